"""Local copies of files in a bucket: they follow it, whatever size its files have."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import left_by_killed, make_old
from tests.stand_ins import open_bucket
from univid_jax.checkpoints import weights_file
from univid_jax.core import bucket_files
from univid_jax.core.bucket_files import copy_file, copy_to_local
from univid_jax.core.unfinished import unfinished_path


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  monkeypatch.setattr(bucket_files, "CACHE_FOLDER", str(tmp_path / "cache"))
  return open_bucket("data")


@pytest.fixture
def copied(monkeypatch):
  """The names of the files that are copied."""
  names, copy = [], bucket_files._copy
  monkeypatch.setattr(bucket_files, "_copy", lambda source, target: (names.append(source.name), copy(source, target)))
  return names


def names_in(folder):
  return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_local_paths_are_unchanged(tmp_path):
  assert copy_to_local(str(tmp_path)) == str(tmp_path) and copy_to_local("") == ""
  assert copy_file(tmp_path / "a") == tmp_path / "a"


def test_copies_follow_the_bucket(bucket, copied, tmp_path):
  """A table edited to the same length is copied again, and a deleted file is deleted; the rest is not copied."""
  for name in ("metadata.csv", "a/1.png", "a/2.png", "b/3.png"):
    (bucket / name).write_bytes(b"first")
  table = copy_to_local(str(bucket / "metadata.csv"))
  assert sorted(copied) == ["1.png", "2.png", "3.png", "metadata.csv"]
  copied.clear()
  copy_to_local(str(bucket / "metadata.csv"))
  assert not copied
  (bucket / "metadata.csv").write_bytes(b"other")
  (bucket / "b/3.png").unlink()
  assert copy_to_local(str(bucket / "metadata.csv")) == table
  assert copied == ["metadata.csv"] and Path(table).read_text() == "other"
  assert names_in(tmp_path / "cache/data/s3/bucket/data") == {"metadata.csv", "a", "a/1.png", "a/2.png"}
  with pytest.raises(FileNotFoundError, match="no such file or folder: s3://bucket/data/none"):
    copy_to_local(str(bucket / "none"))


def test_a_file_in_place_of_a_folder_and_back(bucket):
  (bucket / "x/1.png").write_bytes(b"in a folder")
  copy = copy_to_local(str(bucket))
  for name, other in (("x", "x/1.png"), ("x/1.png", "x")):
    (bucket / other).unlink()
    (bucket / name).write_bytes(b"new")
    assert Path(copy_to_local(str(bucket)), name).read_text() == "new", copy


def test_replaced_weights_of_the_same_size_are_loaded(bucket):
  path, keys = bucket / "transformer.safetensors", ("blocks", "kernel")
  (bucket / "checksums.xxh128").write_bytes(b"-")
  for value in (1, 2):
    weights_file.save_arrays(path, {"blocks": {"kernel": np.full(3, value, np.float32)}})
    array = weights_file.open_arrays(path, [keys])[keys]
    assert np.array(array.read().result()).tolist() == [value] * 3
  assert names_in(copy_file(path).parent) == {path.name}, "nothing else of the folder is read"


def test_a_copy_that_fails_does_not_count(bucket, monkeypatch, tmp_path):
  (bucket / "a.bin").write_bytes(b"contents")
  with monkeypatch.context() as patch:
    patch.setattr(bucket_files.shutil, "copyfileobj", lambda reading, writing, _: (writing.write(b"half"), 1 / 0))
    with pytest.raises(OSError, match="ZeroDivisionError"):
      copy_file(bucket / "a.bin")
  assert not [name for name in names_in(tmp_path / "cache/data") if "a.bin" in name]
  copy = copy_file(bucket / "a.bin")
  copy.write_bytes(b"CONTENTS")
  assert copy_file(bucket / "a.bin").read_bytes() == b"contents", "the copy was changed"


def test_files_that_others_are_writing_are_left_alone(bucket):
  """Of unfinished files in a copy, those that another process may be writing stay, those of killed ones are deleted."""
  (bucket / "a.bin").write_bytes(b"contents")
  copy = copy_file(bucket / "a.bin").parent
  own, killed = unfinished_path(copy / "b.bin"), left_by_killed(copy / "b.bin")
  elsewhere, silent = (left_by_killed(copy / "b.bin", machine=machine) for machine in ("e" * 8, "f" * 8))
  for path in (own, killed, elsewhere, silent):
    path.touch()
  make_old(own, silent)
  copy_to_local(str(bucket))
  assert names_in(copy) == {"a.bin", own.name, elsewhere.name}


@pytest.mark.parametrize(
  "read", [lambda bucket: Path(copy_to_local(str(bucket)), "a.bin"), lambda bucket: copy_file(bucket / "a.bin")]
)
def test_processes_share_one_copy(read, bucket, copied, monkeypatch):
  """Threads wait for each other as processes do: the lock is on a file that each opens."""
  (bucket / "a.bin").write_bytes(b"contents")
  copy, found = bucket_files.shutil.copyfileobj, []
  monkeypatch.setattr(bucket_files.shutil, "copyfileobj", lambda *args: (time.sleep(0.2), copy(*args)))
  threads = [threading.Thread(target=lambda: found.append(read(bucket).read_text())) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == ["contents"] * 4 and copied == ["a.bin"]


def test_a_bucket_that_tells_no_times_is_copied_every_time(bucket, copied, monkeypatch):
  (bucket / "a.bin").write_bytes(b"first")
  monkeypatch.setattr(bucket_files, "source_state", lambda path: (5, 0))
  for contents in (b"first", b"other"):
    (bucket / "a.bin").write_bytes(contents)
    assert copy_file(bucket / "a.bin").read_bytes() == contents
