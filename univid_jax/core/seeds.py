"""Random keys from seeds."""

import operator
from typing import SupportsIndex

import jax
import numpy as np
from jax import Array


def random_key(seed: SupportsIndex) -> Array:
  """Returns the random key of a seed, all 64 bits of which count; `jax.random.key` takes the lower 32 alone."""
  seed = operator.index(seed)
  key, high = jax.random.key(seed % 2**32), (seed >> 32) % 2**32
  return jax.random.fold_in(key, np.uint32(high)) if high else key
