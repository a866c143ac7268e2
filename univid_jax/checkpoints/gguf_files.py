"""GGUF files: the header's values, and tensors, which are dequantised when they are read.

The package gguf dequantises. Its reader trusts the header, so that a damaged file makes it loop until memory is
exhausted; therefore the header is parsed here.
"""

import functools
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from univid_jax.checkpoints.tensor_files import TensorFile, TensorInfo, numpy_dtype, read_bytes
from univid_jax.core.errors import UserError
from univid_jax.core.installation import install_command
from univid_jax.core.numbers import round_up

VERSIONS = (2, 3)

# Format for `struct` of each type of scalar in the header.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Types of tensors that are stored as they are; all others are quantised, and float32 when read.
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}

# Bounds the memory and time that a damaged header costs. The largest vocabularies take about 10 MB.
_MAX_HEADER = 64 << 20

# Prefix under which programs for ComfyUI store the shape of a tensor that they reshaped before quantising it.
_SHAPE_KEY = "comfy.gguf.orig_shape."


class _Cursor:
  """Reads a header front to back; raises ValueError for anything that cannot be read."""

  def __init__(self, data: mmap.mmap):
    self.data, self.offset = data, 0

  def take(self, count: int) -> bytes:
    if self.offset + count > min(len(self.data), _MAX_HEADER):
      raise ValueError(f"its header does not end within the file, or within {_MAX_HEADER:,} bytes")
    self.offset += count
    return self.data[self.offset - count : self.offset]

  def number(self, kind: str) -> Any:
    return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

  def string(self) -> str:
    return self.take(self.number("Q")).decode()

  def value(self, kind: int) -> Any:
    """Reads a scalar, a string, or an array of either."""
    if kind in _SCALARS:
      return self.number(_SCALARS[kind])
    if kind == _STRING:
      return self.string()
    if kind != _ARRAY:
      raise ValueError(f"its header has a value of the unknown type {kind}")
    item, count = self.number("I"), self.number("Q")
    if item == _STRING:
      return [self.string() for _ in range(count)]
    if item not in _SCALARS:
      raise ValueError(f"its header has an array of the unknown type {item}")
    return np.frombuffer(self.take(count * struct.calcsize("<" + _SCALARS[item])), "<" + _SCALARS[item])


def open_gguf(path: Path) -> TensorFile:
  """Opens a .gguf file; reads its header only.

  Raises:
    OSError: the file is unreadable.
    UserError: it is damaged, has an unsupported quantisation, or the package gguf is not installed.
  """
  return _parse(path)[1]


def read_gguf_values(path: Path) -> dict[str, Any]:
  """Returns the values in a header: numbers, strings, arrays of numbers, lists of strings; raises like `open_gguf`."""
  return _parse(path)[0]


def _parse(path: Path) -> tuple[dict[str, Any], TensorFile]:
  if path.stat().st_size < 4:
    raise UserError(f"{path} is not a GGUF file")
  with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    try:
      return _parse_header(path, data)
    except (ValueError, struct.error) as error:
      if isinstance(error, UserError):
        raise
      raise UserError(f"{path} is not a complete GGUF file: {error}") from error


def _parse_header(path: Path, data: mmap.mmap) -> tuple[dict[str, Any], TensorFile]:
  cursor = _Cursor(data)
  if cursor.take(4) != b"GGUF":
    raise ValueError("it does not begin with GGUF")
  if (version := cursor.number("I")) not in VERSIONS:
    raise ValueError(f"version {version} is not supported, only {VERSIONS}")
  num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
  values: dict[str, Any] = {}
  for _ in range(num_values):
    key, kind = cursor.string(), cursor.number("I")
    if key in values:
      raise ValueError(f"its header has {key} twice")
    values[key] = cursor.value(kind)
  entries: dict[str, tuple[tuple[int, ...], str, int]] = {}
  for _ in range(num_tensors):
    name = cursor.string()
    if name in entries:
      raise ValueError(f"it has two tensors of the name {name}")
    dims = tuple(cursor.number("Q") for _ in range(cursor.number("I")))
    entries[name] = dims[::-1], _type_name(name, cursor.number("I")), cursor.number("Q")
  alignment = values.get("general.alignment", 32)
  if not isinstance(alignment, int) or alignment.bit_count() != 1:
    raise ValueError(f"its alignment is {alignment}, not a power of two")
  start = round_up(cursor.offset, alignment)
  return values, _make_tensors(path, entries, values, start=start, size=len(data))


