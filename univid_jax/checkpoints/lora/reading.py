"""Reads LoRA files of all trainers, see docs/formats.md."""

import dataclasses
import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath

from univid_jax.checkpoints.checksums import has_checksums, require_seal, verified
from univid_jax.checkpoints.info import is_checkpoint
from univid_jax.checkpoints.lora.building import PartsError, build_changes
from univid_jax.checkpoints.lora.folder import is_lora_folder, read_lora_folder
from univid_jax.checkpoints.lora.kinds import Change
from univid_jax.checkpoints.lora.names import (
  MARKERS,
  TARGETS,
  WHOLE_WEIGHTS,
  is_transformer,
  list_names,
  parse_name,
  unsupported,
)
from univid_jax.checkpoints.lora.scaling import CONFIG_FILE, PeftScaling, find_adapter, find_scaling
from univid_jax.checkpoints.lora.sidecar import read_sidecar, sidecar_path
from univid_jax.checkpoints.lora.weights import SCALE_OF_ONE, LoRAWeights
from univid_jax.checkpoints.tensor_files import TensorFile, open_tensors
from univid_jax.core.bucket_files import copy_file, copy_to_local
from univid_jax.core.errors import UserError
from univid_jax.core.options import MAX_LORA_SCALE
from univid_jax.core.paths import exists, is_file, is_folder, is_remote, to_path


def is_peft_folder(path: epath.PathLike) -> bool:
  """Returns whether a path is a folder that PEFT wrote."""
  return is_file(epath.Path(path) / CONFIG_FILE)


def read_lora(path: epath.PathLike, *, verify: bool = True) -> LoRAWeights:
  """Reads a LoRA: a file of any trainer, a folder of PEFT, or this project's own.

  Args:
    path: path of the file or folder, local or in a bucket.
    verify: whether to verify it against its checksums, if it has any.

  Raises:
    DamagedError: a file differs from its checksum.
    FileNotFoundError: the path or its weights do not exist.
    UserError: the contents are not a LoRA for Wan's transformers, damaged, or of an unsupported kind.
  """
  if is_checkpoint(to_path(path)):  # to_path: it is a path, even if it has the name of a built-in base
    raise UserError(f"{path} is a converted checkpoint, not a LoRA: give it as the checkpoint")
  if is_lora_folder(path) or has_checksums(path):
    with verified(path, enabled=verify):
      return read_lora_folder(path)
  local = _local_copy(path) if is_remote(path) else Path(path)
  if is_peft_folder(local):
    found = find_adapter(epath.Path(local))
    if found is None:
      raise FileNotFoundError(f"{path} has {CONFIG_FILE}, but no adapter_model.safetensors")
    local = Path(found)
  if local.is_dir():
    raise UserError(f"{path} is a folder without lora.json or {CONFIG_FILE}: pass the LoRA file itself")
  if verify:
    require_seal(local, sidecar_path(local))
  return dataclasses.replace(parse_lora(open_tensors(local)), source=str(path if is_remote(path) else local))


def _local_copy(path: epath.PathLike) -> Path:
  """Copies a LoRA from a bucket with what belongs to it: a file's sidecar, or all of a folder of PEFT."""
  remote = epath.Path(path)
  if any(exists(folder / CONFIG_FILE) for folder in (remote, remote.parent)):
    return Path(copy_to_local(str(path)))
  if is_folder(remote):
    raise UserError(f"{path} is a folder without lora.json or {CONFIG_FILE}: pass the LoRA file itself")
  if not exists(remote):
    raise FileNotFoundError(f"no such file or folder: {path}")
  copy = copy_file(path)
  for name in (sidecar_path(remote).name, CONFIG_FILE):
    if exists(neighbour := remote.with_name(name)):
      copy_file(neighbour)
    else:
      copy.with_name(name).unlink(missing_ok=True)  # left from an earlier copy
  return copy


