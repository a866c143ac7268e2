"""Two programs against each other: each in a process of its own, so that peak memory is its own, timed in turn."""

import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from univid_jax import cli

# Makes the program: a function without arguments that runs it once, to the end.
Side = Callable[..., Callable[[], Any]]


def race(sides: Mapping[str, tuple[Side, Mapping[str, Any]]], *, pairs: int, flops: float = 0.0,
         hardware_flops: float = 0.0) -> dict[str, dict[str, float]]:
  """Runs each side once to warm up and then `pairs` times in turn; prints a table.

  Args:
    sides: by name, a function of a module and its keyword arguments.
    pairs: timed runs of each.
    flops: of one run, the model's own work, for TFLOP/s; 0 leaves it out.
    hardware_flops: with what is computed again; 0 where nothing is.

  Returns:
    By name first_s, compile_s (what the first run took longer than the others), median_s, peak_gib (of the process; on a GPU
    also device_gib), tflops, mfu (its share of the peak) and with hardware_flops hfu. The peak is the chip's in bfloat16; of a
    processor that is none of `performance.CHIPS`, what a large product in float32 reaches on it.
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
  peak = 0.0
  figures = {}
  for name, pipe in pipes.items():
    pipe.send(False)
    first, *rest = seconds[name]
    median = statistics.median(rest)
    figures[name] = {"first_s": round(first, 3), "compile_s": round(max(first - median, 0), 3), "median_s": round(median, 3),
                     **pipe.recv()}
    chip = figures[name].pop("chip_flops", 0)
    if flops:
      peak = chip or peak or product_flops()
      figures[name] |= {"tflops": round(flops / median / 1e12, 3), "mfu": round(flops / median / peak, 3)}
      if hardware_flops:
        figures[name]["hfu"] = round(hardware_flops / median / peak, 3)
    print(f"{name:<23}" + "   ".join(f"{key} {value:g}" for key, value in figures[name].items()), flush=True)
  return figures


def product_flops(size: int = 4096, repeats: int = 5) -> float:
  """Operations a second of a product of square matrices in float32 on this processor: the fastest of some."""
  a, b = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    a @ b
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)


def peers(names: Sequence[str], side: Side, options: Mapping[str, Any]) -> dict[str, tuple[Side, Mapping[str, Any]]]:
  """The PyTorch sides of a race, by the names that --against takes.

  Raises:
    UserError: there is no such peer.
  """
  for name in names:
    if name not in ("torch", "torch_compile"):
      raise cli.UserError(f"--against is torch or torch_compile, got {name!r}")
  return {name: (side, {**options, "compiled": name == "torch_compile"}) for name in names}


def print_ratios(figures: Mapping[str, Mapping[str, float]]) -> None:
  """Of the first side to the others; on a GPU the memory is the device's."""
  ours, *others = figures
  memory = "device_gib" if "device_gib" in figures[ours] else "peak_gib"
  for other in others:
    time_ratio, memory_ratio = (figures[ours][key] / figures[other][key] for key in ("median_s", memory))
    print(f"{ours} beside {other}: {time_ratio:.2f} times its time, {memory_ratio:.2f} times its memory")


def _serve(side: Side, options: Mapping[str, Any], pipe) -> None:
  run = side(**options)
  pipe.send("ready")
  while pipe.recv():
    start = time.perf_counter()
    run()
    pipe.send(time.perf_counter() - start)
  pipe.send({"peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2), **_device()})


def _peak(name: str) -> float:
  from univid_jax.performance import chip_named
  chip = chip_named(name)
  return chip.flops if chip else 0.0


def _device() -> dict[str, float]:
  import sys
  if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
    return {"device_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "chip_flops": _peak(torch.cuda.get_device_name())}
  if (jax := sys.modules.get("jax")) and jax.default_backend() != "cpu":
    device = jax.local_devices()[0]
    return {"device_gib": round((device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30, 2),
            "chip_flops": _peak(device.device_kind)}
  return {}


def write_json(path: str, values: Mapping[str, Any]) -> None:
  """Figures with the machine they are of; nothing where there is no path."""
  if path:
    with open(path, "w") as file:
      json.dump({"machine": f"{platform.machine()}, Python {platform.python_version()}", **values}, file, indent=2)
