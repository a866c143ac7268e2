"""The autoencoder against diffusers' AutoencoderKLWan at the same sizes, random weights.

python -m benchmarks.vae [--against=torch] [--mode=encode|decode] [--frames=17] [--height=480 --width=832]
    [--dtype=float32] [--pairs=5]
"""

import sys
from collections.abc import Callable

from benchmarks.timing import Program, RaceFlags, print_ratios, race, write_json
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags

FLAGS = CommandFlags(__doc__)
MODE = FLAGS.choice("mode", "encode", ["encode", "decode"], "Pixels to latents, or back.")
FRAMES = FLAGS.integer("frames", 17, "Of the clip: 4n + 1.", lower_bound=1)
HEIGHT = FLAGS.integer("height", 480, "In pixels.")
WIDTH = FLAGS.integer("width", 832, "In pixels.")
RACE = RaceFlags(FLAGS)


def build_jax(*, mode: str, frames: int, height: int, width: int, dtype: str) -> Callable[[], object]:
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from univid_jax.codecs.wan_vae import VAE, VAEConfig
  from univid_jax.core.dims import latent_shape

  config = VAEConfig()
  graph, params = nnx.split(VAE(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
  clip = (frames, height, width, 3)
  strides = dict(temporal_stride=config.temporal_stride, spatial_stride=config.spatial_stride)
  x = jnp.zeros(clip if mode == "encode" else (*latent_shape(clip, **strides), config.latent_channels))
  run = jax.jit(lambda params, x: getattr(nnx.merge(graph, params), mode)(x))
  return lambda: jax.block_until_ready(run(params, x))


def build_torch(*, mode: str, frames: int, height: int, width: int, dtype: str, compiled: bool) -> Callable[[], object]:
  import diffusers
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  kind = diffusers.AutoencoderKLWan  # pyright: ignore[reportPrivateImportUsage]  # exported lazily
  with torch.device(device):
    model = kind().to(getattr(torch, dtype)).eval()
  shape = (1, 3, frames, height, width) if mode == "encode" else (1, 16, 1 + (frames - 1) // 4, height // 8, width // 8)
  x = torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
  convert = torch.compile(getattr(model, mode)) if compiled else getattr(model, mode)

  def run() -> float:
    with torch.no_grad():
      out = convert(x)
      out = out.latent_dist.mode() if mode == "encode" else out.sample
      return out.sum().item()

  return run


@app.command(FLAGS)
def main() -> None:
  shared = dict(mode=MODE.value, frames=FRAMES.value, height=HEIGHT.value, width=WIDTH.value, dtype=RACE.dtype.value)
  programs = {"univid_jax": Program(build_jax, shared), **RACE.peers(build_torch, shared)}
  figures = race(programs, pairs=RACE.pairs.value)
  print_ratios(figures)
  write_json(RACE.out.value, {**shared, **figures})


if __name__ == "__main__":
  sys.exit(main())