def _make_tensors(
  path: Path,
  entries: Mapping[str, tuple[tuple[int, ...], str, int]],
  values: Mapping[str, Any],
  *,
  start: int,
  size: int,
) -> TensorFile:
  """Checks where the data of each tensor is, and returns the tensors.

  Args:
    path: path of the file.
    entries: shape, name of the type, and offset of each tensor.
    values: values in the header.
    start: offset of the data in the file, relative to which offsets count.
    size: size of the file.
  """
  infos, places, end, before = {}, {}, 0, "the header"
  for name, (shape, kind, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
    block, block_bytes = _block(path, kind)
    if not shape or min(shape) < 1 or shape[-1] % block:
      raise ValueError(f"{name} has the shape {shape}, which does not divide into the blocks of {block} of {kind}")
    nbytes = math.prod(shape) // block * block_bytes
    if offset < end:
      raise ValueError(f"{name} overlaps {before}")
    end, before = offset + nbytes, name
    if start + end > size:
      raise ValueError(f"{name} ends after the file")
    places[name] = start + offset, nbytes, (*shape[:-1], shape[-1] // block * block_bytes)
    infos[name] = TensorInfo(_original_shape(name, shape, values), _PLAIN.get(kind, "float32"))

  def read(name: str) -> np.ndarray:
    offset, count, byte_shape = places[name]
    data, kind = read_bytes(path, offset, count), entries[name][1]
    if kind in _PLAIN:
      return data.view(numpy_dtype(_PLAIN[kind])).reshape(infos[name].shape)
    return _dequantize(path, data.reshape(byte_shape), kind).reshape(infos[name].shape)

  texts = {key: value for key, value in values.items() if isinstance(value, str)}
  stored = {name: kind for name, (_, kind, _) in entries.items() if kind not in _PLAIN}
  return TensorFile(path, infos, read, texts, stored)


def _original_shape(name: str, shape: tuple[int, ...], values: Mapping[str, Any]) -> tuple[int, ...]:
  stored = values.get(_SHAPE_KEY + name)
  if stored is None:
    return shape
  original = tuple(int(n) for n in stored) if isinstance(stored, np.ndarray) else ()
  if not original or min(original) < 1 or math.prod(original) != math.prod(shape):
    raise ValueError(f"{_SHAPE_KEY}{name} is {original}, but the tensor is {shape}")
  return original


def _type_name(name: str, number: int) -> str:
  kinds = _import_gguf().GGMLQuantizationType
  try:
    return kinds(number).name
  except ValueError as error:
    raise ValueError(f"{name} has the unknown type {number}") from error


@functools.cache
def _block(path: Path, kind: str) -> tuple[int, int]:
  """Returns the numbers per block of a type, and its bytes; raises UserError if the type cannot be read."""
  gguf = _import_gguf()
  block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
  if kind not in _PLAIN:
    _dequantize(path, np.zeros((1, block_bytes), np.uint8), kind)
  return block, block_bytes


def _dequantize(path: Path, data: np.ndarray, kind: str) -> np.ndarray:
  gguf = _import_gguf()
  try:
    with np.errstate(all="ignore"):  # NaN and infinite weights are reported by the converter
      return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
  except NotImplementedError as error:
    raise UserError(f"{path} has tensors of the type {kind}, which the package gguf cannot dequantise") from error


def _import_gguf() -> Any:
  try:
    import gguf
    import gguf.quants
  except ModuleNotFoundError as error:
    raise UserError(f"GGUF files need the package gguf: {install_command('gguf')}") from error
  return gguf
