"""Files of a workdir, which may be a folder here or in a bucket (gs://)."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath


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


def is_remote(path: epath.PathLike) -> bool:
  return "://" in str(epath.Path(path))
