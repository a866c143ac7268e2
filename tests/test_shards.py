"""Caches that are packed into shards."""

import importlib
import re
import resource
import signal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.commands import finish, start_python
from tests.stand_ins import open_bucket
from tests.test_checksums import flip_bit, run_verify
from univid_jax.core import bucket_files
from univid_jax.core.errors import UserError
from univid_jax.core.lock import hold
from univid_jax.core.unfinished import unfinished_path
from univid_jax.data.cache import shard_writer, shards
from univid_jax.data.cache.entries import Cache, CacheError
from univid_jax.data.cache.shard_writer import pack_caches, repair_indices
from univid_jax.data.cache.shards import Index, Shard, Shards


def value(i):
  return np.full((3, 4), i, np.float32)


def fill(folder, count=40, fingerprint="weights"):
  cache = Cache(folder / "latents", fingerprint)
  for i in range(count):
    cache.put(str(i), value(i))
  return cache


def pack(folder, **options):
  """As the command does; shards of at most 8 entries."""
  repair_indices(folder)
  return pack_caches(folder, **{"max_records": 8, **options})


def get_all(cache, count=40):
  """The numbers whose values are in a cache."""
  found = {i: cache.get(str(i)) for i in range(count)}
  assert all(np.array_equal(got, value(i)) for i, got in found.items() if got is not None)
  return {i for i, got in found.items() if got is not None}


def files(folder):
  return sorted(path for path in (folder / "latents").rglob("*.safetensors"))


def shard_files(folder):
  return sorted((folder / "latents" / "shards").glob("*.array_record"))


def counts(packed):
  return packed.num_packed, packed.num_removed, packed.num_entries, packed.num_shards


class TestPack:
  def test_files_are_removed_only_when_asked(self, tmp_path):
    fill(tmp_path)
    fill(tmp_path, 3, "other weights")
    assert counts(pack(tmp_path)) == (43, 0, 43, 6) and len(files(tmp_path)) == 43
    assert counts(pack(tmp_path, remove_files=True)) == (0, 43, 43, 6) and not files(tmp_path)
    cache = Cache(tmp_path / "latents", "weights")
    assert get_all(cache) == set(range(40)) and all(str(i) in cache for i in range(40))
    assert cache.get("40") is None and "40" not in cache
    assert get_all(Cache(tmp_path / "latents", "other weights")) == {0, 1, 2}, "other weights, other entries"
    assert get_all(Cache(tmp_path / "latents", "third weights")) == set()

  def test_shards_are_read_before_files(self, tmp_path):
    cache = fill(tmp_path, 3)
    pack(tmp_path)
    cache.path("1").write_bytes(b"damaged")
    assert np.array_equal(Cache(tmp_path / "latents", "weights").get("1"), value(1))

  def test_later_entries_become_further_shards(self, tmp_path):
    fill(tmp_path, 10)
    pack(tmp_path, remove_files=True)
    before = {path: path.read_bytes() for path in shard_files(tmp_path)}
    fill(tmp_path, 20)  # of which the first 10 are computed again, as by a run that does not know the shards
    assert counts(pack(tmp_path, remove_files=True)) == (10, 20, 20, 4)
    assert all(path.read_bytes() == data for path, data in before.items())
    assert get_all(Cache(tmp_path / "latents", "weights")) == set(range(20))

  def test_a_cache_that_is_open_follows(self, tmp_path):
    """A run goes on while another command packs its cache and removes the files."""
    cache = fill(tmp_path)
    pack(tmp_path, remove_files=True)
    assert get_all(cache) == set(range(40)) and "7" in cache

  def test_sizes_of_shards(self, tmp_path):
    fill(tmp_path)
    size = files(tmp_path)[0].stat().st_size
    assert pack(tmp_path, max_bytes=5 * size - 1).num_shards == 8

  def test_without_entries(self, tmp_path):
    assert counts(pack(tmp_path / "cache")) == (0, 0, 0, 0)
    assert not (tmp_path / "cache").exists()

  def test_corrupt_files_are_not_packed(self, tmp_path, caplog):
    cache = fill(tmp_path)
    flip_bit(cache.path("5"))
    assert counts(pack(tmp_path, remove_files=True))[:2] == (39, 39)
    assert f"{cache.path('5')} is corrupt and is not packed" in caplog.messages and files(tmp_path) == [cache.path("5")]

  def test_processes_share_the_work(self, tmp_path, monkeypatch):
    fill(tmp_path, 300)
    monkeypatch.setattr("jax.process_count", lambda: 3)
    for name in ("sum_over_processes", "wait_for_processes"):
      monkeypatch.setattr(shard_writer, name, lambda value: value)
    packed = []
    for process in (1, 2, 0):  # process 0 writes the index when all are done
      monkeypatch.setattr("jax.process_index", lambda process=process: process)
      packed.append(pack_caches(tmp_path))
    assert sum(each.num_packed for each in packed) == 300 and min(each.num_packed for each in packed) > 60
    assert packed[-1].num_entries == 300 and packed[-1].num_shards == 3
    assert get_all(Cache(tmp_path / "latents", "weights"), 300) == set(range(300))

  def test_a_full_disk(self, tmp_path):
    """One line, and what was there before."""
    cache = fill(tmp_path, 3)
    cache.put("large", np.zeros(1 << 18, np.float32))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
    try:
      with pytest.raises(CacheError, match=r"cannot write a shard to .*/latents/shards: .*File too large"):
        pack(tmp_path, remove_files=True)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)
      signal.signal(signal.SIGXFSZ, previous)
    assert len(files(tmp_path)) == 4 and not shard_files(tmp_path)
    assert get_all(Cache(tmp_path / "latents", "weights")) == {0, 1, 2}


