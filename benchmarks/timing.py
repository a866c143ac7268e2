"""Two programs against each other: each in a process of its own, so that peak memory is its own, timed in turn."""

import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

# Makes the program: a function without arguments that runs it once, to the end.
Side = Callable[..., Callable[[], Any]]


def race(sides: Mapping[str, tuple[Side, Mapping[str, Any]]], *, pairs: int, flops: float = 0.0) -> dict[str, dict[str, float]]:
  """Runs each side once to warm up and then `pairs` times in turn; prints a table.

  Args:
    sides: by name, a function of a module and its keyword arguments.
    pairs: timed runs of each.
    flops: of one run, for TFLOP/s; 0 leaves it out.

  Returns:
    By name first_s (compilation included), median_s, peak_gib (of the process; on a GPU also device_gib) and tflops.
  """
  context = multiprocessing.get_context("spawn")
  pipes = {}
  for name, (side, options) in sides.items():
    pipes[name], theirs = context.Pipe()
    context.Process(target=_serve, args=(side, options, theirs), daemon=True).start()
    pipes[name].recv()

  seconds = {name: [] for name in sides}
  for _ in range(1 + pairs):
    for name, pipe in pipes.items():
      pipe.send(True)
      seconds[name].append(pipe.recv())
  figures = {}
  for name, pipe in pipes.items():
    pipe.send(False)
    first, *rest = seconds[name]
    figures[name] = {"first_s": round(first, 3), "median_s": round(statistics.median(rest), 3), **pipe.recv()}
    if flops:
      figures[name]["tflops"] = round(flops / statistics.median(rest) / 1e12, 3)
    print(f"{name:<14}" + "   ".join(f"{key} {value:g}" for key, value in figures[name].items()), flush=True)
  return figures


def _serve(side: Side, options: Mapping[str, Any], pipe) -> None:
  run = side(**options)
  pipe.send("ready")
  while pipe.recv():
    start = time.perf_counter()
    run()
    pipe.send(time.perf_counter() - start)
  pipe.send({"peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2), **_device_memory()})


def _device_memory() -> dict[str, float]:
  import sys
  if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
    return {"device_gib": round(sys.modules["torch"].cuda.max_memory_allocated() / 2**30, 2)}
  if "jax" in sys.modules and sys.modules["jax"].default_backend() != "cpu":
    stats = sys.modules["jax"].local_devices()[0].memory_stats() or {}
    return {"device_gib": round(stats.get("peak_bytes_in_use", 0) / 2**30, 2)}
  return {}


def write_json(path: str, values: Mapping[str, Any]) -> None:
  """Figures with the machine they are of; nothing where there is no path."""
  if path:
    with open(path, "w") as file:
      json.dump({"machine": f"{platform.machine()}, Python {platform.python_version()}", **values}, file, indent=2)
