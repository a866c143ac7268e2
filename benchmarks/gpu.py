"""All GPU figures of docs/benchmarks/gpu.md, in one command on a bare machine with JAX and PyTorch.

  python -m benchmarks.gpu [--minutes=8] [--out=DIR] [--only=NAME,...] [--tiny]

Runs the other benchmarks one after another, most valuable first, each with its own time limit, and skips those for
which too little time remains. Figures are added to DIR/gpu.jsonl as soon as they exist; rows for docs/benchmarks/gpu.md
are printed at the end, and by `--rows=DIR/gpu.jsonl` alone. A peer whose packages are missing is left out. --tiny runs
everything in miniature on a CPU.
"""

import concurrent.futures
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import FigureFile, read_figures
from benchmarks.gpu_plan import BENCHMARKS, Benchmark
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.core.errors import UserError

FLAGS = CommandFlags(__doc__)
MINUTES = FLAGS.number("minutes", 8.0, "Minutes for all benchmarks together.", lower_bound=0.0)
OUT = FLAGS.string("out", "runs/gpu", "Folder for figures.")
ONLY = FLAGS.strings("only", [], "Names of the benchmarks to run.")
TINY = FLAGS.switch("tiny", False, "Run in miniature, to try the command.")
ROWS = FLAGS.string("rows", "", "Print the rows of this gpu.jsonl, and run nothing.")

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "peft", "transformers", "nvidia-cudnn-cu13", "triton")
END_SECONDS = 3  # to print the rows
PATIENCE = 0.7  # share of a benchmark's time after which a program that is not warm is left out


def describe_machine() -> dict[str, Any]:
  """Returns GPU, driver, versions and date, and the time to start a process with JAX or PyTorch."""
  versions = {}
  for name in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
  try:
    gpu = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip().splitlines()[:1]
  except (OSError, subprocess.SubprocessError):
    gpu = []
  machine: dict[str, Any] = {
    "gpu": gpu[0] if gpu else "none",
    "python": sys.version.split()[0],
    "versions": versions,
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }
  probes = {
    "jax": "import jax, jax.numpy as j; (j.ones((8, 8)) @ j.ones((8, 8))).block_until_ready(); "
    "print(jax.devices()[0].device_kind)",
    "torch": "import torch; d = 'cuda' if torch.cuda.is_available() else 'cpu'; (torch.ones(8, 8, device=d) @ "
    "torch.ones(8, 8, device=d)).sum().item(); print(torch.cuda.get_device_name() if d == 'cuda' else d)",
  }
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = [pool.submit(probe, name, program) for name, program in probes.items() if not find_missing([name])]
    for future in found:
      machine |= future.result()
  return machine


def probe(name: str, program: str) -> dict[str, Any]:
  """Runs a program that prints a package's device; returns the device and the seconds of the process."""
  start = time.monotonic()
  try:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["it was killed"]
    device = f"failed: {lines[-1]}" if done.returncode else lines[-1]
  except subprocess.TimeoutExpired:
    device = "failed: no answer in 90 s"
  return {f"{name}_device": device, f"{name}_start_s": round(time.monotonic() - start, 1)}


def run(benchmark: Benchmark, *, tiny: bool, limit: float) -> dict[str, Any]:
  """Runs a benchmark in its own process group, which is ended after `limit` seconds.

  Returns:
    command, seconds, exit code (None if it was ended) and result: what the benchmark wrote.
  """
  if missing := find_missing(benchmark.peer_needs):
    print(f"{benchmark.name}: without its peer, which needs {', '.join(missing)}", flush=True)
  environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "figures.json"
    command = benchmark.command(tiny=tiny, with_peer=not missing, patience=PATIENCE * limit, out=out)
    text = shlex.join(["python", *command[1:-1]])
    print(f"$ {text}", flush=True)
    start = time.monotonic()
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
      code = process.wait(limit)
    except subprocess.TimeoutExpired:
      print(f"{benchmark.name}: ended after {limit:.0f} s", flush=True)
      code = None
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
    result = json.loads(out.read_text()) if out.exists() else {}
  return {"command": text, "seconds": round(time.monotonic() - start, 1), "code": code, **result}


def find_missing(packages: Sequence[str]) -> list[str]:
  return [name for name in packages if not importlib.util.find_spec(name)]


