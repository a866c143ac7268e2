"""The autoencoder beside PyTorch's: diffusers' AutoencoderKLWan at the same sizes, random weights.

  python -m benchmarks.vae [--against=torch] [--mode=encode|decode] [--frames=17] [--height=480 --width=832]
      [--dtype=float32] [--pairs=5]
"""

from absl import flags

from univid_jax import cli

MODE = flags.DEFINE_enum("mode", "encode", ["encode", "decode"], "Pixels to latents, or back.")
FRAMES = flags.DEFINE_integer("frames", 17, "Of the clip: 4n + 1.", lower_bound=1)
HEIGHT = flags.DEFINE_integer("height", 480, "In pixels.")
WIDTH = flags.DEFINE_integer("width", 832, "In pixels.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["bfloat16", "float32"], "Of weights and activations.")
AGAINST = flags.DEFINE_list("against", [], "Peers: torch (eager), torch_compile.")
PAIRS = flags.DEFINE_integer("pairs", 5, "Timed runs of each.", lower_bound=1)
OUT = flags.DEFINE_string("out", "", "File for the figures as JSON.")


def jax_side(mode, frames, height, width, dtype):
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from univid_jax.models.vae import VAE, VAEConfig

  config = VAEConfig()
  graph, params = nnx.split(VAE(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
  if mode == "encode":
    x = jnp.zeros((frames, height, width, 3))
  else:
    x = jnp.zeros((1 + (frames - 1) // config.temporal_stride, height // config.spatial_stride, width // config.spatial_stride,
                   config.latent_channels))
  run = jax.jit(lambda params, x: getattr(nnx.merge(graph, params), mode)(x))
  return lambda: jax.block_until_ready(run(params, x))


def torch_side(mode, frames, height, width, dtype, compiled):
  import diffusers
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = diffusers.AutoencoderKLWan().to(device, getattr(torch, dtype)).eval()
  shape = (1, 3, frames, height, width) if mode == "encode" else (1, 16, 1 + (frames - 1) // 4, height // 8, width // 8)
  x = torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
  run = torch.compile(getattr(model, mode)) if compiled else getattr(model, mode)

  def once():
    with torch.no_grad():
      out = run(x)
      out = out.latent_dist.mode() if mode == "encode" else out.sample
      return out.sum().item()
  return once


def main() -> None:
  from benchmarks.timing import peers, print_ratios, race, write_json

  shared = dict(mode=MODE.value, frames=FRAMES.value, height=HEIGHT.value, width=WIDTH.value, dtype=DTYPE.value)
  figures = race({"univid_jax": (jax_side, shared), **peers(AGAINST.value, torch_side, shared)}, pairs=PAIRS.value)
  print_ratios(figures)
  write_json(OUT.value, {**shared, **figures})


if __name__ == "__main__":
  cli.run(main)
