"""Checkpoint files as other programs write them, made from golden weights; and what they must be read as."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from univid_jax.checkpoints.checksums import combine_digests, tensor_digest
from univid_jax.checkpoints.info import read_info

Tensors = Mapping[str, np.ndarray]
GGUFTensors = Mapping[str, tuple[np.ndarray, str]]  # data and type

SAFETENSORS_DTYPES = {
  np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
  np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
  np.dtype(ml_dtypes.bfloat16): "BF16",
  np.dtype(np.float16): "F16",
  np.dtype(np.float32): "F32",
  np.dtype(np.uint8): "U8",
  np.dtype(np.int8): "I8",
  np.dtype(np.int32): "I32",
}


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
  """Writes a file, 8-bit floats included, which the library cannot write from NumPy arrays."""
  header, offset = {}, 0
  for name, value in tensors.items():
    dtype = SAFETENSORS_DTYPES[value.dtype]
    header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": [offset, offset + value.nbytes]}
    offset += value.nbytes
  if metadata:
    header["__metadata__"] = metadata
  return write_raw(path, header, b"".join(value.tobytes() for value in tensors.values()))


def write_raw(path: Path, header: object, data: bytes) -> Path:
  """Writes a .safetensors file with any header."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)
  return path


def checksum_of(tensors: Tensors) -> str:
  """Returns the checksum that a component with these official tensors has."""
  return combine_digests({name: tensor_digest(name, value) for name, value in tensors.items()})


def assert_converted(folder: Path, component: str, expected: Tensors) -> None:
  """Asserts that a checkpoint has exactly these official tensors, dtypes included."""
  info = read_info(folder).components[component]
  dtypes = [str(value.dtype) for value in expected.values()]
  assert info.dtypes == {dtype: dtypes.count(dtype) for dtype in set(dtypes)}
  assert info.checksum == checksum_of(expected)


def is_matrix(name: str, value: np.ndarray) -> bool:
  """Returns whether programs quantise a tensor of the transformer or text encoder."""
  return name.endswith(".weight") and value.ndim == 2


def random_float8(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> np.ndarray:
  """Returns numbers of all magnitudes, subnormal ones included, but finite."""
  codes = np.arange(256, dtype=np.uint8)
  finite = codes[np.isfinite(codes.view(dtype).astype(np.float32))]
  return rng.choice(finite, shape).view(dtype)


def gguf_package():
  return pytest.importorskip("gguf", reason="needs the extra `gguf`")


def quantize_gguf(tensors: Tensors, kinds: Mapping[str, str], rng: np.random.Generator) -> GGUFTensors:
  """Returns tensors as they are in a GGUF file: quantised, or random blocks of types that gguf only dequantises.

  Args:
    tensors: by name.
    kinds: the type of each that is not to be float32.
    rng: of the blocks.
  """
  gguf, out = gguf_package(), {}
  for name, value in tensors.items():
    kind = gguf.GGMLQuantizationType[kinds.get(name, "F32")]
    try:
      out[name] = gguf.quants.quantize(value.astype(np.float32), kind), kind.name
    except NotImplementedError:
      block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
      shape = (*value.shape[:-1], value.shape[-1] // block * block_bytes)
      out[name] = rng.integers(0, 256, shape, np.uint8), kind.name
  return out


def write_gguf(path: Path, tensors: GGUFTensors, values: Mapping[str, Any] | None = None) -> Path:
  """Writes a GGUF file with the package gguf."""
  gguf = gguf_package()
  writer = gguf.GGUFWriter(path, "wan")
  for key, value in (values or {}).items():
    if isinstance(value, str):
      writer.add_string(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    else:
      writer.add_array(key, value)
  for name, (data, kind) in tensors.items():
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def dequantize_gguf(tensors: GGUFTensors) -> dict[str, np.ndarray]:
  """Returns what the package gguf dequantises tensors to; half precision is kept."""
  gguf = gguf_package()
  with np.errstate(all="ignore"):
    return {
      name: data if kind in ("F32", "F16") else gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
      for name, (data, kind) in tensors.items()
    }
