"""Rotary positions over (t, y, x), as in Wan2.1: neighbouring channels form a pair that turns by position x frequency."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def split_head_dim(head_dim: int) -> tuple[int, int, int]:
  """Channels of a head that carry t, y and x; what six does not divide goes to time."""
  side = 2 * (head_dim // 6)
  return head_dim - 2 * side, side, side


def rotary_frequencies(head_dim: int, *, theta: float, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Radians a position for each pair of channels on each axis, float64."""
  return tuple(scale * theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim) for dim in split_head_dim(head_dim))


def rotary_tables(positions: Int[Array, "b l 3"], head_dim: int, *, theta: float = 10000.0, scale: float = 1.0,
                  max_position: int = 1024) -> tuple[Float[Array, "b l 1 r"], Float[Array, "b l 1 r"]]:
  """Cosines and sines of each token's angles, float32, r = head_dim / 2.

  The angles are taken in float64 on the host for every position up to max_position, as the original does, and looked up.
  """
  frequencies = rotary_frequencies(head_dim, theta=theta, scale=scale)
  angles = [np.arange(max_position)[:, None] * f for f in frequencies]

  def look_up(function):
    parts = [jnp.asarray(function(a), jnp.float32)[positions[..., axis]] for axis, a in enumerate(angles)]
    return jnp.concatenate(parts, axis=-1)[:, :, None, :]

  return look_up(np.cos), look_up(np.sin)


def rotate(x: Float[Array, "b l h k"], cos: Float[Array, "b l 1 r"], sin: Float[Array, "b l 1 r"]) -> Float[Array, "b l h k"]:
  """Turns each pair of channels (2i, 2i + 1) by its angle, in float32."""
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return turned.reshape(x.shape).astype(x.dtype)
