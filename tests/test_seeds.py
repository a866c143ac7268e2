"""Random keys of seeds: all 64 bits count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
