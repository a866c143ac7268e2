"""Layers of Wan's causal video autoencoders, which compute a clip in chunks.

Ported from Wan2.1 and Wan2.2 (Apache-2.0).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from univid_jax.models.attention.api import attention
from univid_jax.models.layers import ones, param, xavier, zeros
from univid_jax.platform import cpu, tpu
from univid_jax.platform.current import Platform, current_platform


class Caches:
  """Frames that convolutions over time carry from one chunk to the next, in the order in which the convolutions run.

  Attributes:
    written: the frames to keep for the next chunk.
  """

  def __init__(self, kept: Sequence[Array] | None):
    """Starts a chunk with the frames that the previous chunk has kept; None starts a clip."""
    self.is_first = kept is None
    self._kept = iter(kept or ())
    self.written: list[Array] = []

  def extend(self, x: Float[Array, "t y x c"], frames: int) -> tuple[Float[Array, "_t y x c"], int]:
    """Prepends the kept frames to x, and keeps the last `frames` of the result.

    Returns:
      The extended x, and how many zero frames precede it: `frames` in the first chunk, else 0.
    """
    if self.is_first:
      missing = max(frames - len(x), 0)
      self.written.append(jnp.pad(x[-frames:], ((missing, 0), (0, 0), (0, 0), (0, 0))))
      return x, frames
    x = jnp.concatenate([next(self._kept), x])
    self.written.append(x[-frames:])
    return x, 0


class Convolution(nnx.Module):
  """Kernel and bias of a convolution over (t, y, x), channels last."""

  def __init__(
    self,
    in_dim: int,
    out_dim: int,
    kernel: tuple[int, int, int],
    *,
    strides: tuple[int, int, int] = (1, 1, 1),
    padding: int = 0,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.strides, self.padding, self.dtype = strides, padding, dtype
    self.kernel = param(rngs, xavier, (*kernel, in_dim, out_dim), param_dtype, (None,) * 5)
    self.bias = param(rngs, zeros, (out_dim,), param_dtype, (None,))

  def convolve(self, x: Float[Array, "t y x c"], *, zero_frames: int) -> Float[Array, "_t _y _x d"]:
    """Convolves x, preceded by `zero_frames` and with `padding` zeros at each side of y and x."""
    x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
    if current_platform() == Platform.CPU:
      y = cpu.conv_in_time(x, kernel, strides=self.strides, padding=self.padding, zero_frames=zero_frames)
    else:
      padding = ((zero_frames, 0), *((self.padding, self.padding),) * 2)
      dimensions = ("NDHWC", "DHWIO", "NDHWC")
      y = jax.lax.conv_general_dilated(x[None], kernel, self.strides, padding, dimension_numbers=dimensions)[0]
    return y + self.bias[...].astype(self.dtype)


class Conv(Convolution):
  """Convolution without padding in time."""

  def __call__(self, x: Float[Array, "t y x c"]) -> Float[Array, "_t _y _x d"]:
    return self.convolve(x, zero_frames=0)


class CausalConv(Convolution):
  """3 x 3 x 3 convolution in which each frame depends on itself and the two before."""

  def __init__(self, in_dim: int, out_dim: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
    super().__init__(in_dim, out_dim, (3, 3, 3), padding=1, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "t y x c"], caches: Caches) -> Float[Array, "t y x d"]:
    x, zero_frames = caches.extend(x, 2)
    return self.convolve(x, zero_frames=zero_frames)


class ChannelNorm(nnx.Module):
  """x / |x| over the channels, times sqrt(channels) and a scale; in float32."""

  def __init__(self, dim: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
    self.scale = param(rngs, ones, (dim,), param_dtype, (None,))

  def __call__(self, x: Float[Array, "t y x c"]) -> Float[Array, "t y x c"]:
    y = x.astype(jnp.float32)
    norm = jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True)), 1e-12)
    return (y / norm * x.shape[-1] ** 0.5 * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class ResidualBlock(nnx.Module):
  """Norm, SiLU and convolution, twice, with a shortcut around them."""

  def __init__(self, in_dim: int, out_dim: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
    norm = functools.partial(ChannelNorm, param_dtype=param_dtype, rngs=rngs)
    conv = functools.partial(CausalConv, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.norm1 = norm(in_dim)
    self.conv1 = conv(in_dim, out_dim)
    self.norm2 = norm(out_dim)
    self.conv2 = conv(out_dim, out_dim)
    shortcut = functools.partial(Conv, kernel=(1, 1, 1), dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.shortcut = shortcut(in_dim, out_dim) if in_dim != out_dim else None

  def __call__(self, x: Float[Array, "t y x c"], caches: Caches) -> Float[Array, "t y x d"]:
    y = self.conv1(jax.nn.silu(self.norm1(x)), caches)
    y = self.conv2(jax.nn.silu(self.norm2(y)), caches)
    return y + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nnx.Module):
  """Attention with one head among the positions of each frame."""

  def __init__(self, dim: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
    conv = functools.partial(Conv, kernel=(1, 1, 1), dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.norm = ChannelNorm(dim, param_dtype=param_dtype, rngs=rngs)
    self.to_qkv = conv(dim, 3 * dim)
    self.proj = conv(dim, dim)

  def __call__(self, x: Float[Array, "t y x c"], caches: Caches) -> Float[Array, "t y x c"]:
    del caches  # part of the common interface of layers
    q, k, v = jnp.split(self.to_qkv(self.norm(x)).reshape(x.shape[0], -1, 1, 3 * x.shape[-1]), 3, axis=-1)
    return x + self.proj(attention(q, k, v).reshape(x.shape))


class Downsample(nnx.Module):
  """Halves y and x and, after the first frame, optionally t."""

  def __init__(self, dim: int, *, temporal: bool, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
    conv = functools.partial(Conv, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.conv = conv(dim, dim, (1, 3, 3), strides=(1, 2, 2))
    self.time_conv = conv(dim, dim, (3, 1, 1), strides=(2, 1, 1)) if temporal else None

  def __call__(self, x: Float[Array, "t y x c"], caches: Caches) -> Float[Array, "_t _y _x c"]:
    x = self.conv(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))))
    if self.time_conv is None:
      return x
    extended, _ = caches.extend(x, 1)
    return x if caches.is_first else self.time_conv(extended)


class Upsample(nnx.Module):
  """Doubles y and x and, after the first frame, optionally t."""

  def __init__(
    self, dim: int, out_dim: int, *, temporal: bool, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
  ):
    conv = functools.partial(Conv, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.conv = conv(dim, out_dim, (1, 3, 3), padding=1)
    self.time_conv = conv(dim, 2 * dim, (3, 1, 1)) if temporal else None

  def __call__(self, x: Float[Array, "t y x c"], caches: Caches) -> Float[Array, "_t _y _x d"]:
    if self.time_conv is not None:
      # The first frame is not doubled in time, and the next chunk gets zeros in its place.
      extended, _ = caches.extend(jnp.zeros_like(x) if caches.is_first else x, 2)
      if not caches.is_first:
        pairs = self.time_conv(extended)
        pairs = pairs.reshape(*pairs.shape[:3], 2, -1)
        x = jnp.moveaxis(pairs, 3, 1).reshape(-1, *x.shape[1:])
    return self.conv(repeat_positions(x, rows=2, columns=2))


def repeat_positions(
  x: Float[Array, "t y x c"], *, frames: int = 1, rows: int, columns: int
) -> Float[Array, "_t _y _x c"]:
  """Repeats each position in t, y and x."""
  times = (frames, rows, columns)
  if current_platform() == Platform.TPU:
    return tpu.repeat(x, (*times, 1))
  for axis, count in enumerate(times):
    x = jnp.repeat(x, count, axis=axis) if count > 1 else x
  return x


Layer = ResidualBlock | FrameAttention | Downsample | Upsample


def middle_layers(dim: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> list[Layer]:
  """Returns the layers at the lowest resolution."""
  block = functools.partial(ResidualBlock, dim, dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
  return [block(), FrameAttention(dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs), block()]


@dataclasses.dataclass(frozen=True)
class AverageShortcut:
  """Reduces the input of a level to the shape of its output by averaging blocks of frames x side x side positions.

  If the level multiplies channels, each channel becomes several adjacent ones, the means over parts of the block in
  time. The first frame is preceded by zeros.

  Attributes:
    out_dim: channels of the output: those of the input, times a divisor of `frames`.
    frames, side: of a block.
  """

  out_dim: int
  frames: int
  side: int

  def __call__(self, x: Float[Array, "t y x c"], *, is_first: bool) -> Float[Array, "_t _y _x d"]:
    del is_first  # only its chunk has a number of frames that blocks do not divide
    parts = self.out_dim // x.shape[-1]
    block = (self.frames // parts, self.side, self.side, 1)
    y = jnp.pad(x.astype(jnp.float32), ((-len(x) % self.frames, 0), (0, 0), (0, 0), (0, 0)))
    y = jax.lax.reduce_window(y, 0.0, jax.lax.add, block, block, "VALID") / math.prod(block)
    return rearrange(y, "(t n) y x c -> t y x (c n)", n=parts).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class RepeatShortcut:
  """Expands the input of a level to the shape of its output by repeating values over blocks of frames x side x side.

  If the level divides channels, adjacent ones become the rows of a block. Only the last frame of the first block in
  time remains, since the block is one frame of the clip.

  Attributes:
    out_dim: channels of the output: those of the input, or those divided by `side`.
    frames, side: of a block.
  """

  out_dim: int
  frames: int
  side: int

  def __call__(self, x: Float[Array, "t y x c"], *, is_first: bool) -> Float[Array, "_t _y _x d"]:
    rows = x.shape[-1] // self.out_dim
    y = repeat_positions(
      rearrange(x, "t y x (c n) -> t (y n) x c", n=rows), frames=self.frames, rows=self.side // rows, columns=self.side
    )
    return y[self.frames - 1 :] if is_first else y


class Level(nnx.Module):
  """The layers at one resolution and the resampling after them, with a shortcut around all of them."""

  def __init__(self, layers: Sequence[Layer], shortcut: AverageShortcut | RepeatShortcut | None):
    self.layers, self.shortcut = nnx.List(layers), shortcut

  def __call__(self, x: Float[Array, "t y x c"], caches: Caches) -> Float[Array, "_t _y _x d"]:
    y = x
    for layer in self.layers:
      y = layer(y, caches)
    return y if self.shortcut is None else y + self.shortcut(x, is_first=caches.is_first)


def fold_pixels(x: Float[Array, "T H W c"], side: int) -> Float[Array, "T v w d"]:
  """Folds squares of pixels into channels, ordered (channel, column, row)."""
  return rearrange(x, "t (y q) (x r) c -> t y x (c r q)", q=side, r=side)


def unfold_pixels(x: Float[Array, "T v w d"], side: int) -> Float[Array, "T H W c"]:
  """Inverts `fold_pixels`."""
  return rearrange(x, "t y x (c r q) -> t (y q) (x r) c", q=side, r=side)
