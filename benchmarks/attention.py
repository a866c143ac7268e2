"""Attention's time and memory by the number of tokens: forward and gradient, beside PyTorch's scaled_dot_product_attention.

  python -m benchmarks.attention [--against=torch] [--tokens=4096,8192,16384] [--dtype=float32] [--backend=auto]
      [--sentences=1] [--pairs=3]

Of the 1.3B's shape, 12 heads of 128. Memory is the whole process's, inputs and outputs included. With several
sentences a row is packed: each token sees its own, and what a backend can skip shows in the time (univid_jax alone).
"""

from absl import flags

from univid_jax import cli

TOKENS = flags.DEFINE_list("tokens", ["4096", "8192", "16384"], "Lengths of a row.")
SENTENCES = flags.DEFINE_integer("sentences", 1, "Of equal length in a row.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["bfloat16", "float32"], "Of all inputs.")
BACKEND = flags.DEFINE_string("backend", "auto", "Of univid_jax.")
MODE = flags.DEFINE_enum("mode", "gradient", ["forward", "gradient"], "Forward alone, or with the gradient of all inputs.")
AGAINST = flags.DEFINE_list("against", [], "Peers: torch.")
PAIRS = flags.DEFINE_integer("pairs", 3, "Timed runs of each.", lower_bound=1)
OUT = flags.DEFINE_string("out", "", "File for the figures as JSON.")

NUM_HEADS, HEAD_DIM = 12, 128


def jax_side(tokens, dtype, sentences, backend, mode):
  import jax
  import jax.numpy as jnp

  from univid_jax.attention.api import attention

  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, g = (jax.random.normal(key, (1, tokens, NUM_HEADS, HEAD_DIM), dtype) for key in keys)
  starts = jnp.arange(tokens) * sentences // tokens * tokens // sentences
  intervals = None if sentences == 1 else jnp.stack([starts, starts + tokens // sentences], -1)[None]

  def attend(q, k, v):
    return attention(q, k, v, key_intervals=intervals, backend=backend)

  run = jax.jit(attend if mode == "forward" else lambda q, k, v: jax.vjp(attend, q, k, v)[1](g))
  return lambda: jax.block_until_ready(run(q, k, v))


def torch_side(tokens, dtype, mode, compiled):
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  options = dict(device=device, dtype=getattr(torch, dtype), requires_grad=mode == "gradient")
  q, k, v, g = (torch.randn(1, NUM_HEADS, tokens, HEAD_DIM, **options) for _ in range(4))
  attend = torch.nn.functional.scaled_dot_product_attention
  attend = torch.compile(attend) if compiled else attend

  def once():
    out = attend(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), g.detach()) if mode == "gradient" else (out,)
    return grads[0].sum().item()
  return once


def main() -> None:
  from benchmarks.timing import peers, print_ratios, race, write_json

  figures = {}
  for tokens in map(int, TOKENS.value):
    if tokens % SENTENCES.value:
      raise cli.UserError(f"{tokens} tokens do not divide into {SENTENCES.value} sentences")
    shared = dict(tokens=tokens, dtype=DTYPE.value, mode=MODE.value)
    # A pair of a query and a key takes two products of the head's size; the backward pass four more.
    flops = 4 * tokens**2 / SENTENCES.value * NUM_HEADS * HEAD_DIM * (3 if MODE.value == "gradient" else 1)
    print(f"{tokens:,} tokens")
    ours = (jax_side, {**shared, "sentences": SENTENCES.value, "backend": BACKEND.value})
    figures[tokens] = race({"univid_jax": ours, **peers(AGAINST.value, torch_side, shared)}, pairs=PAIRS.value, flops=flops)
    print_ratios(figures[tokens])
  write_json(OUT.value, {"sentences": SENTENCES.value, "dtype": DTYPE.value, "mode": MODE.value, **figures})


if __name__ == "__main__":
  cli.run(main)
