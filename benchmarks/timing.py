"""Races programs: each runs in a separate process, so that peak memory is its own, and they are timed in turn."""

import dataclasses
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from univid_jax.cli.flags import CommandFlags
from univid_jax.core.errors import UserError
from univid_jax.platform.chips import find_chip_by_name

PEERS = ("torch", "torch_compile")

Figures = dict[str, float]

# JAX would otherwise preallocate three quarters of a GPU's memory, which the other programs of a race need.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


class Pipe(Protocol):
  """An end of a `multiprocessing.Pipe`, whose type depends on the platform."""

  def send(self, obj: Any, /) -> None: ...
  def recv(self) -> Any: ...
  def poll(self, timeout: float | None = 0.0, /) -> bool: ...


class ProgramError(Exception):
  """A program failed, or took too long."""


@dataclasses.dataclass(frozen=True)
class Program:
  """A program to time.

  Attributes:
    build: a function at the top level of a module; called in the program's process, it returns a function that runs the
      program once and waits for the result. If that returns a dict, these are figures of the program.
    options: keyword arguments of `build`.
    is_peer: whether it is PyTorch's.
  """

  build: Callable[..., Callable[[], object]]
  options: Mapping[str, Any]
  is_peer: bool = False


class RaceFlags:
  """The flags that all races have, and a race according to them.

  Args:
    command: the command that gets the flags.
    has_against: whether the command takes peers by name.
  """

  def __init__(self, command: CommandFlags, *, has_against: bool = True):
    self.dtype = command.choice("dtype", "float32", ["bfloat16", "float32"], "Dtype of weights and activations.")
    if has_against:
      self.against = command.strings("against", [], f"Peers: {', '.join(PEERS)}.")
    self.pairs = command.integer("pairs", 5, "Timed runs of each program.", lower_bound=1)
    self.at_once = command.switch(
      "at_once", False, "Build all programs at once and warm peers up beside ours: sooner, with longer first calls."
    )
    self.patience = command.integer(
      "patience", 0, "Seconds after which a program that is not warm is left out; 0: none."
    )
    self.out = command.string("out", "", "File for the figures as JSON.")
    self.failed: dict[str, str] = {}

  def peers(self, build: Callable[..., Callable[[], object]], options: Mapping[str, Any]) -> dict[str, Program]:
    """Returns PyTorch's programs by the names that --against takes; `build` also gets `compiled`.

    Raises:
      UserError: there is no such peer.
    """
    for name in self.against.value:
      if name not in PEERS:
        raise UserError(f"--against must be one or more of {', '.join(PEERS)}, got {name!r}")
    return {name: Program(build, {**options, "compiled": name == "torch_compile"}, True) for name in self.against.value}

  def run(
    self, programs: Mapping[str, Program], *, flops: float = 0.0, hardware_flops: float = 0.0
  ) -> dict[str, Figures]:
    """Returns the figures of the programs that did not fail, and prints the ratios; see `race`."""
    figures = race(
      programs,
      pairs=self.pairs.value,
      flops=flops,
      hardware_flops=hardware_flops,
      at_once=self.at_once.value,
      patience=self.patience.value or None,
      failed=self.failed,
    )
    print_ratios(figures)
    return figures

  def write(self, values: Mapping[str, Any]) -> None:
    """Writes figures to --out.

    Raises:
      UserError: a program failed; the figures of the others are written.
    """
    write_json(self.out.value, {**values, "failed": self.failed} if self.failed else values)
    if self.failed:
      raise UserError("; ".join(f"{name}: {reason}" for name, reason in self.failed.items()))


def race(
  programs: Mapping[str, Program],
  *,
  pairs: int,
  flops: float = 0.0,
  hardware_flops: float = 0.0,
  at_once: bool = False,
  patience: float | None = None,
  failed: dict[str, str] | None = None,
) -> dict[str, Figures]:
  """Runs each program once to warm up and then `pairs` times in turn; prints a line per program.

  Args:
    programs: programs by name.
    pairs: number of timed runs of each.
    flops: operations of one run, the model's own; 0 omits TFLOP/s.
    hardware_flops: operations of one run, recomputation included; 0 if nothing is recomputed.
    at_once: whether to build all programs at once, and to warm up peers while ours warm up. Ours warm up in turn,
      because XLA on a GPU times kernels to choose them when it compiles.
    patience: seconds after which a program that is not warm fails.
    failed: receives the reasons of programs that fail, which are then missing in the result.

  Returns:
    By name: first_s (of the first run, which compiles), compile_s (first minus median), median_s, peak_gib (of the
    process; on a GPU also device_gib), what the program itself returns, and with `flops` tflops, mfu (share of the
    peak) and hfu. The peak is the chip's in bfloat16; on a processor that is not in `platform.chips` it is the rate of
    a large matrix product in float32.

  Raises:
    UserError: a program fails, and `failed` is None.
  """
  runners = _Runners(patience, failed)
  try:
    runners.start(programs, at_once=at_once)
    for _ in range(1 + pairs):
      runners.run_all()
    results = runners.finish()
  finally:
    runners.stop()
  peak = 0.0
  figures: dict[str, Figures] = {}
  for name, (seconds, own) in results.items():
    chip = own.pop("chip_flops", 0.0)
    first, *rest = seconds
    median = statistics.median(rest)
    figures[name] = {
      "first_s": round(first, 3),
      "compile_s": round(max(first - median, 0), 3),
      "median_s": round(median, 5),
      **own,
    }
    if flops:
      peak = chip or peak or measure_flops()
      figures[name] |= {"tflops": round(flops / median / 1e12, 3), "mfu": round(flops / median / peak, 3)}
      if hardware_flops:
        figures[name]["hfu"] = round(hardware_flops / median / peak, 3)
    print(f"{name:<23}" + "   ".join(f"{key} {value:g}" for key, value in figures[name].items()), flush=True)
  return figures


