"""The text encoder against transformers' UMT5EncoderModel at UMT5-XXL's widths, random weights.

  python -m benchmarks.text_encoder [--against=torch] [--layers=2] [--prompts=1] [--dtype=float32] [--pairs=5]

Prompts have 512 tokens. All 24 layers take 23 GB in float32; the vocabulary is cut to 32,768, since look-ups cost
nothing.
"""

import sys
from collections.abc import Callable

from benchmarks.timing import Program, RaceFlags, print_ratios, race, write_json
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags

FLAGS = CommandFlags(__doc__)
LAYERS = FLAGS.integer("layers", 2, "Blocks; UMT5-XXL has 24.", lower_bound=1)
PROMPTS = FLAGS.integer("prompts", 1, "Prompts at a time.", lower_bound=1)
RACE = RaceFlags(FLAGS)

LENGTH = 512
VOCABULARY = 32768


def build_jax(*, layers: int, prompts: int, dtype: str) -> Callable[[], object]:
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from univid_jax.models.umt5 import UMT5Config, UMT5Encoder

  config = UMT5Config(num_layers=layers, vocab_size=VOCABULARY)
  model = UMT5Encoder(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
  graph, params = nnx.split(model)
  ids, mask = jnp.ones((prompts, LENGTH), jnp.int32), jnp.ones((prompts, LENGTH), bool)
  run = jax.jit(lambda params, ids, mask: nnx.merge(graph, params)(ids, mask))
  return lambda: jax.block_until_ready(run(params, ids, mask))


def build_torch(*, layers: int, prompts: int, dtype: str, compiled: bool) -> Callable[[], object]:
  import torch
  import transformers

  device = "cuda" if torch.cuda.is_available() else "cpu"
  config = transformers.UMT5Config(
    vocab_size=VOCABULARY,
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=layers,
    num_heads=64,
    feed_forward_proj="gated-gelu",
  )
  with torch.device(device):
    model = transformers.UMT5EncoderModel(config).to(getattr(torch, dtype)).eval()
    ids = torch.ones(prompts, LENGTH, dtype=torch.long)
  encode = torch.compile(model) if compiled else model

  def run() -> float:
    with torch.no_grad():
      return encode(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.sum().item()

  return run


@app.command(FLAGS)
def main() -> None:
  shared = dict(layers=LAYERS.value, prompts=PROMPTS.value, dtype=RACE.dtype.value)
  programs = {"univid_jax": Program(build_jax, shared), **RACE.peers(build_torch, shared)}
  figures = race(programs, pairs=RACE.pairs.value)
  print_ratios(figures)
  write_json(RACE.out.value, {**shared, **figures})


if __name__ == "__main__":
  sys.exit(main())
