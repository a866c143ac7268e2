"""The speed of a large matrix product in JAX and in PyTorch, an upper bound of everything else.

python -m benchmarks.matmul [--against=torch] [--size=8192] [--repeats=20] [--dtype=bfloat16] [--pairs=5]

Data is random, since zeros are faster. A run is several products in a row, so that launching them takes no time.
"""

import sys
from collections.abc import Callable

from benchmarks.timing import Program, RaceFlags
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags

FLAGS = CommandFlags(__doc__)
SIZE = FLAGS.integer("size", 8192, "Rows and columns.", lower_bound=1)
REPEATS = FLAGS.integer("repeats", 20, "Products of a run.", lower_bound=1)
RACE = RaceFlags(FLAGS)


def build_jax(*, size: int, repeats: int, dtype: str) -> Callable[[], object]:
  import jax
  import jax.numpy as jnp

  a, b = (jax.random.normal(jax.random.key(seed), (size, size), jnp.dtype(dtype)) for seed in range(2))
  multiply = jax.jit(jnp.matmul)

  def run() -> None:
    for _ in range(repeats - 1):
      multiply(a, b)
    multiply(a, b).block_until_ready()

  return run


def build_torch(*, size: int, repeats: int, dtype: str, compiled: bool) -> Callable[[], object]:
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
  multiply = torch.compile(torch.matmul) if compiled else torch.matmul

  def run() -> float:
    for _ in range(repeats - 1):
      multiply(a, b)
    return multiply(a, b)[0, 0].item()

  return run


@app.command(FLAGS)
def main() -> None:
  shared = dict(size=SIZE.value, repeats=REPEATS.value, dtype=RACE.dtype.value)
  programs = {"univid_jax": Program(build_jax, shared), **RACE.peers(build_torch, shared)}
  RACE.write({**shared, **RACE.run(programs, flops=2.0 * REPEATS.value * SIZE.value**3)})


if __name__ == "__main__":
  sys.exit(main())
