"""Parameters on disk, as Orbax stores them: the only module that relies on details of its format.

Undocumented, and checked by tests/test_orbax_files.py:

- `PyTreeCheckpointHandler(use_ocdbt=False)` stores each array as a zarr array in a folder named by its dotted path, and
  records no chunk shapes that a reader would compare with those on disk. `create_arrays` relies on it.
- A reader that does not know Orbax finds the arrays in these folders. `open_arrays` relies on it.
- `CheckpointManager` stores each item in a folder of its name, which `StandardCheckpointer` reads. `restore_items`
  relies on it.
- It stores metrics as JSON in `METRICS_FILE`, in which `SavedCheckpoints` reads and writes the validation loss.
- Grain's handler stores the position of each process in process_INDEX-of-COUNT.json. `read_positions` relies on it.
- Orbax logs through absl, and abandons the other arrays if one fails. `silence_orbax` relies on the resulting errors.
"""

import functools
import logging
import math
import mmap
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax import traverse_util

from univid_jax.checkpoints.tensor_files import numpy_dtype
from univid_jax.core.errors import UserError, first_line
from univid_jax.core.numbers import ceil_div
from univid_jax.core.params import ParamPath
from univid_jax.core.paths import is_remote, make_absolute

# Arrays larger than this, such as stacked layers, are stored in several chunks.
CHUNK_BYTES = 64 << 20
# The file with the validation loss, in a checkpoint.
METRICS_FILE = "metrics/metrics"

_ORBAX = os.path.dirname(ocp.__file__)


def silence_orbax() -> None:
  """Suppresses from now on Orbax's logs, and the tracebacks that it leaves behind after a failure.

  Orbax raises every error as well, its warnings are for programmers, and what it abandons prints a traceback for every
  array: writes that find their event loop closed, results and coroutines that are never awaited.
  """
  _silence_logs()
  # Checked each time: code that replaced the hook may have restored the previous one.
  if not isinstance(sys.unraisablehook, _IgnoreAbandoned):
    sys.unraisablehook = _IgnoreAbandoned(sys.unraisablehook)


class _IgnoreAbandoned:
  """Replaces `sys.unraisablehook`, and passes on to the previous hook what is not Orbax's."""

  def __init__(self, following: Callable[[Any], Any]):
    self._following = following
    # Kept as attributes: it is also called at interpreter exit, when the module's globals are None.
    self._coroutine, self._orbax = types.CoroutineType, _ORBAX

  def __call__(self, args: Any) -> None:
    is_closed = isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == "Event loop is closed"
    is_coroutine = isinstance(args.object, self._coroutine) and self._orbax in args.object.cr_code.co_filename
    if not (is_closed or is_coroutine):
      self._following(args)


