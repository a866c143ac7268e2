"""Rotary positions over (t, y, x), as in Wan2.1: neighbouring channels form a pair that turns by position x frequency."""

import jax
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
                  max_position: int = 1024) -> tuple[Float[Array, "b l 1 k"], Float[Array, "b l 1 k"]]:
  """What `rotate` multiplies each channel and its neighbour with, float32: the cosine, and the sine with its sign.

  The angles are taken in float64 on the host for every position up to max_position, as the original does, and looked up.
  """
  frequencies = rotary_frequencies(head_dim, theta=theta, scale=scale)
  angles = [np.arange(max_position)[:, None] * np.repeat(f, 2) for f in frequencies]

  def look_up(values):
    parts = [jnp.asarray(value, jnp.float32)[positions[..., axis]] for axis, value in enumerate(values)]
    return jnp.concatenate(parts, axis=-1)[:, :, None, :]

  return look_up(np.cos(a) for a in angles), look_up(np.sin(a) * np.tile([-1, 1], a.shape[1] // 2) for a in angles)


def rotate(x: Float[Array, "b l h k"], cos: Float[Array, "b l 1 k"], sin: Float[Array, "b l 1 k"]) -> Float[Array, "b l h k"]:
  """Turns each pair of channels (2i, 2i + 1) by its angle, in float32."""
  # On a TPU channels are lanes of registers, which change places in a product alone; anything else copies x several times.
  neighbours = jax.lax.platform_dependent(x, tpu=_neighbours_by_product, default=_neighbours)
  return (x.astype(jnp.float32) * cos + neighbours.astype(jnp.float32) * sin).astype(x.dtype)


def _neighbours(x: Float[Array, "b l h k"]) -> Float[Array, "b l h k"]:
  """Each channel's other one of its pair."""
  return x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)


def _neighbours_by_product(x: Float[Array, "b l h k"]) -> Float[Array, "b l h k"]:
  """The same by a product with zeros and ones, exact in x's dtype."""
  exchange = np.eye(x.shape[-1], dtype=x.dtype)[np.arange(x.shape[-1]) ^ 1]
  return jnp.einsum("blhk,kn->blhn", x, exchange, precision=jax.lax.Precision.HIGHEST)
