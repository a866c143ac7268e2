"""Evaluates a model on held-out sentences.

  python -m univid_jax.evaluate --workdir=DIR [--config=PRESET] [--config.KEY=VALUE ...] [--out=DIR]

Samples them with the model of the workdir (or with --checkpoint and --lora), with the right example pairs and with
altered ones, and writes report.md, report.json, grid.png, grid.webp (of videos), curves.png and the frames to OUT. The
config, by default that of the run in the workdir, determines the tasks, contexts, numbers of clips, prompts, seeds and
steps. Rerun the same command to resume; samples of other weights, configs or data are kept and not used.
"""

import logging
import shlex
import sys

from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags, UsageError
from univid_jax.core.text import count_noun

FLAGS = CommandFlags(__doc__)
CONFIG = FLAGS.config(of_run=True)
WORKDIR = FLAGS.workdir("The training run to evaluate")
CHECKPOINT_HELP = "A converted checkpoint to evaluate instead of the workdir's model; needs --config."
CHECKPOINT = FLAGS.path("checkpoint", None, CHECKPOINT_HELP)
LORA, LORA_SKIP_UNMATCHED = FLAGS.lora(), FLAGS.lora_skip_unmatched()
ACCELERATE = FLAGS.accelerate("Adds the row `accelerated` to the report: the prediction in few steps, with a")
STEP, VERIFICATION, OFFLOAD_INACTIVE = FLAGS.step(), FLAGS.run_verification(), FLAGS.offload_inactive()
QUANTIZE = FLAGS.quantize()
OUT = FLAGS.path("out", None, "Folder of the results; default: WORKDIR/evaluation.")
PROCESSES = FLAGS.processes()

log = logging.getLogger("univid_jax.evaluate")


@app.command(FLAGS, continues=True)
def main() -> None:
  if CHECKPOINT.value and not CONFIG.is_given:
    raise UsageError("--checkpoint needs --config, which says what to evaluate on; the bases' own are their presets")
  if not (LORA.value or ACCELERATE.value):
    FLAGS.refuse("no LoRA is added to the model", [LORA_SKIP_UNMATCHED.name])
  from univid_jax.checkpoints.run import require_run
  from univid_jax.cli.compilation import enable_compilation_cache
  from univid_jax.cli.distributed import start_processes

  record = None if CHECKPOINT.value else require_run(WORKDIR.value)  # before its folder is locked, which creates it
  start_processes(PROCESSES, writes=OUT.value or f"{WORKDIR.value}/evaluation")
  enable_compilation_cache()
  import jax

  from univid_jax.checkpoints.experts import split_loras
  from univid_jax.cli.evaluated_config import describe_config_differences, describe_ignored_overrides
  from univid_jax.cli.loading import load_model
  from univid_jax.data.fingerprint import check_not_trained
  from univid_jax.data.sources.open import open_data
  from univid_jax.evaluation import exact
  from univid_jax.evaluation.run import evaluate
  from univid_jax.inference.distillation_loras import add_distillation, read_distillation

  config, workdir = CONFIG.value, WORKDIR.value
  if record is not None and CONFIG.is_given and jax.process_index() == 0:
    named = {"name": FLAGS.config_name, "workdir": workdir, "overrides": FLAGS.config_overrides}
    if line := describe_config_differences(config, record.config, **named):
      log.warning("%s", line)
  if (line := describe_ignored_overrides(FLAGS.config_overrides)) and jax.process_index() == 0:
    log.warning("%s", line)
  data = open_data(config)
  if not CHECKPOINT.value:
    check_not_trained(workdir, data.held_out, allowed=config.data.allow_changed)
  folder = OUT.value or f"{workdir}/evaluation"
  loras = split_loras(LORA.value)
  verify = VERIFICATION.verify_weights
  distillation = read_distillation(ACCELERATE.value, verify=verify) if ACCELERATE.value else None
  skip = LORA_SKIP_UNMATCHED.value
  pipeline, origin = load_model(
    CHECKPOINT.value or workdir,
    step=STEP.value,
    loras=loras,
    distillation=distillation,
    quantize=QUANTIZE.value,
    verification=VERIFICATION.value,
    lora_skip_unmatched=skip,
    offload_inactive=OFFLOAD_INACTIVE.value,
  )
  command = f"`python -m univid_jax.evaluate {shlex.join(FLAGS.argv[1:])}`"
  accelerated = distillation and add_distillation(pipeline, distillation, skip_unmatched=skip)
  report = evaluate(pipeline, config, data=data, folder=folder, origin=origin, command=command, accelerated=accelerated)
  if report is None:  # not process 0
    return
  for name, scores in report["overall"].items():
    print(f"  {name:<10} PSNR {scores['psnr']:5.1f} dB   RMSE {scores['rmse']:6.2f}")
  for line in exact.summary(report["exact"]) if report["exact"] else []:
    print(f"  {line}")
  print(f"{count_noun(len(report['sentences']), 'sentence')}: {folder}/report.md, report.json, pictures")


if __name__ == "__main__":
  sys.exit(main())
