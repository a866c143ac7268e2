"""A cache of arrays on disk, keyed by what they were computed from.

A key is a hash of everything that determines its value, so that a stale value is never found. Each value is a file,
published atomically: several processes may fill one cache, and a killed one leaves no partial file. Files may have been
packed into shards, see `shards`.
"""

import contextlib
import errno
import hashlib
import logging
import re
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath
from safetensors.numpy import load, save

from univid_jax.core.paths import atomic_write, exists, read_bytes
from univid_jax.data.cache.shards import FOLDER, Shards, seal_entry, unseal_entry

log = logging.getLogger(__name__)

# Part of every key: increase it when the code computes different values from the same input and weights.
ENCODING_VERSION = 1

_NAME = "value"  # name of the only array in a file


class CacheError(OSError):
  """A value cannot be stored or read, for example because the disk is full or a bucket does not answer.

  The data that it is computed from is not at fault.
  """


class Cache:
  """Arrays by key. Values are looked up in shards first, and stored as files.

  Args:
    folder: local or in a bucket; created when the first value is stored.
    fingerprint: identifies what computes the values (weights, options); caches of other fingerprints are separate.

  Raises:
    UserError: the index of the shards is damaged.
  """

  def __init__(self, folder: epath.PathLike, fingerprint: str):
    self.folder, self.fingerprint = epath.Path(folder), fingerprint
    self._shards = Shards(self.folder / FOLDER)
    self._reported: set[str] = set()

  def path(self, key: str) -> epath.Path:
    """Returns the path of a key's file, which need not exist."""
    return entry_path(self.folder, self._digest(key))

  def __contains__(self, key: str) -> bool:
    digest = self._digest(key)
    with self._errors("read"):
      return digest in self._shards or exists(self.path(key)) or digest in self._newer_shards()

  def get(self, key: str) -> np.ndarray | None:
    """Returns the value, or None if it is missing or corrupt; the latter is logged once.

    Raises:
      CacheError: the value cannot be read.
    """
    digest = self._digest(key)
    with self._errors("read"):
      body = self._shards.read(digest)
      if body is None:
        body = self._read_file(key)
      if body is None:
        body = self._newer_shards().read(digest)
    # Not a .npy, whose header is not parsed safely by several threads at once, see `data.media.reader._HEADER_LOCK`.
    return None if body is None else load(bytes(body))[_NAME]

  def put(self, key: str, value: np.ndarray) -> None:
    """Stores a value; raises CacheError if that is not possible."""
    body = save({_NAME: np.ascontiguousarray(value)})
    with self._errors("write to", self.path(key)), atomic_write(self.path(key)) as path:
      path.write_bytes(seal_entry(body))

  def get_or_compute(self, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns the value; computes and stores it if necessary, and raises CacheError if it cannot be stored."""
    value = self.get(key)
    if value is None:
      value = compute()
      self.put(key, value)
    return value

  def _digest(self, key: str) -> bytes:
    return hashlib.sha256(f"{ENCODING_VERSION}|{self.fingerprint}|{key}".encode()).digest()

  @contextlib.contextmanager
  def _errors(self, action: str, path: epath.Path | None = None) -> Iterator[None]:
    """Turns other OSErrors into CacheErrors about `path`, or else the path that they name."""
    try:
      yield
    except OSError as error:
      reason = error.strerror or str(error)
      number = error.errno or errno.EIO  # an error of a bucket may have none
      raise CacheError(
        number, f"cannot {action} the cache: {reason}", str(path or error.filename or self.folder)
      ) from error

  def _read_file(self, key: str) -> bytes | None:
    path = self.path(key)
    try:
      body = unseal_entry(read_bytes(path))
    except FileNotFoundError:
      return None
    if body is None and key not in self._reported:
      self._reported.add(key)
      log.warning("%s is corrupt and is computed again", path)
    return body

  def _newer_shards(self) -> Shards:
    """Returns the shards as they are now: another process may have packed the files and removed them."""
    if not self._shards.is_current():
      self._shards = Shards(self.folder / FOLDER)
    return self._shards


def entry_path(folder: epath.Path, digest: bytes) -> epath.Path:
  """Returns the path of an entry in the folder of a cache, given the digest of its key."""
  name = digest.hex()
  return folder / name[:2] / f"{name}.safetensors"


def is_entry(path: epath.Path) -> bool:
  """Returns whether a file is an entry of a cache, judging by its name."""
  return re.fullmatch(r"[0-9a-f]{64}\.safetensors", path.name) is not None and path.parent.name == path.name[:2]


def is_intact(path: epath.Path) -> bool:
  """Returns whether an entry matches its checksum."""
  return unseal_entry(path.read_bytes()) is not None
