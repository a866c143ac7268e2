"""The autoencoder against diffusers' AutoencoderKLWan at the same sizes, random weights.

python -m benchmarks.vae [--variant=wan2.1|wan2.2] [--against=torch] [--mode=encode|decode] [--frames=17]
    [--height=480 --width=832] [--dtype=float32] [--pairs=5]
"""

import sys
from collections.abc import Callable

from benchmarks.timing import Program, RaceFlags
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.codecs.vae_config import AUTOENCODERS
from univid_jax.core.dims import latent_shape

FLAGS = CommandFlags(__doc__)
VARIANT = FLAGS.choice("variant", "wan2.1", list(AUTOENCODERS), "The autoencoder.")
MODE = FLAGS.choice("mode", "encode", ["encode", "decode"], "Pixels to latents, or back.")
FRAMES = FLAGS.integer("frames", 17, "Frames of the clip: 4n + 1.", lower_bound=1)
HEIGHT = FLAGS.integer("height", 480, "In pixels.")
WIDTH = FLAGS.integer("width", 832, "In pixels.")
RACE = RaceFlags(FLAGS)


def input_shape(*, variant: str, mode: str, frames: int, height: int, width: int) -> tuple[int, ...]:
  """Returns the shape of a clip, or of its latents."""
  config = AUTOENCODERS[variant]
  clip = (frames, height, width, 3)
  latents = latent_shape(clip, temporal_stride=config.temporal_stride, spatial_stride=config.spatial_stride)
  return clip if mode == "encode" else (*latents, config.latent_channels)


def build_jax(*, variant: str, mode: str, dtype: str, **size: int) -> Callable[[], object]:
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from univid_jax.codecs.wan_vae import VAE

  model = VAE(AUTOENCODERS[variant], dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
  graph, params = nnx.split(model)
  x = jnp.zeros(input_shape(variant=variant, mode=mode, **size))
  run = jax.jit(lambda params, x: getattr(nnx.merge(graph, params), mode)(x))
  return lambda: jax.block_until_ready(run(params, x))


def build_torch(*, variant: str, mode: str, dtype: str, compiled: bool, **size: int) -> Callable[[], object]:
  import diffusers
  import torch

  from univid_jax.convert.release_configs import diffusers_config

  device = "cuda" if torch.cuda.is_available() else "cpu"
  kind = diffusers.AutoencoderKLWan  # pyright: ignore[reportPrivateImportUsage]  # exported lazily
  options = diffusers_config(AUTOENCODERS[variant])
  del options["_class_name"]
  with torch.device(device):
    model = kind(**options).to(getattr(torch, dtype)).eval()
  *positions, channels = input_shape(variant=variant, mode=mode, **size)
  x = torch.zeros((1, channels, *positions), dtype=getattr(torch, dtype), device=device)
  convert = torch.compile(getattr(model, mode)) if compiled else getattr(model, mode)

  def run() -> float:
    with torch.no_grad():
      out = convert(x)
      out = out.latent_dist.mode() if mode == "encode" else out.sample
      return out.sum().item()

  return run


@app.command(FLAGS)
def main() -> None:
  size = dict(frames=FRAMES.value, height=HEIGHT.value, width=WIDTH.value)
  shared = dict(variant=VARIANT.value, mode=MODE.value, dtype=RACE.dtype.value, **size)
  programs = {"univid_jax": Program(build_jax, shared), **RACE.peers(build_torch, shared)}
  RACE.write({**shared, **RACE.run(programs)})


if __name__ == "__main__":
  sys.exit(main())
