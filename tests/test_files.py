"""Paths here and in buckets."""

import pytest

from univid_jax.files import absolute, is_remote, local_data, local_file


def test_a_buckets_path_stays_what_it_is(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert str(absolute("gs://bucket/run") / "checkpoints") == "gs://bucket/run/checkpoints"
  assert str(absolute("run")) == str(tmp_path / "run")
  assert is_remote("gs://bucket/run") and not is_remote(tmp_path)
  assert local_data(str(tmp_path)) == str(tmp_path) and local_data("") == ""


def test_a_file_appears_at_once_or_not_at_all(tmp_path):
  with local_file(tmp_path / "folder" / "a.txt") as path:
    path.write_text("half")
    assert not (tmp_path / "folder" / "a.txt").exists()
  assert (tmp_path / "folder" / "a.txt").read_text() == "half"
  with pytest.raises(RuntimeError), local_file(tmp_path / "b.txt") as path:
    path.write_text("half")
    raise RuntimeError
  assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.txt"]
