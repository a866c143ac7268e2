"""Conversions of key intervals for the backends, and padding of tokens."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


def all_keys(num_rows: int, num_queries: int, num_keys: int) -> Int[Array, "b l 2"]:
  """Returns the intervals of queries that attend to all keys."""
  return jnp.broadcast_to(jnp.array([0, num_keys], jnp.int32), (num_rows, num_queries, 2))


def to_mask(intervals: Int[Array | np.ndarray, "b l 2"], num_keys: int) -> Bool[Array, "b 1 l n"]:
  """Returns whether each query attends to each key, the same for all heads."""
  keys = jnp.arange(num_keys)
  start, end = intervals[..., 0, None], intervals[..., 1, None]
  return ((keys >= start) & (keys < end))[:, None]


def pad_tokens(x: Any, multiple: int) -> Any:
  """Pads the tokens of an array (b, l, ...) with zeros; None stays None, and intervals of padding are empty."""
  if x is None or x.shape[1] % multiple == 0:
    return x
  return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))
