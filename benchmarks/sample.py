"""Sampling with context caching (`attention = "context_causal"`) beside sampling without, at a middle size.

  python -m benchmarks.sample [--steps=50] [--dim=512] [--layers=6] [--frames=2] [--height=256 --width=256] [--pairs=3]
      [--variant=wan2.1-t2v-1.3b]

One sentence of context I, random weights; the program is all of sampling without the codec. On an accelerator give --variant,
which replaces --dim and --layers, and the paper's --frames=5 --height=480 --width=832.
"""

from absl import flags

from univid_jax import cli

VARIANT = flags.DEFINE_string("variant", "", "A name of models.dit.PRESETS.")
DIM = flags.DEFINE_integer("dim", 512, "Width; the feed-forward has four times it, a head 64.")
LAYERS = flags.DEFINE_integer("layers", 6, "Blocks.")
FRAMES = flags.DEFINE_integer("frames", 2, "Latent frames of a clip.", lower_bound=1)
HEIGHT = flags.DEFINE_integer("height", 256, "In pixels.")
WIDTH = flags.DEFINE_integer("width", 256, "In pixels.")
STEPS = flags.DEFINE_integer("steps", 50, "Of Euler's method.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["bfloat16", "float32"], "Of weights and products.")
PAIRS = flags.DEFINE_integer("pairs", 3, "Timed runs of each.", lower_bound=1)
OUT = flags.DEFINE_string("out", "", "File for the figures as JSON.")


def side(cached, variant, dim, layers, frames, height, width, steps, dtype):
  """A whole sampling as a function without arguments."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx

  from univid_jax.data.packing import RowShape, pack, sentence_features
  from univid_jax.diffusion.flow import FlowMatching
  from univid_jax.diffusion.solvers import euler, velocity_fn
  from univid_jax.models.dit import PRESETS, DiT, DiTConfig
  from univid_jax.types import Sentence, reference_roles

  config = DiTConfig(dim=dim, ffn_dim=4 * dim, num_heads=dim // 64, num_layers=layers, text_dim=512)
  config = PRESETS[variant] if variant else config
  clips = tuple(np.ones((frames, height // 8, width // 8, 16), np.float32) for _ in range(4))
  features = sentence_features(Sentence(clips=clips, roles=reference_roles(4)), patch_size=(1, 2, 2), text_len=512,
                               prompt_embedding=np.zeros((0, config.text_dim), np.float32))
  # With and without the cache it is the same model on the same row: that of a model trained so.
  row = pack([features], RowShape(num_tokens=len(features["tokens"]), num_targets=len(features["targets"]) if cached else None,
                                  num_text_tokens=1, num_slots=1, context_causal=True))
  abstract = nnx.eval_shape(lambda: DiT(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), attention_backend="auto",
                                        rngs=nnx.Rngs(0)))
  graph = nnx.graphdef(abstract)
  draw = jax.jit(lambda x: 0.02 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype))
  params = jax.tree.map(lambda x: draw(jnp.zeros(x.shape, x.dtype)), nnx.to_pure_dict(nnx.state(abstract, nnx.Param)))
  sigmas = FlowMatching().inference_sigmas(steps)
  noise = jax.random.normal(jax.random.key(0), row.tokens.shape)

  @jax.jit
  def solve(params, row, noise):
    return euler(velocity_fn(nnx.merge(graph, params), row), row, noise, sigmas)
  return lambda: jax.block_until_ready(solve(params, row, noise))


def main() -> None:
  from benchmarks.timing import race, write_json

  shared = dict(variant=VARIANT.value, dim=DIM.value, layers=LAYERS.value, frames=FRAMES.value, height=HEIGHT.value,
                width=WIDTH.value, steps=STEPS.value, dtype=DTYPE.value)
  tokens = 4 * FRAMES.value * (HEIGHT.value // 16) * (WIDTH.value // 16)
  print(f"{STEPS.value} steps, {tokens:,} tokens, a quarter of them the target's")
  sides = {name: (side, shared | {"cached": cached}) for name, cached in (("every step", False), ("cached", True))}
  figures = race(sides, pairs=PAIRS.value)
  print(f"caching: {figures['every step']['median_s'] / figures['cached']['median_s']:.2f} times as fast")
  write_json(OUT.value, {**shared, "tokens": tokens, **figures})


if __name__ == "__main__":
  cli.run(main)
