"""Files of a workdir, which may be a folder here or in a bucket (gs://)."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath
from tqdm import tqdm

# What can be made or fetched again.
CACHE_FOLDER = "~/.cache/univid_jax"


@contextlib.contextmanager
def local_file(path: epath.PathLike) -> Iterator[Path]:
  """A path here for what can only write to this machine; what stands there at the end is at `path`.

  The folder of `path` is made. The file appears at once or not at all.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if is_remote(path):
    with tempfile.TemporaryDirectory() as folder:
      here = Path(folder) / path.name
      yield here
      path.write_bytes(here.read_bytes())
    return
  here = Path(path).with_name(f".{os.getpid()}.{path.name}")
  try:
    yield here
    here.replace(path)
  finally:
    here.unlink(missing_ok=True)


def local_data(path: str) -> str:
  """A path to data on this machine: the same, or where a copy is of what stands in a bucket.

  Of a folder everything is copied; of a file, all that stands beside it, since tables name other files. What is there already
  with the same length is not copied again; the copies are in ~/.cache/univid_jax/data and may be deleted at any time.

  Raises:
    FileNotFoundError: there is no such file or folder.
  """
  if not path or not is_remote(path):
    return path
  wanted = epath.Path(path)
  if not wanted.exists():
    raise FileNotFoundError(f"no such file or folder: {path}")
  root = wanted if wanted.is_dir() else wanted.parent
  copy = Path(CACHE_FOLDER).expanduser() / "data" / str(root).replace("://", "/")
  for file in tqdm(list(_files_below(root)), desc=f"copying {root}", unit="file", disable=None):
    target = copy / file.relative_to(root)
    if not target.exists() or target.stat().st_size != file.stat().length:
      with local_file(target) as unfinished:
        unfinished.write_bytes(file.read_bytes())
  return str(copy if root == wanted else copy / wanted.name)


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from _files_below(path)
    else:
      yield path


def absolute(path: epath.PathLike) -> epath.Path:
  """A path that does not depend on where the process stands, as orbax wants them; a bucket's is one already."""
  path = epath.Path(path)
  return path if is_remote(path) else path.resolve()  # etils would take gs:// for the name of a folder


def is_remote(path: epath.PathLike) -> bool:
  return "://" in str(epath.Path(path))
