"""The data side at the paper's size: how full rows are, how fast clips are read, how fast cached latents are.

  python -m benchmarks.data --video=FILE.mp4 [--pairs=5] [--out=FILE.json]

FILE.mp4 is in the reference's format: four clips of at least 17 frames one after another. The peer reads it as the
reference does (imageio with its ffmpeg plugin: count the frames, then get them one by one), which needs `pip install
imageio-ffmpeg`.
"""

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grain
import numpy as np

from benchmarks.timing import write_json
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.core.contexts import PAPER_CONTEXTS
from univid_jax.core.options import Packing
from univid_jax.data.cache.entries import Cache
from univid_jax.data.media.reader import probe, read_parts
from univid_jax.data.rows.grain_adapter import pack_dataset

FLAGS = CommandFlags(__doc__)
VIDEO = FLAGS.string("video", None, "A file in the reference's format.", required=True)
PAIRS = FLAGS.integer("pairs", 5, "Timed readings of each kind.", lower_bound=1)
OUT = FLAGS.string("out", "", "File for the figures as JSON.")

# At 832 x 480: tokens per latent frame, and latent frames of a sentence by context.
TOKENS_PER_FRAME = 1560
FRAMES = {"I": 20, "II": 4, "III": 12, "IV": 12}
ROW_TOKENS = 37504
NUM_FRAMES = 17  # of a clip
# A LoRA step on a sentence of context I takes 1.06 PFLOP with recomputation; a fast machine reaches 60 % of an H200's
# 989 TFLOP/s.
SECONDS_PER_SENTENCE = 1.06e15 / (0.6 * 989e12)


class SentenceLengths:
  """Sentences represented by their latent frames, with contexts drawn as in the paper."""

  def __len__(self) -> int:
    return 100_000

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((1, int(index)))
    context = rng.choice(list(PAPER_CONTEXTS), p=list(PAPER_CONTEXTS.values()))
    return {"frames": np.ones(FRAMES[context], np.int8)}


def measure_fill_rates(num_rows: int = 1500) -> dict[str, float]:
  """Returns the share of a row's tokens that belong to a sentence, by way of filling rows."""
  mean = sum(share * FRAMES[name] for name, share in PAPER_CONTEXTS.items())
  rates = {"one sentence per row, padded to context I": mean / FRAMES["I"]}
  for packing in Packing:
    sentences = grain.MapDataset.source(SentenceLengths()).seed(0).shuffle().to_iter_dataset()
    capacities = {"frames": ROW_TOKENS // TOKENS_PER_FRAME}
    rows = pack_dataset(sentences, capacities=capacities, segmented=["frames"], packing=packing, num_bins=64, seed=0)
    frames = sum(int((row["frames"] > 0).sum()) for row in itertools.islice(rows, num_rows))
    rates[f"{packing}, 64 open rows"] = frames * TOKENS_PER_FRAME / (num_rows * ROW_TOKENS)
  return rates


def read_clips(path: Path) -> list[np.ndarray]:
  """Reads four clips, each uint8 (T, H, W, 3)."""
  quarter = probe(path).num_frames // 4
  return list(read_parts(path, [(i * quarter, 0, NUM_FRAMES) for i in range(4)]))


def read_clips_like_reference(path: Path) -> list[np.ndarray]:
  import imageio

  reader = imageio.get_reader(str(path))
  quarter = reader.count_frames() // 4  # pyright: ignore[reportAttributeAccessIssue]  # of the ffmpeg plugin's reader
  starts = range(0, 4 * quarter, quarter)
  clips = [np.stack([reader.get_data(start + i) for i in range(NUM_FRAMES)]) for start in starts]
  reader.close()
  return clips


def measure_seconds(run: Callable[[], object]) -> float:
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def measure_cache_rate(count: int = 64) -> float:
  """Returns how many sentences of context I per second can be read from a cache, four latents each, with checksums."""
  with tempfile.TemporaryDirectory() as folder:
    cache = Cache(folder, "benchmark")
    latents = np.random.default_rng(0).standard_normal((5, 60, 104, 16), np.float32)
    for i in range(4 * count):
      cache.put(str(i), latents)
    return count / measure_seconds(lambda: [cache.get(str(i)) for i in range(4 * count)])


@app.command(FLAGS)
def main() -> None:
  fill_rates = measure_fill_rates()
  for name, rate in fill_rates.items():
    print(f"fill rate  {rate:6.1%}  {name}")
  assert VIDEO.value is not None
  path = Path(VIDEO.value)
  difference = np.mean(np.abs(np.stack(read_clips(path)).astype(int) - np.stack(read_clips_like_reference(path))))
  times = [
    (measure_seconds(lambda: read_clips(path)), measure_seconds(lambda: read_clips_like_reference(path)))
    for _ in range(PAIRS.value)
  ]
  ours, theirs = (statistics.median(values) for values in zip(*times))
  ratio = statistics.median(their / our for our, their in times)
  print(
    f"four clips of {NUM_FRAMES} frames: {ours:.3f} s, like the reference {theirs:.3f} s, {ratio:.1f} times "
    f"(medians of {PAIRS.value}); mean difference of pixels {difference:.2f}"
  )
  rate = measure_cache_rate()
  print(
    f"cached latents: {rate:.0f} sentences of context I per second; training takes {1 / SECONDS_PER_SENTENCE:.2f} per "
    f"second (1.06 PFLOP per sentence at 60 % of an H200's 989 TFLOP/s), {rate * SECONDS_PER_SENTENCE:.0f} times less"
  )
  figures = {"fill_rates": fill_rates, "read_s": ours, "reference_read_s": theirs, "read_ratio": ratio}
  write_json(OUT.value, {**figures, "cached_sentences_per_s": rate})


if __name__ == "__main__":
  sys.exit(main())
