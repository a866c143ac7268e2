"""Checks a data set and encodes it, so that training does not have to.

  python -m univid_jax.prepare --config=PRESET --workdir=DIR [--config.KEY=VALUE ...] [--preview=N]

Every clip that training reads is decoded, and every sentence must fit into a row; a record that cannot be used is an
error, or is left out with --allow_dropped. With a base, whatever is not cached yet is encoded: latents, prompts, and
the conditions of I2V models. `train` encodes too; run this first to find problems before you occupy an accelerator, or
to encode with several processes. --quick only looks at the headers of files. --pack packs what is cached into shards: a
few large files instead of one per clip.
"""

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING

from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags, UsageError
from univid_jax.core.text import count_noun, is_or_are

if TYPE_CHECKING:
  from univid_jax.config.schema import RunConfig
  from univid_jax.data.sources.open import DataSources

FLAGS = CommandFlags(__doc__)
CONFIG = FLAGS.config()
WORKDIR = FLAGS.workdir("Folder of the run")
PROCESSES = FLAGS.processes()
ALLOW_DROPPED = FLAGS.switch("allow_dropped", False, "Leave out records that cannot be used.")
QUICK = FLAGS.switch("quick", False, "Only look at the headers of files: decode and encode nothing.")
VERIFICATION = FLAGS.verification()
PREVIEW_HELP = "Only draw this many sentences, of all kinds of data and tasks in turn, to WORKDIR/preview.png."
PREVIEW = FLAGS.integer("preview", 0, PREVIEW_HELP, lower_bound=0)
PACK = FLAGS.switch("pack", False, "Pack the caches into shards afterwards, which are read before single files.")
REMOVE_FILES = FLAGS.switch("remove_files", False, "With --pack: remove each file that can be read back from a shard.")


@app.command(FLAGS, continues=True)
def main() -> None:
  from univid_jax.cli.compilation import enable_compilation_cache
  from univid_jax.cli.distributed import start_processes

  if REMOVE_FILES.value and not PACK.value:
    raise UsageError("--remove_files needs --pack")
  if PACK.value and (QUICK.value or PREVIEW.value):
    raise UsageError("--pack packs what is encoded; --quick and --preview encode nothing")
  if QUICK.value and PREVIEW.value:
    raise UsageError("--preview only draws sentences and --quick only checks headers: give one of them")
  start_processes(PROCESSES)
  enable_compilation_cache()
  import jax

  from univid_jax.cli.preview import draw_preview
  from univid_jax.data.sources.open import open_data
  from univid_jax.training.setup import check_config

  config, workdir = CONFIG.value, WORKDIR.value
  if ALLOW_DROPPED.value:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, allow_dropped=True))
  if not PREVIEW.value and not QUICK.value:
    config = check_config(config)  # before the files of the data are opened
  data = open_data(config)
  is_first = jax.process_index() == 0
  if is_first:  # it warns of what all processes see
    data.report(config.data)
  data.require_usable(config.data)
  if not PREVIEW.value and not QUICK.value:
    lines = encode(config, data, workdir)
  elif is_first and PREVIEW.value:
    lines = [f"sentences of all tasks in turn, as the model sees them: {draw_preview(data, PREVIEW.value, workdir)}"]
  else:
    unchecked = "frames, and the fit of sentences into rows"
    lines = [f"headers checked, {count_noun(len(data.dropped), 'record')} dropped; not checked: {unchecked}"]
  if is_first:
    print(*lines, sep="\n")


def encode(config: "RunConfig", data: "DataSources", workdir: str) -> list[str]:
  """Fills the caches of a run, and packs them with --pack; returns lines that say what was done."""
  import jax

  from univid_jax.checkpoints.built_in import locate
  from univid_jax.checkpoints.checksums import verified
  from univid_jax.checkpoints.run_parts import open_encoders
  from univid_jax.core.errors import UserError
  from univid_jax.core.lock import hold
  from univid_jax.data.cache.shard_writer import pack_caches, repair_indices
  from univid_jax.data.features import caches_folder
  from univid_jax.parallel.mesh import make_mesh
  from univid_jax.runtime.processes import count_distinct, sum_over_processes
  from univid_jax.training.setup import fill_caches, open_features
  from univid_jax.training.validation import select_sentences

  with verified(config.init_from and locate(config.init_from), enabled=VERIFICATION.verify_weights):
    encoders = open_encoders(config, make_mesh(config.mesh))
  if PACK.value and not encoders.has_weights:
    raise UserError("--pack needs a base (config.init_from): without encoders nothing is cached")
  folder = caches_folder(config, workdir)
  with hold(folder, process=jax.process_index()) if PACK.value else contextlib.nullcontext():
    if PACK.value:
      repair_indices(folder)
    features = open_features(config, encoders, data, workdir)
    validation = select_sentences(data, config) if config.validation.every_steps else []
    done = fill_caches(config, features, data, validation, verify=True)
    packed = [pack_caches(folder, remove_files=REMOVE_FILES.value)] if PACK.value else []
  num_dropped = len(data.dropped) + count_distinct(each.reason for each in done.dropped)
  num_encoded = sum_over_processes(done.num_encoded)
  if features.caches is None:
    if not done.num_clips and not num_dropped:
      return ["the data is computed while training: there is nothing to prepare"]
    clips = count_noun(done.num_clips, "different clip")
    return [f"{clips} can be read, {count_noun(num_dropped, 'record')} dropped; they are encoded while training"]
  clips = f"{count_noun(done.num_clips, 'different clip')} {is_or_are(done.num_clips)}"
  line = f"{clips} ready ({num_encoded} encoded now), {count_noun(num_dropped, 'record')} dropped"
  return [line, *map(str, packed)]


if __name__ == "__main__":
  sys.exit(main())