def parse_lora(file: TensorFile) -> LoRAWeights:
  """Reads a LoRA from named tensors; raises like `read_lora`."""
  modules: dict[str, _Module] = {}
  names: dict[str, list[str]] = defaultdict(list)
  unmatched, formats = [], set()
  for name in (name for name in file.infos if name not in MARKERS):
    if what := unsupported(name):
      if what == WHOLE_WEIGHTS and is_transformer(file.infos):
        raise UserError(
          f"{file.path} is a whole model, not a LoRA: convert it with python -m univid_jax.convert "
          f"{shlex.quote(str(file.path))} DST, and give DST as the checkpoint"
        )
      raise UserError(f"{file.path} contains {what}, which are not supported: {list_names([name])}")
    found = parse_name(name)
    if found is None:
      unmatched.append(name)
      continue
    formats.add(found.format)
    names[found.tensor].append(name)
    # The bias of a low-rank layer is scaled like its matrices, so it is read together with them.
    owner = found.tensor.removesuffix(".bias") + ".weight" if found.part == "up_bias" else found.tensor
    parts = modules.setdefault(owner, _Module(found.module, {})).parts
    part = "diff" if found.part in TARGETS and found.part != "up_bias" else found.part
    if part in parts:
      raise UserError(f"{file.path} has two tensors for {part} of {owner}: {parts[part]} and {name}")
    parts[part] = name
  if not modules:
    reason = f": Wan's transformers have no counterpart of {list_names(unmatched)}" if unmatched else ""
    raise UserError(f"{file.path} contains no LoRA for Wan{reason}")
  metadata = {**read_sidecar(file.path), **file.metadata}
  reader = _Reader(file, metadata)
  changes: dict[str, Change] = {}
  for owner, module in modules.items():
    for tensor, change in reader.read(owner, module).items():
      if tensor in changes:
        raise UserError(f"{file.path} changes {tensor} twice: {list_names(names[tensor])}")
      changes[tensor] = change
  return LoRAWeights(
    changes,
    " and ".join(sorted(formats)),
    metadata,
    source=str(file.path),
    names={tensor: tuple(found) for tensor, found in names.items()},
    unmatched=tuple(unmatched),
    notes=reader.notes(),
  )


class _Module(NamedTuple):
  """A module in a file: its name as spelled there, and the names of its tensors by part."""

  name: str
  parts: dict[str, str]


class _Reader:
  """Reads the changes of a file, and remembers what had to be assumed."""

  def __init__(self, file: TensorFile, metadata: Mapping[str, str]):
    self._file, self._metadata = file, metadata
    self._scaling: PeftScaling | None = find_scaling(file.path, metadata)
    self._assumed: Counter[str] = Counter()

  def notes(self) -> tuple[str, ...]:
    return tuple(f"{text} (modules: {count})" for text, count in self._assumed.items())

  def read(self, tensor: str, module: _Module) -> Mapping[str, Change]:
    """Returns the changes that a module's tensors make, by official name."""
    parts = {part: self._read_tensor(name) for part, name in module.parts.items()}
    if any(part.startswith("lokr_") for part in parts):
      parts |= {name: np.zeros(()) for name in MARKERS if name in self._file.infos}

    def alpha_of(rank: int | None) -> float | None:
      return self._alpha(module, rank, parts.get("alpha"))

    try:
      with np.errstate(all="ignore"):  # overflows are refused on use
        return build_changes(tensor, parts, alpha_of)
    except PartsError as error:
      shapes = ", ".join(f"{name} {parts[part].shape}" for part, name in module.parts.items())
      raise UserError(f"{self._file.path}: the change of {tensor} {error}; got {shapes}") from error

  def _read_tensor(self, name: str) -> np.ndarray:
    """Reads a tensor of finite floats; an alpha may be an integer."""
    info = self._file.infos[name]
    if math.prod(info.shape) == 0:
      raise UserError(f"{self._file.path}: {name} is empty, its shape is {info.shape}")
    is_alpha = name.endswith(".alpha")
    value = self._file.read(name)
    if not is_alpha and value.dtype.kind in "iub":
      raise UserError(f"{self._file.path}: {name} has the dtype {value.dtype}; expected floats")
    if is_alpha:
      return value.astype(np.float64)
    with np.errstate(all="ignore"):
      as_float = value.astype(np.float32)
    if not np.isfinite(as_float).all():
      kind = "NaN" if np.isnan(as_float).any() else "values that are infinite or too large for float32"
      raise UserError(f"{self._file.path}: {name} contains {kind}")
    # 2- and 4-byte floats are kept, so that exports equal the file; others become float32: nothing computes in 8 bits.
    return value if value.dtype.itemsize in (2, 4) else as_float

  def _alpha(self, module: _Module, rank: int | None, stored: np.ndarray | None) -> float | None:
    """Returns the alpha of a module: from its tensor, from PEFT's config, or else the rank; see `AlphaOf`."""
    if rank is None:
      return self._scaling.alpha_of(module.name, None)[0] if self._scaling else None
    if stored is not None:
      if stored.size != 1:
        raise UserError(f"{self._file.path}: {module.parts['alpha']} must be one number, its shape is {stored.shape}")
      alpha = float(stored.reshape(()))
    elif self._scaling:
      alpha, assumed = self._scaling.alpha_of(module.name, rank)
      self._assumed.update(assumed)
    else:
      alpha = float(rank)
      if not SCALE_OF_ONE.items() <= self._metadata.items():
        self._assumed["no alpha is stored: taken to be the rank, which is a scale of 1"] += 1
    if not 0 < alpha / rank <= MAX_LORA_SCALE:
      where = module.parts.get("alpha", f"alpha of {module.name} in {self._scaling.source if self._scaling else ''}")
      raise UserError(
        f"{self._file.path}: {where} is {alpha:g} for rank {rank}; the scale alpha / rank must be positive and at most "
        f"{MAX_LORA_SCALE:g}"
      )
    return alpha
