"""The caches of a million clips and more: the real index, shards and loader, with records of a few bytes.

  python -m benchmarks.million [--records=10000000] [--hosts=1,16,256] [--folder=DIR] [--out=FILE.json]

Writes random records to shards and simulates what a run does with them: it opens the index, shuffles, reads, divides
the data among hosts, resumes, and encounters a corrupt record and a missing shard. Figures per host are those of one
process here; memory is the growth of a fresh process.
"""

import dataclasses
import hashlib
import itertools
import logging
import multiprocessing
import re
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grain
import numpy as np
from etils import epath

from benchmarks.timing import write_json
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.core.errors import UserError
from univid_jax.core.sentence import Sentence, reference_roles
from univid_jax.data.cache.shard_writer import repair_indices, write_shards
from univid_jax.data.cache.shards import INDEX_FILE, SHARD_SUFFIX, Shards, seal_entry
from univid_jax.data.rows.balancing import BatchLayout
from univid_jax.data.rows.loader import Loader, make_loader
from univid_jax.data.rows.loader_options import LoaderOptions, RowOwnership
from univid_jax.data.rows.packing import RowShape
from univid_jax.data.rows.tokens import Features, sentence_features

FLAGS = CommandFlags(__doc__)
RECORDS = FLAGS.integer("records", 10_000_000, "Records that are simulated.", lower_bound=1000)
HOSTS = FLAGS.strings("hosts", ["1", "16", "256"], "Numbers of hosts that share the records.")
FOLDER = FLAGS.string("folder", None, "Folder for temporary files; default: the system's.")
OUT = FLAGS.string("out", "", "File for the figures as JSON.")

VALUE_BYTES = 32
NUM_WRITERS = 2
NUM_THREADS = 16
SEED = 3
# Hosts that are compared for each number of hosts, and batches and rows of each host.
SAMPLED_HOSTS, BATCHES, ROWS = 6, 4, 8

Figures = dict[str, float]
T = TypeVar("T")
# Calls a function once with each tuple of arguments.
Run = Callable[..., list[Any]]


def digest_of(number: int) -> bytes:
  return hashlib.sha256(b"key%d" % number).digest()


def value_of(number: int) -> bytes:
  """Returns a record: its number as float32, exact up to 16 million, and bytes that look random."""
  return struct.pack("<f", number) + digest_of(number)[: VALUE_BYTES - 4]


def drawn(order: grain.MapDataset[int], position: int) -> int:
  number = order[position]
  assert number is not None
  return number


def write_part(folder: str, start: int, stop: int, max_records: int) -> int:
  digests = ((number, digest_of(number)) for number in range(start, stop))
  entries = ((digest, seal_entry(struct.pack("<f", number) + digest[: VALUE_BYTES - 4])) for number, digest in digests)
  return write_shards(epath.Path(folder), entries, max_records=max_records)


def run_apart(function: Callable[..., T], *calls: tuple[Any, ...]) -> list[T]:
  """Calls a function once with each tuple of arguments, concurrently in fresh processes."""
  with ProcessPoolExecutor(len(calls), multiprocessing.get_context("spawn")) as pool:
    return list(pool.map(function, *zip(*calls)))


def write_records(folder: Path, count: int, run: Run) -> Figures:
  """Writes the records with several processes, then the index."""
  shards, parts = folder / "latents" / "shards", np.linspace(0, count, NUM_WRITERS + 1).astype(int)
  max_records = min(65536, max(count // 20, 1))
  begin = time.perf_counter()
  run(write_part, *[(str(shards), start, stop, max_records) for start, stop in itertools.pairwise(parts.tolist())])
  written = time.perf_counter()
  repair_indices(folder)
  return {
    "write_records_per_s": count / (written - begin),
    "write_index_s": time.perf_counter() - written,
    "index_bytes_per_record": (shards / INDEX_FILE).stat().st_size / count,
    "shards": len(list(shards.glob(f"*{SHARD_SUFFIX}"))),
    "shard_bytes_per_record": sum(path.stat().st_size for path in shards.glob(f"*{SHARD_SUFFIX}")) / count,
    "writer_peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3,
  }


def memory_mb() -> tuple[float, float]:
  """Returns this process's own memory and its mapped file pages, in MB."""
  status = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text()))
  return int(status["RssAnon"]) / 1e3, int(status["RssFile"]) / 1e3


