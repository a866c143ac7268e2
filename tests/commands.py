"""The project's commands as another process runs them."""

import os
import subprocess
import sys

# Most tests compile for far longer than they compute: LLVM's optimizations would take a third of their compilation.
FAST_COMPILATION = "--xla_backend_optimization_level=0"

# A run that takes seconds, on the default data.
SMALL = ("--config=configs/video_tasks.py", "--config.model.dim=32", "--config.model.ffn_dim=32", "--config.model.num_layers=1",
         "--config.data.height=16", "--config.data.width=16", "--config.rows.num_tokens=48", "--config.rows.packing_bins=8")


def xla_flags(devices: int) -> str:
  """For a CPU that looks like so many devices, and programs that are made quickly."""
  return f"--xla_force_host_platform_device_count={devices} {FAST_COMPILATION}"


def environment(devices: int = 1) -> dict[str, str]:
  """For a process with so many devices."""
  return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)}


def start_command(module: str, *arguments: str, devices: int = 1, **options) -> subprocess.Popen:
  """`python -m module arguments` in a process of its own, with what it writes as text."""
  return subprocess.Popen([sys.executable, "-m", module, *map(str, arguments)], env=environment(devices), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, **options)


def run_command(module: str, *arguments: str, **options) -> subprocess.CompletedProcess:
  """The same to its end."""
  process = start_command(module, *arguments, **options)
  try:
    stdout, stderr = process.communicate(timeout=300)
  finally:
    process.kill()
  return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
