"""Effects on what small models learn: one change at a time, mean and deviation over seeds.

  python -m benchmarks.ablations [--seeds=0,1,2] [--steps=400] [--questions=new_task,...] [--out=FILE.jsonl]

The models of a question are trained for the same number of steps and evaluated on the same held-out sentences. A seed
determines data, weights and order. LoRAs take the 150 steps of `small_lora`, the others --steps of the default run's
model. With --out, configs whose scores the file already has are not trained again.

  new_task        grids whose objects get an outline, from 20 pairs: a LoRA on small, which has never seen any, and the
                  same model from scratch, which learns by the optimizer that small was trained with
  clip_gap        positions in time left out between clips
  shots           number of clips, with one sentence in a row; each model is evaluated on sentences of as many clips
  contexts        which clips are videos while training, with one sentence in a row, and while evaluating
  reversal        reversed sentences while training, and while evaluating
  grids_clip_gap  gaps in LoRAs on small, of new_task's grids
  grids_contexts  contexts in LoRAs on small, of grids whose cells fall
"""

import collections
import dataclasses
import hashlib
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.figures import FigureFile
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.config import presets
from univid_jax.config.boundary import override, to_json
from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import UserError

FLAGS = CommandFlags(__doc__)
SEEDS = FLAGS.strings("seeds", ["0", "1", "2"], "Seeds of the runs.")
STEPS = FLAGS.integer("steps", 400, "Steps of the runs with the default run's model.", lower_bound=1)
CHOSEN = FLAGS.strings("questions", [], "Some of the questions; default: all.")
OUT = FLAGS.string("out", "", "File for the scores, one line of JSON per run; an existing file is continued.")

SENTENCES_PER_CASE = 32
SHOTS = (4, 6, 8)
REVERSIBLE = ("duotone", "invert_brightness", "low_light")


@dataclasses.dataclass(frozen=True)
class Variant:
  """A model to train.

  Attributes:
    name: name in the table.
    config: config of the run.
    evaluations: for each column, the changes to the config that draw its sentences.
  """

  name: str
  config: RunConfig
  evaluations: Mapping[str, Mapping[str, Any]]


