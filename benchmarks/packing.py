"""What packing is worth: sentences a second of a training step, with several sentences a row and with one padded to the longest.

  python -m benchmarks.packing [--variant=wan2.1-t2v-1.3b] [--scale=4] [--layers=8] [--rounds=5] [--out=FILE.json]

LoRA of rank 16, blocks recomputed, the paper's mix of contexts (0.3 I, 0.3 II, 0.4 III), 17 frames of 832 x 480 a video. A scale
of 4 divides the tokens and the width of the model by 4, so that attention keeps its share of a step. Three ways, a row a step, in
turn: packed rows as `wan_1_3b` makes them; a sentence a row, padded to context I, where attention skips the padding;
the same where it does not, as in a batch without a mask. Where attention cannot skip, the second is as slow as the third.
"""

import collections

from absl import flags

from univid_jax import cli

VARIANT = flags.DEFINE_string("variant", "wan2.1-t2v-1.3b", "A name of models.dit.PRESETS.")
SCALE = flags.DEFINE_enum("scale", "4", ["1", "4"], "Divides tokens, width and heads.")
LAYERS = flags.DEFINE_integer("layers", 8, "Blocks; 0 for all.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["bfloat16", "float32"], "Of weights and products; adapters are float32.")
BACKEND = flags.DEFINE_string("attention_backend", "auto", "Of univid_jax.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed steps of each kind of row.", lower_bound=1)
OUT = flags.DEFINE_string("out", "", "File for the figures as JSON.")

VIDEO_FRAMES = 5  # in latents
PROMPT_TOKENS = 64
ROW_FRAMES = 24  # of `wan_1_3b`: a sentence of context I and one of II, or two of III
COUNTED_ROWS, RARE = 300, 0.02


def rows_by_kind(loader):
  """Rows by the contexts of their sentences: one of each kind, how many there are; and all their sentences and tokens."""
  from univid_jax.data.sentences import CONTEXTS

  packed, counts, sentences, filled = {}, collections.Counter(), 0, 0
  for _ in range(COUNTED_ROWS):
    row = next(loader)
    kind = " + ".join(sorted(tuple(CONTEXTS)[i - 1] for i in row.context_ids[0] if i))
    packed.setdefault(kind, row)
    counts[kind] += 1
    sentences, filled = sentences + int(row.segment_ids.max()), filled + int((row.segment_ids > 0).sum())
  return packed, counts, sentences, filled


def main() -> None:
  import dataclasses
  import math
  import statistics
  import time

  import numpy as np

  from benchmarks.steps import row_program
  from benchmarks.timing import write_json
  from univid_jax.data.loader import FeatureMaker, make_loader
  from univid_jax.data.packing import RowShape, pack
  from univid_jax.data.sentences import PAPER_CONTEXTS, video_pattern
  from univid_jax.models.dit import PRESETS
  from univid_jax.types import Sentence, reference_roles

  scale, shape = int(SCALE.value), PRESETS[VARIANT.value]
  shape = dataclasses.replace(shape, dim=shape.dim // scale, ffn_dim=shape.ffn_dim // scale, num_heads=shape.num_heads // scale,
                              num_layers=LAYERS.value or shape.num_layers)
  height, width = 60 // math.isqrt(scale), 104 // math.isqrt(scale)  # of latents
  mix = {name: share for name, share in PAPER_CONTEXTS.items() if share}

  def sentence(context: str) -> Sentence:
    clips = tuple(np.ones((VIDEO_FRAMES if video else 1, height, width, 16), np.float32)
                  for video in video_pattern(context, 4))
    return Sentence(clips=clips, roles=reference_roles(4), context=context)

  class Sentences:
    def __len__(self):
      return 100_000

    def __getitem__(self, index):
      return sentence(np.random.default_rng((1, int(index))).choice(list(mix), p=list(mix.values())))

  make_features = FeatureMaker(encode=lambda clip: clip, patch_size=(1, 2, 2), text_len=512, task_names=(),
                               embed_prompt=lambda prompt: np.ones((PROMPT_TOKENS, shape.text_dim), np.float32))
  frame = height // 2 * width // 2
  packed_shape = RowShape(num_tokens=ROW_FRAMES * frame, num_text_tokens=6 * (PROMPT_TOKENS + 1), num_slots=6,
                          num_targets=ROW_FRAMES * frame // 2)
  padded_shape = RowShape(num_tokens=4 * VIDEO_FRAMES * frame, num_text_tokens=PROMPT_TOKENS + 1, num_slots=1,
                          num_targets=VIDEO_FRAMES * frame)
  loader = make_loader([Sentences()], make_features, row_shape=packed_shape, rows_per_batch=1, seed=0, num_packing_bins=64,
                       packing="best_fit")
  packed, counts, sentences, filled = rows_by_kind(loader)
  loader.close()
  # The few rare kinds are not timed.
  common = {kind: count for kind, count in counts.items() if count >= RARE * COUNTED_ROWS}
  timed = {kind: count / sum(common.values()) for kind, count in common.items()}
  a_row = sum(share * len(kind.split(" + ")) for kind, share in timed.items())
  fill = filled / COUNTED_ROWS / packed_shape.num_tokens
  print(f"{frame} tokens a latent frame; packed: rows of {packed_shape.num_tokens:,} tokens, {sentences / COUNTED_ROWS:.2f} "
        f"sentences each, {fill:.1%} full; padded: rows of {padded_shape.num_tokens:,}; timed "
        f"{sum(common.values()) / COUNTED_ROWS:.0%} of the packed rows", flush=True)
  padded = {name: pack([make_features(sentence(name))], padded_shape) for name in mix}
  rows = {**{f"packed, {kind}": packed[kind] for kind in timed}, **{f"padded, {name}": row for name, row in padded.items()},
          "padded, no mask": dataclasses.replace(padded["I"], key_intervals=None)}

  run = row_program(shape, dtype=DTYPE.value, mode="train", backend=BACKEND.value)
  seconds: dict[str, list[float]] = {}
  for _ in range(1 + ROUNDS.value):
    for name, row in rows.items():
      start = time.perf_counter()
      run(row)
      seconds.setdefault(name, []).append(time.perf_counter() - start)
  median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
  rates = {"packed": a_row / sum(share * median[f"packed, {kind}"] for kind, share in timed.items()),
           "padded, padding skipped": 1 / sum(share * median[f"padded, {name}"] for name, share in mix.items()),
           "padded, padding attended": 1 / median["padded, no mask"]}
  for name, value in median.items():
    print(f"{name:<26}{value:8.2f} s a row (median of {ROUNDS.value})")
  for name, rate in rates.items():
    print(f"{name:<26}{rate:8.4f} sentences a second; packed {rates['packed'] / rate:.2f} times")
  write_json(OUT.value, {"sentences_a_row": sentences / COUNTED_ROWS, "fill_rate": fill, "rows": timed,
                         "median_s": median, "sentences_a_s": rates})


if __name__ == "__main__":
  cli.run(main)
