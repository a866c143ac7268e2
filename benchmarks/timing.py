"""Races programs: each runs in a process of its own, so that its peak memory is its own, and they are timed in turn."""

import dataclasses
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from univid_jax.cli.flags import CommandFlags
from univid_jax.core.errors import UserError
from univid_jax.platform.chips import find_chip_by_name

PEERS = ("torch", "torch_compile")

Figures = dict[str, float]


class Pipe(Protocol):
  """An end of a `multiprocessing.Pipe`, whose type depends on the platform."""

  def send(self, obj: Any, /) -> None: ...
  def recv(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Program:
  """A program to time.

  Attributes:
    build: a function at the top level of a module; called in the program's process, it returns a function that runs the
      program once and waits for the result.
    options: keyword arguments of `build`.
  """

  build: Callable[..., Callable[[], object]]
  options: Mapping[str, Any]


class RaceFlags:
  """The flags that all races have."""

  def __init__(self, command: CommandFlags):
    self.dtype = command.choice("dtype", "float32", ["bfloat16", "float32"], "Of weights and activations.")
    self.against = command.strings("against", [], f"Peers: {', '.join(PEERS)}.")
    self.pairs = command.integer("pairs", 5, "Timed runs of each program.", lower_bound=1)
    self.out = command.string("out", "", "File for the figures as JSON.")

  def peers(self, build: Callable[..., Callable[[], object]], options: Mapping[str, Any]) -> dict[str, Program]:
    """Returns PyTorch's programs by the names that --against takes; `build` also gets `compiled`.

    Raises:
      UserError: there is no such peer.
    """
    for name in self.against.value:
      if name not in PEERS:
        raise UserError(f"--against must be one or more of {', '.join(PEERS)}, got {name!r}")
    return {name: Program(build, {**options, "compiled": name == "torch_compile"}) for name in self.against.value}


def race(
  programs: Mapping[str, Program], *, pairs: int, flops: float = 0.0, hardware_flops: float = 0.0
) -> dict[str, Figures]:
  """Runs each program once to warm up and then `pairs` times in turn; prints a line per program.

  Args:
    programs: by name.
    pairs: timed runs of each.
    flops: of one run, the model's own work; 0 omits TFLOP/s.
    hardware_flops: of one run, recomputation included; 0 if nothing is recomputed.

  Returns:
    By name first_s, compile_s (first minus median), median_s, peak_gib (of the process; on a GPU also device_gib), and
    with `flops` tflops, mfu (share of the peak) and hfu. The peak is the chip's in bfloat16; on a processor that is not
    in `platform.chips` it is what a large matrix product reaches in float32.
  """
  context = multiprocessing.get_context("spawn")
  pipes: dict[str, Pipe] = {}
  for name, program in programs.items():
    pipes[name], child = context.Pipe()
    context.Process(target=_serve, args=(program, child), daemon=True).start()
    pipes[name].recv()

  seconds: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(1 + pairs):
    for name, pipe in pipes.items():
      pipe.send(True)
      seconds[name].append(pipe.recv())
  peak = 0.0
  figures: dict[str, Figures] = {}
  for name, pipe in pipes.items():
    pipe.send(False)
    memory: Figures = pipe.recv()
    chip = memory.pop("chip_flops", 0.0)
    first, *rest = seconds[name]
    median = statistics.median(rest)
    figures[name] = {
      "first_s": round(first, 3),
      "compile_s": round(max(first - median, 0), 3),
      "median_s": round(median, 3),
      **memory,
    }
    if flops:
      peak = chip or peak or measure_flops()
      figures[name] |= {"tflops": round(flops / median / 1e12, 3), "mfu": round(flops / median / peak, 3)}
      if hardware_flops:
        figures[name]["hfu"] = round(hardware_flops / median / peak, 3)
    print(f"{name:<23}" + "   ".join(f"{key} {value:g}" for key, value in figures[name].items()), flush=True)
  return figures


def measure_flops(size: int = 4096, repeats: int = 5) -> float:
  """Measures the operations per second of a product of square float32 matrices on this processor: the best of some."""
  a, b = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    np.matmul(a, b)
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)


def print_ratios(figures: Mapping[str, Figures]) -> None:
  """Prints time and memory of the first program relative to each other one; on a GPU the memory is the device's."""
  first, *others = figures
  memory = "device_gib" if "device_gib" in figures[first] else "peak_gib"
  for other in others:
    time_ratio, memory_ratio = (figures[first][key] / figures[other][key] for key in ("median_s", memory))
    print(f"{first} relative to {other}: {time_ratio:.2f} times the time, {memory_ratio:.2f} times the memory")


def write_json(path: str, values: Mapping[str, Any]) -> None:
  """Writes figures with the machine they were measured on; does nothing without a path."""
  if path:
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    Path(path).write_text(json.dumps({"machine": machine, **values}, indent=2) + "\n")


def _serve(program: Program, pipe: Pipe) -> None:
  """Runs a program each time it is asked to, then reports its memory."""
  run = program.build(**program.options)
  pipe.send("ready")
  while pipe.recv():
    start = time.perf_counter()
    run()
    pipe.send(time.perf_counter() - start)
  pipe.send({"peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2), **_measure_device()})


def _measure_device() -> Figures:
  """Returns the peak memory and the chip's peak of the accelerator that the process used; empty on a CPU."""
  if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
    memory, name = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
  elif (jax := sys.modules.get("jax")) and jax.default_backend() != "cpu":
    device = jax.local_devices()[0]
    memory, name = (device.memory_stats() or {}).get("peak_bytes_in_use", 0), device.device_kind
  else:
    return {}
  chip = find_chip_by_name(name)
  return {"device_gib": round(memory / 2**30, 2), "chip_flops": chip.flops if chip else 0.0}
