"""Local paths and paths in buckets; files of tensors by name; permissions of written files."""

import errno
import io
import json
import os
import types

import fsspec
import jax
import numpy as np
import pytest

from tests.stand_ins import Bucket, open_bucket
from univid_jax.checkpoints import layerwise
from univid_jax.checkpoints.info import read_info
from univid_jax.checkpoints.lora.folder import read_lora_folder
from univid_jax.checkpoints.run import read_run
from univid_jax.checkpoints.tensor_files import find_tensor_files, open_tensors, save_safetensors
from univid_jax.core.errors import UserError, first_line, name_key
from univid_jax.core.paths import (
  atomic_write,
  bucket_errors,
  is_remote,
  make_absolute,
  require_writable,
  walk_files,
  write_text,
)


def test_bucket_paths_are_unchanged(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(fsspec, "get_filesystem_class", lambda scheme: None)  # gcsfs may be missing
  assert str(make_absolute("gs://bucket/run") / "checkpoints") == "gs://bucket/run/checkpoints"
  assert str(make_absolute("run")) == str(tmp_path / "run")
  assert is_remote("gs://bucket/run") and not is_remote(tmp_path)


def test_walking_follows_links_and_ends(tmp_path):
  folder, outside = tmp_path / "folder", tmp_path / "outside"
  for name in ("b/c/1.txt", "2.txt", ".git/3.txt"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
  outside.mkdir()
  (outside / "4.txt").touch()
  (folder / "linked").symlink_to(outside)
  (folder / "b" / "again").symlink_to(folder)
  (outside / "back").symlink_to(folder / "b")
  names = [str(path.relative_to(folder)) for path in walk_files(folder, is_left_out=lambda path: path.name == ".git")]
  assert names == ["2.txt", "b/c/1.txt", "linked/4.txt", "linked/back/c/1.txt"]
  assert folder / ".git" / "3.txt" in set(walk_files(folder))


def test_text_is_utf8_in_every_locale(tmp_path, monkeypatch):
  monkeypatch.setattr(io, "text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")
  with pytest.raises(UnicodeEncodeError):
    (tmp_path / "a.txt").write_text("±")
  write_text(tmp_path / "a.txt", "±")
  assert (tmp_path / "a.txt").read_bytes() == "±".encode()


def test_atomic_write(tmp_path):
  with atomic_write(tmp_path / "folder" / "a.txt") as path:
    path.write_text("half")
    assert not (tmp_path / "folder" / "a.txt").exists()
  assert (tmp_path / "folder" / "a.txt").read_text() == "half"
  with pytest.raises(RuntimeError), atomic_write(tmp_path / "b.txt") as path:
    path.write_text("half")
    raise RuntimeError
  assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.txt"]


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
  """A write itself names no file; an error that says more than the system is left as it is."""
  with pytest.raises(OSError) as error, atomic_write(tmp_path / "a.txt"):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  assert error.value.filename == str(tmp_path / "a.txt")
  with pytest.raises(OSError) as error, atomic_write(tmp_path / "a.txt"):
    raise OSError(errno.ENOSPC, "the folder b needs more")
  assert error.value.filename is None
  for free, needed, expected in (
    (5, 12_288, "needs 12.29 kB, and its disk has 5 bytes left"),
    (0, 1, "needs 1 bytes, and its disk has 0 bytes left"),
    (999_900, 3 * 10**9, "needs 3.00 GB, and its disk has 999.90 kB left"),
  ):
    monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: types.SimpleNamespace(free=free))
    with pytest.raises(OSError, match=f"the folder {tmp_path} {expected}"):
      require_writable(tmp_path, num_bytes=needed)


def test_errors_of_buckets_are_os_errors(monkeypatch):
  """The libraries of buckets raise other exceptions, too, such as gcsfs's HttpError."""
  path = open_bucket("x") / "a.txt"

  def fail(*args, **kwargs):
    raise RuntimeError("Service Unavailable\n503")

  with pytest.raises(RuntimeError), atomic_write(path):
    raise RuntimeError  # of the block itself
  monkeypatch.setattr(Bucket, "_open", fail)
  with (
    pytest.raises(OSError, match=r"RuntimeError: Service Unavailable: 's3://bucket/x/a\.txt'$") as error,
    atomic_write(path) as unfinished,
  ):
    unfinished.touch()
  assert isinstance(error.value.__cause__, RuntimeError)
  with pytest.raises(RuntimeError), bucket_errors("a.txt"):  # on a disk
    fail()


def test_atomic_writes_at_once(tmp_path):
  """Of threads, or of processes that have the same number on different machines."""
  path = tmp_path / "a.txt"
  with atomic_write(path) as first:
    first.write_text("first")
    with atomic_write(path) as second:
      second.write_text("second")
    assert path.read_text() == "second"
  assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
  "error, expected",
  [
    (UserError("no depth"), "config.data.pairs: no depth"),
    (UserError("there is no file named config.json"), "config.data.pairs: there is no file named config.json"),
    (FileNotFoundError(2, "No such file", "a/config.x"), "[Errno 2] config.data.pairs: No such file: 'a/config.x'"),
    (UserError("config.data.pairs has no pair"), "config.data.pairs has no pair"),
    (UserError("needs config.data.fps"), "needs config.data.fps"),
    (UserError("no folder config.d/pairs"), "config.data.pairs: no folder config.d/pairs"),
  ],
)
def test_errors_name_their_key_once(error, expected):
  with pytest.raises(type(error)) as raised, name_key("data.pairs"):
    raise error
  assert str(raised.value) == expected


