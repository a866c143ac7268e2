"""Local paths and paths in buckets; permissions of written files."""

import numpy as np
import pytest

from univid_jax.checkpoints.tensor_files import save_safetensors
from univid_jax.core.paths import atomic_write, copy_to_local, is_remote, make_absolute


def test_bucket_paths_are_unchanged(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert str(make_absolute("gs://bucket/run") / "checkpoints") == "gs://bucket/run/checkpoints"
  assert str(make_absolute("run")) == str(tmp_path / "run")
  assert is_remote("gs://bucket/run") and not is_remote(tmp_path)
  assert copy_to_local(str(tmp_path)) == str(tmp_path) and copy_to_local("") == ""


def test_atomic_write(tmp_path):
  with atomic_write(tmp_path / "folder" / "a.txt") as path:
    path.write_text("half")
    assert not (tmp_path / "folder" / "a.txt").exists()
  assert (tmp_path / "folder" / "a.txt").read_text() == "half"
  with pytest.raises(RuntimeError), atomic_write(tmp_path / "b.txt") as path:
    path.write_text("half")
    raise RuntimeError
  assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.txt"]


def test_safetensors_permissions(tmp_path):
  """The safetensors library creates private files."""
  (tmp_path / "ordinary").touch()
  save_safetensors(tmp_path / "new.safetensors", {"x": np.zeros(2)})
  assert (tmp_path / "new.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
  (tmp_path / "new.safetensors").chmod(0o640)
  save_safetensors(tmp_path / "new.safetensors", {"x": np.ones(2)})
  assert (tmp_path / "new.safetensors").stat().st_mode & 0o777 == 0o640
