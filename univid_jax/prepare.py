"""Makes data ready: python -m univid_jax.prepare --config=configs/video_tasks.py:PRESET --workdir=DIR [--config.KEY=VALUE]

Checks every row (a row that cannot be used ends in an exit code other than 0, or is left out with --allow_dropped), then computes
latents and prompt embeddings where they are not kept yet. `train` does the same by itself; run this first to see what is wrong
before an accelerator waits, or to have several processes share the work.
"""


from absl import flags
from ml_collections import config_flags

from univid_jax import cli
from univid_jax.parallel.processes import start_processes

CONFIG = config_flags.DEFINE_config_file("config", "configs/video_tasks.py", "Config file; :PRESET after it chooses a preset.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; runs/NAME by default.")
ALLOW_DROPPED = flags.DEFINE_bool("allow_dropped", False, "Go on without rows that cannot be used.")
PREVIEW = flags.DEFINE_integer("preview", 0, "Draw so many sentences into WORKDIR/preview.png, and stop there.", lower_bound=0)


def main() -> None:
  start_processes()
  # After the flags: --help and wrong flags answer at once, without waiting for JAX.
  from etils import epath

  from univid_jax import build
  from univid_jax.files import local_file
  from univid_jax.metrics.figures import contact_sheet
  from univid_jax.parallel.mesh import make_mesh
  from univid_jax.training.prepare import open_data, prepare

  config = CONFIG.value
  config.data.allow_dropped = config.data.allow_dropped or ALLOW_DROPPED.value
  build.check(config)
  workdir = WORKDIR.value or f"runs/{config.name}"
  data = open_data(config, workdir)
  if PREVIEW.value:
    preview = epath.Path(workdir) / "preview.png"
    with local_file(preview) as path:
      contact_sheet(path, [(name, source[index]) for index in range(PREVIEW.value) for name, source in data.sources.items()])
    print(f"the first sentences, as the model sees them: {preview}")
    return
  done = prepare(config, workdir, build.encoders(config, make_mesh(config.mesh)), data)
  if done.caches is None:
    print("nothing to compute beforehand: this model encodes clips as it trains")
  else:
    print(f"{done.num_clips} clips are ready ({done.num_encoded} encoded now) in {done.caches.latents.folder}; "
          f"{len(data.dropped)} rows dropped")


if __name__ == "__main__":
  cli.run(main)
