"""Rotary positions over (t, y, x), as in Wan2.1: each pair of neighbouring channels rotates by position x frequency."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from univid_jax.core.dims import MAX_POSITION
from univid_jax.platform import tpu
from univid_jax.platform.current import Platform, current_platform

# cos and sin of the angle of each channel, (b, l, 1, k).
RotaryTables = tuple[Float[Array, "b l 1 k"], Float[Array, "b l 1 k"]]


def split_head_dim(head_dim: int) -> tuple[int, int, int]:
  """Returns how many channels of a head encode t, y and x; t takes the remainder of a division by six."""
  side = 2 * (head_dim // 6)
  return head_dim - 2 * side, side, side


def rotary_frequencies(head_dim: int, *, theta: float, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the radians per position of each pair of channels, for t, y and x; float64."""
  t, y, x = (scale * theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim) for dim in split_head_dim(head_dim))
  return t, y, x


def rotary_tables(
  positions: Int[Array | np.ndarray, "b l 3"], head_dim: int, *, theta: float = 10000.0, scale: float = 1.0
) -> RotaryTables:
  """Returns the factors for `rotate`, float32: the cosine of each channel, and the signed sine for its neighbour.

  They are looked up in tables of MAX_POSITION entries, computed in float64 on the host as in the original.
  """
  frequencies = rotary_frequencies(head_dim, theta=theta, scale=scale)
  angles = [np.arange(MAX_POSITION)[:, None] * np.repeat(f, 2) for f in frequencies]

  def look_up(tables: Iterable[np.ndarray]) -> Array:
    parts = [jnp.asarray(table, jnp.float32)[positions[..., axis]] for axis, table in enumerate(tables)]
    return jnp.concatenate(parts, axis=-1)[:, :, None, :]

  return look_up(np.cos(a) for a in angles), look_up(np.sin(a) * np.tile([-1, 1], a.shape[1] // 2) for a in angles)


@jax.named_scope("rotary")
def rotate(
  x: Float[Array, "b l h k"], cos: Float[Array, "b l 1 k"], sin: Float[Array, "b l 1 k"]
) -> Float[Array, "b l h k"]:
  """Rotates each pair of channels (2i, 2i + 1) by its angle, in float32."""
  neighbours = tpu.swap_pairs(x) if current_platform() == Platform.TPU else swap_pairs(x)
  return (x.astype(jnp.float32) * cos + neighbours.astype(jnp.float32) * sin).astype(x.dtype)


def swap_pairs(x: Float[Array, "b l h k"]) -> Float[Array, "b l h k"]:
  """Swaps channels 2i and 2i + 1."""
  return x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
