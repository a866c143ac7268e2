"""Destinations of conversions: created completely or not at all, after a check of the space that they need."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from univid_jax.convert.replacement import check_replaceable_file, check_replaceable_folder
from univid_jax.core.errors import UserError
from univid_jax.core.paths import bucket_errors, exists, is_folder, is_remote
from univid_jax.core.text import format_bytes
from univid_jax.core.unfinished import PREFIX, find_unfinished, find_writer, remove, remove_abandoned, unfinished_path

# How libraries say that a disk is full; they raise errors of many types.
_DISK_FULL = ("No space left on device", "Disk quota exceeded")


def check_destination(destination: epath.PathLike, *, needed: int, force: bool, is_file: bool = False) -> None:
  """Checks that a file or folder can be written; creates its parent folder and removes leftovers of a killed process.

  Args:
    destination: local or in a bucket.
    needed: bytes that will be written.
    force: whether an existing destination may be replaced.
    is_file: whether it will be a file.

  Raises:
    FileExistsError: the destination exists, and `force` is False.
    OSError: the disk has less than `needed` bytes free.
    UserError: another process is writing the destination, or it is nothing that may be replaced, see `replacement`.
  """
  destination = epath.Path(destination)
  if not is_remote(destination):
    destination.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(Path(destination).resolve())
  if exists(destination) and not force:
    raise FileExistsError(f"{destination} already exists; --force replaces it")
  with bucket_errors(destination):
    (check_replaceable_file if is_file else check_replaceable_folder)(destination)
  if is_remote(destination):
    return
  free = shutil.disk_usage(destination.parent).free
  if free < needed:
    others = sorted(path.name for path in destination.parent.glob(f"{PREFIX}*"))
    hint = f"; {', '.join(others)} in it are of conversions that run or were killed" if others else ""
    raise OSError(
      f"{destination} needs {format_bytes(needed)}, {destination.parent} has {format_bytes(free)} free{hint}"
    )


@contextlib.contextmanager
def atomic_folder(destination: epath.PathLike, *, needed: int, force: bool) -> Iterator[epath.Path]:
  """Yields a folder that is renamed to `destination` on exit, and removed if the block raises.

  A bucket cannot rename: there the folder is the destination itself, and complete once it has the file that describes
  it (checkpoint.json, lora.json).

  Raises: see `check_destination`; and OSError if the disk is full before all is written.
  """
  destination = epath.Path(destination)
  check_destination(destination, needed=needed, force=force)
  if is_remote(destination):
    with bucket_errors(destination):
      if exists(destination):
        if is_folder(destination):
          destination.rmtree()
        else:
          destination.unlink()
      destination.mkdir(parents=True)
    yield destination
    return
  target = Path(destination).resolve()
  partial, old = unfinished_path(target), _old(target)
  partial.mkdir()
  try:
    _check_alone(target, partial)  # another process may have begun at the same time
    yield epath.Path(partial)
    if target.exists():
      target.rename(old)
    partial.rename(target)
  except BaseException as error:
    remove(partial)
    if _is_disk_full(error):
      raise OSError(
        f"the disk was full before {destination} was complete, which needs up to {format_bytes(needed)}"
      ) from error
    raise
  remove(old)


def _old(destination: Path) -> Path:
  return destination.with_name(f".old-{destination.name}")


def _remove_leftovers(destination: Path) -> None:
  """Removes what a killed process has left of this destination, and restores what it was about to replace."""
  remove_abandoned(destination)
  _check_alone(destination)
  old = _old(destination)
  if old.exists():
    if destination.exists():
      remove(old)
    else:
      old.rename(destination)


def _check_alone(destination: Path, own: Path | None = None) -> None:
  """Raises UserError if another process is writing a folder; of a file the last one wins, see `atomic_write`."""
  for path in find_unfinished(destination):
    if path == own or not path.is_dir():
      continue
    writer = find_writer(path)
    if writer:
      raise UserError(f"another process is writing {destination}: wait for {writer}")
    raise UserError(
      f"another process is writing {destination}, or was killed on another machine: wait for it, or remove {path}"
    )


def _is_disk_full(error: BaseException | None) -> bool:
  """Returns whether an exception, or one that led to it, says so."""
  seen: set[int] = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if any(text in str(error) for text in _DISK_FULL):
      return True
    error = error.__cause__ or error.__context__
  return False
