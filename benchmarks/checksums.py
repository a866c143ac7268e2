"""Loads a base of random weights with and without verifying checksums, each time from disk.

  python -m benchmarks.checksums [--variant=wan2.1-t2v-1.3b] [--pairs=5] [--folder=DIR] [--out=FILE.json]

Files are dropped from the page cache before each run, and the two kinds of runs alternate in one process. A run ends
when all arrays are on the devices.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.convert import write_release
from benchmarks.steps import find_variant
from benchmarks.timing import write_json
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags

FLAGS = CommandFlags(__doc__)
VARIANT = FLAGS.string("variant", "wan2.1-t2v-1.3b", "The published model whose shape the weights have.")
FOLDER = FLAGS.string("folder", None, "Folder for temporary files; default: the system's.")
PAIRS = FLAGS.integer("pairs", 5, "Timed runs of each kind.", lower_bound=1)
OUT = FLAGS.string("out", "", "File for the figures as JSON.")


def drop_from_page_cache(folder: Path) -> None:
  for path in folder.rglob("*"):
    if path.is_file():
      handle = os.open(path, os.O_RDONLY)
      os.fsync(handle)
      os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
      os.close(handle)


def load(folder: Path, *, verify: bool) -> dict[str, float]:
  """Returns the seconds that loading took, and the CPU seconds of all cores."""
  from univid_jax.inference.load import load_pipeline

  drop_from_page_cache(folder)
  started, used = time.perf_counter(), time.process_time()
  jax.block_until_ready(load_pipeline(str(folder), verify_weights=verify).experts.transformers[0].params)
  return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}


@app.command(FLAGS)
def main() -> None:
  from univid_jax.convert.commands import convert_any

  with tempfile.TemporaryDirectory(dir=FOLDER.value) as folder:
    base = Path(folder) / "base"
    release = write_release(Path(folder) / "release", find_variant(VARIANT.value))
    convert_any(str(release.parent), str(base))
    release.unlink()
    load(base, verify=True)  # warms up: imports and compiles
    runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for pair in range(PAIRS.value):
      for verify in (True, False) if pair % 2 else (False, True):
        runs[verify].append(load(base, verify=verify))
  for verify, values in runs.items():
    seconds = [value["seconds"] for value in values]
    print(
      f"{'with' if verify else 'without'} checksums: median {statistics.median(seconds):.2f} s, fastest "
      f"{min(seconds):.2f} s, {statistics.median(value['cpu_seconds'] for value in values):.2f} s of all cores"
    )
  write_json(OUT.value, {"with": runs[True], "without": runs[False]})


if __name__ == "__main__":
  sys.exit(main())
