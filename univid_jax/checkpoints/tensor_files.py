"""Files of named tensors: safetensors, GGUF and PyTorch's, single or in shards; tensors are read one at a time."""

import dataclasses
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from univid_jax.checkpoints.header_texts import merge_texts
from univid_jax.core.errors import UserError, first_line
from univid_jax.core.installation import install_command
from univid_jax.core.json_files import parse_json, read_json_object
from univid_jax.core.paths import is_lfs_pointer, resolve_inside

SUFFIXES = (".safetensors", ".gguf", ".pth", ".pt", ".ckpt", ".bin")
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_SHARD = re.compile(r"-(\d+)-of-(\d+)(\.safetensors|\.bin)$", re.IGNORECASE)
_GGUF_SPLIT = re.compile(r"-(\d+)-of-(\d+)\.gguf$", re.IGNORECASE)

# NumPy's dtype names by safetensors'. PyTorch's are NumPy's after "torch.". Other dtypes are refused.
_SAFETENSORS_DTYPES = {
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
  "F8_E4M3": "float8_e4m3fn",
  "F8_E5M2": "float8_e5m2",
  "I64": "int64",
  "I32": "int32",
  "I16": "int16",
  "I8": "int8",
  "U8": "uint8",
  "BOOL": "bool",
}
DTYPES = _SAFETENSORS_DTYPES | {f"torch.{name}": name for name in _SAFETENSORS_DTYPES.values()}


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
    path: path of the file or index.
    infos: shape and dtype by tensor name, as `read` returns it.
    read: reads a tensor by name.
    metadata: the texts in the header of a safetensors or GGUF file, or in those of all shards.
    stored: types of the tensors that `read` dequantises, by name.
    read_float8: returns the float8_e4m3fn numbers of a matrix that `read` dequantises, and the float32 scales of its
      rows (rows, 1), or None if it is stored in another way.
  """

  path: Path
  infos: Mapping[str, TensorInfo]
  read: Callable[[str], np.ndarray]
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
  stored: Mapping[str, str] = dataclasses.field(default_factory=dict)
  read_float8: Callable[[str], tuple[np.ndarray, np.ndarray] | None] = lambda name: None

  def rename(self, names: Mapping[str, str]) -> "TensorFile":
    """Returns the tensors under new names; `names` maps the old names, and tensors that it lacks are dropped."""
    old = {new: name for name, new in names.items()}
    return dataclasses.replace(
      self,
      infos={new: self.infos[name] for new, name in old.items()},
      read=lambda new: self.read(old[new]),
      read_float8=lambda new: self.read_float8(old[new]),
      stored={new: self.stored[name] for new, name in old.items() if name in self.stored},
    )

  def concatenate(self, parts: Mapping[str, Sequence[str]]) -> "TensorFile":
    """Returns the tensors with some replaced by their concatenations over the first dim.

    Args:
      parts: names of the parts by name of the concatenation.

    Raises:
      UserError: a part is missing, or its shape or dtype does not fit.
    """
    infos = dict(self.infos)
    for new, names in parts.items():
      found = [infos.pop(name) for name in names if name in infos]
      if len(found) < len(names) or len({(info.shape[1:], info.dtype) for info in found}) > 1 or not found[0].shape:
        raise UserError(f"{', '.join(names)} must all exist, with shapes and dtypes that fit")
      infos[new] = TensorInfo((sum(info.shape[0] for info in found), *found[0].shape[1:]), found[0].dtype)
    stored = {new: self.stored[names[0]] for new, names in parts.items() if names[0] in self.stored}

    def read(name: str) -> np.ndarray:
      return np.concatenate([self.read(part) for part in parts[name]]) if name in parts else self.read(name)

    return dataclasses.replace(self, infos=infos, read=read, stored={**self.stored, **stored})


def numpy_dtype(name: str) -> np.dtype:
  """Returns a NumPy dtype by name, including bfloat16 and the 8-bit floats."""
  return np.dtype(getattr(ml_dtypes, name, name))


def open_tensors(path: str | os.PathLike) -> TensorFile:
  """Opens a .safetensors file, the index of its shards, a .gguf file or a PyTorch file; reads headers only.

  Raises:
    OSError: the file or one of its shards is missing or unreadable.
    UserError: the file is damaged, contains more than tensors, has an unsupported dtype, or needs a package that is not
      installed.
  """
  path = Path(path)
  if not path.exists():
    raise FileNotFoundError(f"no such file: {path}")
  if path.is_file() and is_lfs_pointer(path):
    raise UserError(f"{path} is not downloaded: run git lfs pull in its repository")
  if _is_index(path):
    return _open_shards(path)
  if shard := _SHARD.search(path.name):
    raise UserError(
      f"{path} is shard {int(shard[1])} of {int(shard[2])}: pass the folder that contains all shards and their index"
    )
  if split := _GGUF_SPLIT.search(path.name):
    raise UserError(
      f"{path} is part {int(split[1])} of {int(split[2])}: join the parts with llama.cpp's gguf-split --merge"
    )
  if not is_tensor_file(path):
    raise UserError(f"{path} is not a file of tensors; expected a name ending in {', '.join(SUFFIXES)}")
  if not path.is_file():  # reading a pipe waits for its writer
    raise UserError(f"{path} is not a file")
  return _open_file(path)


def is_tensor_file(path: PurePath) -> bool:
  """Returns whether a name is that of a file of tensors, which may be a shard."""
  return path.suffix.lower() in SUFFIXES


def _is_index(path: PurePath) -> bool:
  return path.name.lower().endswith(INDEX_SUFFIXES)


def _open_file(path: Path) -> TensorFile:
  if path.suffix.lower() == ".safetensors":
    return _open_safetensors(path)
  if path.suffix.lower() == ".gguf":
    from univid_jax.checkpoints.gguf_files import open_gguf  # a cycle: it imports this module

    return open_gguf(path)
  return _open_torch(path)


def _open_safetensors(path: Path) -> TensorFile:
  with path.open("rb") as file:  # raises file system errors, which the library does not distinguish from damage
    size = int.from_bytes(file.read(8), "little")
  try:
    with safe_open(path, framework="np") as checked:  # checks that data and header have their sizes, and offsets
      metadata = checked.metadata() or {}
    with path.open("rb") as file:
      header = parse_json(file.read(8 + size)[8:])
  except (SafetensorError, ValueError) as error:
    raise UserError(f"{path} is not a complete safetensors file ({error})") from error
  header.pop("__metadata__", None)
  infos = {
    name: TensorInfo(tuple(entry["shape"]), _dtype_name(path, name, entry["dtype"])) for name, entry in header.items()
  }

  def read(name: str) -> np.ndarray:
    # The library cannot return 8-bit floats as NumPy arrays.
    start, end = header[name]["data_offsets"]
    data = read_bytes(path, 8 + size + start, end - start)
    return data.view(numpy_dtype(infos[name].dtype)).reshape(infos[name].shape)

  return TensorFile(path, infos, read, metadata)


def read_bytes(path: Path, offset: int, count: int) -> np.ndarray:
  """Reads a part of a file, uint8 (count,), without mapping it, so that a shrinking file raises an error, not a crash.

  Raises:
    OSError: the file is unreadable.
    UserError: it ends early.
  """
  data = np.fromfile(path, np.uint8, count, offset=offset)
  if len(data) < count:
    raise UserError(f"{path} is not complete: it ends before byte {offset + count:,}")
  return data


def _open_shards(index: Path) -> TensorFile:
  weight_map = _read_weight_map(index)
  names = sorted(set(weight_map.values()))
  for name in names:
    try:
      resolve_inside(index.parent, name)
    except UserError as error:
      raise UserError(f"{index}: {error}") from error
    if not name.lower().endswith((".safetensors", ".bin")):
      raise UserError(f"{index} names {name} as a shard; expected a name ending in .safetensors or .bin")
  missing = [name for name in names if not (index.parent / name).is_file()]
  if missing:
    raise FileNotFoundError(f"shards listed in {index} are missing: {', '.join(missing)}")
  shards = {name: _open_file(index.parent / name) for name in names}
  counts = Counter(tensor for file in shards.values() for tensor in file.infos)
  if repeated := [tensor for tensor, count in counts.items() if count > 1]:
    raise UserError(f"{len(repeated)} tensors are in several shards of {index}, the first is {min(repeated)}")
  in_shards = {tensor: shard for shard, file in shards.items() for tensor in file.infos}
  if in_shards != weight_map:
    tensor, shard = min(in_shards.items() ^ weight_map.items())
    raise UserError(f"{index} and its shards disagree about the tensor {tensor} in {shard}")
  infos = {name: shards[shard].infos[name] for name, shard in weight_map.items()}
  metadata = merge_texts(index, {name: file.metadata for name, file in shards.items()})
  return TensorFile(index, infos, lambda name: shards[weight_map[name]].read(name), metadata)


def _read_weight_map(index: Path) -> dict[str, str]:
  """Returns the shard of each tensor."""
  weight_map = read_json_object(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
    raise UserError(f'{index} is not an index of shards: it has no "weight_map" from names of tensors to files')
  return weight_map


def _open_torch(path: Path) -> TensorFile:
  torch = require_torch(path)
  loaded = _load_torch(path)
  if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
    loaded = loaded["state_dict"]
  if not isinstance(loaded, Mapping) or not loaded:
    raise UserError(f"{path} does not contain named tensors")
  if not all(isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in loaded.items()):
    raise UserError(f"{path} contains more than named tensors")
  infos = {}
  for name, x in loaded.items():
    infos[name] = TensorInfo(tuple(x.shape), _dtype_name(path, name, str(x.dtype)))
    if x.layout is not torch.strided or x.device.type != "cpu" or x.untyped_storage().nbytes() < infos[name].nbytes:
      raise UserError(f"{path}: {name} has less data than its shape {infos[name].shape} says, or is sparse")

  def read(name: str) -> np.ndarray:
    # As bytes, because PyTorch cannot convert bfloat16 and 8-bit floats.
    data = loaded[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return data.view(numpy_dtype(infos[name].dtype)).reshape(infos[name].shape)

  return TensorFile(path, infos, read)


def _load_torch(path: Path) -> Any:
  """Loads the contents of a PyTorch file, with tensors mapped into memory; runs no code from the file."""
  import torch

  try:
    with zipfile.ZipFile(path) as file:
      compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist())
  except zipfile.BadZipFile as error:
    raise UserError(f"{path} is not a complete PyTorch file (of PyTorch 1.6 or newer)") from error
  if compressed:  # PyTorch never compresses; the archive could expand without bound
    raise UserError(f"{path} is a compressed archive, which PyTorch never writes: save it again with torch.save")
  try:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
  except Exception as error:
    raise UserError(
      f"{path} is damaged or contains more than tensors; code in it is never run ({first_line(error)})"
    ) from error


def _dtype_name(path: Path, name: str, dtype: str) -> str:
  if dtype not in DTYPES:
    supported = ", ".join(dict.fromkeys(DTYPES.values()))
    raise UserError(f"{path}: {name} has the dtype {dtype}, which is not supported; supported are {supported}")
  return DTYPES[dtype]


def require_torch(path: os.PathLike | str) -> Any:
  """Returns the module torch; raises UserError that names a file which needs it, if it is not installed."""
  try:
    import torch
  except ModuleNotFoundError as error:
    raise UserError(f"{path} is a PyTorch file and needs PyTorch: {install_command('convert')}") from error
  return torch


def find_tensor_files(folder: Path) -> list[Path]:
  """Lists the files of tensors in a folder; shards are represented by their index. Hidden files are ignored.

  Raises:
    FileNotFoundError: there is a shard, but no index.
    UserError: an index is damaged.
  """
  visible = sorted(path for path in folder.iterdir() if path.name[0] != ".")
  files = [path for path in visible if is_tensor_file(path) or _is_index(path)]
  indices = [path for path in files if _is_index(path)]
  listed = {folder / shard for index in indices for shard in _read_weight_map(index).values()}
  for path in files:
    index = _SHARD.sub(r"\3.index.json", path.name)
    if _SHARD.search(path.name) and index.lower() not in {each.name.lower() for each in indices}:
      raise FileNotFoundError(f"{path} is a shard, but its index {index} is missing")
  return [path for path in files if not _SHARD.search(path.name) and path not in listed]


def save_safetensors(
  path: Path, tensors: Mapping[str, np.ndarray], *, metadata: Mapping[str, str] | None = None
) -> None:
  """Writes a .safetensors file with the usual permissions of new files; the library would make it private."""
  path.touch()
  mode = path.stat().st_mode
  save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
  path.chmod(mode)


def save_torch(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a PyTorch file of named tensors.

  Raises:
    UserError: PyTorch is not installed.
  """
  torch = require_torch(path)

  def convert(array):
    array = array if array.flags.writeable else array.copy()
    if array.dtype == ml_dtypes.bfloat16:  # PyTorch does not accept it from NumPy
      return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)

  with path.open("wb") as file:  # given a path, PyTorch would store the temporary file's name
    torch.save({name: convert(array) for name, array in tensors.items()}, file)
