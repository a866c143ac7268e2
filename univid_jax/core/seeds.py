"""Random keys from seeds."""

from typing import SupportsIndex

import jax
import numpy as np
from jax import Array

from univid_jax.core.checks import require_integer
from univid_jax.core.options import MAX_SEED


def check_seed(seed: SupportsIndex) -> int:
  """Returns a seed; raises UserError if it is not a whole number of 64 bits."""
  return require_integer("seed", seed, -MAX_SEED - 1, MAX_SEED)


def random_key(seed: SupportsIndex) -> Array:
  """Returns the random key of all 64 bits of a seed; `jax.random.key` takes only the lower 32.

  Raises:
    UserError: the seed is not a whole number of 64 bits.
  """
  seed = check_seed(seed)
  key, high = jax.random.key(seed % 2**32), (seed >> 32) % 2**32
  return jax.random.fold_in(key, np.uint32(high)) if high else key
