"""Packs the entries of a cache into shards, see `shards`; several processes share the work.

A shard gets its name when it is complete, and counts once the index names it. A kill at any time leaves the cache as it
was; the next call adopts shards that are complete, and continues after them.
"""

import dataclasses
import itertools
import logging
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from etils import epath

from univid_jax.core.bucket_files import copy_file
from univid_jax.core.errors import UserError
from univid_jax.core.paths import atomic_write, bucket_errors, exists, read_bytes
from univid_jax.core.text import count_noun
from univid_jax.core.unfinished import is_unfinished
from univid_jax.data.cache.entries import CacheError, entry_path, is_entry
from univid_jax.data.cache.shards import (
  FOLDER,
  INDEX_FILE,
  KEY_BYTES,
  KEYS_SUFFIX,
  SHARD_SUFFIX,
  Index,
  Shard,
  ShardReader,
  Shards,
  seal_entry,
  unseal_entry,
  unseal_record,
)
from univid_jax.data.features import CACHE_NAMES
from univid_jax.data.progress import Progress
from univid_jax.runtime.processes import sum_over_processes, wait_for_processes

log = logging.getLogger(__name__)

# A shard is full when it reaches one of these limits.
MAX_BYTES = 256 << 20
MAX_RECORDS = 65536

# Files in a bucket that are read at the same time.
_NUM_THREADS = 16


@dataclasses.dataclass(frozen=True)
class Packed:
  """Result of packing.

  Attributes:
    num_packed: entries that were packed now.
    num_removed: files of entries that were removed.
    num_entries, num_shards: totals of the caches.
  """

  num_packed: int
  num_removed: int
  num_entries: int
  num_shards: int

  def __str__(self) -> str:
    entries = f"{self.num_entries:,} entries are in {self.num_shards:,} shards ({self.num_packed:,} packed now)"
    return f"{entries}, {count_noun(self.num_removed, 'file')} removed"


def repair_indices(folder: epath.PathLike) -> None:
  """Makes the index of each cache name the shards that exist. All processes must call it, and hold their locks.

  Adds complete shards of a killed command, leaves out shards that are gone, and removes unfinished files.

  Args:
    folder: folder of a run's caches.
  """
  if jax.process_index() == 0:
    for name in CACHE_NAMES:
      shards = epath.Path(folder) / name / FOLDER
      _remove_unfinished(shards)
      _update_index(shards)
  wait_for_processes("indices of shards are repaired")


def pack_caches(
  folder: epath.PathLike, *, remove_files: bool = False, max_bytes: int = MAX_BYTES, max_records: int = MAX_RECORDS
) -> Packed:
  """Packs entries of caches that are files but not yet intact in a shard.

  All processes must call it, and hold their locks, after `repair_indices`.

  Args:
    folder: folder of a run's caches.
    remove_files: remove each file whose entry can be read back from a shard.
    max_bytes, max_records: limits of a shard.

  Returns:
    The result over all processes.

  Raises:
    CacheError: a shard cannot be written.
  """
  caches = [epath.Path(folder) / name for name in CACHE_NAMES]
  own = {cache: list(_own_digests(cache)) for cache in caches}
  num_packed = 0
  for cache, digests in own.items():
    with Progress(f"packing {cache.name}", len(digests), unit="entries", step="files") as progress:
      entries = _unpacked(cache, digests, Shards(cache / FOLDER), progress)
      num_packed += write_shards(cache / FOLDER, entries, max_bytes=max_bytes, max_records=max_records)
  num_packed = sum_over_processes(num_packed)  # all have written their shards
  if jax.process_index() == 0:
    for cache in caches:
      _update_index(cache / FOLDER)
  wait_for_processes("indices of shards are written")
  indices = [Shards(cache / FOLDER).index for cache in caches]
  num_removed = sum(_remove_packed(cache, own[cache]) for cache in caches) if remove_files else 0
  return Packed(
    num_packed,
    sum_over_processes(num_removed),
    num_entries=sum(map(len, indices)),
    num_shards=sum(len(index.shards) for index in indices),
  )


def _own_digests(cache: epath.Path) -> Iterator[bytes]:
  """Yields the digests of the files that this process packs."""
  for number in range(jax.process_index(), 256, jax.process_count()):
    subfolder = cache / f"{number:02x}"
    with bucket_errors(subfolder):
      paths = sorted(subfolder.iterdir()) if exists(subfolder) else []
    yield from (bytes.fromhex(path.stem) for path in paths if is_entry(path))


def _unpacked(
  cache: epath.Path, digests: list[bytes], shards: Shards, progress: Progress
) -> Iterator[tuple[bytes, bytes]]:
  """Yields the digests and entries of intact files whose entries are not intact in a shard."""
  num_yielded = 0
  for position, digest in enumerate(digests):
    progress.update(position, num_yielded)
    if shards.read(digest) is None:
      path = entry_path(cache, digest)
      entry = read_bytes(path)
      if unseal_entry(entry) is None:
        log.warning("%s is corrupt and is not packed", path)
        continue
      num_yielded += 1
      yield digest, entry


