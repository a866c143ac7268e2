"""What identifies the files that clips are read from: their content, never a path or a date."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from univid_jax.core.errors import UserError
from univid_jax.core.paths import file_state
from univid_jax.data.media.reader import list_frames

# Threads that hash files, more than cores because storage may be slow to answer; and how many files they get at a time.
_NUM_THREADS = 16
_NUM_QUEUED = 4096


class WatchedFile:
  """A file, or a folder of frames, whose content must not change while it is used."""

  def __init__(self, path: Path):
    self.path = path
    self._state = _clip_state(path)
    self._identity: str | None = None

  def identify(self) -> str:
    """Returns the hash of its content, see `file_hash`.

    Raises:
      OSError, UserError: it has vanished or changed.
    """
    if self._identity is None:
      identity = file_hash(self.path)
      self.require_unchanged()
      self._identity = identity
    return self._identity

  def require_unchanged(self) -> None:
    """Raises OSError if it has vanished, UserError if its content has changed; being moved or linked is no change."""
    state = _clip_state(self.path)
    if state != self._state:
      if self._identity is None or file_hash(self.path) != self._identity:
        raise UserError(f"{self.path} changed while it was in use: start again")
      self._state = state


def identify_all(identities: Sequence[Callable[[], str]]) -> list[str]:
  """Calls functions that identify files, in threads, and returns their results in order.

  Raises:
    OSError, UserError: of the first one that failed; files that have not been opened by then are not read.
  """
  found: list[str] = []
  with ThreadPoolExecutor(_NUM_THREADS) as pool:
    for start in range(0, len(identities), _NUM_QUEUED):
      found += pool.map(lambda identify: identify(), identities[start : start + _NUM_QUEUED])
  return found


def file_hash(path: Path) -> str:
  """Returns the SHA-256 of a file's content, or of the images in a folder in the order in which they are read."""
  if path.is_dir():
    return hashlib.sha256("".join(file_hash(part) for part in list_frames(path)).encode()).hexdigest()
  return _hash_content(path.resolve(), file_state(path))


def _clip_state(path: Path) -> object:
  """Returns the state of a file, or of the images in a folder."""
  return [file_state(part) for part in list_frames(path)] if path.is_dir() else file_state(path)


@functools.lru_cache(maxsize=65536)
def _hash_content(path: Path, state: tuple[int, ...]) -> str:
  """Hashes a file; `state` is an argument so that a changed file is hashed again."""
  del state
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
