"""Converts random weights of a published size: rate and memory, beside a copy of the same bytes and beside diffusers.

  python -m benchmarks.convert [--against=torch] [--variant=wan2.1-t2v-1.3b] [--pairs=5] [--folder=DIR] [--out=FILE.json]

The peer reads the same file with WanTransformer3DModel.from_single_file and writes it with save_pretrained. Both are whole
commands, in turn, and end when what they wrote is on disk.
Memory is the process's anonymous memory; pages of mapped files, which the system takes back when it needs them, do not count.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags

from univid_jax import cli

AGAINST = flags.DEFINE_list("against", [], "Peers: torch.")
VARIANT = flags.DEFINE_string("variant", "wan2.1-t2v-1.3b", "The published model whose shape the weights have.")
FOLDER = flags.DEFINE_string("folder", None, "Where files are made and removed again; the system's temporary folder by default.")
PAIRS = flags.DEFINE_integer("pairs", 5, "Timed runs of each.", lower_bound=1)
OUT = flags.DEFINE_string("out", "", "File for the figures as JSON.")
PEER = flags.DEFINE_string("peer", "", "FILE TARGET: what the peer's command is started with.")


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


def write_diffusers_config(folder: Path, variant: str) -> None:
  """What from_single_file would otherwise take from the hub."""
  from benchmarks.steps import diffusers_options
  from univid_jax.models.dit import PRESETS

  folder.mkdir()
  (folder / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **diffusers_options(PRESETS[variant])}))


def convert_with_diffusers(file: str, target: str) -> None:
  """What the peer's command does."""
  import diffusers
  import torch

  folder = str(Path(file).parent / "diffusers")
  diffusers.WanTransformer3DModel.from_single_file(file, config=folder, torch_dtype=torch.bfloat16).save_pretrained(target)


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


def run(command: Sequence[str], target: Path) -> tuple[float, float]:
  """Seconds until what the command wrote is on disk, and its peak of anonymous memory (GB)."""
  start = time.perf_counter()
  process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
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
  os.sync()
  seconds = time.perf_counter() - start
  shutil.rmtree(target)
  return seconds, peak * 1024 / 1e9


def main() -> None:
  if PEER.value:
    convert_with_diffusers(*PEER.value.split())
    return
  if set(AGAINST.value) - {"torch"}:
    raise cli.UserError(f"--against is torch, got {','.join(AGAINST.value)!r}")
  from benchmarks.timing import print_ratios, write_json

  with tempfile.TemporaryDirectory(dir=FOLDER.value) as name:
    path, target = write_release(Path(name) / "release", VARIANT.value), Path(name) / "target"
    size = path.stat().st_size / 1e6
    commands = {"univid_jax": ["-m", "tools.convert_weights", str(path.parent), str(target)]}
    if AGAINST.value:
      write_diffusers_config(path.parent / "diffusers", VARIANT.value)
      commands["diffusers"] = ["-m", "benchmarks.convert", f"--peer={path} {target}"]
    runs = {name: [] for name in ("copy", *commands)}
    for _ in range(PAIRS.value):
      runs["copy"].append((copy_and_sync(path), 0.0))
      for name, command in commands.items():
        runs[name].append(run(command, target))
  figures = {}
  for name in (*commands, "copy"):
    seconds, peaks = zip(*runs[name])
    median = statistics.median(seconds)
    figures[name] = {"median_s": round(median, 2), "mb_per_s": round(size / median), "peak_gib": round(max(peaks) / 1.0737, 2)}
    print(f"{name:<12}" + "   ".join(f"{key} {value:g}" for key, value in figures[name].items()))
  print_ratios({name: figures[name] for name in commands})
  write_json(OUT.value, {"variant": VARIANT.value, "dtype": "bfloat16", "mb": size, **figures})


if __name__ == "__main__":
  cli.run(main)
