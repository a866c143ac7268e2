"""A command like train, without training: `python -m tests.loop_command --workdir=DIR --mode=MODE ...`.

It takes steps of 50 ms and writes the number of each to DIR/steps-PROCESS; after a stop, the number it has stopped at.
"""

import atexit
import hashlib
import signal
import sys
import time
from pathlib import Path

from univid_jax.cli import app
from univid_jax.cli.distributed import start_processes
from univid_jax.cli.flags import CommandFlags
from univid_jax.core.errors import UserError
from univid_jax.runtime import main_thread, supervisor

FLAGS = CommandFlags(__doc__)
CONFIG = FLAGS.config()
WORKDIR = FLAGS.workdir("Folder")
PROCESSES = FLAGS.processes()
MODE = FLAGS.string("mode", "loop", "What to do.")
STEPS = FLAGS.integer("steps", 10_000, "How many steps to take.")

main_thread.NOTICE = 1.0


class Destructor:
  """Python ignores exceptions in its destructor."""

  def __del__(self):
    say("ready")
    time.sleep(1)


@app.command(FLAGS, continues=True)
def main() -> None:
  start_processes(PROCESSES, writes=WORKDIR.value)
  mode = MODE.value
  if mode == "loop":
    take_steps()
  elif mode == "fail":
    if PROCESSES.process_id.value:
      raise UserError("the second process cannot go on")
    time.sleep(60)
  elif mode == "python":
    say("ready")
    time.sleep(60)
  elif mode == "compile":  # no Python for a minute, and system calls are not interrupted either
    say("ready")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)
  elif mode == "destructor":
    Destructor()
    time.sleep(60)
  elif mode == "exit":
    atexit.register(signal.raise_signal, signal.SIGTERM)


def say(text: str) -> None:
  print(text, flush=True)


def take_steps() -> None:
  path = Path(WORKDIR.value) / f"steps-{PROCESSES.process_id.value or 0}"
  path.parent.mkdir(parents=True, exist_ok=True)
  with supervisor.supervise() as running, running.stepping():
    say("ready")
    for step in range(1, STEPS.value + 1):
      time.sleep(0.05)
      path.write_text(str(step))
      if running.should_stop():
        assert running.stop_signal
        raise running.stop_signal.interrupt(f" at step {step}")


if __name__ == "__main__":
  sys.exit(main())
