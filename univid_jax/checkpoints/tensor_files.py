"""Files of named tensors: safetensors, alone or in shards, and PyTorch's; headers first, tensors one at a time."""

import dataclasses
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from univid_jax.core.errors import UserError

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")

# NumPy's dtype names by those of safetensors and PyTorch. Others (8-bit floats) are refused.
DTYPES = {
  **{name: f"int{name[1:]}" for name in ("I64", "I32", "I16", "I8")},
  **{f"torch.{name}": name for name in ("int64", "int32", "int16", "int8", "uint8", "bool")},
  "U8": "uint8",
  "BOOL": "bool",
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
  "torch.float64": "float64",
  "torch.float32": "float32",
  "torch.float16": "float16",
  "torch.bfloat16": "bfloat16",
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """Shape and dtype of a tensor, the latter by NumPy's name."""

  shape: tuple[int, ...]
  dtype: str

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * numpy_dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class TensorFile:
  """The named tensors of a file, or of all shards of an index.

  Attributes:
    path: of the file or index.
    infos: shape and dtype by tensor name.
    read: reads a tensor by name.
    metadata: the text entries of a safetensors header.
  """

  path: Path
  infos: Mapping[str, TensorInfo]
  read: Callable[[str], np.ndarray]
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def require_floats(self) -> None:
    """Raises UserError if a tensor is of integers: not a weight, or a quantised one."""
    for name, info in self.infos.items():
      if numpy_dtype(info.dtype).kind in "iub":
        raise UserError(f"{self.path}: {name} has the dtype {info.dtype}, which is not supported: weights are floats")

  def rename(self, names: Mapping[str, str]) -> "TensorFile":
    """Returns the tensors under new names; `names` maps the old ones, and tensors that are not in it are dropped."""
    old = {new: name for name, new in names.items()}
    return dataclasses.replace(
      self, infos={new: self.infos[name] for new, name in old.items()}, read=lambda new: self.read(old[new])
    )


def numpy_dtype(name: str) -> np.dtype:
  """Returns a NumPy dtype by name, including bfloat16."""
  return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def open_tensors(path: str | os.PathLike) -> TensorFile:
  """Opens a .safetensors file, the index of its shards, or a PyTorch file; reads headers only.

  Raises:
    FileNotFoundError: the file or one of its shards does not exist.
    UserError: the file is damaged, contains more than tensors, has an unsupported dtype, or needs PyTorch, which is not
      installed.
  """
  path = Path(path)
  if not path.exists():
    raise FileNotFoundError(f"no such file: {path}")
  if path.name.endswith(INDEX_SUFFIX):
    return _open_shards(path)
  if shard := _SHARD.search(path.name):
    raise UserError(
      f"{path} is shard {int(shard[1])} of {int(shard[2])}: pass the folder that contains all shards and their index"
    )
  if path.suffix == ".safetensors":
    return _open_safetensors(path)
  if path.suffix in SUFFIXES:
    return _open_torch(path)
  raise UserError(f"{path} is not a file of tensors; expected a name ending in {', '.join(SUFFIXES)}")


def _open_safetensors(path: Path) -> TensorFile:
  try:
    file = safe_open(path, framework="np")
  except (SafetensorError, OSError) as error:
    raise UserError(f"{path} is not a complete safetensors file ({error})") from error
  infos = {}
  for name in file.keys():  # noqa: SIM118 (the file itself is not iterable)
    part = file.get_slice(name)
    infos[name] = TensorInfo(tuple(part.get_shape()), _dtype_name(path, name, part.get_dtype()))
  return TensorFile(path, infos, file.get_tensor, file.metadata() or {})


def _open_shards(index: Path) -> TensorFile:
  try:
    weight_map = json.loads(index.read_text())["weight_map"]
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{index} is not an index of shards ({error!r})") from error
  missing = sorted({name for name in weight_map.values() if not (index.parent / name).exists()})
  if missing:
    raise FileNotFoundError(f"shards listed in {index} are missing: {', '.join(missing)}")
  shards = {name: _open_safetensors(index.parent / name) for name in sorted(set(weight_map.values()))}
  in_shards = {tensor: shard for shard, file in shards.items() for tensor in file.infos}
  if in_shards != weight_map:
    tensor, shard = min(in_shards.items() ^ weight_map.items())
    raise UserError(f"{index} and its shards disagree about the tensor {tensor} in {shard}")
  infos = {name: shards[shard].infos[name] for name, shard in weight_map.items()}
  return TensorFile(index, infos, lambda name: shards[weight_map[name]].read(name))


def _open_torch(path: Path) -> TensorFile:
  torch = _import_torch(path)
  if not zipfile.is_zipfile(path):
    raise UserError(f"{path} is not a complete PyTorch file (of PyTorch 1.6 or newer)")
  try:
    # weights_only: loads tensors and plain containers, and runs no code of the pickle.
    loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
  except Exception as error:
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    raise UserError(f"{path} is damaged or contains more than tensors; code in it is never run ({reason})") from error
  if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
    loaded = loaded["state_dict"]
  if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(x, torch.Tensor) for x in loaded.values()):
    raise UserError(f"{path} does not contain named tensors")
  infos = {name: TensorInfo(tuple(x.shape), _dtype_name(path, name, str(x.dtype))) for name, x in loaded.items()}

  def read(name: str) -> np.ndarray:
    tensor = loaded[name].detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # PyTorch cannot convert it
      return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

  return TensorFile(path, infos, read)


def _dtype_name(path: Path, name: str, dtype: str) -> str:
  if dtype not in DTYPES:
    supported = ", ".join(dict.fromkeys(DTYPES.values()))
    raise UserError(f"{path}: {name} has the dtype {dtype}, which is not supported; supported are {supported}")
  return DTYPES[dtype]


def _import_torch(path: Path) -> Any:
  try:
    import torch
  except ModuleNotFoundError as error:
    raise UserError(f"{path} is a PyTorch file and needs PyTorch: pip install 'univid_jax[convert]'") from error
  return torch


def find_tensor_files(folder: Path) -> list[Path]:
  """Lists the files of tensors in a folder; shards are represented by their index.

  Raises:
    FileNotFoundError: there is a shard, but no index.
  """
  files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES or path.name.endswith(INDEX_SUFFIX))
  for path in files:
    index = path.with_name(_SHARD.sub(INDEX_SUFFIX, path.name))
    if _SHARD.search(path.name) and not index.exists():
      raise FileNotFoundError(f"{path} is a shard, but its index {index.name} is missing")
  return [path for path in files if not _SHARD.search(path.name)]


def save_safetensors(
  path: Path, tensors: Mapping[str, np.ndarray], *, metadata: Mapping[str, str] | None = None
) -> None:
  """Writes a .safetensors file with the permissions of any new file; the library alone makes it private."""
  path.touch()
  mode = path.stat().st_mode
  save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
  path.chmod(mode)


def save_torch(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a PyTorch file of named tensors.

  Raises:
    UserError: PyTorch is not installed.
  """
  torch = _import_torch(path)

  def convert(array):
    array = array if array.flags.writeable else array.copy()
    if array.dtype == ml_dtypes.bfloat16:  # PyTorch does not accept it from NumPy
      return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)

  with path.open("wb") as file:  # given a path, PyTorch would store the name of a temporary file
    torch.save({name: convert(array) for name, array in tensors.items()}, file)
