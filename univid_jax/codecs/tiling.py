"""Encoding and decoding of large frames in tiles whose seams are blended."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float

from univid_jax.core.dims import latent_shape
from univid_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
  """How frames are cut into tiles.

  Attributes:
    size: side of a tile, in latents.
    overlap: overlap of neighbouring tiles, in latents, over which one fades into the other.
  """

  size: int = 32
  overlap: int = 8

  def __post_init__(self):
    if not 0 < self.overlap <= self.size // 2:
      raise UserError(f"the overlap of tiles must be from 1 to half their size {self.size}, got {self.overlap}")

  def places(self, length: int, scale: int = 1) -> list[tuple[int, int, np.ndarray]]:
    """Returns (start, length, weights) of the tiles along a side; the weights of all tiles sum to 1 everywhere.

    Args:
      length: length of the side, in latents.
      scale: weights per latent.
    """
    size = min(self.size, length)
    starts = [*range(0, length - size, size - self.overlap), length - size]
    overlap = self.overlap * scale
    ramp = (np.arange(overlap, dtype=np.float32) + 0.5) / overlap
    total, weights = np.zeros(length * scale, np.float32), []
    for index, start in enumerate(starts):
      weight = np.ones(size * scale, np.float32)
      if index > 0:
        weight[:overlap] = ramp
      if index < len(starts) - 1:
        weight[-overlap:] *= ramp[::-1]
      weights.append(weight)
      total[start * scale : (start + size) * scale] += weight
    return [
      (start, size, weight / total[start * scale : (start + size) * scale]) for start, weight in zip(starts, weights)
    ]


def encode_tiled(
  encode: Callable[[np.ndarray], Array],
  frames: Float[np.ndarray, "*n T H W 3"],
  tiling: Tiling,
  *,
  spatial_stride: int,
  temporal_stride: int,
) -> Float[np.ndarray, "*n t y x c"]:
  """Encodes one clip, or several if `encode` takes them, tile by tile; see `VAE.encode`."""
  _, height, width = latent_shape(frames.shape[-4:], temporal_stride=temporal_stride, spatial_stride=spatial_stride)
  out = np.float32(0)
  for (y, y_size, y_weight), (x, x_size, x_weight) in itertools.product(tiling.places(height), tiling.places(width)):
    rows = slice(y * spatial_stride, (y + y_size) * spatial_stride)
    columns = slice(x * spatial_stride, (x + x_size) * spatial_stride)
    tile = np.asarray(encode(frames[..., rows, columns, :])) * (y_weight[:, None] * x_weight)[..., None]
    edges = (y, height - y - y_size), (x, width - x - x_size), (0, 0)
    out = out + np.pad(tile, (*((0, 0),) * (tile.ndim - 3), *edges))
  return np.asarray(out)


def decode_tiled(
  decode: Callable[[np.ndarray], Array], latents: Float[np.ndarray, "t y x c"], tiling: Tiling, *, spatial_stride: int
) -> Float[np.ndarray, "T H W 3"]:
  """Decodes tile by tile; see `VAE.decode`."""
  _, height, width, _ = latents.shape
  out = np.float32(0)
  sides = (tiling.places(length, spatial_stride) for length in (height, width))
  for (y, y_size, y_weight), (x, x_size, x_weight) in itertools.product(*sides):
    tile = np.asarray(decode(latents[:, y : y + y_size, x : x + x_size]))
    tile = tile * (y_weight[:, None] * x_weight)[None, ..., None]
    edges = [
      (start * spatial_stride, (length - start - size) * spatial_stride)
      for start, size, length in ((y, y_size, height), (x, x_size, width))
    ]
    out = out + np.pad(tile, ((0, 0), *edges, (0, 0)))
  return np.asarray(out)
