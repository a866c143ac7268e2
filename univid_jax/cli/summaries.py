"""What `train` prints when it is done."""

import shlex
from collections.abc import Mapping
from typing import Any

from univid_jax.checkpoints.run import read_run
from univid_jax.checkpoints.run_parts import open_base
from univid_jax.config.drawn import DrawnSentences
from univid_jax.config.schema import RunConfig
from univid_jax.core.program import spell_commands
from univid_jax.core.text import count_noun
from univid_jax.data.sources.computed import describe_held_out
from univid_jax.evaluation import exact
from univid_jax.evaluation.candidates import Candidate
from univid_jax.evaluation.report import describe_count
from univid_jax.training.loop import TrainResult, lora_exports

# What a prediction has to be better than.
BASELINES = (Candidate.COPY_B, Candidate.COPY_A2, Candidate.MEAN_A2)


def complete(config: RunConfig, workdir: str) -> str:
  """Says that there was nothing to do."""
  return f"{workdir} is complete ({config.num_steps} steps); see {workdir}/eval.json and {workdir}/grid.png"


def trained(result: TrainResult, config: RunConfig, workdir: str) -> str:
  """Says where the model is, after a run without evaluation."""
  lines = [f"{_steps(result)}; checkpoints and metrics: {workdir}"]
  folder = shlex.quote(workdir)
  if config.lora.enabled:
    files = ", ".join(f"{workdir}/{name}" for name in lora_exports(config))
    lines += (
      [f"LoRA: {files}"]
      if _has_own_base(config)
      else [
        f"LoRA for ComfyUI and diffusers: {files}; in other formats:",
        f"  python -m univid_jax.convert {folder} OUT.safetensors --to=diffusers|comfyui|musubi|univid",
      ]
    )
  clips = f"--clips=A.mp4,A2.mp4,B.mp4 --out=B2.mp4{_prompt_flag(config, workdir)}"
  return spell_commands("\n".join([*lines, "next:", f"  python -m univid_jax.sample --checkpoint={folder} {clips}"]))


def _prompt_flag(config: RunConfig, workdir: str) -> str:
  """Returns the flag without which a sentence would have another prompt than in training; "" if none is needed."""
  record = read_run(workdir)
  if record is not None and len({*record.prompts.values()} - {""}) > 1:
    return " --task=NAME"
  return " --prompt=TEXT" if DrawnSentences.from_config(config.data).lists_prompts else ""


def evaluated(result: TrainResult, report: Mapping[str, Any], config: RunConfig, workdir: str) -> str:
  """Summarizes the quick evaluation in ten lines.

  Args:
    result: of the run.
    report: the contents of eval.json.
    config: of the run.
    workdir: of the run.
  """
  failed = [
    name
    for name, scores in report["by_task"].items()
    if scores["psnr"] <= max(scores[key] for baseline in BASELINES if (key := f"psnr_{baseline}") in scores)
  ]
  lines = [
    f"{_steps(result)}. PSNR of B' on held-out sentences:",
    *([_scores("images", report["image"], report)] if report["image"] else []),
    _scores("all", report["overall"], report),
    *_few_pairs(report, config),
    *(f"  {text}" for text in filter(None, [describe_held_out(config.data)])),
    f"  no better than a baseline: {', '.join(failed)}" if failed else "  every task is better than its baselines",
    *(f"  {line}" for line in (exact.summary(report["exact"]) if "exact" in report else [])),
    f"pictures    {workdir}/grid.png (A | A' | B | B' predicted | B' true), {workdir}/loss.png",
    f"numbers     {workdir}/eval.json, {workdir}/metrics.jsonl, "
    f"tensorboard --logdir={shlex.quote(f'{workdir}/tensorboard')}",
    f"checkpoints {workdir}/checkpoints",
    *_next_steps(config, workdir),
  ]
  return spell_commands("\n".join(lines))


def _next_steps(config: RunConfig, workdir: str) -> list[str]:
  """Suggests what to do after the evaluation of a run."""
  folder = shlex.quote(workdir)
  sample = f"  python -m univid_jax.sample --checkpoint={folder} --clips=A.png,A2.png,B.png --out=B2.png"
  if config.lora.enabled:
    evaluate = f"  python -m univid_jax.evaluate --workdir={folder}"
    if _has_own_base(config):
      return ["next: sample from your own files, or evaluate with all metrics and controls:", sample, evaluate]
    return [
      "next: sample from your own files, evaluate with all metrics and controls, or export the LoRA:",
      sample,
      evaluate,
      f"  python -m univid_jax.convert {folder} OUT.safetensors --to=diffusers|comfyui|musubi|univid",
    ]
  other = "runs/mine" if workdir.rstrip("/") != "runs/mine" else "runs/other"
  return [
    "next: sample from your own files, or train on your own videos:",
    sample,
    f"  python -m univid_jax.train --config={config.name} --config.data.folder=DIR --workdir={other}",
  ]


def _has_own_base(config: RunConfig) -> bool:
  """Returns whether a LoRA is that of a base that this project trained, for which no other program has a use."""
  base = open_base(config)
  return base is None or base.info.codec is not None


def _steps(result: TrainResult) -> str:
  return f"{count_noun(result.steps_taken, 'step')} in {result.seconds:.0f} s"


def _few_pairs(report: Mapping[str, Any], config: RunConfig) -> list[str]:
  """Says how to evaluate on more pairs, if the sentences are variants of few."""
  is_few = 2 * report["held_out_pairs"] <= report["overall"]["count"]
  if not (is_few and config.data.pairs) or config.data.test_pairs:
    return []
  return ["  to evaluate on more pairs: --config.data.test_pairs=FOLDER, or hold out more with --config.data.held_out"]


def _scores(name: str, scores: Mapping[str, Any], report: Mapping[str, Any]) -> str:
  shown = {name: name.label for name in BASELINES} | {Candidate.SWAPPED: "swapped pair"}
  others = [f"{text} {scores[key]:5.1f}" for other, text in shown.items() if (key := f"psnr_{other}") in scores]
  return f"  {name:<9} {scores['psnr']:5.1f} dB   {'   '.join(others)}   ({describe_count(report, scores['count'])})"
