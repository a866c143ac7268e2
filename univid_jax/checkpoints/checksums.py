"""Checksums of weights, independent of the files that hold them, and of files, so that damage is noticed before use.

Tensors are identified by SHA-256. Files are checked with XXH3 (128 bits), which detects accidental changes at memory
speed, but does not protect against deliberate ones:

FOLDER/checksums.xxh128   a line "CHECKSUM  NAME" per file, which `xxhsum --check` reads too, then one with the checksum
                          of these lines; written last and atomically
LoRA files                hold their own checksums in their headers or sidecars, see `seal_file`
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import xxhash
from etils import epath

from univid_jax.core.errors import UserError
from univid_jax.core.paths import (
  atomic_write,
  bucket_errors,
  exists,
  is_folder,
  is_remote,
  read_bytes,
  resolve_inside,
  walk_files,
)
from univid_jax.core.text import list_first

CHECKSUMS_FILE = "checksums.xxh128"
# The entry that `seal_file` fills in, and its value until then.
SEAL = "univid_checksum"
OPEN_SEAL = f"xxh3_128:{'0' * 32}"
# Two patterns, so that no flipped bit hides it from both.
_SEAL_PATTERNS = (rb'"%s": ?".{9}(.{32})"' % SEAL.encode(), rb"xxh3_128:(.{32})")

log = logging.getLogger(__name__)

_NUM_THREADS = 8
# Fits into a core's L2 cache: blocks of 4 MB take one and a half times as long.
_BLOCK_BYTES = 1 << 18
# Minimum number of bytes searched for a checksum.
_START_BYTES = 1 << 20


class DamagedError(UserError):
  """Files differ from their checksums, are missing, or cannot be read.

  Attributes:
    summary: the message without advice.
    damage: one text per file, which begins with its name in the folder.
  """

  def __init__(
    self,
    folder: epath.PathLike,
    damage: Sequence[str],
    advice: str = "restore it from a copy or write it again; --verify_weights=off skips this check in train, prepare, "
    "sample, evaluate and demo",
  ):
    self.folder, self.damage = folder, tuple(damage)
    self.summary = f"{folder} is damaged: {list_first(damage, 8)}"
    super().__init__(f"{self.summary}; {advice}")


def tensor_digest(name: str, tensor: np.ndarray) -> str:
  """Returns the SHA-256 of a tensor's official name, dtype, shape and bytes.

  Dims of size 1 are omitted from the shape, because layouts differ in them.
  """
  shape = tuple(n for n in tensor.shape if n != 1)
  sha = hashlib.sha256(f"{name} {tensor.dtype} {shape}\n".encode())
  sha.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
  return sha.hexdigest()


def combine_digests(digests: Mapping[str, str]) -> str:
  """Returns one checksum for the tensors whose digests are given by name."""
  return hashlib.sha256("".join(f"{name} {value}\n" for name, value in sorted(digests.items())).encode()).hexdigest()


def write_checksums(folder: epath.PathLike) -> int:
  """Writes the checksums of all files in a folder and its subfolders; returns how many files there are."""
  folder = epath.Path(folder)
  names = _list_names(folder)
  with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    checksums = pool.map(hash_file, [folder / name for name in names])
    lines = "".join(f"{checksum}  {name}\n" for checksum, name in zip(checksums, names)).encode()
  with atomic_write(folder / CHECKSUMS_FILE) as path, path.open("wb") as file:
    file.write(lines + _last_line(lines))
    file.flush()
    os.fsync(file.fileno())  # a checkpoint with an empty list would count as damaged after a power failure
  return len(names)


def has_checksums(folder: epath.PathLike) -> bool:
  return exists(epath.Path(folder) / CHECKSUMS_FILE)


def read_names(folder: epath.PathLike) -> list[str]:
  """Returns the names of the files that have a checksum; [] if the list of checksums is damaged."""
  return list(_read_checksums(epath.Path(folder)) or ())


def find_damage(folder: epath.PathLike, select: Callable[[str], bool] = lambda name: True) -> list[str]:
  """Hashes files of a folder in threads.

  Args:
    folder: a folder with checksums.
    select: returns whether to hash a file, given its name in the folder.

  Returns:
    The damage, see `DamagedError.damage`; files without a checksum are ignored.
  """
  with _hashing(folder, select) as wait:
    return wait()


@contextlib.contextmanager
def verified(
  folder: epath.PathLike, *, enabled: bool = True, select: Callable[[str], bool] = lambda name: True
) -> Iterator[None]:
  """Verifies files of a folder while the block runs, for example while it loads them.

  A damaged file is reported at the end of the block, even in place of an error that the block raised. A folder without
  checksums causes a warning.

  Args:
    folder: the folder to verify; "" for none.
    enabled: whether to verify at all.
    select: see `find_damage`.

  Raises:
    DamagedError: a file is damaged.
  """
  if not enabled or not folder:
    yield
    return
  if not has_checksums(folder):
    yield
    _report_missing(str(folder))
    return
  with _hashing(folder, select) as wait:
    try:
      yield
    except Exception as error:
      if damage := wait():
        raise DamagedError(folder, damage) from error
      raise
    if damage := wait():
      raise DamagedError(folder, damage)


@functools.cache  # once, however often a folder is opened
def _report_missing(folder: str) -> None:
  log.warning(
    "%s has no checksums, so damage would go unnoticed; to add them: python -m univid_jax.verify %s --write",
    folder,
    folder,
  )


@contextlib.contextmanager
def _hashing(folder: epath.PathLike, select: Callable[[str], bool]) -> Iterator[Callable[[], list[str]]]:
  """Hashes files in the background; yields a function that waits for the result and returns the damage."""
  folder = epath.Path(folder)
  checksums = _read_checksums(folder)
  pool = concurrent.futures.ThreadPoolExecutor(_NUM_THREADS)
  futures = [
    pool.submit(_check_file, folder, name, checksum) for name, checksum in (checksums or {}).items() if select(name)
  ]

  def wait() -> list[str]:
    if checksums is None:
      return [f"{CHECKSUMS_FILE} (its own checksum differs)"]
    return [damage for future in futures if (damage := future.result()) is not None]

  try:
    yield wait
  finally:
    pool.shutdown(cancel_futures=True)


def _check_file(folder: epath.Path, name: str, checksum: str) -> str | None:
  try:
    found = hash_file(folder / name)
  except FileNotFoundError:
    return f"{name} (missing, but has a checksum)"
  except OSError as error:
    if is_remote(folder):
      raise  # a bucket that does not answer says nothing about the file
    return f"{name} (no checksum: {error.strerror or error})"
  return None if found == checksum else f"{name} (checksum differs)"


def digest_contents(path: epath.PathLike, *, listed_in: epath.PathLike | None) -> str:
  """Returns one checksum of a file, or of the names and contents of all files in a folder.

  Args:
    path: a file or a folder.
    listed_in: `path` or a folder that contains it, if its files were verified against its list of checksums: the listed
      checksums are then used instead of reading the files again, with the same result.
  """
  path, listed = epath.Path(path), {}
  if listed_in is not None and has_checksums(listed_in):
    listed = {str(epath.Path(listed_in) / name): value for name, value in (_read_checksums(listed_in) or {}).items()}
  names = _list_names(path) if is_folder(path) else [""]
  files = [path / name if name else path for name in names]
  with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    values = pool.map(lambda file: listed.get(str(file)) or hash_file(file), files)
    return combine_digests(dict(zip(names, values)))


def hash_file(path: epath.PathLike) -> str:
  """Returns the XXH3 of a file's contents: 128 bits in hexadecimal."""
  checksum = xxhash.xxh3_128()
  with bucket_errors(path), epath.Path(path).open("rb") as file:
    _hash_rest(file, checksum)
  return checksum.hexdigest()