def measure_reading(folder: str, count: int, num_reads: int) -> Figures:
  """Measures opening shards and random reads, in a fresh process."""
  before = memory_mb()
  begin = time.perf_counter()
  shards = Shards(epath.Path(folder) / "latents" / "shards")
  opened = time.perf_counter()
  after_open = memory_mb()
  assert shards.read(digest_of(0)) == value_of(0)
  first = time.perf_counter()
  shuffled = grain.MapDataset.source(range(count)).seed(SEED).shuffle().repeat()
  shuffled_mb = memory_mb()[0] - after_open[0]
  order = [drawn(shuffled, position) for position in range(num_reads)]
  digests = list(map(digest_of, order))

  def read_all(threads: int) -> float:
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
      values = list(pool.map(shards.read, digests)) if threads > 1 else list(map(shards.read, digests))
    seconds = time.perf_counter() - begin
    assert all(value == value_of(number) for value, number in zip(values, order)), "other values were read"
    return num_reads / seconds

  begin_find = time.perf_counter()
  assert all(shards.index.find(digest) for digest in digests)
  found = time.perf_counter()
  read_all(1)  # opens all shards
  rates = {f"reads_per_s_{threads}_threads": read_all(threads) for threads in (1, NUM_THREADS)}
  anonymous, mapped = memory_mb()
  return {
    "open_s": opened - begin,
    "first_read_s": first - opened,
    "lookups_per_s": num_reads / (found - begin_find),
    **rates,
    "shuffle_mb": shuffled_mb,
    "index_mapped_mb": mapped - before[1],
    "own_memory_mb": anonymous - before[0],
  }


@dataclasses.dataclass(frozen=True)
class Numbers:
  """A source of sentences whose task is their number."""

  count: int
  task_names: Sequence[str] = ()

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Sentence:
    clip = np.zeros((1, 2, 2, 1), np.float32)
    return Sentence(clips=(clip, clip), roles=reference_roles(2), task=str(index))


@dataclasses.dataclass(frozen=True)
class Shape:
  """A `TransformerShape` of one token per clip."""

  patch_size: tuple[int, int, int] = (1, 2, 2)
  text_len: int = 1
  takes_condition: bool = False
  takes_image_features: bool = False

  @property
  def patch_volume(self) -> int:
    return 4


class RecordFeatures:
  """Makes features whose first token is the record of the sentence's number; a missing record counts as damage."""

  shape = Shape()

  def __init__(self, shards: Shards):
    self.shards = shards

  def __call__(self, sentence: Sentence) -> Features:
    value = self.shards.read(digest_of(int(sentence.task)))
    if value is None:
      raise UserError("there is no such record")
    record = np.frombuffer(value, np.float32)[:1]
    clips = np.broadcast_to(record, (1, 2, 2, 1)), np.zeros((1, 2, 2, 1), np.float32)
    embedding = np.zeros((0, 1), np.float32)
    return sentence_features(
      sentence.replace(clips=clips), patch_size=(1, 2, 2), prompt_embedding=embedding, text_len=1
    )


def open_loader(shards: Shards, count: int, *, host: int = 0, num_hosts: int = 1) -> Loader:
  num_rows = ROWS * num_hosts
  return make_loader(
    [Numbers(count)],
    RecordFeatures(shards),
    row_shape=RowShape(num_tokens=2, num_text_tokens=1, num_slots=1),
    layout=BatchLayout(num_rows=num_rows),
    seed=SEED,
    ownership=RowOwnership(own=range(ROWS * host, ROWS * (host + 1)), order=range(num_rows)),
    options=LoaderOptions(num_streams=num_hosts, num_threads=2),
  )


def take(loader: Loader, batches: int = BATCHES) -> list[int]:
  """Returns the numbers of the records in the next batches."""
  return [int(row[0, 0]) for _ in range(batches) for row in next(loader).tokens]


