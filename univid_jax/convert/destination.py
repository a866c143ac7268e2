"""Destinations of conversions: created completely or not at all, after a check of the space that they need."""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator

from etils import epath

from univid_jax.convert.replacement import check_replaceable_file, check_replaceable_folder
from univid_jax.core.errors import UserError
from univid_jax.core.paths import is_remote

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
    _remove_leftovers(destination.resolve())
  if destination.exists() and not force:
    raise FileExistsError(f"{destination} already exists; --force replaces it")
  (check_replaceable_file if is_file else check_replaceable_folder)(destination)
  if is_remote(destination):
    return
  free = shutil.disk_usage(destination.parent).free
  if free < needed:
    others = sorted(path.name for path in destination.parent.glob(".partial-*"))
    hint = f"; {', '.join(others)} in it are of conversions that run or were killed" if others else ""
    raise OSError(
      f"{destination} needs {format_bytes(needed)}, {destination.parent} has {format_bytes(free)} free{hint}"
    )


@contextlib.contextmanager
def atomic_folder(destination: epath.PathLike, *, needed: int, force: bool) -> Iterator[epath.Path]:
  """Yields a folder that is renamed to `destination` on exit, and removed if the block raises.

  A bucket cannot rename: there the folder is the destination itself, and complete once it has the file that is written
  last (checkpoint.json).

  Raises: see `check_destination`; and OSError if the disk is full before all is written.
  """
  destination = epath.Path(destination)
  check_destination(destination, needed=needed, force=force)
  if is_remote(destination):
    if destination.exists():
      _remove(destination)
    destination.mkdir(parents=True)
    yield destination
    return
  destination = destination.resolve()
  partial, old = _partial(destination), _old(destination)
  partial.mkdir()
  with _locked(partial):
    try:
      yield partial
      if destination.exists():
        destination.rename(old)
      partial.rename(destination)
    except BaseException as error:
      if partial.exists():
        _remove(partial)
      if _is_disk_full(error):
        raise OSError(
          f"the disk was full before {destination} was complete, which needs up to {format_bytes(needed)}"
        ) from error
      raise
  if old.exists():
    _remove(old)


def _partial(destination: epath.Path) -> epath.Path:
  return destination.with_name(f".partial-{destination.name}")


def _old(destination: epath.Path) -> epath.Path:
  return destination.with_name(f".old-{destination.name}")


def _remove_leftovers(destination: epath.Path) -> None:
  """Removes what a killed process has left of this destination, and restores what it was about to replace."""
  partial, old = _partial(destination), _old(destination)
  if partial.exists():
    with _locked(partial):
      _remove(partial)
  if old.exists():
    _remove(old) if destination.exists() else old.rename(destination)
  for path in destination.parent.iterdir():  # of core.paths.atomic_write
    process = re.fullmatch(rf"\.(\d+)-[0-9a-f]+\.{re.escape(destination.name)}", path.name)
    if process and not _is_running(int(process[1])):
      _remove(path)


@contextlib.contextmanager
def _locked(folder: epath.Path) -> Iterator[None]:
  """Locks a folder while the block runs, where the file system can; raises UserError if another process has done so."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    os.close(handle)
    raise UserError(f"another process is writing {folder.with_name(folder.name.removeprefix('.partial-'))}") from error
  except OSError:
    pass  # network file systems cannot lock folders
  try:
    yield
  finally:
    os.close(handle)


def _is_running(process: int) -> bool:
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except (OSError, OverflowError):  # of another user, or no possible number
    pass
  return True


def _is_disk_full(error: BaseException | None) -> bool:
  """Returns whether an exception, or one that led to it, says so."""
  seen: set[int] = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if any(text in str(error) for text in _DISK_FULL):
      return True
    error = error.__cause__ or error.__context__
  return False


def _remove(path: epath.Path) -> None:
  path.rmtree() if path.is_dir() else path.unlink()


def format_bytes(count: int) -> str:
  return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
