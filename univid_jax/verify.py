"""Compares files with their checksums.

  python -m univid_jax.verify PATH [--write]

PATH is a workdir, a converted checkpoint (or `small`), a LoRA, a cache, or a folder that contains any of them. Every
damaged file is named. The exit code is 1 if one is damaged, or if checksums are missing. `train`, `prepare`, `sample`,
`evaluate`, `calibrate`, `demo` and `convert` verify what they load by themselves.
"""

import sys

from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags, UsageError
from univid_jax.core.errors import UserError
from univid_jax.core.text import count_noun

FLAGS = CommandFlags(__doc__, max_arguments=1)
WRITE = FLAGS.switch("write", False, "Add checksums to checkpoints and LoRA folders that have none.")


@app.command(FLAGS)
def main() -> None:
  if not FLAGS.arguments:
    raise UsageError("give a path: python -m univid_jax.verify PATH")
  from univid_jax.cli.verification import verify

  findings = []
  for found in verify(FLAGS.arguments[0], write=WRITE.value):
    print(found, flush=True)
    findings.append(found)
  damaged = sum(len(found.damaged) for found in findings)
  if damaged:
    raise UserError(f"{damaged} of {count_noun(sum(found.num_files for found in findings), 'file')} damaged")
  if any(found.is_unverified for found in findings):
    raise UserError("not everything has checksums; --write adds them")
  if not findings:
    raise UserError(f"nothing in {FLAGS.arguments[0]} carries checksums")


if __name__ == "__main__":
  sys.exit(main())
