"""Trains a model: python -m univid_jax.train --config=configs/video_tasks.py[:PRESET] --workdir=DIR [--config.KEY=VALUE]

Run again with the same workdir, it goes on where it was. At the end it evaluates on held-out photographs.
"""

import gc
import json

from absl import flags
from ml_collections import config_flags

from univid_jax import cli
from univid_jax.compilation import keep_programs, uncollected
from univid_jax.parallel.processes import start_processes

CONFIG = config_flags.DEFINE_config_file("config", "configs/video_tasks.py", "Config file; :PRESET after it chooses a preset.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints and results; runs/NAME by default.")

# Examples of each task and context that grid.png shows.
GRID_EXAMPLES = 1


def main() -> None:
  # After the flags: --help and wrong flags answer at once, without waiting for JAX.
  with uncollected():
    start_processes()
    programs = keep_programs()
    from etils import epath

    from univid_jax.evaluation import evaluate
    from univid_jax.files import local_file
    from univid_jax.metrics.figures import sentence_grid
    from univid_jax.training.loop import LORA_EXPORT, Interrupted, train
  gc.freeze()  # modules stay; no need to look through them ever again

  config = CONFIG.value
  workdir = WORKDIR.value or f"runs/{config.name}"
  try:
    result = train(config, workdir, traces=programs)
  except (Interrupted, FloatingPointError) as error:
    raise cli.UserError(error) from error
  import jax
  if jax.process_index() > 0:
    return
  folder = epath.Path(workdir)
  if result.steps_taken == 0 and (folder / "eval.json").exists():
    print(f"{workdir} is complete ({config.num_steps} steps); results stand in {folder / 'eval.json'} and {folder / 'grid.png'}")
    return

  if not config.eval.sentences_per_case or jax.process_count() > 1:
    print(f"{result.steps_taken} steps in {result.seconds:.0f} s; checkpoints and numbers stand in {workdir}")
    if config.lora.rank:
      print(f"the LoRA, as ComfyUI and diffusers read it: {folder / LORA_EXPORT}; other formats:\n"
            f"  python -m tools.convert_weights {workdir} OUT.safetensors --to=diffusers|comfyui|musubi|univid")
    print(f"next: python -m univid_jax.sample --checkpoint={workdir} --clips=A.mp4,A2.mp4,B.mp4 --out=B2.mp4")
    return
  print("evaluating on held-out photographs ...")
  report, examples = evaluate(result.pipeline)
  shown: dict[tuple[str, str], int] = {}
  rows = []
  for example in examples:
    case = example.sentence.task, example.sentence.context
    shown[case] = shown.get(case, 0) + 1
    if shown[case] <= GRID_EXAMPLES:
      *context, truth = example.sentence.clips
      label = f"{case[0].replace('_', ' ')}\ncontext {case[1]}\n{example.scores['psnr']:.1f} dB"
      rows.append((label, (*context[-3:], example.painted, truth)))
  with local_file(folder / "grid.png") as path:
    sentence_grid(path, rows)
  (folder / "eval.json").write_text(json.dumps(report, indent=2) + "\n")
  print(summary(report, workdir, result.steps_taken, result.seconds))


def summary(report: dict, workdir: str, steps: int, seconds: float) -> str:
  """Ten lines for the terminal."""
  def line(name, m):
    return (f"  {name:<9} {m['psnr']:5.1f} dB   copy of B {m['psnr_copy_b']:5.1f}   mean of A' {m['psnr_mean_a2']:5.1f}   "
            f"swapped pair {m['psnr_swapped']:5.1f}   ({m['count']} sentences)")

  worse = [name for name, m in report["by_task"].items() if m["psnr"] <= max(m["psnr_copy_b"], m["psnr_mean_a2"])]
  rows = [
      f"{steps} steps in {seconds:.0f} s. PSNR of B' on photographs that the model never saw:",
      line("images", report["image"]) if report["image"] else None,
      line("all", report["overall"]),
      f"  no better than a baseline: {', '.join(worse) if worse else 'none of the tasks'}",
      f"pictures    {workdir}/grid.png (A | A' | B | B' predicted | B' true), {workdir}/loss.png",
      f"numbers     {workdir}/eval.json, {workdir}/metrics.jsonl, tensorboard --logdir={workdir}/tensorboard",
      f"checkpoints {workdir}/checkpoints",
      "next: paint your own files, or train on your own videos:",
      f"  python -m univid_jax.sample --checkpoint={workdir} --clips=A.png,A2.png,B.png --out=B2.png",
      "  python -m univid_jax.train --config=configs/video_tasks.py --config.data.folder=DIR --workdir=runs/mine",
  ]
  return "\n".join(row for row in rows if row is not None)


if __name__ == "__main__":
  cli.run(main)
