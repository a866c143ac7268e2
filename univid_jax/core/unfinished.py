"""Names of local files and folders that are being written, next to the name that they get when they are complete.

`.partial-MACHINE-PID-START-RANDOM.NAME` becomes NAME; it keeps only the end of a long NAME. It names the process that
writes it, so that another process can tell whether that one was killed:

- On the same machine: by whether the process exists.
- On another machine, or on this one before a reboot: it counts as killed if nothing has changed for `SILENCE` seconds.

Objects in buckets appear as a whole and have no such names.
"""

import contextlib
import dataclasses
import os
import re
import secrets
import shutil
import sys
import time
from pathlib import Path

from univid_jax.core.process_identity import ProcessIdentity

PREFIX = ".partial-"
SILENCE = 86_400.0
# Maximum for NAME; file systems allow 255 for the whole name.
MAX_NAME_BYTES = 190

_NAME = re.compile(re.escape(PREFIX) + r"([0-9a-f]{8})-(\d+)-(\d*)-[0-9a-f]{8}\.(.+)")


def unfinished_path(path: Path) -> Path:
  """Returns a new path that this process writes to and then renames to `path`."""
  process = ProcessIdentity.current()
  owner = f"{process.machine}-{process.pid}-{process.start}-{secrets.token_hex(4)}"
  return path.with_name(f"{PREFIX}{owner}.{_shorten(path.name)}")


def _shorten(name: str) -> str:
  """Shortens a name that is too long to its end, suffix included."""
  encoded = os.fsencode(name)
  if len(encoded) <= MAX_NAME_BYTES:
    return name
  return encoded[-MAX_NAME_BYTES:].decode(sys.getfilesystemencoding(), "ignore")


def is_unfinished(name: str) -> bool:
  """Returns whether the name of a file or folder has the form of `unfinished_path`."""
  return _NAME.fullmatch(name) is not None


def find_unfinished(path: Path) -> list[Path]:
  """Returns everything that is to become `path`, abandoned or not."""
  name = _shorten(path.name)
  with contextlib.suppress(FileNotFoundError):
    return [each for each in path.parent.iterdir() if (match := _NAME.fullmatch(each.name)) and match[4] == name]
  return []


def find_writer(path: Path) -> ProcessIdentity | None:
  """Returns the process on this machine that writes, or wrote, an unfinished path; None if it is on another machine."""
  match, here = _NAME.fullmatch(path.name), ProcessIdentity.current()
  if match is None or match[1] != here.machine:
    return None
  return dataclasses.replace(here, pid=int(match[2]), start=match[3])


def is_abandoned(path: Path) -> bool:
  """Returns whether an unfinished path was left by a process that was killed."""
  if writer := find_writer(path):
    return writer.has_ended
  return time.time() - _last_change(path) > SILENCE


def remove_abandoned(path: Path) -> None:
  """Removes what killed processes have left of `path`."""
  for each in find_unfinished(path):
    if is_abandoned(each):
      with contextlib.suppress(FileNotFoundError):  # another process is removing it, too
        remove(each)


def remove(path: Path) -> None:
  """Removes a file or a folder, if it exists."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _last_change(path: Path) -> float:
  """Returns the Unix time of the last change of a file, or of anything in a folder; now if it is gone already."""
  times = []
  for each in (path, *path.rglob("*")):
    with contextlib.suppress(FileNotFoundError):
      times.append(each.lstat().st_mtime)
  return max(times, default=time.time())