def find_programs(values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Yields the programs of a result and their figures; attention's are by number of tokens."""
  for name, figures in values.items():
    if isinstance(figures, Mapping) and "median_s" in figures:
      yield name, figures
    elif isinstance(figures, Mapping) and name.isdigit():
      yield from find_programs(figures)


def make_rows(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
  """Yields lines of Markdown: one table of programs, one of errors."""
  titles = {benchmark.name: benchmark.title for benchmark in BENCHMARKS}
  ceiling = max(
    (
      figures.get("tflops", 0.0)
      for record in records
      if record["name"] == "ceiling"
      for _, figures in find_programs(record)
    ),
    default=0.0,
  )
  heads = ("first call", "median", "TFLOP/s", "MFU", "of the ceiling", "HFU", "memory", "forecast", "time, relative")
  yield f"| | | {' | '.join(heads)} |"
  yield "|---" * (2 + len(heads)) + "|"
  for record in records:
    first = None
    for name, figures in find_programs(record):
      first = first or figures["median_s"]
      tflops, memory = figures.get("tflops"), figures.get("device_gib", figures.get("peak_gib"))
      cells = (
        titles.get(str(record["name"]), ""),
        name,
        f"{figures['first_s']:.1f} s",
        f"{1000 * figures['median_s']:.4g} ms",
        f"{tflops:.4g}" if tflops else "",
        f"{figures['mfu']:.3f}" if "mfu" in figures else "",
        f"{tflops / ceiling:.3f}" if tflops and ceiling else "",
        f"{figures['hfu']:.3f}" if "hfu" in figures else "",
        f"{memory:.2f} GiB" if memory is not None else "",
        f"{figures['forecast_gib']:.2f} GiB" if "forecast_gib" in figures else "",
        "" if first == figures["median_s"] else f"{first / figures['median_s']:.2f}",
      )
      yield f"| {' | '.join(cells)} |"
  yield ""
  yield "| | error or figure |"
  yield "|---|---|"
  for record in records:
    for name, value in {**record.get("errors", {}), **record.get("figures", {})}.items():
      yield f"| {titles.get(record['name'], '')}, {name} | {value:.3g} |"
    for name, reason in record.get("failed", {}).items():
      yield f"| {titles.get(record['name'], '')}, {name} | failed: {reason} |"


@app.command(FLAGS)
def main() -> None:
  deadline = time.monotonic() + 60 * MINUTES.value
  if ROWS.value:
    print("\n".join(make_rows(read_figures(ROWS.value))))
    return
  names = [benchmark.name for benchmark in BENCHMARKS]
  if unknown := set(ONLY.value) - set(names):
    raise UserError(f"--only must be one or more of {', '.join(names)}, got {unknown.pop()!r}")
  out = Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  machine = describe_machine()
  print(json.dumps(machine, indent=2), flush=True)
  device = machine.get("jax_device", "none")
  if not device.startswith("NVIDIA") and not TINY.value:
    raise UserError(f"JAX finds no GPU (its device: {device}; nvidia-smi: {machine['gpu']}); --tiny runs on a CPU")
  records: list[dict[str, Any]] = []
  left_out: list[str] = []
  file = FigureFile(out / "gpu.jsonl")
  for benchmark in BENCHMARKS:
    if ONLY.value and benchmark.name not in ONLY.value:
      continue
    if missing := find_missing(benchmark.needs):
      print(f"{benchmark.name}: skipped, it needs {', '.join(missing)}", flush=True)
      continue
    remaining = deadline - time.monotonic() - END_SECONDS
    if remaining < benchmark.seconds and not TINY.value:
      left_out.append(f"{benchmark.name} (about {benchmark.seconds:.0f} s)")
      continue
    limit = max(min(remaining, 2 * benchmark.seconds), 1)
    record = {"name": benchmark.name, **run(benchmark, tiny=TINY.value, limit=limit), "machine": machine}
    file.add(record)
    records.append(record)
  print("\n" + "\n".join(make_rows(records)), flush=True)
  if left_out:
    print(f"\nleft out, {max(deadline - time.monotonic(), 0):.0f} s remain: {', '.join(left_out)}")
  if bad := [record["name"] for record in records if record["code"] != 0]:
    raise UserError(f"failed, or ended too late: {', '.join(bad)}; see above")


if __name__ == "__main__":
  sys.exit(main())
