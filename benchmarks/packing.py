"""The gain from packing: sentences per second of a training step, packed and with one sentence per row.

  python -m benchmarks.packing [--variant=wan2.1-t2v-1.3b] [--scale=4] [--layers=8] [--dtype=float32] [--rounds=5]
      [--out=FILE.json]
  python -m benchmarks.packing --count [--variant=wan2.1-t2v-1.3b] [--out=FILE.json]

LoRA of rank 16, blocks recomputed, the paper's contexts (0.3 I, 0.3 II, 0.4 III), videos of 17 frames of 832 x 480. A
scale of 4 divides the tokens and the width of the model by 4, so that attention keeps its share of a step. Three kinds
of rows are timed in turn: packed rows as `wan_1_3b` makes them; one sentence per row, padded to context I, with
attention that skips the padding; the same with attention that does not, as in a batch without a mask. If the backend
cannot skip, the second is as slow as the third.

With --count nothing is timed: it counts the operations per sentence of the slowest of eight devices, with best-fit and
balanced packing, videos of 5 to 81 frames, and attention that skips other sentences.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.steps import LORA_RANK, find_variant, make_row_program
from benchmarks.timing import write_json
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.config.schema import RowsConfig
from univid_jax.core.contexts import CONTEXT_NAMES, PAPER_CONTEXTS, video_pattern
from univid_jax.core.options import AttentionBackend, Packing
from univid_jax.core.packed_row import PackedRow
from univid_jax.core.sentence import Sentence, reference_roles
from univid_jax.data.rows.balancing import BatchLayout, count_pairs
from univid_jax.data.rows.loader import make_loader
from univid_jax.data.rows.loader_options import LoaderOptions
from univid_jax.data.rows.packing import RowShape, pack
from univid_jax.data.rows.tokens import Features, sentence_features
from univid_jax.models.variants import DiTConfig
from univid_jax.training.balance import WorkCounter

FLAGS = CommandFlags(__doc__)
VARIANT = FLAGS.string("variant", "wan2.1-t2v-1.3b", "A published model, by its name in models.variants.")
SCALE = FLAGS.choice("scale", "4", ["1", "4"], "Divides tokens, width and heads.")
LAYERS = FLAGS.integer("layers", 8, "Blocks; 0 for all.")
DTYPE = FLAGS.choice("dtype", "float32", ["bfloat16", "float32"], "Of weights and activations; adapters are float32.")
BACKEND = FLAGS.choice("attention_backend", "auto", list(AttentionBackend), "Of univid_jax.")
ROUNDS = FLAGS.integer("rounds", 5, "Timed steps of each kind of row.", lower_bound=1)
COUNT = FLAGS.switch("count", False, "Count the work of eight devices instead of timing rows.")
OUT = FLAGS.string("out", "", "File for the figures as JSON.")

VIDEO_FRAMES = 5  # latent frames of a video
PROMPT_TOKENS = 64
ROW_FRAMES = 24  # of `wan_1_3b`: a sentence of context I and one of II, or two of III
COUNTED_ROWS = 300
DEVICES = 8
LONGEST = 21  # latent frames of 81 frames; the shortest videos have 5 frames, 2 of latents
TOKENS_PER_FRAME = 60 // 2 * (104 // 2)
RARE = 0.02  # combinations of contexts that fewer rows have are not timed
CONTEXT_SHARES = {name: share for name, share in PAPER_CONTEXTS.items() if share}


@dataclasses.dataclass(frozen=True)
class LatentFeatures:
  """Makes the features of sentences whose clips are latents; their prompts have equal lengths.

  Attributes:
    shape: shape of the transformer.
  """

  shape: DiTConfig

  def __call__(self, sentence: Sentence, /) -> Features:
    return sentence_features(
      sentence,
      patch_size=self.shape.patch_size,
      prompt_embedding=np.ones((PROMPT_TOKENS, self.shape.text_dim), np.float32),
      text_len=self.shape.text_len,
      context_id=1 + CONTEXT_NAMES.index(sentence.context),
    )


@dataclasses.dataclass(frozen=True)
class LatentSentences:
  """Sentences of constant latents with contexts drawn as in the paper.

  Attributes:
    size: height and width of the latents.
    lengths: latent frames of a video, drawn for each sentence.
    numbers: of the sentences.
  """

  size: tuple[int, int]
  lengths: Sequence[int] = (VIDEO_FRAMES,)
  numbers: range = range(100_000)

  @property
  def task_names(self) -> Sequence[str]:
    return ()

  def __len__(self) -> int:
    return len(self.numbers)

  def __getitem__(self, index: int) -> Sentence:
    rng = np.random.default_rng((1, self.numbers[int(index)]))
    return self.make(rng.choice(list(CONTEXT_SHARES), p=list(CONTEXT_SHARES.values())), int(rng.choice(self.lengths)))

  def make(self, context: str, num_frames: int = VIDEO_FRAMES) -> Sentence:
    """Returns a sentence of a context, with videos of a number of latent frames."""
    lengths = [num_frames if is_video else 1 for is_video in video_pattern(context, 4)]
    clips = tuple(np.ones((length, *self.size, 16), np.float32) for length in lengths)
    return Sentence(clips=clips, roles=reference_roles(4), context=context)


@dataclasses.dataclass(frozen=True)
class PackedRows:
  """A sample of packed rows.

  Attributes:
    rows: one row per combination of contexts, such as "I + II".
    shares: how often each combination occurs, without the rare ones.
    sentences: sentences per row, rare rows included.
    fill_rate: fill rate of rows, rare rows included.
    timed: share of the rows that are not rare.
  """

  rows: Mapping[str, PackedRow]
  shares: Mapping[str, float]
  sentences: float
  fill_rate: float
  timed: float

  @classmethod
  def draw(cls, loader: Iterator[PackedRow]) -> "PackedRows":
    rows: dict[str, PackedRow] = {}
    counts: collections.Counter[str] = collections.Counter()
    sentences = fill = 0.0
    for _ in range(COUNTED_ROWS):
      row = next(loader)
      assert row.context_ids is not None
      kind = " + ".join(sorted(CONTEXT_NAMES[i - 1] for i in np.asarray(row.context_ids)[0] if i))
      rows.setdefault(kind, row)
      counts[kind] += 1
      segments = np.asarray(row.segment_ids)
      sentences += segments.max() / COUNTED_ROWS
      fill += np.mean(segments > 0) / COUNTED_ROWS
    common = {kind: count for kind, count in counts.items() if count >= RARE * COUNTED_ROWS}
    total = sum(common.values())
    shares = {kind: count / total for kind, count in common.items()}
    return cls(rows, shares, sentences, float(fill), total / COUNTED_ROWS)

  @property
  def sentences_per_timed_row(self) -> float:
    return sum(share * len(kind.split(" + ")) for kind, share in self.shares.items())


@dataclasses.dataclass(frozen=True)
class CountedPacking:
  """The work of batches on eight devices.

  Attributes:
    fill_rate: fill rate of the rows.
    balance: mean work of a device over that of the slowest one.
    slowest: operations of the slowest device per sentence of the batches.
    sentences: the fewest and the most in a batch.
  """

  fill_rate: float
  balance: float
  slowest: float
  sentences: tuple[int, int]


def count_packing(
  shape: DiTConfig, packing: Packing, *, streams: int = 1, bins: int = 64, batches: int = 64
) -> CountedPacking:
  """Packs the paper's contexts with videos of 5 to 81 frames of 832 x 480, eight rows per batch, and counts.

  The packed rows have one token per frame, which counts as all tokens of a frame.

  Args:
    shape: of the transformer.
    packing: how rows and batches are made.
    streams: number of streams of rows, as if each belonged to a process.
    bins: rows that a stream fills at the same time.
    batches: number of batches that are counted; whole windows of balanced packing.
  """
  slots = 4 * LONGEST // 4  # sentences of four images
  rows = RowsConfig(
    num_tokens=4 * LONGEST * TOKENS_PER_FRAME, num_text_tokens=slots * (PROMPT_TOKENS + 1), num_sentences=slots
  )
  work = WorkCounter(shape=shape, lora_rank=LORA_RANK, rows=rows, layout=BatchLayout(num_rows=DEVICES))
  row_shape = RowShape(num_tokens=4 * LONGEST, num_text_tokens=rows.num_text_tokens, num_slots=slots)
  loader = make_loader(
    [LatentSentences((2, 2), lengths=range(2, 1 + LONGEST))],
    LatentFeatures(dataclasses.replace(shape, text_dim=1)),
    row_shape=row_shape,
    layout=BatchLayout(num_rows=DEVICES),
    seed=0,
    options=LoaderOptions(num_packing_bins=bins, packing=packing, num_streams=streams),
  )
  fill, sentences, devices = [], [], []
  with contextlib.closing(loader):
    for batch in itertools.islice(loader, batches):
      fill.append(np.mean(batch.segment_ids > 0))
      sentences.append(int(np.sum(batch.segment_ids.max(1))))
      attended, attended_text = count_pairs(batch)
      devices.append(work.count(attended * TOKENS_PER_FRAME**2, attended_text * TOKENS_PER_FRAME).sum(1))
  slowest = np.max(devices, axis=1).sum()
  return CountedPacking(
    float(np.mean(fill)),
    float(np.mean(devices, axis=1).sum() / slowest),
    float(slowest / sum(sentences)),
    (min(sentences), max(sentences)),
  )


def print_counts(shape: DiTConfig) -> dict[str, dict[str, Any]]:
  """Prints and returns the counts of both ways of packing, with one stream and with one per device."""
  figures = {}
  for streams, bins in ((1, 16), (1, 64), (DEVICES, 64)):
    both = [
      count_packing(shape, packing, streams=streams, bins=bins) for packing in (Packing.BEST_FIT, Packing.BALANCED)
    ]
    for packing, counted in zip(("best_fit", "balanced"), both):
      print(
        f"{packing:<10}streams {streams}, open rows {bins:>3}: {counted.fill_rate:6.1%} full, balance "
        f"{counted.balance:.2f}, {counted.sentences[0]} to {counted.sentences[1]} sentences per batch, slowest device "
        f"{counted.slowest / 1e12:6.1f} TFLOP per sentence ({counted.slowest / both[0].slowest - 1:+.0%})",
        flush=True,
      )
      figures[f"{packing}, {streams} streams, {bins} rows"] = dataclasses.asdict(counted)
  return figures


def scaled_shape() -> DiTConfig:
  shape, scale = find_variant(VARIANT.value), int(SCALE.value)
  return dataclasses.replace(
    shape,
    dim=shape.dim // scale,
    ffn_dim=shape.ffn_dim // scale,
    num_heads=shape.num_heads // scale,
    num_layers=LAYERS.value or shape.num_layers,
  )


def time_rows(shape: DiTConfig, rows: Mapping[str, PackedRow]) -> dict[str, float]:
  """Returns the median seconds of a step on each row, timed in turn after one warm-up."""
  run = make_row_program(shape, dtype=DTYPE.value, mode="train", backend=BACKEND.value)
  seconds: dict[str, list[float]] = {name: [] for name in rows}
  for _ in range(1 + ROUNDS.value):
    for name, row in rows.items():
      start = time.perf_counter()
      run(row)
      seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(values[1:]) for name, values in seconds.items()}


@app.command(FLAGS)
def main() -> None:
  if COUNT.value:
    return write_json(OUT.value, print_counts(find_variant(VARIANT.value)))
  shape = scaled_shape()
  divisor = math.isqrt(int(SCALE.value))
  source = LatentSentences((60 // divisor, 104 // divisor))
  tokens_per_frame = source.size[0] // 2 * (source.size[1] // 2)
  make_features = LatentFeatures(shape)
  packed_shape = RowShape(
    num_tokens=ROW_FRAMES * tokens_per_frame,
    num_text_tokens=6 * (PROMPT_TOKENS + 1),
    num_slots=6,
    num_targets=ROW_FRAMES * tokens_per_frame // 2,
  )
  padded_shape = RowShape(
    num_tokens=4 * VIDEO_FRAMES * tokens_per_frame,
    num_text_tokens=PROMPT_TOKENS + 1,
    num_slots=1,
    num_targets=VIDEO_FRAMES * tokens_per_frame,
  )
  loader = make_loader(
    [source],
    make_features,
    row_shape=packed_shape,
    layout=BatchLayout(num_rows=1),
    seed=0,
    options=LoaderOptions(num_packing_bins=64, packing=Packing.BEST_FIT),
  )
  packed = PackedRows.draw(loader)
  loader.close()
  print(
    f"{tokens_per_frame} tokens per latent frame; packed: rows of {packed_shape.num_tokens:,} tokens, "
    f"{packed.sentences:.2f} sentences each, {packed.fill_rate:.1%} full, {packed.timed:.0%} of them timed; padded: "
    f"rows of {padded_shape.num_tokens:,}",
    flush=True,
  )
  padded = {name: pack([make_features(source.make(name))], padded_shape) for name in CONTEXT_SHARES}
  rows = {
    **{f"packed, {kind}": packed.rows[kind] for kind in packed.shares},
    **{f"padded, {name}": row for name, row in padded.items()},
    "padded, no mask": dataclasses.replace(padded["I"], key_intervals=None),
  }
  write_json(OUT.value, report_times(packed, time_rows(shape, rows)))


def report_times(packed: PackedRows, median: Mapping[str, float]) -> dict[str, Any]:
  """Prints and returns the rates for the seconds of each kind of row."""
  packed_seconds = sum(share * median[f"packed, {kind}"] for kind, share in packed.shares.items())
  rates = {
    "packed": packed.sentences_per_timed_row / packed_seconds,
    "padded, padding skipped": 1 / sum(share * median[f"padded, {name}"] for name, share in CONTEXT_SHARES.items()),
    "padded, padding attended": 1 / median["padded, no mask"],
  }
  for name, value in median.items():
    print(f"{name:<26}{value:8.2f} s per row (median of {ROUNDS.value})")
  for name, rate in rates.items():
    print(f"{name:<26}{rate:8.4f} sentences per second; packed {rates['packed'] / rate:.2f} times")
  return {
    "sentences_per_row": packed.sentences,
    "fill_rate": packed.fill_rate,
    "rows": packed.shares,
    "median_s": median,
    "sentences_per_s": rates,
  }


if __name__ == "__main__":
  sys.exit(main())
