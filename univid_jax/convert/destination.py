"""Destinations of conversions: created completely or not at all."""

import contextlib
import shutil
from collections.abc import Iterator

from etils import epath

from univid_jax.core.paths import is_remote


def check_destination(destination: epath.PathLike, *, needed: int, force: bool) -> None:
  """Checks that a file or folder can be written; creates its parent folder.

  Args:
    destination: local or in a bucket.
    needed: bytes that will be written.
    force: whether an existing destination may be replaced.

  Raises:
    FileExistsError: the destination exists, and `force` is False.
    OSError: the disk has less than `needed` bytes free.
  """
  destination = epath.Path(destination)
  if destination.exists() and not force:
    raise FileExistsError(f"{destination} already exists; --force replaces it")
  if is_remote(destination):
    return
  destination.parent.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(destination.parent).free
  if free < needed:
    raise OSError(f"{destination} needs {format_bytes(needed)}, {destination.parent} has {format_bytes(free)} free")


@contextlib.contextmanager
def atomic_folder(destination: epath.PathLike, *, needed: int, force: bool) -> Iterator[epath.Path]:
  """Yields a folder that is renamed to `destination` on exit, and removed if the block raises.

  A bucket cannot rename: there the folder is the destination itself, and complete once it has the file that is written
  last (checkpoint.json). Leftovers of a killed process are removed.

  Raises: see `check_destination`.
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
  partial, old = (destination.with_name(f".{kind}-{destination.name}") for kind in ("partial", "old"))
  if partial.exists():
    _remove(partial)
  partial.mkdir()
  try:
    yield partial
    if destination.exists():
      destination.rename(old)
    partial.rename(destination)
  except BaseException:
    if partial.exists():
      _remove(partial)
    raise
  if old.exists():
    _remove(old)


def _remove(path: epath.Path) -> None:
  path.rmtree() if path.is_dir() else path.unlink()


def format_bytes(count: int) -> str:
  return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
