"""Finds and verifies everything below a folder that has checksums."""

import dataclasses
from collections.abc import Iterator

from etils import epath

from univid_jax.checkpoints.built_in import locate
from univid_jax.checkpoints.checksums import check_seal, find_damage, has_checksums, read_names, write_checksums
from univid_jax.checkpoints.info import is_checkpoint
from univid_jax.checkpoints.lora.folder import is_lora_folder
from univid_jax.checkpoints.lora.sidecar import sidecar_path
from univid_jax.checkpoints.saved import CHECKPOINTS_FOLDER, DAMAGED_SUFFIX, DELETED_FOLDER
from univid_jax.core.paths import bucket_errors, exists, is_folder, is_remote
from univid_jax.core.text import count_noun, is_or_are
from univid_jax.data.cache import entries, shards


@dataclasses.dataclass(kw_only=True)
class Findings:
  """What was verified in one place.

  Attributes:
    path: the folder or file.
    num_files: that have checksums.
    damaged: paths of damaged files, with what is wrong.
    note: shown in parentheses.
    is_unverified: whether checksums are missing that should be there.
  """

  path: epath.Path
  num_files: int = 0
  damaged: list[str] = dataclasses.field(default_factory=list)
  note: str = ""
  is_unverified: bool = False

  def __str__(self) -> str:
    if self.is_unverified:
      return f"{self.path}: no checksums; --write adds them"
    num_intact = self.num_files - len(self.damaged)
    intact = f"{num_intact} of {count_noun(self.num_files, 'file')} {is_or_are(self.num_files)} intact"
    notes = f" ({self.note})" if self.note else ""
    return "\n".join([*(f"DAMAGED {line}" for line in self.damaged), f"{self.path}: {intact}{notes}"])


def verify(path: epath.PathLike, *, write: bool) -> Iterator[Findings]:
  """Verifies checkpoints, converted bases, LoRAs and caches, lazily and one after another.

  Args:
    path: one of them, the name of a built-in base, or a folder that contains any number, such as a workdir.
    write: whether to add checksums to checkpoints, bases and LoRA folders that have none.

  Raises:
    FileNotFoundError: there is no such path.
  """
  path = locate(path)
  if not exists(path):
    raise FileNotFoundError(f"no such file or folder: {path}")
  if not is_folder(path):
    yield from _verify_files([path, sidecar_path(path)] if exists(sidecar_path(path)) else [path])
  elif has_checksums(path) or is_checkpoint(path) or is_lora_folder(path) or _is_run_checkpoint(path):
    yield _verify_folder(path, write=write)
  else:
    with bucket_errors(path):
      inside = sorted(path.iterdir())
    folders = [each for each in inside if is_folder(each)]
    yield from _verify_files([each for each in inside if each not in folders])
    for folder in folders:
      is_deleted = folder.name == DELETED_FOLDER and _is_in_checkpoints(folder)
      if DAMAGED_SUFFIX not in folder.name and not is_deleted:
        yield from verify(folder, write=write)


def _is_run_checkpoint(folder: epath.Path) -> bool:
  return folder.name.isdecimal() and _is_in_checkpoints(folder)


def _is_in_checkpoints(folder: epath.Path) -> bool:
  return (folder if is_remote(folder) else folder.resolve()).parent.name == CHECKPOINTS_FOLDER


def _verify_folder(folder: epath.Path, *, write: bool) -> Findings:
  if has_checksums(folder):
    damage = [f"{folder}/{line}" for line in find_damage(folder)]
    return Findings(path=folder, num_files=max(len(read_names(folder)), len(damage)), damaged=damage)
  if not write:
    return Findings(path=folder, is_unverified=True)
  return Findings(path=folder, num_files=write_checksums(folder), note="checksums written now")


def _verify_files(paths: list[epath.Path]) -> Iterator[Findings]:
  """Verifies the files of one folder that carry their own checksums."""
  found = Findings(path=paths[0].parent) if paths else None
  for path in paths:
    damage = _find_damage(path)
    if damage is not None and found is not None:
      found.num_files += 1
      found.damaged += [f"{path} ({damage})"] if damage else []
  if found is not None and found.num_files:
    yield found


def _find_damage(path: epath.Path) -> str | None:
  """Returns what is wrong with a file, "" if nothing; None if it carries no checksum."""
  try:
    with bucket_errors(path):
      return _check_file(path)
  except OSError as error:
    return f"cannot be read: {error.strerror or error}"


def _check_file(path: epath.Path) -> str | None:
  if entries.is_entry(path):
    intact = entries.is_intact(path)
  elif path.suffix.lower() == ".safetensors":
    intact = check_seal(path)
  elif path.name.lower().endswith(".ckpt.json") and exists(path.with_suffix("")):
    intact = check_seal(path, path.with_suffix(""))
  else:
    return shards.find_damage(path)
  return None if intact is None else "" if intact else "checksum differs"
