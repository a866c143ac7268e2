"""Random keys of seeds: all 64 bits count."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import univid_jax
from univid_jax.core.options import MAX_SEED
from univid_jax.core.seeds import random_key


def test_all_bits_count():
  seeds = (0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, MAX_SEED - 1, MAX_SEED, -1, -(2**32), -MAX_SEED - 1)
  numbers = {tuple(np.asarray(jax.random.bits(random_key(seed), 4)).tolist()) for seed in seeds}
  assert len(numbers) == len(seeds)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, np.int32(7), np.uint32(7), jnp.int32(7)], ids=repr)
def test_small_seeds_are_those_of_jax(seed):
  assert random_key(seed) == jax.random.key(seed)


def test_it_can_be_traced():
  assert jax.jit(lambda: random_key(2**40 + 1))() == random_key(2**40 + 1)


@pytest.mark.parametrize("path", sorted(Path(univid_jax.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_draws_have_a_dtype(path):
  """Else `jax_enable_x64` changes what a seed means."""
  for call in ast.walk(ast.parse(path.read_text())):
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
      kind, words = call.func.attr, ast.unparse(call)
      if words.startswith("jax.random.") and kind in ("normal", "uniform", "randint", "truncated_normal", "bernoulli"):
        assert "jnp.float32" in words or "jnp.int32" in words, f"{path}:{call.lineno}"
