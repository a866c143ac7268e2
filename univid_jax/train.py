"""Trains a model, and evaluates it on held-out data.

  python -m univid_jax.train [--config=PRESET] [--workdir=DIR] [--config.KEY=VALUE ...]

The workdir gets checkpoints, metrics.jsonl, loss.png, previews and TensorBoard events, and after the evaluation
grid.png and eval.json. Rerun the same command to resume bit-exactly.
"""

import sys

from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags

FLAGS = CommandFlags(__doc__)
CONFIG = FLAGS.config()
WORKDIR = FLAGS.workdir("Folder of the run")
PROFILE = FLAGS.profile("WORKDIR/profile")
VERIFICATION = FLAGS.run_verification()
PROCESSES = FLAGS.processes()


@app.command(FLAGS, continues=True)
def main() -> None:
  # JAX is imported after the flags are parsed, so that --help and wrong flags are answered at once.
  from univid_jax.cli.compilation import enable_compilation_cache
  from univid_jax.cli.distributed import start_processes

  start_processes(PROCESSES, writes=WORKDIR.value)
  enable_compilation_cache()
  import jax

  from univid_jax.cli import summaries
  from univid_jax.evaluation.run import evaluate_quick, is_evaluated
  from univid_jax.training.loop import train

  config, workdir = CONFIG.value, WORKDIR.value
  result = train(config, workdir, profile_steps=PROFILE.value, **VERIFICATION.value)
  if jax.process_index() > 0:
    return
  if result.steps_taken == 0 and is_evaluated(config, workdir):
    print(summaries.complete(config, workdir))
  elif not config.eval.sentences_per_case or jax.process_count() > 1:
    print(summaries.trained(result, config, workdir))
  else:
    report = evaluate_quick(result.pipeline, config, workdir)
    print(
      summaries.evaluated(result, report, config, workdir) if report else summaries.trained(result, config, workdir)
    )


if __name__ == "__main__":
  sys.exit(main())