def measure_hosts(shards: Shards, count: int, num_hosts: int) -> Figures:
  """Opens the parts of some of the hosts; checks their order, and that no record is in two of them."""
  chosen = sorted({round(host) for host in np.linspace(0, num_hosts - 1, min(SAMPLED_HOSTS, num_hosts))})
  shuffled = grain.MapDataset.source(range(count)).seed(SEED).shuffle().repeat()
  seconds, taken = [], []
  for host in chosen:
    begin = time.perf_counter()
    loader = open_loader(shards, count, host=host, num_hosts=num_hosts)
    records = take(loader, 1)
    seconds.append(time.perf_counter() - begin)
    records += take(loader, BATCHES - 1)
    loader.close()
    mine = shuffled[host::num_hosts]
    # Rows are yielded in random order from two batches that are filled at a time.
    beginning = {drawn(mine, position) for position in range((BATCHES + 2) * ROWS)}
    assert set(records) <= beginning, f"host {host} of {num_hosts} reads other records than its own"
    taken += records
  assert len(set(taken)) == len(taken) or count < 2 * len(taken), "two hosts read one record"
  return {f"first_batch_s_of_{num_hosts}_hosts": max(seconds)}


def measure_resuming(shards: Shards, count: int, num_batches: int) -> Figures:
  """Checks that a new loader continues at the record where another one stopped."""
  loader = open_loader(shards, count)
  take(loader, 1)
  begin = time.perf_counter()
  take(loader, num_batches)
  rate = num_batches * ROWS / (time.perf_counter() - begin)
  state, expected = loader.get_state(), take(loader)
  loader.close()
  other = open_loader(shards, count)
  begin = time.perf_counter()
  other.set_state([state])
  resumed = take(other, 1)
  seconds = time.perf_counter() - begin
  assert resumed + take(other, BATCHES - 1) == expected, "the loader resumed elsewhere"
  other.close()
  return {"loader_records_per_s": rate, "resume_s": seconds}


class Lines(logging.Handler):
  """Keeps what is logged."""

  def __init__(self):
    super().__init__()
    self.lines: list[str] = []

  def emit(self, record: logging.LogRecord) -> None:
    self.lines.append(record.getMessage())


def check_damage(folder: Path, count: int) -> None:
  """Damages a record and removes a shard; checks that only their records are lost, with one line logged for each."""
  shards_folder = folder / "latents" / "shards"
  shards = Shards(shards_folder)
  found = {
    number: shards.index.find(digest_of(number)) for number in np.linspace(0, count - 1, 200).astype(int).tolist()
  }
  places = {number: place for number, place in found.items() if place is not None}
  corrupt = next(iter(places))
  other = next(number for number, place in places.items() if place[0] != places[corrupt][0])
  path, gone = (shards_folder / places[number][0].name for number in (corrupt, other))
  data = bytearray(path.read_bytes())
  data[data.index(value_of(corrupt)) + 5] ^= 1
  path.write_bytes(data)
  gone.unlink()
  handler = Lines()
  logger = logging.getLogger("univid_jax")
  logger.addHandler(handler)
  try:
    shards = Shards(shards_folder)
    lost = {number for number in places if shards.read(digest_of(number)) is None}
  finally:
    logger.removeHandler(handler)
  expected = {corrupt} | {number for number, place in places.items() if place[0].name == gone.name}
  assert lost == expected and len(handler.lines) == 2, handler.lines


def measure(folder: Path, *, records: int, hosts: Sequence[int], run: Run = run_apart) -> Figures:
  """Returns all figures, and prints them as they are found.

  Args:
    folder: an empty folder.
    records: number of records.
    hosts: numbers of hosts.
    run: calls a function in other processes.
  """
  figures: Figures = {}

  def note(found: Figures) -> None:
    figures.update(found)
    for name, value in found.items():
      print(f"{name:<32}{value:,.4g}" if value < 1000 else f"{name:<32}{value:,.0f}", flush=True)

  begin = time.perf_counter()
  note(write_records(folder, records, run))
  note(run(measure_reading, (str(folder), records, min(records // 10, 100_000)))[0])
  shards = Shards(folder / "latents" / "shards")
  for num_hosts in hosts:
    note(measure_hosts(shards, records, num_hosts))
  note(measure_resuming(shards, records, num_batches=min(records // 500, 1000)))
  check_damage(folder, records)  # logs both lines
  begin_repair = time.perf_counter()
  repair_indices(folder)
  note({"repair_index_s": time.perf_counter() - begin_repair, "total_s": time.perf_counter() - begin})
  note({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3})
  return figures


@app.command(FLAGS)
def main() -> None:
  with tempfile.TemporaryDirectory(dir=FOLDER.value) as folder:
    figures = measure(Path(folder), records=RECORDS.value, hosts=[int(number) for number in HOSTS.value])
  write_json(OUT.value, {"records": RECORDS.value, **figures})


if __name__ == "__main__":
  sys.exit(main())
