"""Sampling with cached context (`attention = "context_causal"`) against sampling without it, and against diffusers.

  python -m benchmarks.sample [--against=torch|torch_compile] [--steps=50] [--dim=512] [--layers=6] [--frames=2]
      [--height=256 --width=256] [--dtype=float32] [--pairs=5] [--variant=wan2.1-t2v-1.3b] [--full]

One sentence of context I with a prompt of 512 tokens, random weights; times all of sampling except the codec. On an
accelerator give --variant, which replaces --dim, and --layers=0 for all blocks, and the paper's --frames=5 --height=480
--width=832. With --full a model with full attention, as UniVid's and the peer's, races too.

  python -m benchmarks.sample --queries=32 [--checkpoint=runs/tiny] [--steps=50] [--pairs=5] [--batch_size=auto]

Queries (images) of `sample --queries` in batches against the same queries one by one, files included; without
--checkpoint the default model with random weights.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.steps import diffusers_options, find_variant, make_sentence_row
from benchmarks.timing import Program, RaceFlags
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.codecs.vae_config import find_autoencoder
from univid_jax.models.variants import DiTConfig

FLAGS = CommandFlags(__doc__)
VARIANT = FLAGS.string("variant", "", "A published model, by its name in models.variants.")
FULL = FLAGS.switch("full", False, "Also time full attention.")
DIM = FLAGS.integer("dim", 512, "Width; the feed-forward has four times as much, a head 64.")
LAYERS = FLAGS.integer("layers", 6, "Blocks; 0 for all of --variant.")
FRAMES = FLAGS.integer("frames", 2, "Latent frames of a clip.", lower_bound=1)
HEIGHT = FLAGS.integer("height", 256, "In pixels.")
WIDTH = FLAGS.integer("width", 256, "In pixels.")
STEPS = FLAGS.integer("steps", 50, "Euler steps.", lower_bound=1)
QUERIES = FLAGS.integer("queries", 0, "Race batches of this many queries against single ones instead.", lower_bound=0)
CHECKPOINT = FLAGS.string("checkpoint", "", "A model for --queries; default: random weights.")
BATCH_SIZE = FLAGS.integer("batch_size", 0, "Maximum queries sampled together; 0: as `sample` chooses.", lower_bound=0)
RACE = RaceFlags(FLAGS)

PROMPT_TOKENS = 512


def build_jax(
  *, attention: str, shape: DiTConfig, num_steps: int, frames: int, height: int, width: int, dtype: str
) -> Callable[[], object]:
  """Builds sampling.

  Args:
    attention: "cached" for a context-causal model, "causal" for the same without the cache, or "full".
    shape: shape of the transformer.
    num_steps: Euler steps.
    frames: latent frames of a clip.
    height: height of a clip in pixels.
    width: width of a clip in pixels.
    dtype: dtype of weights and activations.
  """
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from univid_jax.core.packed_row import UNIVID_CONTEXT, ContextMode
  from univid_jax.diffusion.flow import FlowMatching
  from univid_jax.diffusion.guidance import Branch, guide
  from univid_jax.diffusion.solvers import Euler
  from univid_jax.models.dit import DiT

  row = make_sentence_row(
    shape,
    frames=frames,
    height=height,
    width=width,
    prompt_tokens=PROMPT_TOKENS,
    with_targets=True,
    context_mode=UNIVID_CONTEXT if attention == "full" else ContextMode(causal=True, zero_timestep=True),
  )
  if attention == "full":
    row = dataclasses.replace(row, key_intervals=None, text_intervals=None, modulation_ids=None)
  abstract = nnx.eval_shape(lambda: DiT(shape, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
  graph = nnx.graphdef(abstract)
  draw = jax.jit(lambda x: 0.02 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype))
  params = jax.tree.map(lambda x: draw(jnp.zeros(x.shape, x.dtype)), nnx.to_pure_dict(nnx.state(abstract, nnx.Param)))
  solver = Euler()
  sigmas = solver.sigmas(FlowMatching(), num_steps)
  coefficients = solver.coefficients(sigmas)

  @jax.jit
  def start(params, row):
    return Branch.create(nnx.merge(graph, params), row) if attention == "cached" else Branch(row)

  @jax.jit
  def step(params, branch, state, sigma, weights):
    return solver.step(guide(nnx.merge(graph, params), branch), state, sigma, weights)

  def run() -> None:
    branch = start(params, row)
    state = solver.init(jax.random.normal(jax.random.key(0), row.tokens.shape))
    for sigma, weights in zip(sigmas, coefficients, strict=True):
      state = step(params, branch, state, sigma, weights)
    jax.block_until_ready(state)

  return run


def build_torch(
  *, options: dict[str, Any], sigmas: Sequence[float], frames: int, height: int, width: int, dtype: str, compiled: bool
) -> Callable[[], object]:
  import diffusers
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  kind = diffusers.WanTransformer3DModel  # pyright: ignore[reportPrivateImportUsage]  # exported lazily
  with torch.device(device):
    model = kind(**options).to(getattr(torch, dtype)).eval()
    channels = options["in_channels"]
    stride = find_autoencoder(channels).spatial_stride
    size = height // stride, width // stride
    context = torch.ones(1, channels, 3 * frames, *size, dtype=getattr(torch, dtype))
    text = torch.ones(1, PROMPT_TOKENS, options["text_dim"], dtype=getattr(torch, dtype))
  run_model = torch.compile(model) if compiled else model

  def run() -> float:
    x = torch.randn(1, channels, frames, *size, device=device, dtype=getattr(torch, dtype))
    with torch.no_grad():
      for sigma, following in zip(sigmas, [*sigmas[1:], 0.0]):
        time = torch.full((1,), 1000 * sigma, device=device)
        velocity = run_model(torch.cat([context, x], dim=2), time, text, return_dict=False)[0]
        x = x + (following - sigma) * velocity[:, :, -frames:]
    return x.sum().item()

  return run


def build_queries(*, batched: bool, count: int, num_steps: int, checkpoint: str, batch_size: int | None):
  """Builds sampling of image queries from and to files, in batches or one by one."""
  import tempfile

  from benchmarks.step_cache import random_pipeline
  from univid_jax.cli.queries import QueryRunner
  from univid_jax.cli.requests import RequestRunner
  from univid_jax.cli.sampling import SamplingArguments, plan_requests
  from univid_jax.config.presets import tiny
  from univid_jax.data.media.writer import write_clip
  from univid_jax.data.sources.photos import PhotoSource
  from univid_jax.inference.load import load_pipeline
  from univid_jax.inference.plan import SamplingOptions

  pipeline = load_pipeline(checkpoint, verify_weights=False) if checkpoint else random_pipeline(tiny())
  folder = tempfile.TemporaryDirectory()
  photos, rng = PhotoSource.bundled("train"), np.random.default_rng(0)
  names = [f"{folder.name}/{i:02d}.png" for i in range(count + 2)]
  for i, name in enumerate(names):
    write_clip(name, photos.clip(i % len(photos), rng, num_frames=1, size=(64, 64)))
  arguments = SamplingArguments(steps=SamplingOptions(num_inference_steps=num_steps))
  runner = RequestRunner(pipeline, pipeline.clip_format, arguments, {})

  def run() -> None:
    with tempfile.TemporaryDirectory(dir=folder.name) as out:
      requests = plan_requests(names[:2], names[2:], out)
      for _ in QueryRunner(runner, batch_size).run(requests) if batched else map(runner.run, requests):
        pass

  return run


def race_queries() -> None:
  setup = {
    "count": QUERIES.value,
    "num_steps": STEPS.value,
    "checkpoint": CHECKPOINT.value,
    "batch_size": BATCH_SIZE.value or None,
  }
  ways = {"batches": True, "one by one": False}
  figures = RACE.run({name: Program(build_queries, {**setup, "batched": batched}) for name, batched in ways.items()})
  RACE.write({**setup, **figures})


@app.command(FLAGS)
def main() -> None:
  if QUERIES.value:
    race_queries()
    return
  if VARIANT.value:
    shape = find_variant(VARIANT.value)
    shape = dataclasses.replace(shape, num_layers=LAYERS.value or shape.num_layers)
  else:
    dim = DIM.value
    shape = DiTConfig(dim=dim, ffn_dim=4 * dim, num_heads=dim // 64, num_layers=LAYERS.value, text_dim=512)
  shared = dict(frames=FRAMES.value, height=HEIGHT.value, width=WIDTH.value, dtype=RACE.dtype.value)
  ours = {**shared, "shape": shape, "num_steps": STEPS.value}
  theirs = {**shared, "options": diffusers_options(shape), "sigmas": euler_sigmas(STEPS.value)}
  side = 2 * find_autoencoder(shape.out_dim).spatial_stride
  tokens = 4 * FRAMES.value * (HEIGHT.value // side) * (WIDTH.value // side)
  print(f"{STEPS.value} steps, {tokens:,} tokens, a quarter of them the target's")
  programs = {
    "cached": Program(build_jax, {**ours, "attention": "cached"}),
    "every step": Program(build_jax, {**ours, "attention": "causal"}),
    **({"full": Program(build_jax, {**ours, "attention": "full"})} if FULL.value else {}),
    **RACE.peers(build_torch, theirs),
  }
  figures = RACE.run(programs)
  setup = {"steps": STEPS.value, "shape": dataclasses.asdict(shape), "tokens": tokens}
  RACE.write({**shared, **setup, **figures})


def euler_sigmas(num_steps: int, shift: float = 5.0) -> list[float]:
  """Returns UniVid's noise levels as plain numbers, since the peer's process does not import JAX."""
  times = [1 - i / num_steps for i in range(num_steps)]
  return [shift * u / (1 + (shift - 1) * u) for u in times]


if __name__ == "__main__":
  sys.exit(main())
