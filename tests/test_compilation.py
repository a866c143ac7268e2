"""A second start takes its programs from JAX's compilation cache, except for damaged ones."""

import os

import numpy as np
import pytest

from tests.commands import SMALL, environment, finish, run_command, start_python

# Compiles a few programs as a command does, and prints what they compute.
SCRIPT = """
import logging, sys
from univid_jax.cli.compilation import enable_compilation_cache
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
enable_compilation_cache()
import jax
for number in range(5):
  print(jax.jit(lambda x: x * number + 1)(2.0))
"""


COMMAND = f"""
import sys
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
@app.command(CommandFlags(""))
def main():
  exec({SCRIPT!r}, {{}})
sys.exit(main([""]))
"""


def test_damaged_programs_are_replaced(tmp_path, monkeypatch):
  """Whatever is wrong with them: cut off, empty, or a flipped bit. If this fails after an upgrade of JAX, its private
  cache has changed: adapt `cli.compilation`, or remove it if JAX replaces damaged entries by then.
  """
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  first = finish(start_python("-W", "error", "-c", SCRIPT))
  assert first.returncode == 0, first.stderr
  contents = {path: path.read_bytes() for path in tmp_path.glob("jit__lambda*-cache")}
  assert len(contents) == 5
  for number, (path, entry) in enumerate(contents.items()):
    place = int(np.random.default_rng().integers(len(entry) - 24))
    flipped = entry[:place] + bytes([entry[place] ^ 1]) + entry[place + 1 :]
    path.write_bytes([b"", entry[: len(entry) // 2], flipped, flipped, entry][number])
  again = finish(start_python("-W", "error", "-c", SCRIPT))
  assert again.returncode == 0, again.stderr
  lines = again.stdout.splitlines()
  assert [line for line in lines if "damaged" not in line] == first.stdout.splitlines() and len(lines) == 5 + 4
  for path, entry in contents.items():
    assert path.stat().st_size == len(entry), path
  third = finish(start_python("-W", "error", "-c", SCRIPT))
  assert third.stdout == first.stdout, third.stderr


def test_loading_a_program_logs_no_errors(tmp_path, monkeypatch):
  """On some processors XLA complains of the options that it compiled with."""
  monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  for _ in range(2):
    done = finish(start_python("-c", COMMAND))
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.long
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