@pytest.mark.parametrize(
  "error, expected",
  [
    (ValueError(), "ValueError()"),
    (ValueError(" \n "), "ValueError(' \\n ')"),
    (OSError("\nfirst\nsecond"), "first"),
    (KeyError("a"), "'a'"),
  ],
)
def test_first_line_of_an_error(error, expected):
  assert first_line(error) == expected


def test_readers_may_fail_without_a_message():
  class Unreadable:
    shape, kvstore = (2,), types.SimpleNamespace(path="weights")

    def __getitem__(self, index):
      return self

    def read(self):
      return self

    def result(self):
      raise ValueError

  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with pytest.raises(UserError, match=r"cannot read the weights in weights: ValueError\(\)"):
    layerwise._read(Unreadable(), jax.ShapeDtypeStruct((2,), np.float32, sharding=sharding))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 1, "format": 1}', "{", "[]", "\xff"])
@pytest.mark.parametrize(
  "name, read", [("checkpoint.json", read_info), ("config.json", read_run), ("lora.json", read_lora_folder)]
)
def test_damaged_json_is_an_error_of_one_line(name, read, text, tmp_path):
  (tmp_path / name).write_text(text, encoding="latin-1")
  with pytest.raises(UserError, match=name) as error:
    read(tmp_path)
  assert len(str(error.value).splitlines()) == 1


def test_safetensors_permissions(tmp_path):
  """The safetensors library creates private files."""
  (tmp_path / "ordinary").touch()
  save_safetensors(tmp_path / "new.safetensors", {"x": np.zeros(2)})
  assert (tmp_path / "new.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
  (tmp_path / "new.safetensors").chmod(0o640)
  save_safetensors(tmp_path / "new.safetensors", {"x": np.ones(2)})
  assert (tmp_path / "new.safetensors").stat().st_mode & 0o777 == 0o640


def test_files_of_tensors_by_name(tmp_path):
  tensors = {"a": np.ones(2, np.float32)}
  save_safetensors(tmp_path / "SHARD.SAFETENSORS", tensors)
  assert open_tensors(tmp_path / "SHARD.SAFETENSORS").read("a").tolist() == [1, 1]
  os.mkfifo(tmp_path / "pipe.safetensors")
  (tmp_path / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
  for name, reason in (("pipe.safetensors", "is not a file"), ("pointer.bin", "git lfs pull")):
    with pytest.raises(UserError, match=f"{name} .*{reason}"):
      open_tensors(tmp_path / name)


def test_shards_with_suffixes_in_capitals(tmp_path):
  save_safetensors(tmp_path / "X-00001-of-00001.SAFETENSORS", {"a": np.ones(2, np.float32)})
  with pytest.raises(UserError, match="is shard 1 of 1: pass the folder"):
    open_tensors(tmp_path / "X-00001-of-00001.SAFETENSORS")
  with pytest.raises(FileNotFoundError, match=r"is a shard, but its index X\.SAFETENSORS\.index\.json is missing"):
    find_tensor_files(tmp_path)
  for name in ("X.SAFETENSORS.INDEX.JSON", "X.safetensors.index.json"):
    index = tmp_path / name
    index.write_text(json.dumps({"weight_map": {"a": "X-00001-of-00001.SAFETENSORS"}}))
    assert find_tensor_files(tmp_path) == [index] and open_tensors(index).read("a").tolist() == [1, 1]
    index.unlink()


def test_shards_of_any_name_are_found_by_their_index(tmp_path):
  save_safetensors(tmp_path / "first.safetensors", {"a": np.ones(2, np.float32)})
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"a": "first.safetensors", "b": "second.safetensors"}}))
  assert find_tensor_files(tmp_path) == [index]
  with pytest.raises(FileNotFoundError, match=r"shards listed in .* are missing: second\.safetensors"):
    open_tensors(index)
