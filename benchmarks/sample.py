"""Sampling with context caching (`attention = "context_causal"`) beside sampling without, and beside diffusers' transformer.

  python -m benchmarks.sample [--against=torch|torch_compile] [--steps=50] [--dim=512] [--layers=6] [--frames=2]
      [--height=256 --width=256] [--pairs=5] [--variant=wan2.1-t2v-1.3b]

One sentence of context I with a prompt of 512 tokens, random weights; the program is all of sampling without the codec. On an
accelerator give --variant, which replaces --dim and --layers, and the paper's --frames=5 --height=480 --width=832.
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
AGAINST = flags.DEFINE_list("against", [], "Peers: torch (eager), torch_compile.")
PAIRS = flags.DEFINE_integer("pairs", 5, "Timed runs of each.", lower_bound=1)
OUT = flags.DEFINE_string("out", "", "File for the figures as JSON.")

PROMPT_TOKENS = 512


def jax_side(cached, shape, sigmas, frames, height, width, dtype):
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx

  from univid_jax.data.packing import RowShape, pack, sentence_features
  from univid_jax.diffusion.solvers import euler, velocity_fn
  from univid_jax.models.dit import DiT
  from univid_jax.types import Sentence, reference_roles

  clips = tuple(np.ones((frames, height // 8, width // 8, 16), np.float32) for _ in range(4))
  features = sentence_features(Sentence(clips=clips, roles=reference_roles(4)), patch_size=(1, 2, 2), text_len=PROMPT_TOKENS,
                               prompt_embedding=np.ones((PROMPT_TOKENS, shape.text_dim), np.float32))
  # With and without the cache it is the same model on the same row: that of a model trained so.
  row = pack([features], RowShape(num_tokens=len(features["tokens"]), num_targets=len(features["targets"]) if cached else None,
                                  num_text_tokens=PROMPT_TOKENS, num_slots=1, context_causal=True))
  abstract = nnx.eval_shape(lambda: DiT(shape, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), attention_backend="auto",
                                        rngs=nnx.Rngs(0)))
  graph = nnx.graphdef(abstract)
  draw = jax.jit(lambda x: 0.02 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype))
  params = jax.tree.map(lambda x: draw(jnp.zeros(x.shape, x.dtype)), nnx.to_pure_dict(nnx.state(abstract, nnx.Param)))
  noise = jax.random.normal(jax.random.key(0), row.tokens.shape)

  @jax.jit
  def solve(params, row, noise):
    return euler(velocity_fn(nnx.merge(graph, params), row), row, noise, np.array(sigmas, np.float32))
  return lambda: jax.block_until_ready(solve(params, row, noise))


def torch_side(options, sigmas, frames, height, width, dtype, compiled):
  import diffusers
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  with torch.device(device):
    model = diffusers.WanTransformer3DModel(**options).to(getattr(torch, dtype)).eval()
    context = torch.ones(1, 16, 3 * frames, height // 8, width // 8, dtype=getattr(torch, dtype))
    text = torch.ones(1, PROMPT_TOKENS, options["text_dim"], dtype=getattr(torch, dtype))
  run_model = torch.compile(model) if compiled else model

  def sample():
    x = torch.randn(1, 16, frames, height // 8, width // 8, device=device, dtype=getattr(torch, dtype))
    with torch.no_grad():
      for sigma, following in zip(sigmas, [*sigmas[1:], 0.0]):
        time = torch.full((1,), 1000 * sigma, device=device)
        velocity = run_model(torch.cat([context, x], dim=2), time, text, return_dict=False)[0]
        x = x + (following - sigma) * velocity[:, :, -frames:]
    return x.sum().item()
  return sample


def main() -> None:
  import dataclasses

  from benchmarks.steps import diffusers_options
  from benchmarks.timing import peers, print_ratios, race, write_json
  from univid_jax.diffusion.flow import FlowMatching
  from univid_jax.models.dit import PRESETS, DiTConfig

  shape = DiTConfig(dim=DIM.value, ffn_dim=4 * DIM.value, num_heads=DIM.value // 64, num_layers=LAYERS.value, text_dim=512)
  shape = PRESETS[VARIANT.value] if VARIANT.value else shape
  shared = dict(sigmas=FlowMatching().inference_sigmas(STEPS.value).tolist(), frames=FRAMES.value, height=HEIGHT.value,
                width=WIDTH.value, dtype=DTYPE.value)
  tokens = 4 * FRAMES.value * (HEIGHT.value // 16) * (WIDTH.value // 16)
  print(f"{STEPS.value} steps, {tokens:,} tokens, a quarter of them the target's")
  sides = {"cached": (jax_side, {**shared, "shape": shape, "cached": True}),
           "every step": (jax_side, {**shared, "shape": shape, "cached": False}),
           **peers(AGAINST.value, torch_side, {**shared, "options": diffusers_options(shape)})}
  figures = race(sides, pairs=PAIRS.value)
  print_ratios(figures)
  write_json(OUT.value, {**shared, "shape": dataclasses.asdict(shape), "tokens": tokens, **figures})


if __name__ == "__main__":
  cli.run(main)
