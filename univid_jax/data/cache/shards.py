"""Entries of a cache in shards: files of many entries in array_record's format, with one index of all entries.

  CACHE/shards/index                  shard and position of each entry, see `Index`
  CACHE/shards/NUMBER-ID.array_record  entries, each behind the digest of its key
  CACHE/shards/NUMBER-ID.keys          the same digests, from which the index is built

The index is written last, atomically: only the shards that it names count. Shards never change.
"""

import collections
import dataclasses
import hashlib
import json
import logging
import resource
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash
from etils import epath

from univid_jax.core.bucket_files import copy_file, source_state
from univid_jax.core.errors import UserError, first_line
from univid_jax.core.json_files import parse_json
from univid_jax.core.numbers import round_up
from univid_jax.core.paths import bucket_errors, exists, file_state, is_remote

log = logging.getLogger(__name__)

FOLDER = "shards"
INDEX_FILE = "index"
SHARD_SUFFIX = ".array_record"
KEYS_SUFFIX = ".keys"

DIGEST_BYTES = 32
KEY_BYTES = 16  # of a digest in the index: two of a billion keys collide with probability 1e-21

# An open shard takes a file handle, and 8 bytes of memory per record; opening one takes 0.2 us per record. Half of a
# process's file handles are left for other uses.
MAX_OPEN_SHARDS = 1024

_MAGIC = b"UVSHARD1"
_CHECKSUM_BYTES = 32
_INDEX_CHECKSUM_BYTES = 16
_BLOCK = 1 << 22

_Bytes = TypeVar("_Bytes", bytes, memoryview)


def seal_entry(body: bytes) -> bytes:
  """Returns an entry: contents with their checksum."""
  return body + hashlib.sha256(body).digest()


def unseal_entry(entry: _Bytes) -> _Bytes | None:
  """Returns the contents of an entry; None if they differ from the checksum."""
  body, checksum = entry[:-_CHECKSUM_BYTES], entry[-_CHECKSUM_BYTES:]
  return body if hashlib.sha256(body).digest() == checksum else None


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of entries, as the index describes it."""

  name: str
  num_records: int
  num_bytes: int


class Index:
  """The location of each entry, in 24 bytes per entry, mapped from a file.

  The file holds `UVSHARD1`, the length of the header in 8 bytes, the header (JSON: `shards`, `num_records`), three
  columns of uint64 in the order of the keys (first and second half of a key; shard << 32 | record), and the XXH3 (128
  bits) of all that. Integers are little-endian.

  Args:
    shards: by number.
    columns: uint64 (3, n).
  """

  def __init__(self, shards: Sequence[Shard], columns: np.ndarray):
    self.shards, self._columns = tuple(shards), columns

  def __len__(self) -> int:
    return self._columns.shape[1]

  @classmethod
  def build(cls, shards: Sequence[Shard], keys: Sequence[bytes]) -> "Index":
    """Sorts the keys of shards, given in the shards' order; among equal keys the one in the last shard counts."""
    table = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
    places = [(number << 32) + np.arange(shard.num_records, dtype=np.uint64) for number, shard in enumerate(shards)]
    order = np.argsort(table[:, 0], kind="stable")
    columns = np.empty((3, len(order)), np.uint64)
    columns[0], columns[1] = table[order, 0], table[order, 1]
    columns[2] = np.concatenate([np.empty(0, np.uint64), *places])[order]
    is_last = np.ones(len(order), bool)
    is_last[:-1] = (columns[:2, 1:] != columns[:2, :-1]).any(0)
    return cls(shards, columns if is_last.all() else columns[:, is_last])

  def write(self, path: Path) -> None:
    shards = [dataclasses.astuple(shard) for shard in self.shards]
    header = json.dumps({"num_records": len(self), "shards": shards}).encode()
    header = header.ljust(round_up(len(header), 8))
    checksum = xxhash.xxh3_128()
    with path.open("wb") as file:
      columns = (np.ascontiguousarray(column).view(np.uint8).data for column in self._columns)
      for part in (_MAGIC, len(header).to_bytes(8, "little"), header, *columns):
        checksum.update(part)
        file.write(part)
      file.write(checksum.digest())

  @classmethod
  def read(cls, path: Path) -> "Index":
    """Maps an index into memory.

    Raises:
      ValueError: the index is damaged.
    """
    checksum = xxhash.xxh3_128()
    left = path.stat().st_size - _INDEX_CHECKSUM_BYTES
    with path.open("rb") as file:
      while left > 0 and (block := file.read(min(left, _BLOCK))):
        checksum.update(block)
        left -= len(block)
      if left or file.read() != checksum.digest():
        raise ValueError("its checksum differs")
      file.seek(0)
      if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("another format")
      header = parse_json(file.read(int.from_bytes(file.read(8), "little")))
      shape = 3, header["num_records"]
      columns = np.memmap(file, np.uint64, "r", offset=file.tell(), shape=shape) if shape[1] else np.empty(shape)
    return cls([Shard(*values) for values in header["shards"]], np.asarray(columns).astype(np.uint64, copy=False))

  def find(self, digest: bytes) -> tuple[Shard, int] | None:
    """Returns the shard of an entry and its position there."""
    first, second = np.frombuffer(digest, "<u8", 2)
    end = int(np.searchsorted(self._columns[0], first, side="right"))
    while end and self._columns[0, end - 1] == first:
      end -= 1
      if self._columns[1, end] == second:
        place = int(self._columns[2, end])
        return self.shards[place >> 32], place & 0xFFFFFFFF
    return None


