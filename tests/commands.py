"""The project's commands, in processes of their own or in this one."""

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import jaxlib

# Most tests compile for far longer than they compute; LLVM's optimizations and the newer of XLA's two emitters, which
# goes through MLIR, are most of the compilation. Workers have a core each, so they compile a program in one piece.
FAST_COMPILATION = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
)
if jaxlib.__version__.startswith("0.10."):  # an option that XLA does not know (any longer) ends the process
  FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"

# A run of seconds, on the default data. Its optimizer compiles sooner than Muon.
SMALL = (
  "--config=configs/video_tasks.py",
  "--config.model.dim=32",
  "--config.model.ffn_dim=32",
  "--config.model.num_layers=1",
  "--config.data.height=16",
  "--config.data.width=16",
  "--config.rows.num_tokens=48",
  "--config.rows.packing_bins=8",
  "--config.optimizer.name=adamw",
)

# A torch that cannot be imported. tensorboardX imports an installed one, which takes two seconds.
WITHOUT_TORCH = Path(__file__).parent / "without_torch"


def xla_flags(devices: int) -> str:
  """Returns flags for a CPU that looks like this many devices, and for quick compilation."""
  return f"--xla_force_host_platform_device_count={devices} {FAST_COMPILATION}"


def environment(devices: int = 1, *, torch: bool = True) -> dict[str, str]:
  """Returns the variables of a process with this many devices, and with PyTorch if it is installed, or without."""
  variables = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)}
  if not torch:
    variables["PYTHONPATH"] = os.pathsep.join([str(WITHOUT_TORCH), *filter(None, [variables.get("PYTHONPATH")])])
  return variables


def start_python(*arguments: str, devices: int = 1, **options) -> subprocess.Popen:
  """Starts `python arguments` without PyTorch, with its output as text."""
  return subprocess.Popen(
    [sys.executable, *map(str, arguments)],
    env=environment(devices, torch=False),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )


def start_command(module: str, *arguments: str, **options) -> subprocess.Popen:
  """Starts `python -m module arguments`, with its output as text."""
  return start_python("-m", module, *arguments, **options)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
  """Waits for the end of a process."""
  try:
    stdout, stderr = process.communicate(timeout=300)
  finally:
    process.kill()
  return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run_command(module: str, *arguments: str, **options) -> subprocess.CompletedProcess:
  """Runs `python -m module arguments` to its end."""
  return finish(start_command(module, *arguments, **options))


def run_here(module: str, *arguments: object) -> int:
  """Runs a command in this process, which is quicker; returns its exit code."""
  return importlib.import_module(module).main([module, *map(str, arguments)])


def free_port() -> int:
  """Returns a port that nothing listens on."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]
