"""The data side at the paper's size: how full rows are, how fast clips are read, how fast kept latents are.

  python -m benchmarks.data --video=FILE.mp4 [--pairs=5] [--out=FILE.json]

FILE.mp4 is in the reference's format: four clips of at least 17 frames one after another. The peer is the reference's way of
reading it (imageio with its ffmpeg plugin: count the frames, then take them one by one); it needs `pip install imageio-ffmpeg`.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from univid_jax import cli

VIDEO = flags.DEFINE_string("video", None, "A file in the reference's format.", required=True)
PAIRS = flags.DEFINE_integer("pairs", 5, "Timed readings of each kind.", lower_bound=1)
OUT = flags.DEFINE_string("out", "", "File for the figures as JSON.")

# At 832 x 480: tokens of a latent frame, and latent frames of a sentence by context.
TOKENS_A_FRAME = 1560
FRAMES = {"I": 20, "II": 4, "III": 12, "IV": 12}
ROW_TOKENS = 37504
# A LoRA step on one sentence of context I costs 1.06 PFLOP (with recomputation); 60 % of an H200's 989 TFLOP/s is a fast machine.
SECONDS_A_SENTENCE = 1.06e15 / (0.6 * 989e12)


def fill_rates(rows: int = 1500) -> dict[str, float]:
  """Share of a row's tokens that are some sentence's, by how rows are packed."""
  import grain

  from univid_jax.data.sentences import PAPER_CONTEXTS

  class Sentences:
    def __len__(self):
      return 100_000

    def __getitem__(self, index):
      context = np.random.default_rng((1, int(index))).choice(list(PAPER_CONTEXTS), p=list(PAPER_CONTEXTS.values()))
      return {"frames": np.ones(FRAMES[context], np.int8)}

  mean = sum(share * FRAMES[name] for name, share in PAPER_CONTEXTS.items())
  rates = {"one sentence a row, padded to context I": mean / FRAMES["I"]}
  for name, kind in (("first_fit", grain.experimental.FirstFitPackIterDataset),
                     ("best_fit", grain.experimental.BestFitPackIterDataset)):
    sentences = grain.MapDataset.source(Sentences()).seed(0).shuffle().to_iter_dataset()
    packed = iter(kind(sentences, length_struct={"frames": ROW_TOKENS // TOKENS_A_FRAME}, num_packing_bins=64, seed=0))
    frames = sum(int((next(packed)["frames"] > 0).sum()) for _ in range(rows))
    rates[f"{name}, 64 rows at a time"] = frames * TOKENS_A_FRAME / (rows * ROW_TOKENS)
  return rates


def read_ours(path: Path) -> np.ndarray:
  """Four clips of 17 frames."""
  from univid_jax.data.clips import probe
  from univid_jax.data.video import read_video_frames
  quarter = probe(path).frames // 4
  return np.stack([read_video_frames(path, range(start, start + 17)) for start in range(0, 4 * quarter, quarter)])


def read_theirs(path: Path) -> np.ndarray:
  """The same as the reference reads it."""
  import imageio
  reader = imageio.get_reader(str(path))
  quarter = reader.count_frames() // 4
  clips = [[reader.get_data(start + i) for i in range(17)] for start in range(0, 4 * quarter, quarter)]
  reader.close()
  return np.array(clips)


def seconds(function, *arguments) -> float:
  start = time.perf_counter()
  function(*arguments)
  return time.perf_counter() - start


def cached_sentences_a_second(count: int = 64) -> float:
  """Sentences of context I whose four latents are read from a cache, checksums and all."""
  from univid_jax.data.cache import Cache
  with tempfile.TemporaryDirectory() as folder:
    cache = Cache(folder, "benchmark")
    latents = np.random.default_rng(0).standard_normal((5, 60, 104, 16), np.float32)
    for i in range(4 * count):
      cache.put(str(i), latents)
    return count / seconds(lambda: [cache.get(str(i)) for i in range(4 * count)])


def main() -> None:
  rates = fill_rates()
  for name, rate in rates.items():
    print(f"fill rate  {rate:6.1%}  {name}")
  path = Path(VIDEO.value)
  same = np.mean(np.abs(read_ours(path).astype(int) - read_theirs(path)))
  times = [(seconds(read_ours, path), seconds(read_theirs, path)) for _ in range(PAIRS.value)]
  ours, theirs = (statistics.median(values) for values in zip(*times))
  ratio = statistics.median(their / our for our, their in times)
  print(f"four clips of 17 frames: {ours:.3f} s, the reference's way {theirs:.3f} s, {ratio:.1f} times (medians of "
        f"{PAIRS.value}); mean difference of pixels {same:.2f}")
  rate = cached_sentences_a_second()
  print(f"kept latents: {rate:.0f} sentences of context I a second; training takes {1 / SECONDS_A_SENTENCE:.2f} a second "
        f"(1.06 PFLOP a sentence at 60 % of an H200's 989 TFLOP/s), {rate * SECONDS_A_SENTENCE:.0f} times less")
  if OUT.value:
    figures = {"fill_rates": rates, "read_s": ours, "reference_read_s": theirs, "read_ratio": ratio, "cached_sentences_a_s": rate}
    Path(OUT.value).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
  cli.run(main)
