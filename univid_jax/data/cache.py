"""Latents and prompt embeddings that were computed once, on disk, by what they were made from.

A value's key is a hash of everything that determines it, so a stale one is never found. Each is a file of its own, written under
another name and then renamed: several processes may fill one cache, and one that is killed leaves nothing half written.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable

import numpy as np
from etils import epath
from safetensors.numpy import load, save

from univid_jax.data.clips import ClipRef
from univid_jax.files import local_file

# Part of every key: to be raised whenever the code would compute something else from the same input and weights.
ENCODING_VERSION = 1

_CHECKSUM_BYTES = 32
_NAME = "value"  # of the one array in a file


class Cache:
  """Arrays by key.

  Args:
    folder: where they are kept, here or in a bucket; made when something is.
    fingerprint: names what computes them (weights, options); another one is another cache.
  """

  def __init__(self, folder: epath.PathLike, fingerprint: str):
    self.folder, self.fingerprint = epath.Path(folder), fingerprint

  def path(self, key: str) -> epath.Path:
    """The file of a key."""
    name = hashlib.sha256(f"{ENCODING_VERSION}|{self.fingerprint}|{key}".encode()).hexdigest()
    return self.folder / name[:2] / f"{name}.safetensors"

  def __contains__(self, key: str) -> bool:
    return self.path(key).exists()

  def missing(self, keys: Iterable[str]) -> list[str]:
    """Those of the keys that are not there."""
    return [key for key in keys if key not in self]

  def get(self, key: str) -> np.ndarray | None:
    """The value, or None where there is none; one that is damaged is said to be, and counts as none."""
    path = self.path(key)
    try:
      data = path.read_bytes()
    except FileNotFoundError:
      return None
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if hashlib.sha256(body).digest() != checksum:
      warnings.warn(f"{path} is damaged and is computed again", stacklevel=2)
      return None
    # Not a .npy: NumPy reads its header with Python's ast, which in Python 3.11 fails now and then when threads use it at once.
    return load(body)[_NAME]

  def put(self, key: str, value: np.ndarray) -> None:
    """Keeps a value."""
    body = save({_NAME: np.ascontiguousarray(value)})
    with local_file(self.path(key)) as path:
      path.write_bytes(body + hashlib.sha256(body).digest())

  def get_or_compute(self, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The value, computed and kept where it is not there yet."""
    value = self.get(key)
    if value is None:
      value = compute()
      self.put(key, value)
    return value


def read_frames(clip: np.ndarray | ClipRef) -> np.ndarray:
  """A clip's frames, uint8 (T, H, W, 3), whether they are at hand or still to be read."""
  return clip.read() if isinstance(clip, ClipRef) else clip
