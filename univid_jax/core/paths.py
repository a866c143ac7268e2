"""Files and folders that are local or in a bucket; docs/formats.md says which may be in one."""

import contextlib
import errno
import functools
import importlib.util
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import fsspec
from etils import epath
from etils.epath.stat_utils import StatResult

from univid_jax.core.errors import UserError, first_line
from univid_jax.core.installation import install_command
from univid_jax.core.text import format_bytes
from univid_jax.core.unfinished import remove, unfinished_path

# Holds only what can be recomputed or downloaded again.
CACHE_FOLDER = "~/.cache/univid_jax"

# Schemes of the buckets that etils reads.
_SCHEMES = ("gs", "s3", "az", "hf")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

PathT = TypeVar("PathT", Path, epath.Path)


@contextlib.contextmanager
def atomic_write(path: epath.PathLike) -> Iterator[Path]:
  """Yields a local path whose contents are published atomically to `path` on exit.

  Creates the parent folder. Nothing appears at `path` if the block raises. Several threads, processes and machines may
  write the same path: the last one wins. The block may make a folder, which replaces an empty one, unless `path` is in
  a bucket. `core.unfinished` handles what a killed process leaves.
  """
  path = to_path(path)
  with bucket_errors(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  if is_remote(path):
    with tempfile.TemporaryDirectory() as folder:
      local = Path(folder) / path.name
      yield local
      contents = local.read_bytes()
      with bucket_errors(path):
        path.write_bytes(contents)
    return
  local = unfinished_path(Path(path))
  try:
    yield local
    local.replace(path)
  except OSError as error:
    if error.filename is None and error.errno and error.strerror == os.strerror(error.errno):  # raised by a write
      error.filename = str(path)
    raise
  finally:
    remove(local)


def write_text(path: epath.PathLike, text: str) -> None:
  """Writes UTF-8 text; nothing appears, or is replaced, before it is complete."""
  with atomic_write(path) as unfinished:
    unfinished.write_text(text, encoding="utf-8")


def read_bytes(path: epath.PathLike) -> bytes:
  """Returns the contents of a file; raises OSError, also for faults of a bucket."""
  with bucket_errors(path):
    return to_path(path).read_bytes()


@contextlib.contextmanager
def bucket_errors(path: epath.PathLike) -> Iterator[None]:
  """Turns what a bucket's library raises (HttpError of gcsfs, errors of sign-in and of aiohttp) into an OSError with a
  number and a path, so that code that handles the errors of a disk handles those of a bucket. A UserError passes.

  Args:
    path: what the block reads or writes; if it is local, errors pass unchanged.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    if not is_remote(path):
      raise
    reason = f"{type(error).__name__}: {first_line(error)}"
    if not isinstance(error, OSError):
      raise OSError(errno.EIO, reason, str(path)) from error
    if not error.errno and f"{str(path).partition(':')[0]}://" not in str(error):
      number = errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EIO
      error.errno, error.strerror, error.filename = number, reason, str(path)  # keeps the class, which callers handle
    raise


def exists(path: epath.PathLike) -> bool:
  """Returns whether there is something at a path.

  The methods of etils and fsspec report a bucket that does not answer as empty; this function, `is_folder` and
  `is_file` raise OSError.
  """
  return epath.Path(path).exists() if not is_remote(path) else _find_status(path) is not None


def is_folder(path: epath.PathLike) -> bool:
  """Returns whether there is a folder at a path; see `exists`."""
  if not is_remote(path):
    return epath.Path(path).is_dir()
  status = _find_status(path)
  return status is not None and status.is_directory


def is_file(path: epath.PathLike) -> bool:
  """Returns whether there is a file at a path; see `exists`."""
  if not is_remote(path):
    return epath.Path(path).is_file()
  status = _find_status(path)
  return status is not None and not status.is_directory


def _find_status(path: epath.PathLike) -> StatResult | None:
  with bucket_errors(path):
    try:
      return to_path(path).stat()
    except FileNotFoundError:
      return None


def file_state(path: str | os.PathLike) -> tuple[int, ...]:
  """Returns numbers that change whenever a local file is changed or replaced, also by copies that keep its dates.

  Raises:
    OSError: there is no such file.
  """
  status = os.stat(path)
  return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def is_lfs_pointer(path: str | os.PathLike) -> bool:
  """Returns whether a file is a pointer, left by Git in place of a file that Git LFS has not downloaded."""
  path = Path(path)
  if not path.is_file() or path.stat().st_size > 1024:
    return False
  return path.read_bytes().startswith(b"version https://git-lfs.github.com/spec/")


def resolve_inside(folder: str | os.PathLike, name: str) -> Path:
  """Returns the path of a file that is named in another file, relative to that file's folder.

  Raises:
    UserError: the path leads out of the folder.
  """
  path = os.path.normpath(name)
  if not name or "\0" in name or os.path.isabs(path) or path.split(os.sep)[0] in (os.curdir, os.pardir):
    raise UserError(f"{name!r} must be a path inside {folder}: put the file there, or a link to it")
  return Path(folder) / path


def explain_missing(path: str | os.PathLike) -> str:
  """Returns the end of a message about a missing local file: "; ..." if a file beside it has almost the same name."""
  missing = Path(path)
  try:
    while not missing.parent.is_dir() and missing != missing.parent:
      missing = missing.parent
    if "\\" in missing.name:
      return "; folders in a path are separated by /, not by a backslash"
    names = _names_by_folded(missing.parent, missing.parent.stat().st_mtime_ns).get(_fold(missing.name))
  except OSError:
    return ""
  if not names or missing.name in names:  # a dangling link
    return ""
  if any(_compose(name) == _compose(missing.name) for name in names):
    return f"; {missing.parent} has this name with its accents in another Unicode form (NFC or NFD): rename one of them"
  return f"; {missing.parent} has {names[0]}, in other upper and lower case"


@functools.lru_cache(maxsize=64)
def _names_by_folded(folder: Path, modified: int) -> dict[str, list[str]]:
  """Returns the names in a folder by their folded form; cached, since a table may name many missing files."""
  del modified
  names: dict[str, list[str]] = {}
  for name in sorted(os.listdir(folder)):
    names.setdefault(_fold(name), []).append(name)
  return names


def _compose(name: str) -> str:
  return unicodedata.normalize("NFC", name)


def _fold(name: str) -> str:
  return _compose(name).casefold()


def walk_files(folder: PathT, *, is_left_out: Callable[[PathT], bool] = lambda path: False) -> Iterator[PathT]:
  """Yields the files in a folder and in its subfolders, sorted by path. Links to folders are followed, but not into a
  folder that they are in.

  Args:
    folder: a local one, or one in a bucket.
    is_left_out: returns whether to leave out a file, or a subfolder with its contents.

  Raises:
    OSError: a folder cannot be read.
  """
  yield from sorted(_walk(folder, is_left_out, ()))


def _walk(folder: PathT, is_left_out: Callable[[PathT], bool], above: tuple[tuple[int, int], ...]) -> Iterator[PathT]:
  if not is_remote(folder):  # buckets have no links
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity in above:
      return
    above = *above, identity
  with bucket_errors(folder):
    paths = list(folder.iterdir())
  for path in paths:
    if is_left_out(path):
      continue
    if is_folder(path):
      yield from _walk(path, is_left_out, above)
    else:
      yield path


def require_writable(folder: str | os.PathLike, *, num_bytes: int = 0) -> None:
  """Creates a local folder if necessary, and checks that files can be written to it.

  Raises:
    OSError: they cannot be written, or the disk has less than `num_bytes` left.
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
    needed, left = format_bytes(num_bytes), format_bytes(free)
    raise OSError(errno.ENOSPC, f"the folder {folder} needs {needed}, and its disk has {left} left")


def to_path(path: epath.PathLike) -> epath.Path:
  """Returns a path that is local or in a bucket.

  Raises:
    UserError: it is another kind of URL, or in a bucket whose package is not installed.
  """
  if scheme := _find_scheme(path):
    try:
      fsspec.get_filesystem_class(scheme)
    except ImportError as error:
      if scheme != "gs" or not importlib.util.find_spec("tensorflow"):  # etils reads gs:// with it, too
        extra = f": {install_command('gcs')}" if scheme == "gs" else ""
        raise UserError(f"{path}: {error}{extra}") from error
  return epath.Path(path)


def _find_scheme(path: epath.PathLike) -> str:
  """Returns the scheme of a path in a bucket, or "" for a local path; raises UserError for other URLs."""
  url = _URL.match(str(path))
  if url and url[1] not in _SCHEMES:
    names = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
    raise UserError(f"{path}: paths are local or in a bucket ({names})")
  return url[1] if url else ""


def refuse_other_buckets(path: epath.PathLike, what: str) -> None:
  """Raises UserError if a path is neither local nor in gs://, whatever packages are installed.

  Args:
    path: of the file or folder.
    what: the kind of files and folders that may not be there, for the message.
  """
  if _find_scheme(path) not in ("", "gs"):
    raise UserError(f"{path}: {what} are local or in gs://")


def make_absolute(path: epath.PathLike) -> epath.Path:
  """Returns a path for Orbax: a local one made absolute, a gs:// one unchanged.

  Raises:
    UserError: it is in another bucket.
  """
  refuse_other_buckets(path, "checkpoints and their arrays")
  path = to_path(path)
  return path if is_remote(path) else path.resolve()  # etils would take gs:// for the name of a local folder


def require_local(path: str | os.PathLike) -> Path:
  """Returns a local path as a pathlib.Path, which would take gs:// for the name of a local folder.

  Raises:
    UserError: it is in a bucket.
  """
  if _find_scheme(path):
    raise UserError(f"{path} is in a bucket: give a path on this machine")
  return Path(path)


def is_remote(path: epath.PathLike) -> bool:
  return _URL.match(str(path)) is not None
