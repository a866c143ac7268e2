"""Quantised kernels of frozen Linears: numbers in 4 or 8 bits, and scales.

qwix computes them. Its `QArray` is stored as plain bytes, which compilers slice and store as they are: where the
hardware lacks 8-bit floats or 4-bit integers, XLA would convert whole stacks of layers.
"""

import dataclasses
import functools
import threading
from collections.abc import Mapping
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from univid_jax.core.errors import UserError
from univid_jax.core.options import Quantize
from univid_jax.platform import cpu
from univid_jax.platform.current import Platform, current_platform

# The types as qwix names them.
QTYPES: Mapping[Quantize, DTypeLike] = {Quantize.INT8: jnp.int8, Quantize.FP8: jnp.float8_e4m3fn, Quantize.NF4: "nf4"}

# Maximum inputs of a kernel that share a scale. FP8 has exponents, so one scale per output is enough.
TILE = 64

# The values of NF4's 16 codes: QLoRA (arXiv 2305.14314), appendix E.
# fmt: off
NF4_VALUES = (
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
  -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
  0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


@no_type_check  # of fields at run time: leaves of a pytree can be anything
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
  """A kernel ([layers,] in_dim, out_dim) whose inputs are divided into tiles that share scales.

  Attributes:
    numbers: (*layers, in_dim, out_dim): int8, or the bits of float8_e4m3fn in uint8. NF4: (*layers, in_dim / 2,
      out_dim), for each tile the codes of the first half in the lower bits, those of the second half in the upper bits.
      With any method, a quarter as many uint32 if the kernel is stored `in_words`.
    scale: (*layers, tiles, out_dim), float32.
    method: how the kernel is quantised.
  """

  numbers: Array
  scale: Float[Array, "*layers tiles o"]
  method: Quantize = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    *layers, num_rows, out_dim = self.numbers.shape
    in_words = self.numbers.dtype == jnp.uint32
    return *layers, num_rows * (4 if in_words else 1) * (2 if self.method == Quantize.NF4 else 1), out_dim

  @property
  def ndim(self) -> int:
    return self.numbers.ndim

  def __getitem__(self, index: Any) -> "QuantizedKernel":
    return jax.tree.map(lambda x: x[index], self)


def quantize(kernel: Float[Array, "*layers i o"], method: Quantize) -> QuantizedKernel:
  """Quantises a kernel.

  Raises:
    UserError: the method is NF4, which stores pairs of inputs, and their number is odd.
  """
  *layers, in_dim, out_dim = kernel.shape
  tile = in_dim if method == Quantize.FP8 else tile_size(in_dim)
  if method == Quantize.NF4 and tile % 2:
    raise UserError(f"nf4 cannot store a Linear with {in_dim} inputs, an odd number: use int8 or fp8")
  tiles = kernel.astype(jnp.float32).reshape(*layers, in_dim // tile, tile, out_dim)
  channels = [axis for axis in range(tiles.ndim) if axis != tiles.ndim - 2]
  quantized = qwix.quantize(tiles, QTYPES[method], channelwise_axes=channels)
  numbers = quantized.qvalue
  if method == Quantize.FP8:
    numbers = jax.lax.bitcast_convert_type(numbers, jnp.uint8)
  elif method == Quantize.NF4:
    low, high = jnp.split(numbers.astype(jnp.uint8), 2, axis=-2)
    numbers = low | high << 4
  return QuantizedKernel(numbers.reshape(*layers, -1, out_dim), quantized.scale.squeeze(-2), method)


def tile_size(in_dim: int) -> int:
  """Returns how many inputs of a kernel share a scale: an even number if possible."""
  sizes = [size for size in range(1, min(in_dim, TILE) + 1) if in_dim % size == 0]
  return max([size for size in sizes if size % 2 == 0] or sizes)


def in_words(kernel: QuantizedKernel) -> QuantizedKernel:
  """Returns the kernel with four numbers in a word; as it is, if its tiles do not divide into four.

  TPUs can slice a stack of words in host memory; for every slice of a stack of bytes they copy all of it.
  """
  shape, size = kernel.numbers.shape, _rows_per_tile(kernel)
  if size % 4:
    return kernel
  numbers = jax.lax.bitcast_convert_type(kernel.numbers, jnp.uint8).astype(jnp.uint32)
  quarters = jnp.split(numbers.reshape(*shape[:-2], -1, size, shape[-1]), 4, axis=-2)
  words = functools.reduce(jnp.bitwise_or, (quarter << 8 * i for i, quarter in enumerate(quarters)))
  return dataclasses.replace(kernel, numbers=words.reshape(*shape[:-2], -1, shape[-1]))


def _out_of_words(kernel: QuantizedKernel) -> QuantizedKernel:
  *layers, num_words, out_dim = kernel.numbers.shape
  words = kernel.numbers.reshape(*layers, -1, _rows_per_tile(kernel), out_dim)
  numbers = jnp.concatenate([words >> 8 * i & 255 for i in range(4)], axis=-2).astype(jnp.uint8)
  numbers = numbers.reshape(*layers, 4 * num_words, out_dim)
  is_signed = kernel.method == Quantize.INT8
  return dataclasses.replace(kernel, numbers=jax.lax.bitcast_convert_type(numbers, jnp.int8) if is_signed else numbers)


def _rows_per_tile(kernel: QuantizedKernel) -> int:
  """Returns how many rows of numbers hold a tile of inputs."""
  in_dim = kernel.shape[-2]
  return kernel.numbers.shape[-2] * tile_size(in_dim) // in_dim


def dequantize(kernel: Float[Array, "..."] | QuantizedKernel) -> Float[Array, "..."]:
  """Returns the values of a quantised kernel, in float32; returns arrays as they are."""
  if not isinstance(kernel, QuantizedKernel):
    return kernel
  shape, num_tiles = kernel.shape, kernel.scale.shape[-2]
  # Otherwise XLA moves the conversions of all layers out of their loop.
  numbers, scale = jax.lax.optimization_barrier((kernel.numbers, kernel.scale))
  kernel = QuantizedKernel(numbers, scale, kernel.method)
  if kernel.numbers.dtype == jnp.uint32:
    kernel = _out_of_words(kernel)
  tiles = kernel.numbers.reshape(*shape[:-2], num_tiles, -1, shape[-1])
  if kernel.method == Quantize.FP8:
    tiles = jax.lax.bitcast_convert_type(tiles, jnp.float8_e4m3fn)
  elif kernel.method == Quantize.NF4:
    tiles = _decode_nf4(jnp.concatenate([tiles & 15, tiles >> 4], axis=-2))
  return (tiles.astype(jnp.float32) * kernel.scale[..., None, :]).reshape(shape)


def _decode_nf4(codes: Array) -> Array:
  """Looks up the values of codes by a tree of selections, because a TPU gathers one number after another."""
  codes, values = codes.astype(jnp.int32), [jnp.float32(value) for value in NF4_VALUES]
  while len(values) > 1:
    values = [jnp.where(codes & 1, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    codes >>= 1
  return values[0]


def multiply(
  x: Float[Array, "..."], kernel: Float[Array, "i o"], in_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> Float[Array, "..."]:
  """Returns the product of x with a kernel in x's dtype, (..., *in_shape) to (..., *out_shape)."""
  kernel = kernel.astype(x.dtype).reshape(*in_shape, *out_shape)
  tensordot = cpu.tensordot if current_platform() == Platform.CPU else jnp.tensordot
  return tensordot(x, kernel, len(in_shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def multiply_quantized(
  x: Float[Array, "..."], kernel: QuantizedKernel, in_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> Float[Array, "..."]:
  """Computes `multiply`; the backward pass dequantises again, and treats the kernel as a constant."""
  return multiply(x, dequantize(kernel), in_shape, out_shape)


def _multiply_forward(
  x: Float[Array, "..."], kernel: QuantizedKernel, in_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> tuple[Float[Array, "..."], QuantizedKernel]:
  return multiply_quantized(x, kernel, in_shape, out_shape), kernel


def _multiply_backward(
  in_shape: tuple[int, ...], out_shape: tuple[int, ...], kernel: QuantizedKernel, gradient: Float[Array, "..."]
) -> tuple[Float[Array, "..."], None]:
  return multiply(gradient, dequantize(kernel).T, out_shape, in_shape), None


multiply_quantized.defvjp(_multiply_forward, _multiply_backward)


def is_quantized(x: object) -> bool:
  """Returns whether a leaf of parameters is a quantised kernel; also says to `jax.tree` that it is a leaf."""
  return isinstance(x, QuantizedKernel)


def quantization_of(params: Any) -> Quantize:
  """Returns how the kernels among parameters are quantised."""
  leaves = jax.tree.leaves(params, is_leaf=is_quantized)
  return next((x.method for x in leaves if isinstance(x, QuantizedKernel)), Quantize.NONE)


class QuantizationError:
  """Sums the relative L2 error of quantised kernels by layer; several threads may add to it."""

  def __init__(self) -> None:
    self._squares: dict[int, np.ndarray] = {}
    self._lock = threading.Lock()

  def add(self, layer: int, squares: Float[np.ndarray, "2"]) -> None:
    """Adds the result of `squared_norms` for a kernel."""
    with self._lock:
      self._squares[layer] = self._squares.get(layer, np.zeros(2)) + np.asarray(squares, np.float64)

  @property
  def by_layer(self) -> list[float]:
    """The error of each layer."""
    return [float(np.sqrt(error / max(norm, 1e-300))) for _, (error, norm) in sorted(self._squares.items())]


def squared_norms(kernel: Float[Array, "i o"], quantized: QuantizedKernel) -> Float[Array, "2"]:
  """Returns the squared norms of a kernel's quantisation error, and of the kernel."""
  kernel = kernel.astype(jnp.float32)
  return jnp.stack([jnp.sum(jnp.square(x)) for x in (dequantize(quantized) - kernel, kernel)])
