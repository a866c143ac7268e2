"""How fast one core makes sentences and fills rows for a preset without an autoencoder, by source and task.

  OMP_NUM_THREADS=1 python -m benchmarks.sentences [--preset=small] [--count=1000] [--out=FILE.json]

Clips are drawn, encoded and, for the last figure, packed as in a stream of `config.data.stream_processes`.
"""

import collections
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping

import numpy as np

from benchmarks.timing import write_json
from univid_jax.checkpoints.run_parts import open_encoders
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.config.presets import PRESETS
from univid_jax.config.schema import RunConfig
from univid_jax.core.protocols import SentenceSource
from univid_jax.data.features import FeatureMaker
from univid_jax.data.sources.open import open_data
from univid_jax.parallel.mesh import make_mesh
from univid_jax.training.loop import open_loader
from univid_jax.training.setup import open_features, set_up_run

FLAGS = CommandFlags(__doc__)
PRESET = FLAGS.choice("preset", "small", list(PRESETS), "The preset whose data and rows are measured.")
COUNT = FLAGS.integer("count", 1000, "Sentences of each source.", lower_bound=20)
OUT = FLAGS.string("out", "", "File for the figures as JSON.")

WARM_UP = 10


def time_source(source: SentenceSource, features: FeatureMaker, count: int) -> dict[str, object]:
  """Returns the milliseconds per sentence: the means to draw and to encode it, and the median of each task."""
  drawing, encoding = [], []
  by_task: dict[str, list[float]] = collections.defaultdict(list)
  for index in range(WARM_UP + count):
    start = time.perf_counter()
    sentence = source[index]
    drawn = time.perf_counter()
    features(sentence)
    drawing.append(1000 * (drawn - start))
    encoding.append(1000 * (time.perf_counter() - drawn))
    by_task[f"{sentence.task} {sentence.context}"].append(drawing[-1])
  return {
    "draw_ms": statistics.mean(drawing[WARM_UP:]),
    "encode_ms": statistics.mean(encoding[WARM_UP:]),
    "tasks_ms": {name: statistics.median(values) for name, values in sorted(by_task.items())},
  }


def time_rows(config: RunConfig, count: int) -> float:
  """Returns the milliseconds per sentence to draw, encode and pack it in one stream."""
  rows = dataclasses.replace(config.rows, per_batch=2, streams=1)
  data = dataclasses.replace(config.data, stream_processes=False)
  config = dataclasses.replace(config, rows=rows, data=data)
  with tempfile.TemporaryDirectory() as workdir:
    loader = open_loader(set_up_run(config, workdir))
    for _ in range(WARM_UP):
      next(loader)
    start, made = time.perf_counter(), 0
    while made < count:
      task_ids = next(loader).task_ids
      assert task_ids is not None
      made += np.count_nonzero(task_ids)
    seconds = time.perf_counter() - start
    loader.close()
  return 1000 * seconds / made


def measure(config: RunConfig, count: int) -> Mapping[str, object]:
  """Returns the figures of every source, and of rows from all sources."""
  data = open_data(config)
  features = open_features(config, open_encoders(config, make_mesh(config.mesh)), data, "")
  figures: dict[str, object] = {name: time_source(source, features, count) for name, source in data.sources.items()}
  return figures | {"rows_ms": time_rows(config, count)}


@app.command(FLAGS)
def main() -> None:
  figures = measure(PRESETS[PRESET.value](), COUNT.value)
  for name, values in figures.items():
    if isinstance(values, dict):
      print(f"{name}: {values['draw_ms']:.2f} ms to draw a sentence, {values['encode_ms']:.2f} to encode it")
      slowest = sorted(values["tasks_ms"].items(), key=lambda item: -item[1])[:5]
      print("  slowest: " + ", ".join(f"{task} {value:.1f}" for task, value in slowest))
  print(f"rows: {figures['rows_ms']:.2f} ms per sentence")
  write_json(OUT.value, figures)


if __name__ == "__main__":
  sys.exit(main())