class ShardReader:
  """Random access to the records of one local shard, from several threads.

  Raises:
    ValueError: the shard, or a record, is damaged.
  """

  def __init__(self, path: Path):
    self._path = path
    self._lock = threading.Lock()
    self._reader = self._open()
    self.num_records: int = self._reader.num_records()

  def read(self, position: int) -> bytes:
    with self._lock:
      try:
        self._reader.seek(position)  # reading by position takes time proportional to the number of records
        return self._reader.read()
      except (RuntimeError, ValueError, IndexError) as error:
        self._reader = self._open()  # the reader does not recover from errors
        raise ValueError(str(error)) from error

  def __iter__(self) -> Iterator[bytes | None]:
    """Yields all records; None for those that cannot be read."""
    for position in range(self.num_records):
      try:
        yield self.read(position)
      except ValueError:
        yield None

  def _open(self):
    from array_record.python.array_record_module import ArrayRecordReader

    try:
      return ArrayRecordReader(str(self._path), "readahead_buffer_size:0,max_parallelism:0")
    except (RuntimeError, ValueError) as error:
      raise ValueError(str(error)) from error


class Shards:
  """The shards of a cache that the index names. Damaged ones count as absent, and are logged once.

  array_record reads local files. Shards in a bucket are therefore copied to ~/.cache/univid_jax/shards, each when it is
  first read, which takes as much local disk as the cache; copies may be deleted at any time. Whole shards are read at
  network speed, whereas each single record would wait for a response.

  Args:
    folder: local or in a bucket; need not exist.

  Raises:
    UserError: the index is damaged.
  """

  def __init__(self, folder: epath.PathLike):
    self.folder = epath.Path(folder)
    self._state = self._find_state()
    self.index = self._read_index()
    self._lock = threading.Lock()
    self._readers: collections.OrderedDict[str, ShardReader] = collections.OrderedDict()
    handles, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    self._max_open = MAX_OPEN_SHARDS if handles == resource.RLIM_INFINITY else min(MAX_OPEN_SHARDS, handles // 2)
    self._opening: dict[str, threading.Lock] = {}
    self._are_usable: dict[str, bool] = {}
    self._corrupt: set[bytes] = set()

  def is_current(self) -> bool:
    """Returns whether the index is still the one that was opened."""
    return self._find_state() == self._state

  def __contains__(self, digest: bytes) -> bool:
    found = self.index.find(digest)
    return found is not None and self._is_usable(found[0])

  def read(self, digest: bytes) -> memoryview | None:
    """Returns the contents of an entry; None if it is missing or damaged."""
    found = self.index.find(digest)
    if found is None or digest in self._corrupt or not self._is_usable(found[0]):
      return None
    shard, position = found
    try:
      reader = self._open(shard)
    except (ValueError, FileNotFoundError) as error:  # the shard may vanish from a bucket
      self._are_usable[shard.name] = False
      self._report(shard, "is missing" if isinstance(error, OSError) else f"is damaged ({first_line(error)})")
      return None
    try:
      body = unseal_record(reader.read(position), digest)
    except ValueError:
      body = None
    if body is None:
      self._corrupt.add(digest)
      path = self.folder / shard.name
      log.warning("%s: record %d is corrupt and is computed again; univid-prepare --pack replaces it", path, position)
    return body

  def _is_usable(self, shard: Shard) -> bool:
    usable = self._are_usable.get(shard.name)
    if usable is None:
      try:
        with bucket_errors(path := self.folder / shard.name):
          size = path.stat().length
        problem = "" if size == shard.num_bytes else f"has {size:,} of {shard.num_bytes:,} bytes"
      except FileNotFoundError:
        problem = "is missing"
      with self._lock:
        is_new = shard.name not in self._are_usable
        usable = self._are_usable[shard.name] = not problem
      if problem and is_new:
        self._report(shard, problem)
    return usable

  def _report(self, shard: Shard, problem: str) -> None:
    log.warning(
      "%s %s: its %s records are computed again when they are needed; restore it, or let univid-prepare --pack replace "
      "it",
      self.folder / shard.name,
      problem,
      f"{shard.num_records:,}",
    )

  def _open(self, shard: Shard) -> ShardReader:
    """Raises ValueError if the shard is damaged."""
    with self._lock:
      lock = self._opening.setdefault(shard.name, threading.Lock())
    with lock:  # copying may take long; other threads go on reading meanwhile
      reader = self._readers.get(shard.name)
      if reader is None:
        reader = ShardReader(copy_file(self.folder / shard.name, folder=FOLDER))
        if reader.num_records != shard.num_records:
          raise ValueError(f"it has {reader.num_records:,} of {shard.num_records:,} records")
    with self._lock:
      self._readers[shard.name] = reader
      self._readers.move_to_end(shard.name)
      if len(self._readers) > self._max_open:
        self._readers.popitem(last=False)
    return reader

  def _find_state(self) -> object:
    path = self.folder / INDEX_FILE
    try:
      return source_state(path) if is_remote(path) else file_state(path)
    except FileNotFoundError:
      return None

  def _read_index(self) -> Index:
    if self._state is None:
      return Index((), np.empty((3, 0), np.uint64))
    try:
      return Index.read(copy_file(self.folder / INDEX_FILE, folder=FOLDER))
    except (ValueError, KeyError, TypeError) as error:
      path = self.folder / INDEX_FILE
      raise UserError(f"{path} is damaged ({first_line(error)}): univid-prepare --pack writes it again") from error


def find_damage(path: epath.Path) -> str | None:
  """Describes what is wrong with an index, a shard or its keys, "" if nothing; None for other files."""
  if path.parent.name != FOLDER:
    return None
  if path.name == INDEX_FILE:
    try:
      missing = [shard for shard in Shards(path.parent).index.shards if not exists(path.parent / shard.name)]
    except UserError:
      return "checksum differs"
    return f"{len(missing)} of its shards are missing, first {missing[0].name}" if missing else ""
  if path.suffix == KEYS_SUFFIX:
    return "" if unseal_entry(path.read_bytes()) is not None else "checksum differs"
  if path.suffix != SHARD_SUFFIX:
    return None
  try:
    records = ShardReader(copy_file(path, folder=FOLDER))
  except ValueError as error:
    return first_line(error)
  damaged = [position for position, record in enumerate(records) if record is None or unseal_record(record) is None]
  if damaged:
    return f"{len(damaged)} of {records.num_records} records are corrupt, first record {damaged[0]}"
  return "" if records.num_records else "no records"


def unseal_record(record: bytes, digest: bytes | None = None) -> memoryview | None:
  """Returns the contents of the entry in a record; None if they are damaged, or belong to another key."""
  view = memoryview(record)
  if digest not in (None, record[:DIGEST_BYTES]):
    return None
  return unseal_entry(view[DIGEST_BYTES:])
