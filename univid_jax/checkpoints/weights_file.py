"""The parameters of a small model in one safetensors file, named by dotted paths."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import tensorstore as ts
from etils import epath
from flax import traverse_util

from univid_jax.checkpoints.tensor_files import open_tensors
from univid_jax.core.bucket_files import copy_file
from univid_jax.core.errors import UserError
from univid_jax.core.params import ParamPath

SUFFIX = ".safetensors"


def save_arrays(path: epath.PathLike, tree: Mapping[str, Any]) -> None:
  """Saves nested NumPy arrays."""
  flat: dict[ParamPath, Any] = traverse_util.flatten_dict(dict(tree))
  arrays = {".".join(keys): np.ascontiguousarray(value) for keys, value in flat.items()}
  epath.Path(path).write_bytes(safetensors.numpy.save(arrays, metadata={}))


def restore_arrays(path: epath.PathLike, abstract: Mapping[str, Any]) -> dict[str, Any]:
  """Reads nested arrays.

  Args:
    path: a file written by `save_arrays`.
    abstract: shapes, dtypes and shardings of the result.

  Raises:
    UserError: they cannot be read, or have other names or shapes.
  """
  arrays, values = _read(path), {}
  flat: dict[ParamPath, Any] = traverse_util.flatten_dict(dict(abstract))
  for keys, wanted in flat.items():
    array = _find(arrays, keys, path)
    if array.shape != wanted.shape:
      raise UserError(f"{path} is damaged: {'.'.join(keys)} has the shape {array.shape} instead of {wanted.shape}")
    values[keys] = jax.device_put(array.astype(wanted.dtype), wanted.sharding)
  return traverse_util.unflatten_dict(values)


def open_arrays(path: epath.PathLike, paths: Iterable[ParamPath]) -> dict[ParamPath, Any]:
  """Opens arrays as TensorStore arrays, like `orbax_files.open_arrays`; raises like `restore_arrays`."""
  arrays = _read(path)
  return {keys: ts.array(_find(arrays, keys, path)) for keys in paths}


def _read(path: epath.PathLike) -> dict[str, np.ndarray]:
  file = open_tensors(copy_file(path))
  return {name: file.read(name) for name in file.infos}


def _find(arrays: Mapping[str, np.ndarray], keys: ParamPath, path: epath.PathLike) -> np.ndarray:
  name = ".".join(keys)
  if name not in arrays:
    raise UserError(f"{path} is damaged: it has no {name}")
  return arrays[name]
