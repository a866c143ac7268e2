"""How good a model is: python -m univid_jax.evaluate --config=configs/video_tasks.py[:PRESET] --workdir=DIR [--config.KEY=VALUE]

Paints held-out sentences of the config's data with the model of the workdir (or of --checkpoint and --lora), with the right and
with wrong example pairs, and writes report.md, report.json, grid.png and curves.png beside the frames to OUT. What is compared is
the config's: tasks, contexts, numbers of clips, prompts, seeds, steps. Stopped and run again, it goes on where it was.
"""

import json
import sys

from absl import flags
from ml_collections import config_flags

from univid_jax import cli
from univid_jax.compilation import keep_programs
from univid_jax.parallel.processes import start_processes

CONFIG = config_flags.DEFINE_config_file("config", "configs/video_tasks.py", "Config file; :PRESET after it chooses a preset.")
WORKDIR = flags.DEFINE_string("workdir", None, "The training run to evaluate; runs/NAME by default.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A converted checkpoint to evaluate instead of the workdir's model.")
LORA = flags.DEFINE_list("lora", [], "LoRA files on top.")
STEP = flags.DEFINE_string("step", None, "Of the workdir's checkpoints: a number, or best; the latest by default.")
OUT = flags.DEFINE_string("out", None, "Folder of the results; WORKDIR/evaluation by default.")

# Keys of config.eval that change no picture: the report is made again with others from the same files.
SCORING = ("depth_alignment", "palette", "num_labels", "void_label", "clip_model")


def main() -> None:
  start_processes()
  keep_programs()
  import jax
  from etils import epath
  from jax.experimental import multihost_utils

  import univid_jax
  from univid_jax import build
  from univid_jax.parallel.mesh import make_mesh
  from univid_jax.pipeline import load_pipeline
  from univid_jax.report import make_report
  from univid_jax.study import paint, study_sentences

  config = json.loads(CONFIG.value.to_json())
  build.check(config)
  build.task_kinds(config)
  workdir = WORKDIR.value or f"runs/{config['name']}"
  folder = epath.Path(OUT.value or f"{workdir}/evaluation")
  # Each process has the model on its own devices and its own share of the sentences.
  mesh = make_mesh({"data": 1, "fsdp": -1}, jax.local_devices())
  pipeline = load_pipeline(CHECKPOINT.value or workdir, lora=LORA.value, mesh=mesh, step=STEP.value)
  sentences = study_sentences(config, build.data_sources(config, workdir))
  folder.mkdir(parents=True, exist_ok=True)
  painting = {name: value for name, value in config["eval"].items() if name not in SCORING}
  protocol = {"config": {"data": config["data"], "eval": painting}, "checkpoint": CHECKPOINT.value or workdir,
              "lora": LORA.value, "step": STEP.value, "version": univid_jax.__version__}
  protocol = json.loads(json.dumps(protocol, default=list))
  kept = folder / "protocol.json"
  if kept.exists() and json.loads(kept.read_text()) != protocol:
    raise cli.UserError(f"{folder} holds an evaluation of another model or config: give another --out, or delete it")
  if jax.process_index() == 0:
    kept.write_text(json.dumps(protocol, indent=2) + "\n")
  paint(pipeline, config, sentences, folder)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("painted")
  if jax.process_index() > 0:
    return
  command = "`python -m univid_jax.evaluate " + " ".join(sys.argv[1:]) + "`"
  del protocol["config"]
  report = make_report(folder, len(sentences), config, {"command": command, **protocol})
  for name, rows in report["overall"].items():
    print(f"  {name:<9} PSNR {rows['psnr']:5.1f} dB   RMSE {rows['rmse']:6.2f}")
  print(f"{len(sentences)} sentences: {folder / 'report.md'}, report.json, grid.png, curves.png")


if __name__ == "__main__":
  cli.run(main)
