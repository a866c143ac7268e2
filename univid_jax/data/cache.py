"""A cache of arrays on disk, keyed by what they were computed from.

A key is a hash of everything that determines its value, so that a stale value is never found. Each value is a file,
published atomically: several processes may fill one cache, and a killed one leaves no partial file.
"""

import hashlib
import logging
import re
from collections.abc import Callable

import numpy as np
from etils import epath
from safetensors.numpy import load, save

from univid_jax.core.paths import atomic_write

log = logging.getLogger(__name__)

# Part of every key: raise it when the code computes something else from the same input and weights.
ENCODING_VERSION = 1

_CHECKSUM_BYTES = 32
_NAME = "value"  # of the one array in a file


class CacheWriteError(OSError):
  """A value cannot be stored, for example because the disk is full; what it was computed from is not to blame."""


class Cache:
  """Arrays by key.

  Args:
    folder: local or in a bucket; created when the first value is stored.
    fingerprint: identifies what computes the values (weights, options); caches of other fingerprints are separate.
  """

  def __init__(self, folder: epath.PathLike, fingerprint: str):
    self.folder, self.fingerprint = epath.Path(folder), fingerprint
    self._reported: set[str] = set()

  def path(self, key: str) -> epath.Path:
    """Returns the file of a key, whether it exists or not."""
    name = hashlib.sha256(f"{ENCODING_VERSION}|{self.fingerprint}|{key}".encode()).hexdigest()
    return self.folder / name[:2] / f"{name}.safetensors"

  def __contains__(self, key: str) -> bool:
    return self.path(key).exists()

  def get(self, key: str) -> np.ndarray | None:
    """Returns the value, or None if it is missing or, as the log says once, corrupt."""
    path = self.path(key)
    try:
      data = path.read_bytes()
    except FileNotFoundError:
      return None
    body = _intact_body(data)
    if body is None:
      if key not in self._reported:
        self._reported.add(key)
        log.warning("%s is corrupt and is computed again", path)
      return None
    # Not a .npy, whose header several threads cannot parse at once, see `reader._HEADER_LOCK`.
    return load(body)[_NAME]

  def put(self, key: str, value: np.ndarray) -> None:
    """Stores a value; raises CacheWriteError if that is not possible."""
    body = save({_NAME: np.ascontiguousarray(value)})
    try:
      with atomic_write(self.path(key)) as path:
        path.write_bytes(body + hashlib.sha256(body).digest())
    except OSError as error:
      reason = error.strerror or str(error)
      raise CacheWriteError(error.errno, f"cannot write to the cache: {reason}", str(self.path(key))) from error

  def get_or_compute(self, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns the value; computes and stores it if necessary, and raises CacheWriteError if it cannot be stored."""
    value = self.get(key)
    if value is None:
      value = compute()
      self.put(key, value)
    return value


def is_entry(path: epath.Path) -> bool:
  """Returns whether a file is an entry of a cache, by its name."""
  return re.fullmatch(r"[0-9a-f]{64}\.safetensors", path.name) is not None and path.parent.name == path.name[:2]


def is_intact(path: epath.Path) -> bool:
  """Returns whether an entry equals its checksum."""
  return _intact_body(path.read_bytes()) is not None


def _intact_body(data: bytes) -> bytes | None:
  """Returns the contents of an entry without its checksum; None if they differ from it."""
  body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
  return body if hashlib.sha256(body).digest() == checksum else None
