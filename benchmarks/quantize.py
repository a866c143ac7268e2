"""A training step of adapters on a quantised base, against bases in bfloat16 and float32.

  python -m benchmarks.quantize [--methods=int8] [--variant=wan2.1-t2v-1.3b] [--layers=4] [--frames=1]
      [--height=256 --width=256] [--dtype=float32] [--pairs=5]

One sentence of four clips, LoRA of rank 16, blocks recomputed in the backward pass, AdamW; random weights. Programs run
in turn, each in a separate process, whose peak memory is printed. `--dtype` applies to matrix products.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.steps import find_variant, make_row_program, make_sentence_row
from benchmarks.timing import Program, RaceFlags, print_ratios, race, write_json
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.models.variants import DiTConfig

FLAGS = CommandFlags(__doc__)
METHODS = FLAGS.strings("methods", ["int8"], "How the base is quantised: int8, fp8, nf4; several race.")
VARIANT = FLAGS.string("variant", "wan2.1-t2v-1.3b", "A published model, by its name in models.variants.")
LAYERS = FLAGS.integer("layers", 4, "Blocks; 0 for all.")
FRAMES = FLAGS.integer("frames", 1, "Latent frames of a clip.", lower_bound=1)
HEIGHT = FLAGS.integer("height", 256, "In pixels.")
WIDTH = FLAGS.integer("width", 256, "In pixels.")
RACE = RaceFlags(FLAGS)

PROMPT_TOKENS = 512


def build(*, shape: DiTConfig, frames: int, height: int, width: int, dtype: str, quantize: str) -> Callable[[], object]:
  row = make_sentence_row(
    shape, frames=frames, height=height, width=width, prompt_tokens=PROMPT_TOKENS, with_targets=True
  )
  run = make_row_program(shape, dtype=dtype, mode="train", backend="auto", remat="full", quantize=quantize)
  return lambda: run(row)


@app.command(FLAGS)
def main() -> None:
  shape = find_variant(VARIANT.value)
  shape = dataclasses.replace(shape, num_layers=LAYERS.value or shape.num_layers)
  shared: dict[str, Any] = {"shape": shape, "frames": FRAMES.value, "height": HEIGHT.value, "width": WIDTH.value}
  bases = {method: {"dtype": RACE.dtype.value, "quantize": method} for method in METHODS.value}
  bases |= {dtype: {"dtype": dtype, "quantize": "none"} for dtype in ("bfloat16", "float32")}
  figures = race({name: Program(build, {**shared, **base}) for name, base in bases.items()}, pairs=RACE.pairs.value)
  print_ratios(figures)
  write_json(RACE.out.value, {**shared, "shape": dataclasses.asdict(shape), "figures": figures})


if __name__ == "__main__":
  sys.exit(main())
