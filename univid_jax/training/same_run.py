"""Checks that a workdir belongs to a config and its data, so that a run is resumed as it was started."""

import logging
import os

import jax

from univid_jax.checkpoints.built_in import locate
from univid_jax.checkpoints.run import RunRecord, has_checkpoint
from univid_jax.config.boundary import differences
from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import UserError
from univid_jax.core.text import count_noun
from univid_jax.data.fingerprint import (
  describe_changes,
  find_shared,
  fingerprint,
  read_fingerprint,
  remember_trained,
  write_fingerprint,
)
from univid_jax.data.sources.open import DataSources

log = logging.getLogger(__name__)

# Keys that may change when a run is resumed: how long, how often and where things run.
MAY_CHANGE = (
  "num_steps",
  "log_every",
  "checkpoint.",
  "mesh.",
  "rows.microbatches",
  "model.remat",
  "base.offload",
  "model.attention_backend",
  "eval.",
  "validation.",
  "data.allow_",
  "data.num_threads",
  "data.cache",
)

# Paths of data, which may change if the contents are on record, since `check_same_data` compares these.
MAY_MOVE = (
  "data.folder",
  "data.test_folder",
  "data.pairs",
  "data.test_pairs",
  "data.metadata",
  "data.manifest",
  "data.arc.path",
  "data.arc.test_path",
  "data.tfds.data_dir",
)


def check_same_data(workdir: str, data: DataSources, config: RunConfig) -> None:
  """Records the contents of a run's data, and checks that they are those that the run started with.

  Raises:
    UserError: the data has changed, and the config does not allow that.
  """
  stored, now = read_fingerprint(workdir), fingerprint(data.sources, data.held_out)
  if stored and has_checkpoint(workdir):
    if changes := describe_changes(stored, now):
      if not config.data.allow_changed:
        raise UserError(
          f"the data of {workdir} has changed since the run started: {'; '.join(changes)}; restore it, use another "
          "--workdir, or continue on the changed data with --config.data.allow_changed=True"
        )
      for change in changes:
        log.warning("the data of %s has changed: %s", workdir, change)
    now = remember_trained(stored, now)
  if shared := find_shared(now, now):
    log.warning(
      "training sees %s of what is held out, such as %s: validation and evaluation say little about unseen ones",
      count_noun(len(shared), "record"),
      shared[0],
    )
  if jax.process_index() == 0 and stored != now:
    write_fingerprint(workdir, now)


def check_same_run(workdir: str, previous: RunRecord, current: RunRecord) -> None:
  """Raises UserError, naming the first key that differs, if a workdir belongs to another config."""
  different = list(differences(previous.config, current.config))
  for key, before, after in different:
    if key in ("validation.sentences", "validation.sigmas"):
      log.warning(
        "%s = %s instead of %s: validation losses are not comparable with earlier ones, by which --step=best chooses",
        key,
        after,
        before,
      )
  has_records = read_fingerprint(workdir) is not None
  has_same_base = bool(previous.base_contents) and previous.base_contents == current.base_contents
  moved = [
    (key, before, after)
    for key, before, after in different
    if (key == "init_from" and (has_same_base or _is_same_place(before, after)))
    or (key in MAY_MOVE and has_records and before and after)
  ]
  changes = [change for change in different if change not in moved and not change[0].startswith(MAY_CHANGE)]
  if previous.base != current.base:
    changes.append(("the checksum of init_from", *map(" and ".join, (previous.base, current.base))))
  if changes:
    key, before, after = changes[0]
    raise UserError(
      f"{workdir} is a run with {key} = {before!r}, not {after!r}: use the same config or another --workdir"
    )
  for key, before, after in moved:
    log.info("%s was %s, is %s now", key, before, after)


def _is_same_place(a: str, b: str) -> bool:
  """Returns whether two names of a base refer to the same folder."""
  return bool(a and b) and os.path.realpath(locate(a)) == os.path.realpath(locate(b))
