"""Local copies of files in buckets, for code that reads only local files.

A copy has the size and the modification time of its source: it is current while both are equal, and is copied again
otherwise. Copies are below ~/.cache/univid_jax and may be deleted at any time.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
from etils import epath
from tqdm import tqdm

from univid_jax.core.paths import (
  CACHE_FOLDER,
  atomic_write,
  bucket_errors,
  exists,
  is_folder,
  is_remote,
  to_path,
  walk_files,
)
from univid_jax.core.unfinished import is_abandoned, is_unfinished

log = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 22


def copy_to_local(path: str) -> str:
  """Returns a local path to data: the path itself, or a copy of data in a bucket.

  Copies a whole folder; of a file, everything in its folder, since tables refer to other files. Deletes from the copy
  what is no longer in the bucket.

  Raises:
    FileNotFoundError: there is no such file or folder.
    OSError: the bucket cannot be read.
  """
  if not path or not is_remote(path):
    return path
  with bucket_errors(path):
    return _copy_folder(path)


def _copy_folder(path: str) -> str:
  wanted = to_path(path)
  _forget_listings(path)
  if not exists(wanted):
    raise FileNotFoundError(f"no such file or folder: {path}")
  root = wanted if is_folder(wanted) else wanted.parent
  copy = _copy_path(root, "data")
  with _locked(copy):
    files = {copy / file.relative_to(root): file for file in walk_files(root)}
    _delete_others(copy, files)
    stale = [(target, file) for target, file in files.items() if not _is_current(target, source_state(file))]
    for target, file in tqdm(stale, desc=f"copying {root}", unit="file", disable=None if stale else True):
      _copy(file, target)
  return str(copy if root == wanted else copy / wanted.name)


def copy_file(path: epath.PathLike, *, folder: str = "data") -> Path:
  """Returns a local path to a file: the path itself, or a copy of the file in a bucket.

  Args:
    path: of the file.
    folder: subfolder of the cache for the copy.

  Raises:
    FileNotFoundError: there is no such file.
    OSError: the bucket cannot be read.
  """
  if not is_remote(path):
    return Path(path)
  source, copy = to_path(path), _copy_path(path, folder)
  with bucket_errors(path):
    _forget_listings(path)
    if not _is_current(copy, source_state(source)):
      with _locked(copy):
        if not _is_current(copy, source_state(source)):  # another process may have copied it meanwhile
          _copy(source, copy)
  return copy


def source_state(path: epath.PathLike) -> tuple[int, int]:
  """Returns the size of a file in a bucket and its modification time in ns, or 0 if the bucket does not report it.

  Raises:
    FileNotFoundError: there is no such file.
    OSError: the bucket cannot be read.
  """
  with bucket_errors(path):
    status = epath.Path(path).stat()
    modified = status.mtime * 1_000_000_000  # etils reports whole seconds, and for S3 nothing
    with contextlib.suppress(ImportError, NotImplementedError):  # TensorFlow reads gs:// without gcsfs
      files, name = fsspec.core.url_to_fs(str(path))
      modified = round(files.modified(name).timestamp() * 1_000_000) * 1000
  return status.length, modified


def _forget_listings(path: epath.PathLike) -> None:
  """Drops fsspec's cached listings of a bucket, which other writers may have changed."""
  with contextlib.suppress(ImportError):
    fsspec.core.url_to_fs(str(path))[0].invalidate_cache()


def _copy_path(path: epath.PathLike, folder: str) -> Path:
  return Path(CACHE_FOLDER).expanduser() / folder / str(path).replace("://", "/")


def _is_current(copy: Path, state: tuple[int, int]) -> bool:
  try:
    status = copy.stat()
  except (FileNotFoundError, NotADirectoryError):
    return False
  return state[1] != 0 and (status.st_size, status.st_mtime_ns) == state


def _copy(source: epath.Path, copy: Path) -> None:
  """Copies a file, with its time, atomically; a source that is replaced meanwhile is copied again next time."""
  _, modified = source_state(source)
  with atomic_write(copy) as unfinished:
    with source.open("rb") as reading, unfinished.open("wb") as writing:
      shutil.copyfileobj(reading, writing, _BLOCK_BYTES)
    os.utime(unfinished, ns=(time.time_ns(), modified))


def _delete_others(copy: Path, keep: dict[Path, epath.Path]) -> None:
  """Deletes files and folders that the source lacks, before new ones need their names."""
  for folder, _, names in os.walk(copy, topdown=False):
    for path in (Path(folder) / name for name in names):
      # Spares files that other processes are writing: their copy may include this folder.
      if path not in keep and (not is_unfinished(path.name) or is_abandoned(path)):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
      Path(folder).rmdir()  # if it is empty


@contextlib.contextmanager
def _locked(copy: Path) -> Iterator[None]:
  """Lets the processes of a machine copy one at a time, so that later ones find the copy."""
  lock = Path(CACHE_FOLDER).expanduser() / "locks" / hashlib.sha256(str(copy).encode()).hexdigest()[:32]
  lock.parent.mkdir(parents=True, exist_ok=True)
  with lock.open("wb") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log.info("waiting for another process that copies to %s", copy)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:  # some network file systems have no locks; copies are atomic without them
      log.debug("%s is not locked: %s", copy, error)
    yield
