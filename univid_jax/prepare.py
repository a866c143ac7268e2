"""Checks a data set and encodes it, so that training does not have to.

  python -m univid_jax.prepare --config=PRESET --workdir=DIR [--config.KEY=VALUE ...] [--preview=N]

Every row is checked; a row that cannot be used is an error, or is left out with --allow_dropped. Then whatever is not
cached yet is encoded: latents, prompts, and the conditions of I2V models. `train` does the same; run this first to find
problems before an accelerator waits, or to encode with several processes.
"""

import dataclasses
import sys

from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags

FLAGS = CommandFlags(__doc__)
CONFIG = FLAGS.config()
WORKDIR = FLAGS.workdir("Folder of the run")
PROCESSES = FLAGS.processes()
ALLOW_DROPPED = FLAGS.switch("allow_dropped", False, "Leave out rows that cannot be used.")
PREVIEW = FLAGS.integer("preview", 0, "Only draw this many sentences, to WORKDIR/preview.png.", lower_bound=0)


@app.command(FLAGS)
def main() -> None:
  from univid_jax.cli.compilation import enable_compilation_cache
  from univid_jax.cli.distributed import start_processes

  start_processes(PROCESSES)
  enable_compilation_cache()
  from univid_jax.checkpoints.model import open_encoders, transformer_config
  from univid_jax.cli.preview import draw_preview
  from univid_jax.data.features import FeatureCaches, FeatureMaker
  from univid_jax.data.prepare import prepare
  from univid_jax.data.sources.open import open_data
  from univid_jax.parallel.mesh import make_mesh

  config, workdir = CONFIG.value, WORKDIR.value
  if ALLOW_DROPPED.value:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, allow_dropped=True))
  data = open_data(config, workdir=workdir)
  data.report()
  data.require_usable(config.data)
  if PREVIEW.value:
    print(f"the first sentences, as the model sees them: {draw_preview(data, PREVIEW.value, workdir)}")
    return
  encoders = open_encoders(config, make_mesh(config.mesh))
  caches = FeatureCaches.open(config, encoders, workdir)
  if caches is None:
    print("nothing to encode in advance: without config.init_from, clips are encoded while training")
    return
  shape, task_names = transformer_config(config), data.task_names
  done = prepare(FeatureMaker(encoders, shape=shape, task_names=task_names, caches=caches), data)
  print(f"{done.num_clips} clips are ready ({done.num_encoded} encoded now); {len(data.dropped)} rows dropped")


if __name__ == "__main__":
  sys.exit(main())
