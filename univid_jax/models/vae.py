"""Wan2.1's causal video autoencoder: 4 x 8 x 8 pixels to a latent, the first frame alone.

Ported from Wan2.1 (Apache-2.0). A clip runs through in chunks (one frame, then four at a time; one latent frame at a time on
the way back), each convolution over time carrying the last frames that it saw, so memory does not grow with the clip. All of
it is one program: the first chunk, then a scan over the others.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from univid_jax.attention.api import attention
from univid_jax.models.layers import ones, param, xavier, zeros
from univid_jax.types import latent_shape

# Mean and deviation of each latent channel of the released weights, by which latents are normalised.
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922,
               -0.9497, 0.2503, -0.2921)
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
              2.8251, 1.9160)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
  """Shape of the autoencoder; the defaults are Wan2.1's.

  Attributes:
    dim: channels at full resolution.
    dim_mult: channels at each level, in multiples of dim.
    num_res_blocks: a level, on the way down; one more on the way up.
    temporal_downsample: whether going down from each level but the last halves time too.
    latent_channels: of the latents.
  """

  dim: int = 96
  dim_mult: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  temporal_downsample: tuple[bool, ...] = (False, True, True)
  latent_channels: int = 16

  @property
  def spatial_stride(self) -> int:
    return 2 ** (len(self.dim_mult) - 1)

  @property
  def temporal_stride(self) -> int:
    return 2 ** sum(self.temporal_downsample)


class Caches:
  """What convolutions over time remember from chunk to chunk, in the order in which they run.

  Attributes:
    written: the frames to remember for the next chunk.
  """

  def __init__(self, remembered: Sequence[Array] | None):
    self._remembered = None if remembered is None else iter(remembered)
    self.written: list[Array] = []

  @property
  def is_first(self) -> bool:
    """Whether this is a clip's first chunk."""
    return self._remembered is None

  def extend(self, x: Float[Array, "t y x c"], frames: int) -> tuple[Float[Array, "u y x c"], int]:
    """Remembers the last frames of x.

    Returns:
      x with the remembered frames before it, and how many zero frames stand before those: all of them in the first chunk.
    """
    if self.is_first:
      missing = max(frames - len(x), 0)
      self.written.append(jnp.pad(x[-frames:], ((missing, 0), (0, 0), (0, 0), (0, 0))))
      return x, frames
    x = jnp.concatenate([next(self._remembered), x])
    self.written.append(x[-frames:])
    return x, 0


class Conv(nnx.Module):
  """Convolution over (t, y, x) or (y, x), channels last, without padding of its own."""

  def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int], *, strides: tuple[int, int, int] = (1, 1, 1),
               padding: int = 0, dtype, param_dtype, rngs: nnx.Rngs):
    self.strides, self.padding, self.dtype = strides, padding, dtype
    self.kernel = param(rngs, xavier, (*kernel, in_dim, out_dim), param_dtype, (None,) * 5)
    self.bias = param(rngs, zeros, (out_dim,), param_dtype, (None,))

  def __call__(self, x: Float[Array, "t y x c"], zeros: int = 0) -> Float[Array, "u v w d"]:
    """Pads y and x with zeros by `padding` on each side, and time by `zeros` frames before x."""
    x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
    y = jax.lax.platform_dependent(x, kernel, cpu=functools.partial(self._frame_by_frame, zeros=zeros),
                                   default=functools.partial(self._at_once, zeros=zeros))
    return y + self.bias[...].astype(self.dtype)

  def _at_once(self, x, kernel, zeros: int):
    sides = ((self.padding, self.padding),) * 2
    return jax.lax.conv_general_dilated(x[None], kernel, self.strides, ((zeros, 0), *sides),
                                        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))[0]

  def _frame_by_frame(self, x, kernel, zeros: int):
    """The same as sums of convolutions in the plane: XLA's over time take twice as long on a CPU, though half the memory."""
    (step, *strides), sides = self.strides, ((self.padding, self.padding),) * 2
    # Or what follows from the remembered frames alone is computed early and kept: a fifth more memory.
    x = jax.lax.optimization_barrier(x)

    def frame(start):
      # Zero frames add nothing.
      parts = [jax.lax.conv_general_dilated(x[start + tap][None], kernel[tap], strides, sides,
                                            dimension_numbers=("NHWC", "HWIO", "NHWC"))
               for tap in range(len(kernel)) if start + tap >= 0]
      return sum(parts)

    # A chunk has a few frames; a loop over them takes more memory than the frames themselves.
    return jnp.concatenate([frame(start) for start in range(-zeros, len(x) - len(kernel) + 1, step)])