@functools.cache
def _silence_logs() -> None:
  def keep_record(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    abandoned = _ORBAX in record.getMessage() or re.match("[A-Z_]+: Error (reading|writing) ", str(error))
    return not (_ORBAX in record.pathname or abandoned)

  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(keep_record)
  warnings.filterwarnings("ignore", "coroutine '(async_serialize|_read_array|_serialize)", RuntimeWarning)


def save_arrays(folder: epath.PathLike, tree: Any) -> None:
  """Saves nested arrays to a new folder."""
  silence_orbax()
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(make_absolute(folder), tree)


def restore_arrays(folder: epath.PathLike, abstract: Any = None) -> Any:
  """Reads nested arrays; a process may do so alone.

  Args:
    folder: a folder written by `save_arrays` or through `create_arrays`, or that of an item of a run's checkpoint.
    abstract: shapes, dtypes and shardings of the result; as stored by default.

  Raises:
    UserError: they cannot be read.
  """
  silence_orbax()
  index = jax.process_index()
  # Otherwise Orbax would wait for the other processes, in collectives that may be matched with other ones.
  alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
  try:
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
      return checkpointer.restore(make_absolute(folder), abstract)
  except Exception as error:  # Orbax and TensorStore raise errors of many types for damaged files
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
      raise
    raise UserError(f"cannot read the weights in {folder}: {first_line(error)}") from error


def restore_items(folder: epath.PathLike, items: Mapping[str, Any]) -> Mapping[str, Any]:
  """Reads some of the items of a run's checkpoint; a process may do so alone.

  Args:
    folder: folder of the checkpoint.
    items: shapes, dtypes and shardings of each item by its name.

  Raises:
    UserError: they cannot be read.
  """
  return {name: restore_arrays(make_absolute(folder) / name, abstract) for name, abstract in items.items()}


def read_positions(folder: epath.Path) -> list[bytes]:
  """Returns the position in the data that each process saved, given the folder of the item `data`."""
  files = {file.name: file for file in folder.glob("process_*-of-*.json")}
  count = int(min(files, default="process_0-of-1.json").removesuffix(".json").rpartition("-")[2])
  return [(folder / f"process_{index}-of-{count}.json").read_bytes() for index in range(count)]


def create_arrays(
  folder: epath.PathLike, specs: Mapping[ParamPath, tuple[tuple[int, ...], str]]
) -> dict[ParamPath, Any]:
  """Creates a checkpoint whose arrays are written afterwards, layer by layer.

  Orbax saves whole arrays only, which have up to 5.7 GB in the 14B model. So here it saves zeros, with all of its
  metadata; then each array is created again, in chunks of one layer.

  Args:
    folder: folder of the new checkpoint.
    specs: shape and dtype of each array by its path; the first dim of arrays under `blocks` is the layer.

  Returns:
    TensorStore arrays of zeros by path.
  """
  silence_orbax()
  zeros = {path: _virtual_zeros(shape, numpy_dtype(dtype)) for path, (shape, dtype) in specs.items()}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
    checkpointer.save(make_absolute(folder), args=ocp.args.PyTreeSave(traverse_util.unflatten_dict(zeros)))
  return {path: _create_array(_array_url(folder, path), path, *spec) for path, spec in specs.items()}


def open_arrays(folder: epath.PathLike, paths: Iterable[ParamPath]) -> dict[ParamPath, Any]:
  """Opens arrays that were written through `create_arrays`, to read them layer by layer.

  Args:
    folder: folder of the checkpoint. A missing chunk reads as zeros, so count its files first.
    paths: paths of the arrays.

  Returns:
    TensorStore arrays by path.

  Raises:
    UserError: they cannot be opened.
  """
  try:
    futures = {path: ts.open({"driver": "zarr", "kvstore": _array_url(folder, path)}, read=True) for path in paths}
    return {path: future.result() for path, future in futures.items()}
  except ValueError as error:
    raise UserError(f"cannot read the weights in {folder}: {first_line(error)}") from error


def _array_url(folder: epath.PathLike, path: ParamPath) -> str:
  folder = make_absolute(folder)
  base = str(folder) if is_remote(folder) else f"file://{folder}"
  return f"{base}/{'.'.join(path)}/"


def _virtual_zeros(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
  """Returns zeros that take no memory: private pages that are never written to all map to one page."""
  nbytes = max(int(np.prod(shape)) * dtype.itemsize, 1)
  pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  # JAX on CPUs refers to aligned NumPy memory and does not copy it.
  return jax.device_put(np.frombuffer(pages, dtype, count=int(np.prod(shape))).reshape(shape), jax.devices("cpu")[0])


def _create_array(url: str, path: ParamPath, shape: tuple[int, ...], dtype: str) -> Any:
  metadata = {
    "shape": shape,
    "chunks": _chunk_shape(path, shape, dtype),
    "dtype": dtype if dtype == "bfloat16" else np.dtype(dtype).str,  # zarr's names
    "compressor": {"id": "zstd", "level": 1},
  }
  spec = {
    "driver": "zarr",
    "kvstore": url,
    "metadata": metadata,
    "store_data_equal_to_fill_value": True,  # Orbax treats an absent chunk as lost
  }
  return ts.open(spec, create=True, delete_existing=True).result()


def num_chunks(path: ParamPath, shape: tuple[int, ...], dtype: str) -> int:
  """Returns how many files `create_arrays` stores an array in."""
  return math.prod(ceil_div(size, chunk) for size, chunk in zip(shape, _chunk_shape(path, shape, dtype)))


def _chunk_shape(path: ParamPath, shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
  """Returns the shape of a chunk: one layer of stacked layers; else the first dim is split above CHUNK_BYTES."""
  if path[0] == "blocks":
    return (1, *_chunk_shape(path[1:], shape[1:], dtype))
  row_bytes = int(np.prod(shape[1:])) * numpy_dtype(dtype).itemsize
  return (max(1, min(shape[0], CHUNK_BYTES // max(row_bytes, 1))), *shape[1:])
