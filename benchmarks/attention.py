"""Attention's time and memory by number of tokens, against PyTorch's scaled_dot_product_attention.

  python -m benchmarks.attention [--against=torch] [--tokens=4096,8192,16384] [--mode=gradient|forward]
      [--dtype=float32] [--backend=auto] [--kernels=default] [--sentences=1] [--pairs=5]

The shape is that of the 1.3B: 12 heads of 128. Memory is the whole process's, inputs and outputs included. With several
sentences a row is packed, each token attends to its own sentence, and the time shows what a backend skips (univid_jax
only). On a GPU, several backends of univid_jax (--backend=auto,xla) and several of PyTorch's kernels can race.
"""

import contextlib
import sys
from collections.abc import Callable

from benchmarks.timing import Figures, Program, RaceFlags
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.core.errors import UserError
from univid_jax.core.options import AttentionBackend

FLAGS = CommandFlags(__doc__)
TOKENS = FLAGS.strings("tokens", ["4096", "8192", "16384"], "Lengths of a row.")
KEYS = FLAGS.integer("keys", 0, "Of cross-attention to a prompt, with a bias in univid_jax; 0: as many as tokens.")
SENTENCES = FLAGS.integer("sentences", 1, "Sentences of equal length in a row.", lower_bound=1)
BACKEND = FLAGS.strings("backend", ["auto"], f"Of univid_jax: {', '.join(AttentionBackend)}; several race.")
KERNELS = FLAGS.strings("kernels", ["default"], "Of PyTorch: default, flash_attention, cudnn_attention; several race.")
MODE = FLAGS.choice("mode", "gradient", ["forward", "gradient"], "Forward alone, or with the gradient of all inputs.")
RACE = RaceFlags(FLAGS)

NUM_HEADS, HEAD_DIM = 12, 128
TORCH_KERNELS = ("default", "flash_attention", "cudnn_attention", "efficient_attention", "math")


def build_jax(*, tokens: int, keys: int, dtype: str, sentences: int, backend: str, mode: str) -> Callable[[], object]:
  import jax
  import jax.numpy as jnp

  from univid_jax.models.attention.api import attention

  q, k, v, g = (
    jax.random.normal(jax.random.key(seed), (1, length, NUM_HEADS, HEAD_DIM), jnp.dtype(dtype))
    for seed, length in enumerate((tokens, keys or tokens, keys or tokens, tokens))
  )
  bias = jnp.zeros((1, keys)) if keys else None
  starts = jnp.arange(tokens) * sentences // tokens * tokens // sentences
  intervals = None if sentences == 1 else jnp.stack([starts, starts + tokens // sentences], -1)[None]

  def attend(q, k, v):
    return attention(q, k, v, key_intervals=intervals, key_bias=bias, backend=AttentionBackend(backend))

  if mode == "forward":
    run = jax.jit(attend)
    return lambda: jax.block_until_ready(run(q, k, v))
  gradient = jax.jit(lambda q, k, v, g: jax.vjp(attend, q, k, v)[1](g))
  return lambda: jax.block_until_ready(gradient(q, k, v, g))


def build_torch(*, tokens: int, keys: int, dtype: str, mode: str, compiled: bool, kernel: str) -> Callable[[], object]:
  import torch
  from torch.nn.attention import SDPBackend, sdpa_kernel

  device = "cuda" if torch.cuda.is_available() else "cpu"
  q, k, v, g = (
    torch.randn(
      1, NUM_HEADS, length, HEAD_DIM, device=device, dtype=getattr(torch, dtype), requires_grad=mode == "gradient"
    )
    for length in (tokens, keys or tokens, keys or tokens, tokens)
  )
  attend = torch.nn.functional.scaled_dot_product_attention
  attend = torch.compile(attend) if compiled else attend
  chosen = contextlib.nullcontext if kernel == "default" else lambda: sdpa_kernel(getattr(SDPBackend, kernel.upper()))

  def run() -> float:
    with chosen():
      out = attend(q, k, v)
      results = torch.autograd.grad(out, (q, k, v), g.detach()) if mode == "gradient" else (out,)
    return results[0][0, 0, 0, 0].item()

  return run


@app.command(FLAGS)
def main() -> None:
  for flag, given, known in (("backend", BACKEND.value, AttentionBackend), ("kernels", KERNELS.value, TORCH_KERNELS)):
    if unknown := set(given) - set(known):
      raise UserError(f"--{flag} must be one or more of {', '.join(known)}, got {unknown.pop()!r}")
  figures: dict[str, dict[str, Figures]] = {}
  for tokens in map(int, TOKENS.value):
    if tokens % SENTENCES.value:
      raise UserError(f"--tokens={tokens} must be divisible by --sentences={SENTENCES.value}")
    shared = dict(tokens=tokens, keys=KEYS.value, dtype=RACE.dtype.value, mode=MODE.value)
    # A pair of a query and a key takes two products of the head's size; the backward pass takes four more.
    flops = (
      4
      * tokens
      * (KEYS.value or tokens)
      / SENTENCES.value
      * NUM_HEADS
      * HEAD_DIM
      * (3 if MODE.value == "gradient" else 1)
    )
    print(f"{tokens:,} tokens")
    programs = {
      f"univid_jax, {backend}" if i else "univid_jax": Program(
        build_jax, {**shared, "sentences": SENTENCES.value, "backend": backend}
      )
      for i, backend in enumerate(BACKEND.value)
    }
    for i, kernel in enumerate(KERNELS.value):
      peers = RACE.peers(build_torch, {**shared, "kernel": kernel})
      programs |= {f"{name}, {kernel}" if i else name: peer for name, peer in peers.items()}
    figures[str(tokens)] = RACE.run(programs, flops=flops)
  setup = {"keys": KEYS.value, "sentences": SENTENCES.value, "dtype": RACE.dtype.value, "mode": MODE.value}
  RACE.write({**setup, **figures})


if __name__ == "__main__":
  sys.exit(main())