class ChannelNorm(nnx.Module):
  """x / |x| over the channels, times sqrt(channels) and a gain; in float32."""

  def __init__(self, dim: int, *, param_dtype, rngs: nnx.Rngs):
    self.scale = param(rngs, ones, (dim,), param_dtype, (None,))

  def __call__(self, x: Float[Array, "t y x c"]) -> Float[Array, "t y x c"]:
    y = x.astype(jnp.float32)
    norm = jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True)), 1e-12)
    return (y / norm * x.shape[-1] ** 0.5 * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class CausalConv(Conv):
  """Convolution whose frames see themselves and those before."""

  def __init__(self, in_dim: int, out_dim: int, *, rngs: nnx.Rngs, **options):
    super().__init__(in_dim, out_dim, (3, 3, 3), padding=1, rngs=rngs, **options)

  def __call__(self, x: Float[Array, "t y x c"], caches: Caches) -> Float[Array, "t y x d"]:
    return super().__call__(*caches.extend(x, 2))


class ResidualBlock(nnx.Module):
  """Norm, SiLU, convolution, twice, beside a shortcut."""

  def __init__(self, in_dim: int, out_dim: int, *, dtype, param_dtype, rngs: nnx.Rngs):
    options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.norm1 = ChannelNorm(in_dim, param_dtype=param_dtype, rngs=rngs)
    self.conv1 = CausalConv(in_dim, out_dim, **options)
    self.norm2 = ChannelNorm(out_dim, param_dtype=param_dtype, rngs=rngs)
    self.conv2 = CausalConv(out_dim, out_dim, **options)
    self.shortcut = Conv(in_dim, out_dim, (1, 1, 1), **options) if in_dim != out_dim else None

  def __call__(self, x: Float[Array, "t y x c"], caches: Caches) -> Float[Array, "t y x d"]:
    y = self.conv1(jax.nn.silu(self.norm1(x)), caches)
    y = self.conv2(jax.nn.silu(self.norm2(y)), caches)
    return y + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nnx.Module):
  """Attention of one head among the places of each frame."""

  def __init__(self, dim: int, *, dtype, param_dtype, rngs: nnx.Rngs):
    self.norm = ChannelNorm(dim, param_dtype=param_dtype, rngs=rngs)
    self.to_qkv = Conv(dim, 3 * dim, (1, 1, 1), dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.proj = Conv(dim, dim, (1, 1, 1), dtype=dtype, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "t y x c"], caches: Caches) -> Float[Array, "t y x c"]:
    del caches
    q, k, v = jnp.split(self.to_qkv(self.norm(x)).reshape(x.shape[0], -1, 1, 3 * x.shape[-1]), 3, axis=-1)
    return x + self.proj(attention(q, k, v).reshape(x.shape))


class Downsample(nnx.Module):
  """Halves y and x and, after the first frame, time."""

  def __init__(self, dim: int, *, temporal: bool, dtype, param_dtype, rngs: nnx.Rngs):
    options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.conv = Conv(dim, dim, (1, 3, 3), strides=(1, 2, 2), **options)
    self.time_conv = Conv(dim, dim, (3, 1, 1), strides=(2, 1, 1), **options) if temporal else None

  def __call__(self, x: Float[Array, "t y x c"], caches: Caches) -> Float[Array, "u v w c"]:
    x = self.conv(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))))
    if self.time_conv is None:
      return x
    extended, _ = caches.extend(x, 1)
    return x if caches.is_first else self.time_conv(extended)


