"""Files of tensors: safetensors, alone or in shards, and PyTorch's; headers first, tensors one at a time."""

import dataclasses
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
INDEX_SUFFIX = ".safetensors.index.json"

# Names of number formats, ours by safetensors' and PyTorch's; others (8-bit floats, quantised weights) are refused.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
          "torch.float64": "float64", "torch.float32": "float32", "torch.float16": "float16", "torch.bfloat16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """What a header says of a tensor: its shape and its dtype by NumPy's name."""

  shape: tuple[int, ...]
  dtype: str

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * numpy_dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class TensorFile:
  """Named tensors of a file, or of several that are one.

  Attributes:
    path: of the file, or of the index of its shards.
    infos: each tensor's shape and dtype by name.
    read: gives a tensor by name.
    metadata: text by key, as safetensors keeps it.
  """

  path: Path
  infos: Mapping[str, TensorInfo]
  read: Callable[[str], np.ndarray]
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def renamed(self, names: Mapping[str, str]) -> "TensorFile":
    """The tensors under new names, by their old ones; those that have none are left out."""
    old = {new: name for name, new in names.items()}
    return dataclasses.replace(self, infos={new: self.infos[name] for new, name in old.items()},
                               read=lambda new: self.read(old[new]))


def numpy_dtype(name: str) -> np.dtype:
  """A NumPy dtype by name, bfloat16 included."""
  return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def open_tensors(path: str | os.PathLike) -> TensorFile:
  """Opens a .safetensors file, an index of its shards, or a PyTorch file (.pth, .pt, .ckpt, .bin), reading headers alone.

  Raises:
    FileNotFoundError: there is no such file, or a shard is missing.
    ValueError: it is not what its name says, holds more than tensors, or has a number format that is not supported.
    ModuleNotFoundError: a PyTorch file, and no PyTorch to read it.
  """
  path = Path(path)
  if not path.exists():
    raise FileNotFoundError(f"no such file: {path}")
  if path.name.endswith(INDEX_SUFFIX):
    return _open_shards(path)
  if path.suffix == ".safetensors":
    return _open_safetensors(path)
  if path.suffix in SUFFIXES:
    return _open_torch(path)
  raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}")


def _open_safetensors(path: Path) -> TensorFile:
  if shard := re.search(r"-(\d+)-of-(\d+)\.safetensors$", path.name):
    raise ValueError(f"{path} is shard {int(shard[1])} of {int(shard[2])}: give the folder with all of them and their index")
  return _open_one(path)


def _open_one(path: Path) -> TensorFile:
  try:
    file = safe_open(path, framework="np")
  except (SafetensorError, OSError) as error:
    raise ValueError(f"{path} is not a whole safetensors file ({error})") from error
  infos = {}
  for name in file.keys():  # noqa: SIM118 (the file itself is not iterable)
    part = file.get_slice(name)
    infos[name] = TensorInfo(tuple(part.get_shape()), _dtype(path, name, part.get_dtype()))
  return TensorFile(path, infos, file.get_tensor, file.metadata() or {})


def _open_shards(index: Path) -> TensorFile:
  try:
    weight_map = json.loads(index.read_text())["weight_map"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{index} is not an index of shards ({error!r})") from error
  missing = sorted({name for name in weight_map.values() if not (index.parent / name).exists()})
  if missing:
    raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(missing)}")
  shards = {name: _open_one(index.parent / name) for name in sorted(set(weight_map.values()))}
  in_shards = {tensor: shard for shard, file in shards.items() for tensor in file.infos}
  if in_shards != weight_map:
    differing = sorted(in_shards.items() ^ weight_map.items())
    raise ValueError(f"{index} and its shards do not agree, first about {differing[0][0]} in {differing[0][1]}")
  infos = {name: shards[shard].infos[name] for name, shard in weight_map.items()}
  return TensorFile(index, infos, lambda name: shards[weight_map[name]].read(name))


def _open_torch(path: Path) -> TensorFile:
  try:
    import torch
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{path} is a PyTorch file; reading it needs PyTorch: pip install 'univid_jax[convert]'") from error
  if not zipfile.is_zipfile(path):
    raise ValueError(f"{path} is not a whole PyTorch file (of PyTorch 1.6 or newer)")
  try:
    # weights_only: tensors and plain containers; code in a pickle is not run.
    loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
  except Exception as error:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    raise ValueError(f"{path} holds more than tensors or is damaged, and code in it is never run ({reason})") from error
  if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
    loaded = loaded["state_dict"]
  if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(x, torch.Tensor) for x in loaded.values()):
    raise ValueError(f"{path} is not a file of named tensors")
  infos = {name: TensorInfo(tuple(x.shape), _dtype(path, name, str(x.dtype))) for name, x in loaded.items()}

  def read(name: str) -> np.ndarray:
    tensor = loaded[name].detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # which NumPy does not know
      return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

  return TensorFile(path, infos, read)


def _dtype(path: Path, name: str, dtype: str) -> str:
  if dtype not in DTYPES:
    raise ValueError(f"{path}: {name} is stored as {dtype}, which is not supported; there are {', '.join(list(DTYPES)[:4])}")
  return DTYPES[dtype]


def find_tensor_files(folder: Path) -> list[Path]:
  """The files of tensors in a folder: indices of shards stand for their shards."""
  files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES or path.name.endswith(INDEX_SUFFIX))
  shards = re.compile(r"-\d+-of-\d+\.safetensors$")
  indexed = {path.name.removesuffix(INDEX_SUFFIX) for path in files if path.name.endswith(INDEX_SUFFIX)}
  out = []
  for path in files:
    if not shards.search(path.name):
      out.append(path)
    elif shards.sub("", path.name) not in indexed:
      raise FileNotFoundError(f"{path} is a shard, and its index {shards.sub('', path.name)}{INDEX_SUFFIX} is not there")
  return out



def save_safetensors(path: Path, tensors: Mapping[str, np.ndarray], *, metadata: Mapping[str, str] | None = None) -> None:
  """Writes a .safetensors file, as readable as any new file (the library makes it private)."""
  save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
  mask = os.umask(0)
  os.umask(mask)
  os.chmod(path, 0o666 & ~mask)


def save_torch(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a PyTorch file of named tensors.

  Raises:
    ModuleNotFoundError: there is no PyTorch.
  """
  try:
    import torch
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{path} is a PyTorch file; writing it needs PyTorch: pip install 'univid_jax[convert]'") from error

  def convert(array):
    array = array if array.flags.writeable else array.copy()
    if array.dtype == ml_dtypes.bfloat16:  # which PyTorch does not take from NumPy
      return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)

  torch.save({name: convert(array) for name, array in tensors.items()}, path)
