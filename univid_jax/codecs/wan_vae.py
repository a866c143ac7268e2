"""Wan's causal video autoencoders: 4 x 8 x 8 (Wan2.1) or 4 x 16 x 16 (Wan2.2) pixels per latent.

The first frame is a latent frame of its own. Ported from Wan2.1 and Wan2.2 (Apache-2.0).

A clip is computed in chunks (one frame, then four at a time; in the decoder one latent frame at a time), and each
convolution over time keeps the last frames of its input for the next chunk, so memory does not grow with the clip. All
of it is one program: the first chunk, then a scan over the others.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from univid_jax.codecs.tiling import Tiling, decode_tiled, encode_tiled
from univid_jax.codecs.vae_config import VAEConfig
from univid_jax.codecs.vae_layers import (
  AverageShortcut,
  Caches,
  CausalConv,
  ChannelNorm,
  Conv,
  Downsample,
  Layer,
  Level,
  RepeatShortcut,
  ResidualBlock,
  Upsample,
  fold_pixels,
  middle_layers,
  unfold_pixels,
)
from univid_jax.core.dims import latent_shape
from univid_jax.parallel.mesh import make_mesh
from univid_jax.platform.chips import Device


class Encoder(nnx.Module):
  """Maps pixels to the mean and log-variance of latents."""

  def __init__(self, config: VAEConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
    causal_conv = functools.partial(CausalConv, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    block = functools.partial(ResidualBlock, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    downsample = functools.partial(Downsample, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    dims = [config.dim * m for m in (1, *config.dim_mult)]
    self.patch_size = config.patch_size
    self.conv1 = causal_conv(3 * config.patch_size**2, dims[0])
    downsamples: list[Layer | Level] = []
    for level, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
      is_last = level == len(config.dim_mult) - 1
      temporal = not is_last and config.temporal_downsample[level]
      layers: list[Layer] = [block(in_dim if i == 0 else out_dim, out_dim) for i in range(config.num_res_blocks)]
      if not is_last:
        layers.append(downsample(out_dim, temporal=temporal))
      shortcut = AverageShortcut(out_dim, frames=2 if temporal else 1, side=1 if is_last else 2)
      downsamples += [Level(layers, shortcut)] if config.level_shortcuts else layers
    self.downsamples = nnx.List(downsamples)
    self.middle = nnx.List(middle_layers(dims[-1], dtype=dtype, param_dtype=param_dtype, rngs=rngs))
    self.norm = ChannelNorm(dims[-1], param_dtype=param_dtype, rngs=rngs)
    self.head = causal_conv(dims[-1], 2 * config.latent_channels)

  def __call__(self, x: Float[Array, "T H W 3"], caches: Caches) -> Float[Array, "t y x d"]:
    x = self.conv1(fold_pixels(x, self.patch_size), caches)
    for layer in (*self.downsamples, *self.middle):
      x = layer(x, caches)
    return self.head(jax.nn.silu(self.norm(x)), caches)


class Decoder(nnx.Module):
  """Maps latents to pixels."""

  def __init__(self, config: VAEConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
    causal_conv = functools.partial(CausalConv, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    block = functools.partial(ResidualBlock, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    upsample = functools.partial(Upsample, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    mult = config.dim_mult[::-1]
    dims = [(config.decoder_dim or config.dim) * m for m in (mult[0], *mult)]
    self.patch_size = config.patch_size
    self.conv1 = causal_conv(config.latent_channels, dims[0])
    self.middle = nnx.List(middle_layers(dims[0], dtype=dtype, param_dtype=param_dtype, rngs=rngs))
    upsamples: list[Layer | Level] = []
    channels = dims[0]
    for level, out_dim in enumerate(dims[1:]):
      is_last = level == len(mult) - 1
      temporal = not is_last and config.temporal_downsample[::-1][level]
      shortcut = None if is_last else RepeatShortcut(out_dim, frames=2 if temporal else 1, side=2)
      layers: list[Layer] = [block(channels if i == 0 else out_dim, out_dim) for i in range(config.num_res_blocks + 1)]
      channels = out_dim
      if not is_last:
        channels = out_dim if config.level_shortcuts else out_dim // 2
        layers.append(upsample(out_dim, channels, temporal=temporal))
      upsamples += [Level(layers, shortcut)] if config.level_shortcuts else layers
    self.upsamples = nnx.List(upsamples)
    self.norm = ChannelNorm(dims[-1], param_dtype=param_dtype, rngs=rngs)
    self.head = causal_conv(dims[-1], 3 * config.patch_size**2)

  def __call__(self, x: Float[Array, "t y x c"], caches: Caches) -> Float[Array, "T H W 3"]:
    x = self.conv1(x, caches)
    for layer in (*self.middle, *self.upsamples):
      x = layer(x, caches)
    return unfold_pixels(self.head(jax.nn.silu(self.norm(x)), caches), self.patch_size)


class VAE(nnx.Module):
  """The autoencoder. Clips have no batch dim: they differ in length, and a single one keeps a device busy.

  Args:
    config: the shape.
    dtype: of activations and convolutions.
    param_dtype: of the stored weights.
    rngs: provides the stream `params`.
  """

  def __init__(
    self, config: VAEConfig, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
  ):
    self.config, self.dtype = config, dtype
    channels = config.latent_channels
    conv = functools.partial(Conv, kernel=(1, 1, 1), dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.encoder = Encoder(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.decoder = Decoder(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.conv1 = conv(2 * channels, 2 * channels)
    self.conv2 = conv(channels, channels)

  def encode(self, frames: Float[Array, "T H W 3"]) -> Float[Array, "t y x c"]:
    """Encodes pixels in [-1, 1] to normalised latents, float32.

    Raises:
      UserError: T is not 4n + 1 or a side is not a multiple of the stride; the message names the nearest valid values.
    """
    latent_shape(frames.shape, temporal_stride=self.config.temporal_stride, spatial_stride=self.config.spatial_stride)
    moments = self.conv1(_run_in_chunks(self.encoder, frames.astype(self.dtype), self.config.temporal_stride))
    mean = moments[..., : self.config.latent_channels].astype(jnp.float32)
    return (mean - jnp.asarray(self.config.latent_mean)) / jnp.asarray(self.config.latent_std)

  def decode(self, latents: Float[Array, "t y x c"]) -> Float[Array, "T H W 3"]:
    """Decodes normalised latents to pixels, float32, about in [-1, 1] but not clipped."""
    x = latents.astype(jnp.float32) * jnp.asarray(self.config.latent_std) + jnp.asarray(self.config.latent_mean)
    return _run_in_chunks(self.decoder, self.conv2(x.astype(self.dtype)), 1).astype(jnp.float32)

  def decode_part(
    self, latents: Float[Array, "1 y x c"], kept: Sequence[Array] | None
  ) -> tuple[Float[Array, "T H W 3"], list[Array]]:
    """Decodes the next latent frame of a clip with the frames kept from the one before; None starts a clip."""
    x = latents.astype(jnp.float32) * jnp.asarray(self.config.latent_std) + jnp.asarray(self.config.latent_mean)
    caches = Caches(kept)
    return self.decoder(self.conv2(x.astype(self.dtype)), caches).astype(jnp.float32), caches.written


def _run_in_chunks(
  module: Callable[[Array, Caches], Array], x: Float[Array, "t ..."], size: int
) -> Float[Array, "_t ..."]:
  """Runs the first frame, then chunks of `size` frames, each with the frames kept from the one before."""
  caches = Caches(None)
  first = module(x[:1], caches)
  if len(x) == 1:
    return first

  def run_chunk(kept, chunk):
    caches = Caches(kept)
    out = module(chunk, caches)
    return caches.written, out

  _, rest = jax.lax.scan(run_chunk, caches.written, x[1:].reshape(-1, size, *x.shape[1:]))
  return jnp.concatenate([first, rest.reshape(-1, *rest.shape[2:])])


def jit_method(method: Callable[..., Any], graph: nnx.GraphDef) -> Any:
  """Returns a method of a module as a jitted function of the module's parameters and the method's arguments."""
  return jax.jit(lambda params, *inputs: method(nnx.merge(graph, params), *inputs))


class WanVAECodec:
  """An autoencoder of Wan as a codec of NumPy arrays; compiles one program per shape.

  Args:
    config: the autoencoder's shape.
    graph: the autoencoder without its parameters.
    params: its parameters.
    mesh: the devices that hold the parameters and compute.
    devices: devices that encode several clips, one each; by default those of `mesh`.
    tiling: how large frames are cut, or None.
  """

  has_weights = True

  def __init__(
    self,
    config: VAEConfig,
    graph: nnx.GraphDef,
    params: Any,
    *,
    mesh: Mesh,
    devices: Sequence[Device] = (),
    tiling: Tiling | None = None,
  ):
    self.latent_channels = config.latent_channels
    self.temporal_stride, self.spatial_stride = config.temporal_stride, config.spatial_stride
    self._graph, self._params, self._tiling = graph, params, tiling
    self._devices = tuple(devices) or tuple(mesh.devices.flat)

    def compile_method(method: Callable[..., Any]) -> Callable[..., Any]:
      run = jit_method(method, graph)

      def call(*inputs):
        with jax.set_mesh(mesh):  # the caller may have set another mesh
          return run(params, *inputs)

      return call

    self._encode, self._decode = compile_method(VAE.encode), compile_method(VAE.decode)
    self._decode_part = compile_method(VAE.decode_part)

  def encode(self, frames: Float[np.ndarray, "T H W 3"]) -> Float[np.ndarray, "t y x c"]:
    """Encodes pixels in [-1, 1] to normalised latents, float32.

    Raises:
      UserError: T is not 4n + 1 or a side is not a multiple of the stride.
    """
    return self._run_encoder(self._encode, np.asarray(frames, np.float32))

  @property
  def num_parallel(self) -> int:
    """How many clips `encode_many` encodes at the same time: one on each device."""
    return len(self._devices)

  def encode_many(self, clips: Sequence[Float[np.ndarray, "T H W 3"]]) -> list[Float[np.ndarray, "t y x c"]]:
    """Encodes up to `num_parallel` clips of one shape, each as `encode` does."""
    if len(clips) == 1:
      return [self.encode(clips[0])]
    missing = self.num_parallel - len(clips)
    batch = np.stack([*clips, *[clips[0]] * missing], dtype=np.float32)
    return list(self._run_encoder(self._encode_on_all, batch)[: len(clips)])

  def _run_encoder(self, encode: Callable[[np.ndarray], Array], frames: np.ndarray) -> np.ndarray:
    if self._tiling is None:
      return np.asarray(encode(frames))
    return encode_tiled(
      encode, frames, self._tiling, spatial_stride=self.spatial_stride, temporal_stride=self.temporal_stride
    )

  @functools.cached_property
  def _encode_on_all(self) -> Callable[[np.ndarray], Array]:
    """Encodes as many clips as there are devices, one on each."""
    mesh = make_mesh({"data": -1}, self._devices)
    params = jax.device_put(self._params, NamedSharding(mesh, PartitionSpec()))
    graph, each = self._graph, PartitionSpec("data")  # a function that refers to `self` would keep its caches alive

    def encode(params, batch):
      return VAE.encode(nnx.merge(graph, params), batch[0])[None]

    run = jax.jit(jax.shard_map(encode, mesh=mesh, in_specs=(PartitionSpec(), each), out_specs=each))

    def call(batch):
      with jax.set_mesh(mesh):
        return run(params, jax.device_put(batch, NamedSharding(mesh, each)))

    return call

  def decode(self, latents: Float[np.ndarray, "t y x c"]) -> Float[np.ndarray, "T H W 3"]:
    """Decodes latents to pixels, about in [-1, 1]."""
    latents = np.asarray(latents, np.float32)
    if self._tiling is None:
      return np.asarray(self._decode(latents))
    return decode_tiled(self._decode, latents, self._tiling, spatial_stride=self.spatial_stride)

  def decode_parts(self, latents: Float[np.ndarray, "t y x c"]) -> Iterator[Float[np.ndarray, "T H W 3"]]:
    """Decodes latents like `decode`, one latent frame at a time, in memory that does not grow with the clip."""
    kept: dict[int, list[Array]] = {}

    def decode(number: int, part: np.ndarray) -> Array:
      frames, kept[number] = self._decode_part(part, kept.get(number))
      return frames

    for part in np.asarray(latents, np.float32)[:, None]:
      if self._tiling is None:
        yield np.asarray(decode(0, part))
      else:
        numbers = itertools.count()
        yield decode_tiled(
          lambda tile, numbers=numbers: decode(next(numbers), tile),
          part,
          self._tiling,
          spatial_stride=self.spatial_stride,
        )
