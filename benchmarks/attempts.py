"""An attempt of the soak test: a start of the command in two processes, and how it ended."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults import HEARTBEAT_SECONDS, Conditions, Site

ROOT = Path(__file__).parent.parent
NUM_STEPS = 48
OPTIONS = {
  "num_steps": NUM_STEPS,
  "log_every": 1,
  "model.variant": "",
  "model.dtype": "float32",
  "model.param_dtype": "float32",
  "data.height": 16,
  "data.width": 32,
  "data.num_frames": 5,
  "rows.num_tokens": 48,
  "lora.rank": 2,
  "mesh.data": 2,
  "checkpoint.every_steps": 4,
  "validation.every_steps": 12,
  "validation.sentences": 2,
  "validation.previews": 0,
}
# Maximum seconds until both processes have ended, and between the ends of the two.
PATIENCE, PARTING = 600, HEARTBEAT_SECONDS + 40

ENDINGS = ("error: ", "stopped by ")
STATUS = re.compile(
  r"$|data: |compiling |memory per device|attention: |resuming |step \d+: validation loss|validation: |dropped: "
  r"|(clips|prompts|train):|goodput \d|.* so the goodput of earlier runs is unknown"
  r"|.*is damaged: .*is used instead$|.* is kept as .*\.damaged|a program in the compilation cache is damaged"
  r"|a compiled program is not kept|.* has no checksums, so damage would go unnoticed"
  r"|.* is corrupt and is computed again$"
)
# On some processors, XLA's loader of cached CPU programs warns that two of LLVM's tuning hints are missing on the very
# machine that compiled them, and still uses the programs (github.com/openxla/xla/issues/44565).
HARMLESS = re.compile(
  r".* cpu_aot_loader\.cc:\d+\] .* Target machine feature \+prefer-no-(gather|scatter) is not +supported"
)


class Attempt:
  """One start of the command, in two processes.

  Args:
    site: files of the run.
    logs: folder for what the processes print.
    conditions: conditions of each process.
  """

  def __init__(self, site: Site, logs: Path, conditions: Sequence[Conditions] = ({}, {})):
    logs.mkdir(parents=True)
    self._metrics = site.workdir / "metrics.jsonl"
    self._started, self._logs = time.monotonic(), [logs / f"process_{index}" for index in (0, 1)]
    command = ["--config=wan_1_3b", f"--config.init_from={site.base}", f"--config.data.pairs={site.pairs}"]
    command += [f"--workdir={site.workdir}", *(f"--config.{key}={value}" for key, value in OPTIONS.items())]
    command += [
      f"--coordinator=127.0.0.1:{free_port()}",
      "--num_processes=2",
      f"--heartbeat_seconds={HEARTBEAT_SECONDS}",
    ]
    environment = {
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_backend_optimization_level=0",
      "JAX_COMPILATION_CACHE_DIR": str(site.programs),
    }
    self.processes: list[subprocess.Popen[bytes]] = []
    for index, (log, given) in enumerate(zip(self._logs, conditions, strict=True)):
      start = ["benchmarks.handicap", json.dumps(given)] if given else []
      with log.with_suffix(".out").open("wb") as out, log.with_suffix(".err").open("wb") as err:
        arguments = [sys.executable, "-m", *start, "univid_jax.train", *command, f"--process_id={index}"]
        self.processes.append(subprocess.Popen(arguments, env=environment, stdout=out, stderr=err))

  def __enter__(self) -> "Attempt":
    return self

  def __exit__(self, *_: object) -> None:
    """Leaves no process behind."""
    for process in self.processes:
      process.kill()
      process.wait()

  def send(self, number: signal.Signals, index: int) -> None:
    self.processes[index].send_signal(number)
    if number == signal.SIGKILL:
      self.processes[index].wait()

  @property
  def is_running(self) -> bool:
    return all(process.poll() is None for process in self.processes)

  def wait_for(self, step: int) -> bool:
    """Waits until the run has taken a step; returns False if a process ends before."""
    while self.is_running:
      # Lines in metrics.jsonl from before the loop started may be from an earlier attempt.
      if (
        "train:" in self._read_errors(0) and self._metrics.exists() and self._metrics.read_bytes().count(b"\n") >= step
      ):
        return True
      if time.monotonic() - self._started > PATIENCE:
        return False
      time.sleep(0.05)
    return False

  def wait_seconds(self, seconds: float) -> bool:
    """Waits until the processes have joined, plus some seconds; returns False if one ends before.

    A process that is alone before that waits for the other, until a launcher would end it.
    """
    joined = None
    while self.is_running and (joined is None or time.monotonic() < joined + seconds):
      if joined is None and all(b"[Gloo]" in log.with_suffix(".out").read_bytes() for log in self._logs):
        joined = time.monotonic()
      time.sleep(0.05)
    return self.is_running

  def finish(self) -> list[str]:
    """Waits until both processes have ended; returns the problems: which of them had to be killed."""
    while self.is_running and time.monotonic() - self._started < PATIENCE:
      time.sleep(0.05)
    deadline = time.monotonic() + PARTING
    while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
      time.sleep(0.05)
    hanging = [f"process {i} does not end" for i, process in enumerate(self.processes) if process.poll() is None]
    self.__exit__()
    return hanging

  @property
  def codes(self) -> tuple[int, ...]:
    return tuple(process.returncode for process in self.processes)

  def _read_errors(self, index: int) -> str:
    return self._logs[index].with_suffix(".err").read_text(errors="replace")

  def endings(self, index: int) -> tuple[list[str], list[str]]:
    """Returns the lines that say how a process ended, and unexpected lines, which are neither that nor status."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", self._read_errors(index))]
    endings = [line for line in lines if line.startswith(ENDINGS)]
    others = [line for line in lines if not line.startswith(ENDINGS)]
    return endings, [line for line in others if not STATUS.match(line) and not HARMLESS.match(line)]


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]
