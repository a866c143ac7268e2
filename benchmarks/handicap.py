"""Runs a module under bad conditions: python -m benchmarks.handicap CONDITIONS MODULE [ARGUMENT ...].

CONDITIONS is a JSON object:
  file_bytes  size that no file may exceed, as if the disk were full
  clock       seconds by which `time.time` jumps, once
  after       seconds until the clock jumps
  delay       maximum seconds added to each file operation, in Python only, not in native libraries
  seed        seed of the delays
"""

import builtins
import functools
import json
import os
import random
import resource
import runpy
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

SLOW = (
  (os, "replace"),
  (os, "rename"),
  (os, "mkdir"),
  (os, "unlink"),
  (os, "fsync"),
  (os, "scandir"),
  (builtins, "open"),
)


def limit_files(num_bytes: int) -> None:
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def jump_clock(seconds: float, *, after: float) -> None:
  start = time.monotonic()
  now, now_ns = time.time, time.time_ns

  def offset() -> float:
    return seconds if time.monotonic() - start > after else 0.0

  time.time = lambda: now() + offset()
  time.time_ns = lambda: now_ns() + int(offset() * 1e9)


def delay_files(seconds: float, *, seed: int) -> None:
  rng = random.Random(seed)

  def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
      time.sleep(rng.uniform(0, seconds))
      return function(*args, **kwargs)

    return call

  for module, name in SLOW:
    setattr(module, name, slow(getattr(module, name)))


def apply(conditions: Mapping[str, Any]) -> None:
  if num_bytes := conditions.get("file_bytes"):
    limit_files(num_bytes)
  if seconds := conditions.get("clock"):
    jump_clock(seconds, after=conditions["after"])
  if delay := conditions.get("delay"):
    delay_files(delay, seed=conditions["seed"])


if __name__ == "__main__":
  _, given, module, *arguments = sys.argv
  sys.argv = [module, *arguments]
  apply(json.loads(given))
  runpy.run_module(module, run_name="__main__")
