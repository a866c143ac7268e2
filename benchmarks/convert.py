"""Converts random weights of a published size: rate and memory, beside a copy of the same bytes.

  python -m benchmarks.convert [--variant=wan2.1-t2v-1.3b] [--folder=DIR]

Memory is the process's anonymous memory; pages of mapped files, which the system takes back when it needs them, do not count.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags

from univid_jax import cli

VARIANT = flags.DEFINE_string("variant", "wan2.1-t2v-1.3b", "The published model whose shape the weights have.")
FOLDER = flags.DEFINE_string("folder", None, "Where files are made and removed again; the system's temporary folder by default.")


def write_release(folder: Path, variant: str) -> Path:
  """A transformer with random bfloat16 weights in the official layout, written in pieces."""
  from tools.convert_weights.convert import component_fills
  from tools.convert_weights.export import official_config
  from univid_jax.models.dit import PRESETS

  config = PRESETS[variant]
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(official_config(config)))
  tensors = {name: fill.original_shape for fill in component_fills("transformer", config) for name in fill.names}
  header, offset = {}, 0
  for name, shape in sorted(tensors.items()):
    size = 2 * int(np.prod(shape))
    header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
    offset += size
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  rng, path = np.random.default_rng(0), folder / "diffusion_pytorch_model.safetensors"
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name in sorted(tensors):
      file.write(rng.standard_normal(tensors[name], np.float32).astype(ml_dtypes.bfloat16).tobytes())
  return path


def copy_and_sync(path: Path) -> float:
  """Seconds to copy a file and have it on disk."""
  target, start = path.with_suffix(".copy"), time.perf_counter()
  with path.open("rb") as source, target.open("wb") as file:
    shutil.copyfileobj(source, file, 16 << 20)
    file.flush()
    os.fsync(file.fileno())
  seconds = time.perf_counter() - start
  target.unlink()
  return seconds


def convert(folder: Path, target: Path) -> tuple[float, float]:
  """Seconds and peak of anonymous memory (GB) of the command."""
  start = time.perf_counter()
  process = subprocess.Popen([sys.executable, "-m", "tools.convert_weights", str(folder), str(target)])
  peak = 0
  while process.poll() is None:
    try:
      status = Path(f"/proc/{process.pid}/status").read_text()
      peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
    except OSError:
      pass
    time.sleep(0.01)
  if process.returncode:
    raise cli.UserError("the conversion failed")
  return time.perf_counter() - start, peak * 1024 / 1e9


def main() -> None:
  with tempfile.TemporaryDirectory(dir=FOLDER.value) as name:
    path = write_release(Path(name) / "release", VARIANT.value)
    size = path.stat().st_size / 1e6
    before = copy_and_sync(path)
    seconds, peak = convert(path.parent, Path(name) / "target")
    after = copy_and_sync(path)
    print(f"{VARIANT.value}: {size / 1e3:.2f} GB in {seconds:.1f} s = {size / seconds:.0f} MB/s, peak of anonymous memory "
          f"{peak:.2f} GB; a copy with fsync {size / before:.0f} MB/s before, {size / after:.0f} MB/s after")


if __name__ == "__main__":
  cli.run(main)
