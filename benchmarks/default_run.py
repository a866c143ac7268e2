"""Steps per second of the default run (`configs/video_tasks.py`), without validation and evaluation.

python -m benchmarks.default_run [--steps=400] [--out=FILE]
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import write_json
from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.core.errors import UserError

FLAGS = CommandFlags(__doc__)
STEPS = FLAGS.integer("steps", 400, "Steps of training; the last quarter is measured.", lower_bound=4)
OUT = FLAGS.string("out", "", "File for the figures as JSON.")


@app.command(FLAGS)
def main() -> None:
  with tempfile.TemporaryDirectory() as workdir:
    values = {
      "num_steps": STEPS.value,
      "log_every": STEPS.value // 4,
      "validation.every_steps": 0,
      "eval.sentences_per_case": 0,
    }
    settings = [f"--config.{key}={value}" for key, value in values.items()]
    command = ["-m", "univid_jax.train", "--config=configs/video_tasks.py", f"--workdir={workdir}", *settings]
    start = time.monotonic()
    if code := subprocess.run([sys.executable, *command]).returncode:
      raise UserError(f"training ended with {code}")
    total = time.monotonic() - start
    last = json.loads((Path(workdir) / "metrics.jsonl").read_text().splitlines()[-1])
  figures = {
    "steps per second": 1 / last["step_time"],
    "tokens per second": last["tokens_per_second"],
    "total seconds": total,
  }
  print("   ".join(f"{name} {value:.4g}" for name, value in figures.items()))
  write_json(OUT.value, {"steps": STEPS.value, "figures": figures})


if __name__ == "__main__":
  sys.exit(main())
