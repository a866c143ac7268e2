"""Converts random weights of a published size: rate and memory, against a copy of the same bytes and diffusers.

  python -m benchmarks.convert [--against=torch] [--variant=wan2.1-t2v-1.3b] [--pairs=5] [--folder=DIR]
      [--out=FILE.json]

The peer reads the same file with WanTransformer3DModel.from_single_file and writes it with save_pretrained. Both are
whole commands, run in turn, that end when everything is on disk. Memory is the process's anonymous memory: pages of
mapped files, which the system can reclaim, do not count.
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
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.steps import diffusers_options, find_variant
from benchmarks.timing import Figures, print_ratios, write_json
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.core.errors import UserError
from univid_jax.models.variants import DiTConfig

FLAGS = CommandFlags(__doc__)
AGAINST = FLAGS.strings("against", [], "Peers: torch.")
VARIANT = FLAGS.string("variant", "wan2.1-t2v-1.3b", "The published model whose shape the weights have.")
FOLDER = FLAGS.string("folder", None, "Folder for temporary files; default: the system's.")
PAIRS = FLAGS.integer("pairs", 5, "Timed runs of each program.", lower_bound=1)
OUT = FLAGS.string("out", "", "File for the figures as JSON.")
PEER = FLAGS.string("peer", "", "FILE TARGET: runs the peer's command; used internally.")


def write_release(folder: Path, config: DiTConfig) -> Path:
  """Writes a transformer with random bfloat16 weights in the official layout, tensor by tensor; returns its file."""
  from univid_jax.convert.layout import make_fills
  from univid_jax.convert.release_configs import official_config

  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(official_config(config)))
  tensors = {name: fill.original_shape for fill in make_fills("transformer", config) for name in fill.names}
  header: dict[str, Any] = {}
  offset = 0
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


def write_diffusers_config(folder: Path, config: DiTConfig) -> None:
  """Writes the config that from_single_file would otherwise download."""
  folder.mkdir()
  values = {"_class_name": "WanTransformer3DModel", **diffusers_options(config)}
  (folder / "config.json").write_text(json.dumps(values))


def convert_with_diffusers(file: str, target: str) -> None:
  """Runs the peer's command."""
  import diffusers
  import torch

  folder = str(Path(file).parent / "diffusers")
  kind = diffusers.WanTransformer3DModel  # pyright: ignore[reportPrivateImportUsage]  # exported lazily
  kind.from_single_file(file, config=folder, torch_dtype=torch.bfloat16).save_pretrained(target)


def time_copy(path: Path) -> float:
  """Returns the seconds until a copy of a file is on disk."""
  target, start = path.with_suffix(".copy"), time.perf_counter()
  with path.open("rb") as source, target.open("wb") as file:
    shutil.copyfileobj(source, file, 16 << 20)
    file.flush()
    os.fsync(file.fileno())
  seconds = time.perf_counter() - start
  target.unlink()
  return seconds


def time_command(command: Sequence[str], target: Path) -> tuple[float, float]:
  """Returns the seconds until everything that a command wrote is on disk, and its peak anonymous memory in GB."""
  start = time.perf_counter()
  process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
  peak = 0
  while process.poll() is None:
    try:
      status = Path(f"/proc/{process.pid}/status").read_text()
      peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
    except OSError:  # the process has just ended
      pass
    time.sleep(0.01)
  if process.returncode:
    raise UserError(f"the conversion failed: {' '.join(command)}")
  os.sync()
  seconds = time.perf_counter() - start
  shutil.rmtree(target)
  return seconds, peak * 1024 / 1e9


@app.command(FLAGS)
def main() -> None:
  if PEER.value:
    convert_with_diffusers(*PEER.value.split())
    return
  if set(AGAINST.value) - {"torch"}:
    raise UserError(f"--against must be torch, got {','.join(AGAINST.value)!r}")
  config = find_variant(VARIANT.value)
  with tempfile.TemporaryDirectory(dir=FOLDER.value) as folder:
    path, target = write_release(Path(folder) / "release", config), Path(folder) / "target"
    size = path.stat().st_size / 1e6
    commands = {"univid_jax": ["-m", "univid_jax.convert", str(path.parent), str(target)]}
    if AGAINST.value:
      write_diffusers_config(path.parent / "diffusers", config)
      commands["diffusers"] = ["-m", "benchmarks.convert", f"--peer={path} {target}"]
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in (*commands, "copy")}
    for _ in range(PAIRS.value):
      runs["copy"].append((time_copy(path), 0.0))
      for name, command in commands.items():
        runs[name].append(time_command(command, target))
  figures: dict[str, Figures] = {}
  for name, results in runs.items():
    seconds, peaks = zip(*results)
    median = statistics.median(seconds)
    peak = round(max(peaks) / 1.0737, 2)
    figures[name] = {"median_s": round(median, 2), "mb_per_s": round(size / median), "peak_gib": peak}
    print(f"{name:<12}" + "   ".join(f"{key} {value:g}" for key, value in figures[name].items()))
  print_ratios({name: figures[name] for name in commands})
  write_json(OUT.value, {"variant": VARIANT.value, "dtype": "bfloat16", "mb": size, **figures})


if __name__ == "__main__":
  sys.exit(main())