def weights(key: str, chosen: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
  """Returns changes that give weights to some names under a key of the config, and 0 to the others."""
  return {f"{key}.{name}": chosen.get(name, 0.0) for name in names}


def clips(count: int) -> dict[str, float]:
  return weights("data.num_clips", {f"clips_{count}": 1.0}, tuple(f"clips_{each}" for each in SHOTS))


def contexts(*names: str) -> dict[str, float]:
  return weights("data.contexts", dict.fromkeys(names, 1.0), ("I", "II", "III", "IV"))


def questions(steps: int) -> dict[str, list[Variant]]:
  """Returns the models of every question."""
  quiet = {"validation.every_steps": 0, "checkpoint.every_steps": 10_000, "eval.sentences_per_case": SENTENCES_PER_CASE}
  lora = override(presets.small_lora(), quiet)
  optimizer = dataclasses.replace(presets.small().optimizer, warmup_steps=lora.optimizer.warmup_steps)
  scratch = dataclasses.replace(override(lora, {"lora.rank": 0}), init_from="", optimizer=optimizer)
  default = override(presets.tiny(), quiet | {"num_steps": steps})
  single = override(default, {"rows.num_sentences": 1})  # otherwise a row holds more of the shorter sentences
  images = override(single, contexts("II"))
  falling = override(lora, weights("data.grids.families", {"gravity": 1.0}, tuple(lora.data.grids.families)))
  changes = {"data.num_sentences": default.data.num_sentences, "rows.num_sentences": 1, "eval.sentences_per_case": 16}
  falling = override(falling, changes)
  turned = override(default, weights("data.tasks", dict.fromkeys(REVERSIBLE, 1.0), tuple(default.data.tasks)))
  same = {"held out": {}}
  by_context = {f"on {name}": contexts(name) for name in ("I", "II", "III")}
  by_direction = {name: {"data.reverse_probability": share} for name, share in (("forward", 0.0), ("reversed", 1.0))}

  def with_gaps(config: RunConfig) -> list[Variant]:
    return [Variant(f"gap of {gap}", override(config, {"model.clip_gap": gap}), same) for gap in (0, 4, 16)]

  def by_training_context(config: RunConfig) -> list[Variant]:
    trained = (("I",), ("II",), ("I", "II", "III"))
    return [Variant(f"trained on {', '.join(each)}", override(config, contexts(*each)), by_context) for each in trained]

  return {
    "new_task": [Variant("LoRA on small", lora, same), Variant("from scratch", scratch, same)],
    "clip_gap": with_gaps(default),
    "shots": [Variant(f"{count} clips", override(images, clips(count)), same) for count in SHOTS],
    "contexts": by_training_context(single),
    "reversal": [
      Variant(f"{share:.0%} reversed", override(turned, {"data.reverse_probability": share}), by_direction)
      for share in (0.0, 0.5)
    ],
    "grids_clip_gap": with_gaps(lora),
    "grids_contexts": by_training_context(falling),
  }


def score(variant: Variant, seed: int) -> dict[str, float]:
  """Trains a model and returns its scores by column and metric."""
  from univid_jax.cli.compilation import enable_compilation_cache
  from univid_jax.evaluation.run import evaluate_quick
  from univid_jax.training.loop import train

  enable_compilation_cache()
  config, scores = override(variant.config, {"seed": seed}), {}
  with tempfile.TemporaryDirectory() as workdir:
    pipeline = train(config, workdir).pipeline
    for column, changes in variant.evaluations.items():
      report = evaluate_quick(pipeline, override(config, dict(changes)), workdir)
      assert report is not None
      scores[f"{column}: dB"] = report["overall"]["psnr"]
      scores[f"{column}: dB, another task's pair"] = report["overall"]["psnr_swapped"]
      if exact := report.get("exact"):  # every split has the same number of sentences
        rows = [row["scores"]["prediction"] for row in exact["rows"]]
        scores[f"{column}: exact grids (%)"] = 100 * statistics.mean(row["grid_accuracy"] for row in rows)
        scores[f"{column}: cells (%)"] = 100 * statistics.mean(row["cell_accuracy"] for row in rows)
  return scores


def run_apart(variant: Variant, seed: int) -> dict[str, float]:
  """Calls `score` in a separate process, which frees its memory."""
  with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
    return pool.submit(score, variant, seed).result()


class Scores:
  """Scores of models; trains those that its file lacks, and appends them.

  Args:
    path: path of the file; empty for none.
  """

  def __init__(self, path: str | Path):
    self._file = FigureFile(path)
    self._known: dict[str, Mapping[str, float]] = {line["model"]: line["scores"] for line in self._file.lines}

  def get(self, variant: Variant, seed: int) -> Mapping[str, float]:
    said = json.dumps([to_json(variant.config), variant.evaluations, seed], sort_keys=True)
    model = hashlib.sha256(said.encode()).hexdigest()
    if model not in self._known:
      self._known[model] = run_apart(variant, seed)
      self._file.add({"model": model, "name": variant.name, "seed": seed, "scores": self._known[model]})
    return self._known[model]


def describe(question: str, scores: Mapping[str, list[Mapping[str, float]]]) -> Iterator[str]:
  """Yields a table: a row per model, mean and deviation over the seeds."""
  columns = list(dict.fromkeys(name for runs in scores.values() for run in runs for name in run))
  yield f"| {question} | {' | '.join(columns)} |"
  yield f"|---|{'---|' * len(columns)}"
  for name, runs in scores.items():
    cells = []
    for column in columns:
      values = [run[column] for run in runs]
      deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
      cells.append(f"{statistics.mean(values):.1f}{deviation}")
    yield f"| {name} | {' | '.join(cells)} |"


@app.command(FLAGS)
def main() -> None:
  everything = questions(STEPS.value)
  if unknown := set(CHOSEN.value) - set(everything):
    raise UserError(f"unknown question {min(unknown)!r}; there are {', '.join(everything)}")
  if wrong := [seed for seed in SEEDS.value if not seed.isdecimal()]:
    raise UserError(f"--seeds are numbers, got {wrong[0]!r}")
  known = Scores(OUT.value)
  for question in CHOSEN.value or everything:
    scores = collections.defaultdict(list)
    for variant in everything[question]:
      scores[variant.name] += [known.get(variant, int(seed)) for seed in SEEDS.value]
    print("\n".join(describe(question, scores)), flush=True)


if __name__ == "__main__":
  sys.exit(main())