KILLED = """
import os, sys
from etils import epath
from univid_jax.data.cache import shard_writer

point, calls = sys.argv[2], 0
original = getattr(shard_writer, point)

def die(*arguments, **options):
  global calls
  calls += 1
  if calls == 3:
    os._exit(9)
  return original(*arguments, **options)

setattr(shard_writer, point, die)
folder = epath.Path(sys.argv[1])
shard_writer.repair_indices(folder)
shard_writer.pack_caches(folder, remove_files=True, max_records=8)
"""


class Killed(BaseException):
  pass


class TestKilled:
  """A `pack` that ends at any time leaves the old state, and the next one continues it."""

  @pytest.mark.parametrize("point, left", [("seal_entry", 24), ("_update_index", 0)])
  def test_stops(self, tmp_path, monkeypatch, point, left):
    fill(tmp_path, 3, "older weights")
    pack(tmp_path, remove_files=True)
    index = (tmp_path / "latents" / "shards" / "index").read_bytes()
    fill(tmp_path)
    original, calls = getattr(shard_writer, point), []

    def stop(*arguments):
      calls.append(arguments)
      if len(calls) == (3 if point == "seal_entry" else 1):
        raise Killed
      return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
      patch.setattr(shard_writer, point, stop)
      pack_caches(tmp_path, remove_files=True, max_records=8)
    assert (tmp_path / "latents" / "shards" / "index").read_bytes() == index and len(files(tmp_path)) == 40
    assert get_all(Cache(tmp_path / "latents", "older weights"), 3) == {0, 1, 2}
    assert counts(pack(tmp_path, remove_files=True)) == (left, 40, 43, 6)
    assert get_all(Cache(tmp_path / "latents", "weights")) == set(range(40)) and run_verify(tmp_path) == 0

  def test_what_is_unfinished_is_removed(self, tmp_path):
    fill(tmp_path)
    pack(tmp_path)
    folder = tmp_path / "latents" / "shards"
    names = sorted(path.name for path in folder.iterdir())
    (folder / unfinished_path(folder / f"000007-{'a' * 16}.array_record").name).write_bytes(b"half")
    (folder / f"000008-{'b' * 16}.keys").write_bytes(b"of no shard")
    pack(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == names

  @pytest.mark.long
  @pytest.mark.parametrize("point", ["seal_entry", "_keys_path", "_update_index", "entry_path"])
  def test_killed(self, tmp_path, point):
    """By the kernel, in the middle of writing, committing or removing."""
    fill(tmp_path)
    assert finish(start_python("-c", KILLED, tmp_path, point)).returncode == 9
    assert get_all(Cache(tmp_path / "latents", "weights")) == set(range(40))
    done = pack(tmp_path, remove_files=True)
    assert done.num_entries == 40 and done.num_shards == 5 and not files(tmp_path)
    assert get_all(Cache(tmp_path / "latents", "weights")) == set(range(40)) and run_verify(tmp_path) == 0


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
  folder = tmp_path_factory.mktemp("packed")
  fill(folder)
  pack(folder, remove_files=True)
  return folder, {path.name: path.read_bytes() for path in (folder / "latents" / "shards").iterdir()}


class TestDamage:
  """Damage costs the values that it hits, and one line that names the shard and the remedy."""

  @pytest.mark.parametrize(
    "kind, lost, line",
    [
      ("record", 1, r": record \d is corrupt and is computed again; univid-prepare --pack replaces it"),
      ("missing", 8, r" is missing: its 8 records are computed again .*, or let univid-prepare --pack replace it"),
      ("truncated", 8, r" has [\d,]+ of [\d,]+ bytes: its 8 records are .*, or let univid-prepare --pack replace it"),
      ("unreadable", 8, r" is damaged \(.+\): its 8 records are .*, or let univid-prepare --pack replace it"),
    ],
  )
  def test_of_a_shard(self, tmp_path, caplog, capsys, kind, lost, line):
    fill(tmp_path)
    pack(tmp_path, remove_files=True)
    shard = shard_files(tmp_path)[2]
    data = shard.read_bytes()
    if kind == "record":
      flip_bit(shard, place=data.index(b"value"))
    elif kind == "missing":
      shard.unlink()
    else:
      shard.write_bytes(data[:-100] if kind == "truncated" else bytes(len(data)))
    cache = Cache(tmp_path / "latents", "weights")
    for _ in range(2):
      assert len(get_all(cache)) == 40 - lost
    (message,) = caplog.messages
    assert re.fullmatch(re.escape(str(shard)) + line, message)
    assert run_verify(tmp_path) == 1
    damaged = shard.with_name("index") if kind == "missing" else shard
    assert f"DAMAGED {damaged} (" in capsys.readouterr().out
    for i in range(40):
      cache.get_or_compute(str(i), lambda i=i: value(i))
    assert len(files(tmp_path)) == lost and get_all(cache) == set(range(40))
    assert counts(pack(tmp_path, remove_files=True))[:3] == (lost, lost, 40)
    caplog.clear()
    assert get_all(Cache(tmp_path / "latents", "weights")) == set(range(40)) and not caplog.messages

  @settings(max_examples=30, deadline=None)
  @given(data=st.data())
  def test_no_bit_changes_a_value(self, data, packed):
    """A flipped bit anywhere is an error, a value that is computed again, or nothing."""
    folder, contents = packed
    name = data.draw(st.sampled_from(sorted(contents)))
    place = data.draw(st.integers(0, len(contents[name]) - 1))
    try:
      flip_bit(folder / "latents" / "shards" / name, place=place)
      get_all(Cache(folder / "latents", "weights"))
    except UserError as error:
      assert name == "index" and "index is damaged" in str(error)
    finally:
      (folder / "latents" / "shards" / name).write_bytes(contents[name])

  def test_an_index_that_names_other_records(self, tmp_path, caplog):
    fill(tmp_path, 8)
    pack(tmp_path, remove_files=True)
    folder = tmp_path / "latents" / "shards"
    keys = shards.unseal_entry(next(folder.glob("*.keys")).read_bytes())
    Index.build(Shards(folder).index.shards, [keys[16:] + keys[:16]]).write(folder / "index")
    assert get_all(Cache(tmp_path / "latents", "weights"), 8) == set() and len(caplog.messages) == 8

  def test_of_the_index(self, tmp_path, caplog):
    fill(tmp_path)
    pack(tmp_path, remove_files=True)
    index = tmp_path / "latents" / "shards" / "index"
    data = index.read_bytes()
    for damaged in (data[:-1], data[:100], b"", bytes(len(data))):
      index.write_bytes(damaged)
      with pytest.raises(UserError, match=r"shards/index is damaged \(.+\): univid-prepare --pack writes it again"):
        Cache(tmp_path / "latents", "weights")
    repair_indices(tmp_path)
    assert index.read_bytes() == data
    index.unlink()
    repair_indices(tmp_path)
    assert index.read_bytes() == data and not caplog.messages

  def test_of_keys(self, tmp_path):
    """They are read from the shard, of which corrupt records keep their place."""
    fill(tmp_path)
    pack(tmp_path, remove_files=True)
    first, second = list((tmp_path / "latents" / "shards").glob("*.keys"))[:2]
    flip_bit(first)
    second.unlink()
    shard = first.with_suffix(".array_record")
    flip_bit(shard, place=shard.read_bytes().index(b"value"))
    (tmp_path / "latents" / "shards" / "index").unlink()
    assert pack(tmp_path).num_entries == 40  # one of them under a key that nothing has
    assert len(get_all(Cache(tmp_path / "latents", "weights"))) == 39
    assert shards.unseal_entry(first.read_bytes()) is not None and second.exists()


class TestIndex:
  @settings(max_examples=50, deadline=None)
  @given(st.lists(st.lists(st.integers(0, 60), max_size=20), max_size=6))
  def test_the_last_of_equal_keys_counts(self, numbers):
    """Also of keys whose first halves are equal."""
    names = [[(number % 7).to_bytes(8, "little") + number.to_bytes(8, "big") for number in shard] for shard in numbers]
    listed = [Shard(str(i), len(shard), 0) for i, shard in enumerate(names)]
    index = Index.build(listed, [b"".join(shard) for shard in names])
    expected = {name: (listed[i], at) for i, shard in enumerate(names) for at, name in enumerate(shard)}
    every = [(number % 7).to_bytes(8, "little") + number.to_bytes(8, "big") for number in range(70)]
    assert all(index.find(name + bytes(16)) == expected.get(name) for name in every)

  def test_its_file(self, tmp_path):
    rng = np.random.default_rng(0)
    index = Index.build([Shard("a", 1000, 5), Shard("b", 0, 6)], [rng.bytes(16000), b""])
    index.write(tmp_path / "index")
    assert (tmp_path / "index").stat().st_size < 1000 * 24 + 200
    read = Index.read(tmp_path / "index")
    assert len(read) == 1000 and read.shards == index.shards
    assert read._columns.base is not None, "mapped, not loaded"


def test_a_bucket(tmp_path, monkeypatch):
  """Shards are copied when they are read first, and again if the copy has another size."""
  monkeypatch.setattr(bucket_files, "CACHE_FOLDER", str(tmp_path / "local"))
  bucket = open_bucket("cache")
  fill(bucket, 12)
  assert counts(pack(bucket, remove_files=True)) == (12, 12, 12, 2)
  assert not [path for folder in (bucket / "latents").iterdir() for path in folder.glob("*.safetensors")]
  copies = tmp_path / "local" / "shards" / "s3" / "bucket" / "cache" / "latents" / "shards"
  shard = next(copies.glob("*.array_record"))
  shard.write_bytes(b"half")
  assert get_all(Cache(bucket / "latents", "weights"), 12) == set(range(12))
  assert len(list(copies.glob("*.array_record"))) == 2 and shard.stat().st_size > 100
  assert run_verify(bucket) == 0


def test_flags(capsys):
  main = importlib.import_module("univid_jax.prepare").main
  assert main(["prepare", "--quick", "--preview=3"]) == 2 and "give one of them" in capsys.readouterr().err
  assert main(["prepare", "--remove_files"]) == 2 and "--remove_files needs --pack" in capsys.readouterr().err
  assert main(["prepare", "--pack", "--quick"]) == 2
  assert "--quick and --preview encode nothing" in capsys.readouterr().err


def test_one_command_at_a_time(tmp_path, monkeypatch):
  """The lock is on the folder of all caches of a run."""
  monkeypatch.setattr("univid_jax.core.lock.PATIENCE", 0.1)
  code = (
    "import sys, time; from univid_jax.core.lock import hold\nwith hold(sys.argv[1]): print(flush=True); time.sleep(60)"
  )
  other = start_python("-c", code, tmp_path)
  assert other.stdout
  other.stdout.readline()
  try:
    with pytest.raises(UserError, match="is in use by"), hold(tmp_path):
      pass
  finally:
    other.kill()
    other.communicate()