def _remove_packed(cache: epath.Path, digests: list[bytes]) -> int:
  """Removes the files whose entries are intact in a shard; returns their number."""
  shards, num_removed = Shards(cache / FOLDER), 0
  with Progress(f"verifying shards of {cache.name}", len(digests), unit="files", step="files") as progress:
    for position, digest in enumerate(digests):
      progress.update(position, num_removed)
      if shards.read(digest) is not None:
        with bucket_errors(path := entry_path(cache, digest)):
          path.unlink(missing_ok=True)
        num_removed += 1
  return num_removed


def write_shards(
  folder: epath.Path,
  entries: Iterable[tuple[bytes, bytes]],
  *,
  max_bytes: int = MAX_BYTES,
  max_records: int = MAX_RECORDS,
) -> int:
  """Writes entries, given with the digests of their keys, to new shards; returns the number of entries.

  Several processes may write to one folder at the same time. The index is not changed.

  Raises:
    CacheError: a shard cannot be written.
  """
  number = 1 + max(map(_number, _list_shards(folder)), default=-1)
  entries, num_records = iter(entries), 0
  for first in entries:
    path = folder / f"{number:06d}-{secrets.token_hex(8)}{SHARD_SUFFIX}"
    with atomic_write(path) as local:
      keys = _write_shard(local, itertools.chain([first], entries), max_bytes=max_bytes, max_records=max_records)
      with atomic_write(_keys_path(path)) as local_keys:  # written first: a shard without keys must be read as a whole
        local_keys.write_bytes(seal_entry(keys))
    number, num_records = number + 1, num_records + len(keys) // KEY_BYTES
  return num_records


def _write_shard(path: Path, entries: Iterable[tuple[bytes, bytes]], *, max_bytes: int, max_records: int) -> bytes:
  """Writes one shard; returns its keys."""
  from array_record.python.array_record_module import ArrayRecordWriter

  keys, num_bytes = bytearray(), 0
  try:
    # Groups of records would be read and decoded as a whole, and encoders' outputs hardly compress.
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for digest, entry in entries:
      writer.write(digest + entry)
      keys += digest[:KEY_BYTES]
      num_bytes += len(entry)
      if num_bytes >= max_bytes or len(keys) >= max_records * KEY_BYTES:
        break
    writer.close()
  except RuntimeError as error:  # raised by array_record
    raise CacheError(f"cannot write a shard to {path.parent}: {error}") from error
  with path.open("rb") as file:
    os.fsync(file.fileno())  # the packed files may be removed next
  return bytes(keys)


def _update_index(folder: epath.Path) -> None:
  """Writes the index if shards were added or removed, or if it is damaged."""
  paths = _list_shards(folder)
  try:
    named = [shard.name for shard in Shards(folder).index.shards]
  except UserError:
    named = None
  if named == [path.name for path in paths] or not (named or paths):
    return
  with ThreadPoolExecutor(_NUM_THREADS) as threads:
    found = [each for each in threads.map(_describe, paths) if each is not None]
  with atomic_write(folder / INDEX_FILE) as local:
    Index.build([shard for shard, _ in found], [keys for _, keys in found]).write(local)


def _describe(path: epath.Path) -> tuple[Shard, bytes] | None:
  """Returns a shard and its keys, which are read from the shard if their file is damaged; None if both are."""
  try:
    keys = unseal_entry(read_bytes(_keys_path(path)))
  except FileNotFoundError:
    keys = None
  with bucket_errors(path):
    num_bytes = path.stat().length
  if keys is None:
    try:
      records = list(ShardReader(copy_file(path, folder=FOLDER)))
    except ValueError as error:
      log.warning("%s is left out: neither its keys nor its records can be read (%s)", path, error)
      return None
    # A corrupt record keeps its position, under a key that is never looked up.
    intact = [record is not None and unseal_record(record) is not None for record in records]
    keys = b"".join(record[:KEY_BYTES] if ok and record else bytes(KEY_BYTES) for record, ok in zip(records, intact))
    with atomic_write(_keys_path(path)) as local:
      local.write_bytes(seal_entry(keys))
  return Shard(path.name, len(keys) // KEY_BYTES, num_bytes), keys


def _list_shards(folder: epath.Path) -> list[epath.Path]:
  """Returns the complete shards in the order in which they were written."""
  with bucket_errors(folder):
    paths = list(folder.iterdir()) if exists(folder) else []
  names = rf"\d{{6,}}-[0-9a-f]{{16}}{re.escape(SHARD_SUFFIX)}"
  return sorted((path for path in paths if re.fullmatch(names, path.name)), key=lambda p: (_number(p), p.name))


def _number(shard: epath.Path) -> int:
  return int(shard.name.split("-")[0])


def _keys_path(shard: epath.Path) -> epath.Path:
  return shard.with_suffix(KEYS_SUFFIX)


def _remove_unfinished(folder: epath.Path) -> None:
  """Removes what killed processes have left: files without a final name, and keys without a shard.

  No other command writes shards while all processes hold their locks.
  """
  with bucket_errors(folder):
    for path in folder.iterdir() if exists(folder) else ():
      if is_unfinished(path.name) or (path.suffix == KEYS_SUFFIX and not exists(path.with_suffix(SHARD_SUFFIX))):
        path.unlink(missing_ok=True)