class Upsample(nnx.Module):
  """Doubles y and x and, after the first frame, time; halves the channels."""

  def __init__(self, dim: int, *, temporal: bool, dtype, param_dtype, rngs: nnx.Rngs):
    options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.conv = Conv(dim, dim // 2, (1, 3, 3), padding=1, **options)
    self.time_conv = Conv(dim, 2 * dim, (3, 1, 1), **options) if temporal else None

  def __call__(self, x: Float[Array, "t y x c"], caches: Caches) -> Float[Array, "u v w d"]:
    if self.time_conv is not None:
      # The first frame stands for itself alone: the next chunk sees zeros where it was.
      extended, _ = caches.extend(jnp.zeros_like(x) if caches.is_first else x, 2)
      if not caches.is_first:
        pairs = self.time_conv(extended)
        pairs = pairs.reshape(*pairs.shape[:3], 2, -1)
        x = jnp.moveaxis(pairs, 3, 1).reshape(-1, *x.shape[1:])
    return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class Encoder(nnx.Module):
  """Pixels to mean and log-variance of latents."""

  def __init__(self, config: VAEConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    dims = [config.dim * m for m in (1, *config.dim_mult)]
    self.conv1 = CausalConv(3, dims[0], **options)
    layers: list[nnx.Module] = []
    for level, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
      layers += [ResidualBlock(in_dim if i == 0 else out_dim, out_dim, **options) for i in range(config.num_res_blocks)]
      if level < len(config.dim_mult) - 1:
        layers.append(Downsample(out_dim, temporal=config.temporal_downsample[level], **options))
    self.downsamples = nnx.List(layers)
    self.middle = nnx.List(middle_layers(dims[-1], **options))
    self.norm = ChannelNorm(dims[-1], param_dtype=param_dtype, rngs=rngs)
    self.head = CausalConv(dims[-1], 2 * config.latent_channels, **options)

  def __call__(self, x: Float[Array, "T H W 3"], caches: Caches) -> Float[Array, "t y x d"]:
    x = self.conv1(x, caches)
    for layer in (*self.downsamples, *self.middle):
      x = layer(x, caches)
    return self.head(jax.nn.silu(self.norm(x)), caches)


class Decoder(nnx.Module):
  """Latents to pixels."""

  def __init__(self, config: VAEConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    mult = config.dim_mult[::-1]
    dims = [config.dim * m for m in (mult[0], *mult)]
    self.conv1 = CausalConv(config.latent_channels, dims[0], **options)
    self.middle = nnx.List(middle_layers(dims[0], **options))
    layers: list[nnx.Module] = []
    for level, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
      # The upsampling before this level halved the channels.
      in_dim = in_dim // 2 if level else in_dim
      layers += [ResidualBlock(in_dim if i == 0 else out_dim, out_dim, **options) for i in range(config.num_res_blocks + 1)]
      if level < len(mult) - 1:
        layers.append(Upsample(out_dim, temporal=config.temporal_downsample[::-1][level], **options))
    self.upsamples = nnx.List(layers)
    self.norm = ChannelNorm(dims[-1], param_dtype=param_dtype, rngs=rngs)
    self.head = CausalConv(dims[-1], 3, **options)

  def __call__(self, x: Float[Array, "t y x c"], caches: Caches) -> Float[Array, "T H W 3"]:
    x = self.conv1(x, caches)
    for layer in (*self.middle, *self.upsamples):
      x = layer(x, caches)
    return self.head(jax.nn.silu(self.norm(x)), caches)


def middle_layers(dim: int, *, dtype, param_dtype, rngs: nnx.Rngs) -> list[nnx.Module]:
  """What stands at the lowest resolution."""
  options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
  return [ResidualBlock(dim, dim, **options), FrameAttention(dim, **options), ResidualBlock(dim, dim, **options)]


class VAE(nnx.Module):
  """The autoencoder. Clips have no batch dim: they come in all lengths, and one fills a device.

  Args:
    config: the shape.
    dtype: of activations and products.
    param_dtype: of the stored weights.
    rngs: the stream `params`.
  """

  def __init__(self, config: VAEConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
    options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.config, self.dtype = config, dtype
    channels = config.latent_channels
    self.encoder = Encoder(config, **options)
    self.decoder = Decoder(config, **options)
    self.conv1 = Conv(2 * channels, 2 * channels, (1, 1, 1), **options)
    self.conv2 = Conv(channels, channels, (1, 1, 1), **options)

  def encode(self, frames: Float[Array, "T H W 3"]) -> Float[Array, "t y x c"]:
    """Pixels in [-1, 1] to normalised latents, float32.

    Raises:
      ValueError: T is not 4n + 1 or a side is not a multiple of 8; the message names the nearest that are.
    """
    latent_shape(frames.shape, temporal_stride=self.config.temporal_stride, spatial_stride=self.config.spatial_stride)
    moments = self.conv1(_in_chunks(self.encoder, frames.astype(self.dtype), self.config.temporal_stride))
    mean = moments[..., : self.config.latent_channels].astype(jnp.float32)
    return (mean - jnp.asarray(LATENT_MEAN)) / jnp.asarray(LATENT_STD)

  def decode(self, latents: Float[Array, "t y x c"]) -> Float[Array, "T H W 3"]:
    """Normalised latents to pixels, float32, about in [-1, 1] but not clipped."""
    x = latents.astype(jnp.float32) * jnp.asarray(LATENT_STD) + jnp.asarray(LATENT_MEAN)
    return _in_chunks(self.decoder, self.conv2(x.astype(self.dtype)), 1).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
  """How large frames are cut into tiles whose seams are blended; sides in latents, of 8 pixels each.

  Attributes:
    size: side of a tile.
    overlap: of neighbouring tiles, over which one fades into the other.
  """

  size: int = 32
  overlap: int = 8

  def __post_init__(self):
    if not 0 < self.overlap <= self.size // 2:
      raise ValueError(f"the overlap of tiles is positive and at most half their size {self.size}, got {self.overlap}")

  def places(self, length: int, scale: int = 1) -> list[tuple[int, int, np.ndarray]]:
    """Start, length and weights of the tiles along a side; the weights of all tiles add up to 1 everywhere.

    Args:
      length: of the side, in latents.
      scale: weights to a latent.
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
      total[start * scale:(start + size) * scale] += weight
    return [(start, size, weight / total[start * scale:(start + size) * scale]) for start, weight in zip(starts, weights)]


def encode_tiled(encode: Callable[[np.ndarray], Array], frames: Float[np.ndarray, "T H W 3"], tiling: Tiling, *,
                 spatial_stride: int, temporal_stride: int) -> Float[np.ndarray, "t y x c"]:
  """Encodes tile by tile; see `VAE.encode`."""
  _, height, width = latent_shape(frames.shape, temporal_stride=temporal_stride, spatial_stride=spatial_stride)
  out = 0.0
  for (y, y_size, y_weight), (x, x_size, x_weight) in itertools.product(tiling.places(height), tiling.places(width)):
    rows, columns = (slice(start * spatial_stride, (start + size) * spatial_stride) for start, size in ((y, y_size), (x, x_size)))
    tile = np.asarray(encode(frames[:, rows, columns])) * (y_weight[:, None] * x_weight)[None, ..., None]
    out = out + np.pad(tile, ((0, 0), (y, height - y - y_size), (x, width - x - x_size), (0, 0)))
  return out


def decode_tiled(decode: Callable[[np.ndarray], Array], latents: Float[np.ndarray, "t y x c"], tiling: Tiling, *,
                 spatial_stride: int) -> Float[np.ndarray, "T H W 3"]:
  """Decodes tile by tile; see `VAE.decode`."""
  _, height, width, _ = latents.shape
  out = 0.0
  sides = (tiling.places(length, spatial_stride) for length in (height, width))
  for (y, y_size, y_weight), (x, x_size, x_weight) in itertools.product(*sides):
    tile = np.asarray(decode(latents[:, y:y + y_size, x:x + x_size])) * (y_weight[:, None] * x_weight)[None, ..., None]
    edges = [(start * spatial_stride, (length - start - size) * spatial_stride)
             for start, size, length in ((y, y_size, height), (x, x_size, width))]
    out = out + np.pad(tile, ((0, 0), *edges, (0, 0)))
  return out


def _in_chunks(module: Callable[[Array, Caches], Array], x: Float[Array, "t ..."], size: int) -> Float[Array, "u ..."]:
  """Runs the first frame, then chunks of `size` frames, each with what the one before remembers."""
  caches = Caches(None)
  first = module(x[:1], caches)
  if len(x) == 1:
    return first

  def step(remembered, chunk):
    caches = Caches(remembered)
    out = module(chunk, caches)
    return caches.written, out

  _, rest = jax.lax.scan(step, caches.written, x[1:].reshape(-1, size, *x.shape[1:]))
  return jnp.concatenate([first, rest.reshape(-1, *rest.shape[2:])])