def _list_names(folder: epath.Path) -> list[str]:
  """Returns the names of the files that get checksums, sorted."""
  files = [file for file in walk_files(folder) if not file.name.endswith(CHECKSUMS_FILE)]  # nor an unfinished one
  return sorted(str(file.relative_to(folder)) for file in files)


def _read_checksums(folder: epath.PathLike) -> dict[str, str] | None:
  """Reads checksums by file name; returns None if the list is damaged."""
  contents = read_bytes(epath.Path(folder) / CHECKSUMS_FILE)
  end = contents.rfind(b"\n", 0, -1) + 1
  if contents[end:] != _last_line(contents[:end]):
    return None
  checksums: dict[str, str] = {}
  for line in contents[:end].decode().split("\n")[:-1]:
    checksum, name = line.split("  ", 1)
    resolve_inside(str(folder), name)
    checksums[name] = checksum
  return checksums


def _last_line(lines: bytes) -> bytes:
  return f"# {xxhash.xxh3_128_hexdigest(lines)} of the lines above\n".encode()


def seal_file(holder: Path, *files: Path) -> None:
  """Writes the checksum of a file into the file.

  It is the checksum of the file without this entry, followed by the other files.

  Args:
    holder: a new .safetensors file whose metadata has the entry SEAL: OPEN_SEAL, or a JSON file with this entry.
    *files: the files that the JSON file describes.
  """
  start = _find_seal(epath.Path(holder))
  assert start is not None, f"{holder} has no place for a checksum"
  checksum = _hash_sealed(epath.Path(holder), start, [epath.Path(file) for file in files])
  with holder.open("r+b") as file:
    file.seek(start)
    file.write(checksum.encode())


