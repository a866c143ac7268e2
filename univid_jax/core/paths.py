"""Files and folders that are local or in a bucket (gs://)."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from univid_jax.core.errors import UserError
from univid_jax.core.unfinished import remove, unfinished_path

# Holds only what can be recomputed or downloaded again.
CACHE_FOLDER = "~/.cache/univid_jax"


@contextlib.contextmanager
def atomic_write(path: epath.PathLike) -> Iterator[Path]:
  """Yields a local path whose contents are published atomically to `path` on exit.

  Creates the parent folder. Nothing appears at `path` if the block raises. Several threads, processes and machines may
  write the same path: the last one wins. The block may make a folder, which replaces an empty one, unless `path` is in
  a bucket. For what a killed process leaves see `core.unfinished`.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if is_remote(path):
    with tempfile.TemporaryDirectory() as folder:
      local = Path(folder) / path.name
      yield local
      path.write_bytes(local.read_bytes())
    return
  local = unfinished_path(Path(path))
  try:
    yield local
    local.replace(path)
  finally:
    remove(local)


def file_state(path: str | os.PathLike) -> tuple[int, ...]:
  """Returns numbers that change whenever a local file is changed or replaced, also by copies that keep its dates.

  Raises:
    OSError: there is no such file.
  """
  status = os.stat(path)
  return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def is_lfs_pointer(path: str | os.PathLike) -> bool:
  """Whether a file is what Git leaves in place of a file that Git LFS has not downloaded."""
  path = Path(path)
  if not path.is_file() or path.stat().st_size > 1024:
    return False
  return path.read_bytes().startswith(b"version https://git-lfs.github.com/spec/")


def resolve_inside(folder: str | os.PathLike, name: str) -> Path:
  """Returns the path of a file that is named in another file, relative to that file's folder.

  Raises:
    UserError: it leads out of the folder.
  """
  path = os.path.normpath(name)
  if not name or "\0" in name or os.path.isabs(path) or path.split(os.sep)[0] in (os.curdir, os.pardir):
    raise UserError(f"{name!r} must be a path inside {folder}: put the file there, or a link to it")
  return Path(folder) / path


def require_writable(folder: str | os.PathLike, *, num_bytes: int = 0) -> None:
  """Creates a local folder if necessary, and checks that files can be written to it.

  Raises:
    OSError: they cannot, or the disk has less than `num_bytes` left.
  """
  folder = Path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise type(error)(error.errno, f"cannot write to the folder {folder}: {error.strerror}") from error
  free = shutil.disk_usage(folder).free
  if free < num_bytes:
    raise OSError(errno.ENOSPC, f"{folder} needs {num_bytes / 1e6:,.0f} MB, and its disk has {free / 1e6:,.0f} MB left")


def make_absolute(path: epath.PathLike) -> epath.Path:
  """Returns an absolute path, as Orbax requires; paths in a bucket are returned as they are."""
  path = epath.Path(path)
  return path if is_remote(path) else path.resolve()  # etils would take gs:// for the name of a local folder


def require_local(path: str | os.PathLike) -> Path:
  """Returns a path as pathlib's, which would take gs:// for the name of a local folder.

  Raises:
    UserError: the path is in a bucket.
  """
  if is_remote(path):
    raise UserError(f"{os.fspath(path)} is in a bucket, and has to be a path on this machine")
  return Path(path)


def is_remote(path: epath.PathLike) -> bool:
  return "://" in str(epath.Path(path))
