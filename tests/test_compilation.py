"""A second start takes its programs from JAX's compilation cache."""

import os

import pytest

from tests.commands import SMALL, environment, run_command

pytestmark = pytest.mark.long


def test_a_second_start_compiles_nothing(tmp_path, monkeypatch):
  """Every program that the second run needs is in the cache."""
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  assert environment()["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "programs")
  programs = []
  for name in ("first", "second"):
    done = run_command("univid_jax.train", *SMALL, "--config.num_steps=2", f"--workdir={tmp_path / name}")
    assert done.returncode == 0, done.stderr
    programs.append({file for file in os.listdir(tmp_path / "programs") if file.endswith("-cache")})
  assert programs[0] and programs[1] == programs[0]