def check_seal(holder: epath.PathLike, *files: epath.PathLike) -> bool | None:
  """Returns whether files, local or in a bucket, match the checksum that `seal_file` wrote; None if there is none."""
  holder = epath.Path(holder)
  start = _find_seal(holder)
  if start is None:
    return None
  with holder.open("rb") as file:
    file.seek(start)
    return file.read(32) == _hash_sealed(holder, start, [epath.Path(file) for file in files]).encode()


def require_seal(path: Path, sidecar: Path) -> None:
  """Raises DamagedError if a file differs from the checksum that it or its sidecar holds."""
  if path.suffix.lower() == ".safetensors" and path.is_file() and check_seal(path) is False:
    raise DamagedError(path.parent, [f"{path.name} (checksum differs)"])
  if path.is_file() and sidecar.is_file() and check_seal(sidecar, path) is False:
    raise DamagedError(path.parent, [f"{path.name} or {sidecar.name} (checksum differs)"])


def _hash_sealed(holder: epath.Path, start: int, files: Sequence[epath.Path]) -> str:
  checksum = xxhash.xxh3_128()
  with holder.open("rb") as file:
    checksum.update(file.read(start))
    file.seek(start + 32)
    _hash_rest(file, checksum)
  for path in files:
    with path.open("rb") as file:
      _hash_rest(file, checksum)
  return checksum.hexdigest()


@runtime_checkable
class _Readable(Protocol):
  """A file, local or in a bucket."""

  def read(self, size: int, /) -> bytes: ...


def _hash_rest(file: _Readable, checksum: xxhash.xxh3_128) -> None:
  while block := file.read(_BLOCK_BYTES):
    checksum.update(block)


def _find_seal(holder: epath.Path) -> int | None:
  """Returns where in a file its checksum begins, even if the length of the header is damaged."""
  with holder.open("rb") as file:
    start = file.read(_START_BYTES)
    length = holder.stat().length
    end = 8 + int.from_bytes(start[:8], "little") if holder.suffix.lower() == ".safetensors" else length
    if len(start) < end <= length:
      start += file.read(end - len(start))
  found = next(filter(None, (re.search(pattern, start, re.DOTALL) for pattern in _SEAL_PATTERNS)), None)
  return None if found is None else found.start(1)