class _Runners:
  """The programs of a race that have not failed; see `race` for the arguments."""

  def __init__(self, patience: float | None, failed: dict[str, str] | None):
    self._patience, self._failed = patience, failed
    self._runners: dict[str, _Runner] = {}
    self._seconds: dict[str, list[float]] = {}
    self._running: set[str] = set()
    self._begin = time.monotonic()

  def start(self, programs: Mapping[str, Program], *, at_once: bool) -> None:
    """Starts the processes and waits until each has built its program; with `at_once` peers then begin to warm up."""
    for name, program in programs.items():
      self._runners[name], self._seconds[name] = _Runner(program), []
      if not at_once:
        self._receive(name)
    if at_once:
      self._running = {name for name, program in programs.items() if program.is_peer}
      for name in self._running:
        self._runners[name].send(True)
      for name in list(self._runners):
        self._receive(name)

  def run_all(self) -> None:
    """Runs each program once, one after the other."""
    for name in list(self._runners):
      if name not in self._running:
        self._runners[name].send(True)
      self._running.discard(name)
      if (value := self._receive(name)) is not None:
        self._seconds[name].append(value)
        if len(self._seconds[name]) == 1:
          print(f"{name:<23}warm after {time.monotonic() - self._begin:.1f} s, first_s {value:.2f}", flush=True)

  def finish(self) -> dict[str, tuple[list[float], Figures]]:
    """Returns by name the seconds of each run, and the figures that the process reports at its end."""
    results = {}
    for name in list(self._runners):
      self._runners[name].send(False)
      if (value := self._receive(name)) is not None:
        results[name] = self._seconds[name], value
    return results

  def stop(self) -> None:
    for runner in self._runners.values():
      runner.stop()

  def _receive(self, name: str) -> Any:
    """Returns the answer of a program; None if it fails, which removes it from the race."""
    limit = None if self._patience is None else max(self._begin + self._patience - time.monotonic(), 1)
    try:
      return self._runners[name].receive(None if self._seconds[name] else limit)
    except ProgramError as error:
      if self._failed is None:
        raise UserError(f"{name}: {error}") from error
      print(f"{name:<23}failed: {error}", flush=True)
      self._failed[name] = str(error)
      self._runners.pop(name).stop()
      return None


class _Runner:
  """A program in a separate process."""

  def __init__(self, program: Program):
    context = multiprocessing.get_context("spawn")
    pipe, child = context.Pipe()
    self.pipe: Pipe = pipe
    self.process = context.Process(target=_serve, args=(program, child), daemon=True)
    self.process.start()
    child.close()  # so that the end of the process ends the pipe

  def send(self, goes_on: bool) -> None:
    try:
      self.pipe.send(goes_on)
    except OSError:  # the process has ended, as `receive` will find
      return

  def receive(self, timeout: float | None) -> Any:
    """Returns the program's next answer.

    Raises:
      ProgramError: it failed, its process ended, or it did not answer in time.
    """
    try:
      if not self.pipe.poll(timeout):
        raise ProgramError("not warm in time")
      value, reason = self.pipe.recv()
    except (EOFError, OSError):
      self.process.join(1)
      raise ProgramError(f"its process ended with {self.process.exitcode}") from None
    if reason:
      raise ProgramError(reason)
    return value

  def stop(self) -> None:
    """Ends the process, after a moment in which it can end itself."""
    self.process.join(1)
    self.process.terminate()


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
  """Prints time and memory of the first program relative to every other; on a GPU memory is the device's."""
  for other in list(figures)[1:]:
    first = next(iter(figures))
    memory = "device_gib" if "device_gib" in figures[first] else "peak_gib"
    time_ratio, memory_ratio = (figures[first][key] / max(figures[other][key], 1e-9) for key in ("median_s", memory))
    print(f"{first} relative to {other}: {time_ratio:.2f} times the time, {memory_ratio:.2f} times the memory")


def write_json(path: str, values: Mapping[str, Any]) -> None:
  """Writes figures with the machine they were measured on; does nothing without a path."""
  if path:
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    Path(path).write_text(json.dumps({"machine": machine, **values}, indent=2) + "\n")


def _serve(program: Program, pipe: Pipe) -> None:
  """Runs a program on each request, then reports its memory; answers are pairs of a value and a failure."""
  try:
    run = program.build(**program.options)
    pipe.send(("ready", ""))
    own: Figures = {}
    while pipe.recv():
      start = time.perf_counter()
      result = run()
      pipe.send((time.perf_counter() - start, ""))
      own = result if isinstance(result, dict) else own
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    pipe.send(({"peak_gib": peak, **_measure_device(), **own}, ""))
  except EOFError:  # the race is over
    return
  except Exception as error:
    traceback.print_exc()
    lines = str(error).strip().splitlines() or [""]
    pipe.send((None, f"{type(error).__name__}: {lines[0][:300]}"))


def _measure_device() -> Figures:
  """Returns the peak memory and the chip's peak of the accelerator that the process used; empty on a CPU."""
  if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
    memory, name = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
  elif (jax := sys.modules.get("jax")) and jax.default_backend() != "cpu":
    device = jax.local_devices()[0]
    memory, name = (device.memory_stats() or {}).get("peak_bytes_in_use", 0), device.device_kind
  else:
    return {}
  chip = find_chip_by_name(name)
  return {"device_gib": round(memory / 2**30, 3), "chip_flops": chip.flops if chip else 0.0}
