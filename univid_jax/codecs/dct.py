"""A codec without weights, which the default run uses in place of a VAE.

A fixed orthonormal transform with the VAE's interface and structure in time: first a single frame, then groups of four.
It converts blocks of pixels to opponent colours and cosine coefficients (DCT-II), and keeps the strongest. Methods
accept NumPy or JAX arrays and return the same kind.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
import scipy

from univid_jax.core.dims import TEMPORAL_STRIDE, latent_shape
from univid_jax.core.pixels import OPPONENT_COLORS

ArrayT = TypeVar("ArrayT", np.ndarray, jax.Array)

# Variance of a pixel's brightness coefficient at frequency 0, pixels in [-1, 1].
DC_VARIANCE = 0.66


def log_variance(time: np.ndarray, row: np.ndarray, column: np.ndarray, color: np.ndarray) -> np.ndarray:
  """Returns the logarithm of a coefficient's variance in natural clips, up to a constant, given its frequencies.

  Fitted to crops of photographs and slow camera movements over them. On other photographs the channels that it selects
  lose as little as those selected by measured variances.
  """
  space, motion = np.log1p(row**2 + column**2), np.log1p(time**2)
  return np.array([0.0, -3.8, -4.6])[color] - 2.8 * space - 4.2 * motion + 1.4 * space * motion


@dataclasses.dataclass(frozen=True)
class DCTCodec:
  """Converts clips to latents and back, both linearly.

  Attributes:
    latent_channels: coefficients kept per block. With stride 4, 16 channels give about 40 dB on images and 35 dB on
      slow videos of small windows of photographs.
    spatial_stride: side of a block in pixels.
    temporal_stride: frames per block, after the first frame.
  """

  latent_channels: int = 16
  spatial_stride: int = 4
  temporal_stride: int = TEMPORAL_STRIDE

  @property
  def has_weights(self) -> bool:
    return False

  @property
  def num_parallel(self) -> int:
    """How many clips `encode_many` encodes at the same time."""
    return 1

  def encode(self, frames: ArrayT) -> ArrayT:
    """Encodes pixels (T, H, W, 3) in [-1, 1] to latents (t, y, x, latent_channels) of about unit power.

    Raises:
      UserError: T is not 4n + 1 or a side is not a multiple of spatial_stride.
    """
    latent_shape(frames.shape, temporal_stride=self.temporal_stride, spatial_stride=self.spatial_stride)
    image, video = self._analysis
    first = self._to_blocks(frames[:1], 1) @ image
    if len(frames) == 1:
      return first
    rest = self._to_blocks(frames[1:], self.temporal_stride) @ video
    return _concatenate(first, rest)

  def encode_many(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Encodes clips of one shape, each as `encode` does."""
    return [self.encode(frames) for frames in clips]

  def decode(self, latents: ArrayT) -> ArrayT:
    """Decodes latents (t, y, x, latent_channels) to pixels (T, H, W, 3), about in [-1, 1]."""
    image, video = self._synthesis
    first = self._from_blocks(latents[:1] @ image, 1)
    if len(latents) == 1:
      return first
    return _concatenate(first, self._from_blocks(latents[1:] @ video, self.temporal_stride))

  def decode_parts(self, latents: np.ndarray) -> Iterator[np.ndarray]:
    """Decodes latents like `decode`, one latent frame at a time."""
    image, video = self._synthesis
    for index, part in enumerate(latents[:, None]):
      yield self._from_blocks(part @ video, self.temporal_stride) if index else self._from_blocks(part @ image, 1)

  def _to_blocks(self, frames: ArrayT, time: int) -> ArrayT:
    side = self.spatial_stride
    t, y, x = frames.shape[0] // time, frames.shape[1] // side, frames.shape[2] // side
    return frames.reshape(t, time, y, side, x, side, 3).transpose(0, 2, 4, 1, 3, 5, 6).reshape(t, y, x, -1)

  def _from_blocks(self, blocks: ArrayT, time: int) -> ArrayT:
    side = self.spatial_stride
    t, y, x = blocks.shape[:3]
    blocks = blocks.reshape(t, y, x, time, side, side, 3).transpose(0, 3, 1, 4, 2, 5, 6)
    return blocks.reshape(t * time, y * side, x * side, 3)

  @functools.cached_property
  def _analysis(self) -> tuple[np.ndarray, np.ndarray]:
    """The matrices from the values of a frame's block and of a group's block to latent channels; float32.

    A group's motionless coefficients have the same channels and scale as a frame's, so that the latents of a still
    video equal those of its image; motion gets the remaining channels. Each coefficient is divided by the fourth root
    of its variance, so that weak ones are visible to a model, yet strong ones dominate.
    """
    frame, frame_scale, frame_order = self._ranked_basis(1)
    group, group_scale, group_order = self._ranked_basis(self.temporal_stride)
    frame_channels = frame_order[: self.latent_channels]
    chosen = group_order[: self.latent_channels]
    moving = iter(index for index in chosen if index not in frame_channels)
    group_channels = [index if index in chosen else next(moving) for index in frame_channels]
    norm = np.sqrt(np.mean(frame_scale[frame_channels] ** -2))
    image = frame[:, frame_channels] * frame_scale[frame_channels] / norm
    video = group[:, group_channels] * group_scale[group_channels] / norm / self.temporal_stride**0.5
    return image.astype(np.float32), video.astype(np.float32)

  @functools.cached_property
  def _synthesis(self) -> tuple[np.ndarray, np.ndarray]:
    """The matrices from latent channels to the values of a block; exact inverses, since the columns are orthogonal."""
    image, video = ((matrix / np.sum(matrix**2, axis=0)).T for matrix in self._analysis)
    return image, video

  def _ranked_basis(self, time: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns orthonormal columns for a block of `time` frames, their scales, and their order from strong to weak."""
    side = self.spatial_stride
    in_time, in_space = (scipy.fft.dct(np.eye(length), norm="ortho", axis=0) for length in (time, side))
    basis = functools.reduce(np.kron, (in_time, in_space, in_space, OPPONENT_COLORS)).T
    index = np.meshgrid(np.arange(time), np.arange(side), np.arange(side), np.arange(3), indexing="ij")
    variance = DC_VARIANCE * side**2 * np.exp(log_variance(*index)).ravel()
    return basis, variance**-0.25, np.argsort(-variance, kind="stable")


def _concatenate(first: ArrayT, rest: ArrayT) -> ArrayT:
  return first.__array_namespace__().concat([first, rest], axis=0)
