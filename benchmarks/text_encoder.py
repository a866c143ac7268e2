"""The text encoder beside PyTorch's: transformers' UMT5EncoderModel at UMT5-XXL's widths, random weights.

  python -m benchmarks.text_encoder [--against=torch] [--layers=2] [--prompts=1] [--dtype=float32] [--pairs=5]

Prompts of 512 tokens. All 24 layers take 23 GB in float32; the vocabulary is cut to 32,768, since looking up costs nothing.
"""

from absl import flags

from univid_jax import cli

LAYERS = flags.DEFINE_integer("layers", 2, "Blocks; UMT5-XXL has 24.", lower_bound=1)
PROMPTS = flags.DEFINE_integer("prompts", 1, "At a time.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["bfloat16", "float32"], "Of weights and products.")
AGAINST = flags.DEFINE_list("against", [], "Peers: torch (eager), torch_compile.")
PAIRS = flags.DEFINE_integer("pairs", 5, "Timed runs of each.", lower_bound=1)
OUT = flags.DEFINE_string("out", "", "File for the figures as JSON.")

LENGTH = 512
VOCABULARY = 32768


def jax_side(layers, prompts, dtype):
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


def torch_side(layers, prompts, dtype, compiled):
  import torch
  import transformers

  device = "cuda" if torch.cuda.is_available() else "cpu"
  config = transformers.UMT5Config(vocab_size=VOCABULARY, d_model=4096, d_kv=64, d_ff=10240, num_layers=layers, num_heads=64,
                                   feed_forward_proj="gated-gelu")
  with torch.device(device):
    model = transformers.UMT5EncoderModel(config).to(getattr(torch, dtype)).eval()
    ids = torch.ones(prompts, LENGTH, dtype=torch.long)
  run = torch.compile(model) if compiled else model

  def once():
    with torch.no_grad():
      return run(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.sum().item()
  return once


def main() -> None:
  from benchmarks.timing import peers, print_ratios, race, write_json

  shared = dict(layers=LAYERS.value, prompts=PROMPTS.value, dtype=DTYPE.value)
  figures = race({"univid_jax": (jax_side, shared), **peers(AGAINST.value, torch_side, shared)}, pairs=PAIRS.value)
  print_ratios(figures)
  write_json(OUT.value, {**shared, **figures})


if __name__ == "__main__":
  cli.run(main)
