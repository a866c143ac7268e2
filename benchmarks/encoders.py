"""Encoders on one TPU, which need not be present: memory and cycles by the TPU compiler (`pip install '.[tpu]'`).

  python -m benchmarks.encoders [--topologies=v5e:1x1,v6e:1x1] [--sizes=480x832,720x1280] [--frames=17,81]
      [--parts=encoding,decoding,prompts] [--preset=wan_1_3b] [--out=FILE.jsonl]

The autoencoder of a preset's base encodes or decodes one clip in float32, with whole frames; where these do not fit,
with the largest tiles that do. UMT5-XXL embeds a prompt in bfloat16. Compiling a line takes minutes; with --out, lines
that the file already has are not compiled again.
"""

import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.figures import FigureFile
from benchmarks.programs import estimated_cycles
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.config.boundary import override
from univid_jax.config.presets import PRESETS
from univid_jax.core.dims import latent_frames
from univid_jax.core.errors import UserError
from univid_jax.platform.topologies import describe_devices, use_tpu_compiler

PARTS = ("encoding", "decoding", "prompts")
TILES = (0, 64, 48, 32, 24, 16)  # in latents; 0 for whole frames
COLUMNS = ("topology", "", "size", "frames", "memory", "10^9 cycles, of a clip or tile", "frames are")
UMT5_LAYERS = 24

FLAGS = CommandFlags(__doc__)
TOPOLOGIES = FLAGS.strings("topologies", ["v5e:1x1", "v6e:1x1"], "Names that libtpu knows, of one chip.")
SIZES = FLAGS.strings("sizes", ["480x832", "720x1280"], "HEIGHTxWIDTH of the clips in pixels.")
FRAMES = FLAGS.strings("frames", ["17", "81"], "Frames of the clips.")
CHOSEN = FLAGS.strings("parts", list(PARTS), f"What to compile: {', '.join(PARTS)}.")
PRESET = FLAGS.choice("preset", "wan_1_3b", list(PRESETS), "Whose autoencoder.")
OUT = FLAGS.string("out", "", "File for the figures, one line of JSON per program; an existing file is continued.")


def cases() -> Iterator[dict[str, Any]]:
  """Yields the description of each program."""
  if wrong := set(CHOSEN.value) - set(PARTS):
    raise UserError(f"--parts must be of {', '.join(PARTS)}, got {min(wrong)!r}")
  for topology in TOPOLOGIES.value:
    for part in CHOSEN.value:
      if part == "prompts":
        yield {"preset": PRESET.value, "topology": topology, "part": part}
        continue
      for size in SIZES.value:
        for frames in FRAMES.value:
          yield {"preset": PRESET.value, "topology": topology, "part": part, "size": size, "frames": frames}


def compile_case(case: dict[str, Any]) -> dict[str, Any]:
  """Returns the figures of a program: memory_gb, of_gb, cycles and tile (0 for whole frames); {} if nothing fits."""
  from univid_jax.parallel.mesh import make_mesh
  from univid_jax.planning.forecasts import compile_autoencoder, compile_text_encoder
  from univid_jax.training.memory import DoesNotFitError

  config = PRESETS[case["preset"]]()
  mesh = make_mesh({}, describe_devices(case["topology"]))
  if case["part"] == "prompts":
    compiled, found = compile_text_encoder(config, mesh)
    return describe(compiled, found, num_loops=UMT5_LAYERS)
  height, _, width = case["size"].partition("x")
  size = {"data.height": height, "data.width": width, "data.num_frames": case["frames"]}
  try:
    config = override(config, {key: int(value) for key, value in size.items()} | {"data.buckets": ()})
  except ValueError as error:
    raise UserError(f"--sizes and --frames are HEIGHTxWIDTH and numbers: {error}") from None
  for tile in TILES:
    tiled = override(config, {"vae_tiling.size": tile, "vae_tiling.overlap": tile // 4})
    try:
      compiled, found = compile_autoencoder(tiled, mesh, decoding=case["part"] == "decoding")
    except DoesNotFitError:
      continue
    if found.fits:
      # The first chunk is one frame; further ones have four each, in a loop.
      return describe(compiled, found, num_loops=latent_frames(config.data.num_frames) - 1) | {"tile": tile}
  return {}


def describe(compiled: Any, forecast: Any, *, num_loops: int) -> dict[str, Any]:
  """Returns the figures of a compiled program whose loops run this many times."""
  cycles = estimated_cycles(compiled.as_text(), num_loops)
  return {
    "memory_gb": round(forecast.total / 1e9, 2),
    "of_gb": round(forecast.memory / 1e9, 1),
    "cycles": cycles,
    "tile": 0,
  }


def row(case: dict[str, Any], figures: dict[str, Any]) -> str:
  """Returns a row of the table."""
  cells = [case["topology"], case["part"], case.get("size", ""), case.get("frames", "")]
  if figures:
    memory = f"{figures['memory_gb']} of {figures['of_gb']} GB"
    cells += [memory, f"{figures['cycles'] / 1e9:.2f}", f"tiles of {figures['tile']}" if figures["tile"] else "whole"]
  else:
    cells += ["does not fit", "", ""]
  return f"| {' | '.join(cells)} |"


@app.command(FLAGS)
def main() -> None:
  planned = list(cases())
  use_tpu_compiler()
  file = FigureFile(OUT.value)
  print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
  for case in planned:
    found = [line["figures"] for line in file.lines if line["case"] == case]
    figures = found[0] if found else compile_case(case)
    if not found:
      file.add({"case": case, "figures": figures})
    print(row(case, figures), flush=True)


if __name__ == "__main__":
  sys.exit(main())
