"""Quantised kernels in files, one layer after another: whole stacks in floats never exist."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from univid_jax.core.errors import UserError, first_line
from univid_jax.core.options import Quantize
from univid_jax.core.params import ParamPath
from univid_jax.models.quantized import QuantizationError, QuantizedKernel, quantize, squared_norms

# The arrays of a quantised kernel are stored under its path plus these names.
PARTS = ("numbers", "scale")


def read_layerwise(
  open_arrays: Callable[[Sequence[ParamPath]], Mapping[ParamPath, Any]],
  abstract: Mapping[str, Any],
  *,
  stored: Quantize,
) -> tuple[dict[str, Any], list[float]]:
  """Reads parameters; kernels that are to be quantised are read layer by layer.

  Args:
    open_arrays: returns TensorStore arrays by path.
    abstract: shapes, dtypes and shardings in nested dicts.
    stored: how the quantised kernels are stored.

  Returns:
    The parameters, and the relative L2 error of each layer if they are quantised now.

  Raises:
    UserError: the weights are damaged.
  """
  flat: dict[ParamPath, Any] = traverse_util.flatten_dict(dict(abstract))
  kernels = [path for path, value in flat.items() if isinstance(value, QuantizedKernel)]
  paths = [path for path in flat if path not in kernels]
  if stored == Quantize.NONE:
    paths += kernels
  else:
    paths += [(*path, part) for path in kernels for part in PARTS]
  arrays, errors = open_arrays(paths), QuantizationError()
  values: dict[ParamPath, Any] = {}
  for path, value in flat.items():
    if not isinstance(value, QuantizedKernel):
      values[path] = _read(arrays[path], value)
    elif stored == Quantize.NONE:
      values[path] = _quantize_layers(arrays[path], value, errors)
    else:
      numbers, scale = (_read(arrays[*path, part], getattr(value, part)) for part in PARTS)
      values[path] = QuantizedKernel(numbers, scale, value.method)
  return traverse_util.unflatten_dict(values), errors.by_layer


def _read(source: Any, abstract: jax.ShapeDtypeStruct) -> Array:
  """Reads an array into its shards; parts that several devices hold are read once."""
  shape = tuple(source.shape)
  if shape != abstract.shape:
    raise UserError(f"{source.kvstore.path} is damaged: it has the shape {shape} instead of {abstract.shape}")

  @functools.cache
  def read_part(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
    part = source[tuple(slice(*each) for each in bounds)] if bounds else source
    try:
      return part.read().result().astype(abstract.dtype)
    except ValueError as error:
      raise UserError(f"cannot read the weights in {source.kvstore.path}: {first_line(error)}") from error

  def read(index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None
    return read_part(tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True)))

  return jax.make_array_from_callback(shape, abstract.sharding, read)


def _quantize_layers(source: Any, abstract: QuantizedKernel, errors: QuantizationError) -> QuantizedKernel:
  """Reads and quantises a stack of kernels, with only one of them in floats at a time."""
  final_shardings = jax.tree.map(lambda x: x.sharding, abstract)
  shardings = jax.tree.map(lambda x: x.with_memory_kind(None), final_shardings)  # also for a base in host memory
  num_layers, *shape = abstract.shape
  mesh = shardings.numbers.mesh
  layer_sharding = NamedSharding(mesh, PartitionSpec(*shardings.numbers.spec[1:]))
  layer = jax.ShapeDtypeStruct(tuple(shape), source.dtype.numpy_dtype, sharding=layer_sharding)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))
  def quantize_layer(stack: QuantizedKernel, kernel: Array, index: Int[Array, ""]) -> tuple[QuantizedKernel, Array]:
    quantized = quantize(kernel, abstract.method)
    update = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
    return jax.tree.map(lambda x, new: update(x, new), stack, quantized), squared_norms(kernel, quantized)

  stack = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract), out_shardings=shardings)()
  squares = []
  for index in range(num_layers):
    stack, error = quantize_layer(stack, _read(source[index], layer), jnp.int32(index))
    squares.append(error)
  for index, error in enumerate(squares):
    errors.add(index, np.asarray(error))
  return jax.device_put(stack, final_shardings)


def describe_parts(
  path: ParamPath, shape: tuple[int, ...], method: Quantize
) -> dict[ParamPath, tuple[tuple[int, ...], str]]:
  """Returns the shape and dtype of each array that stores a quantised kernel, by path."""
  kernel = jax.eval_shape(functools.partial(quantize, method=method), jax.ShapeDtypeStruct(shape, jnp.float32))
  return {(*path, part): (getattr(kernel, part).shape, str(getattr(kernel, part).dtype)) for part in PARTS}


_quantize_kernel = jax.jit(quantize, static_argnames="method")
_squared_norms = jax.jit(squared_norms)


def quantize_on_host(
  kernel: np.ndarray, method: Quantize, float8: tuple[np.ndarray, np.ndarray] | None
) -> tuple[dict[ParamPath, np.ndarray], np.ndarray]:
  """Quantises a kernel on the CPU.

  Args:
    kernel: (in_dim, out_dim).
    method: how to quantise it.
    float8: the kernel as stored, see `TensorFile.read_float8`, which FP8 keeps unchanged.

  Returns:
    Arrays by name of the part, and the squared norms of the error and of the kernel.
  """
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    if method == Quantize.FP8 and float8 is not None:
      numbers, scale = (np.ascontiguousarray(part.T) for part in float8)
      quantized = QuantizedKernel(jnp.asarray(numbers.view(np.uint8)), jnp.asarray(scale), method)
    else:
      quantized = _quantize_kernel(jnp.asarray(kernel), method=method)
    squares = np.asarray(_squared_norms(jnp.asarray(kernel), quantized))
  return {(part,): np.asarray(getattr(quantized, part)) for part in PARTS}, squares
