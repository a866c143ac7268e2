"""The checkpoints and the config of a run, in its workdir."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from univid_jax.checkpoints.built_in import BUILT_IN
from univid_jax.checkpoints.checksums import write_checksums
from univid_jax.checkpoints.info import CHECKPOINT_FILE
from univid_jax.checkpoints.mistaken import describe_mistaken
from univid_jax.checkpoints.orbax_files import read_positions, restore_items, silence_orbax
from univid_jax.checkpoints.saved import DELETED_FOLDER, SavedCheckpoints
from univid_jax.config.boundary import from_json, to_json
from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import UserError, first_line
from univid_jax.core.json_files import parse_json_object, write_json
from univid_jax.core.options import OnDamaged
from univid_jax.core.paths import exists, read_bytes, to_path
from univid_jax.core.protocols import Resumable
from univid_jax.runtime.processes import wait_for_processes

CONFIG_FILE = "config.json"
# The entry for the config's section `base`, since the entry of that name is the base's checksum.
OPTIONS_OF_BASE = "base_options"


@dataclasses.dataclass(frozen=True)
class RunRecord:
  """What WORKDIR/config.json stores.

  Attributes:
    config: of the run.
    base: checksum of each transformer that training starts from, see `base_checksums`; the file joins them with commas.
    version: version of univid_jax that started or last resumed the run.
    prompts: prompts of the tasks, as the run trains them; tasks whose records have prompts of their own are missing.
    base_contents: checksums of everything in the base, which identify it at any path; {} without a base, and for runs
      of version 0.1.
    adapts_clips: whether any of its clips are brought to one of the config's sizes, cropped or padded.
  """

  config: RunConfig
  base: tuple[str, ...]
  version: str
  prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  base_contents: Mapping[str, str] = dataclasses.field(default_factory=dict)
  adapts_clips: bool = True


def write_run(workdir: epath.PathLike, record: RunRecord) -> None:
  """Writes WORKDIR/config.json."""
  config = to_json(record.config)
  values = {**config, "base": ",".join(record.base), OPTIONS_OF_BASE: config["base"], "version": record.version}
  values |= {"prompts": dict(record.prompts), "base_contents": dict(record.base_contents)}
  values |= {"adapts_clips": record.adapts_clips}
  write_json(epath.Path(workdir) / CONFIG_FILE, values)


def read_run(workdir: epath.PathLike) -> RunRecord | None:
  """Reads WORKDIR/config.json; returns None if there is none, or if it is not a run's.

  Raises:
    UserError: it is damaged, or has keys that this version does not know.
  """
  path = to_path(workdir) / CONFIG_FILE
  if not exists(path):
    return None
  values = parse_json_object(read_bytes(path), source=path)
  if not {"model", "data", "rows"} <= values.keys():
    return None  # it describes something else, for example an official release
  try:
    base, version = values.pop("base", ""), values.pop("version", "unknown")
    prompts, contents = values.pop("prompts", {}), values.pop("base_contents", {})
    adapts_clips = values.pop("adapts_clips", True)
    if not all(isinstance(text, str) for text in (base, version)):
      raise ValueError("base and version must be text")
    if not all(isinstance(each, dict) for each in (prompts, contents)) or not isinstance(adapts_clips, bool):
      raise ValueError("prompts and base_contents must be objects, adapts_clips true or false")
    if OPTIONS_OF_BASE in values:
      values["base"] = values.pop(OPTIONS_OF_BASE)
    return RunRecord(from_json(values), tuple(base.split(",")), version, prompts, contents, adapts_clips)
  except ValueError as error:
    raise UserError(f"{path} cannot be read by this version: {error}") from error


def require_run(workdir: epath.PathLike) -> RunRecord:
  """Reads WORKDIR/config.json.

  Raises:
    FileNotFoundError: there is none.
    UserError: it is damaged, or has keys that this version does not know.
  """
  record = read_run(workdir)
  if record is not None:
    return record
  if has_checkpoint(workdir):
    raise FileNotFoundError(
      f"{workdir} has checkpoints, but no {CONFIG_FILE}, which describes them: restore it from a copy, or from another "
      "workdir of the same config"
    )
  if not exists(workdir):
    if str(workdir) in BUILT_IN:
      raise FileNotFoundError(
        f"there is no folder {workdir}; the built-in base is the text {str(workdir)!r}, not a path"
      )
    raise FileNotFoundError(
      f"{workdir} does not exist: expected a converted checkpoint, the workdir of a training run, or one of the "
      f"built-in bases: {', '.join(BUILT_IN)}{describe_mistaken(workdir, use_of_lora='')}"
    )
  use_of_lora = "give its base as the checkpoint, and it as a LoRA"
  raise FileNotFoundError(
    f"{workdir} is neither a converted checkpoint (no {CHECKPOINT_FILE}) nor the workdir of a training run (no "
    f"{CONFIG_FILE} of one){describe_mistaken(workdir, use_of_lora=use_of_lora)}"
  )


def has_checkpoint(workdir: epath.PathLike) -> bool:
  """Returns whether a run has saved a step."""
  return bool(SavedCheckpoints(workdir).steps)


class Checkpointer:
  """Saves asynchronously and atomically under WORKDIR/checkpoints; an interrupted save leaves no checkpoint.

  Keeps the last `keep` checkpoints and the one with the lowest validation loss. A checkpoint has three items: `model`
  (what to sample with), `training` (step, raw weights, optimizer) and `data` (the position in the stream of sentences),
  and gets checksums in the background when it is finished.

  Args:
    workdir: of the run.
    keep: number of checkpoints to keep.
    verify: whether a checkpoint is verified before it is restored.
    on_damaged: what to do if the newest checkpoint is damaged.
  """

  def __init__(
    self, workdir: epath.PathLike, *, keep: int = 2, verify: bool = True, on_damaged: OnDamaged = OnDamaged.FALLBACK
  ):
    self._saved = SavedCheckpoints(workdir, verify=verify, on_damaged=on_damaged)
    self._keep = keep
    self._pool = concurrent.futures.ThreadPoolExecutor(1, "checksums")
    self._saving: concurrent.futures.Future[None] | None = None

  @functools.cached_property
  def _manager(self) -> ocp.CheckpointManager:
    """Opened by the first save, once damaged checkpoints are set aside: it reads the metrics of all others."""

    def loss(metrics: Mapping[str, float]) -> float:
      return metrics["val_loss"] if math.isfinite(metrics["val_loss"]) else math.inf

    policies = ocp.checkpoint_managers
    best = policies.BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    kept = policies.AnyPreservationPolicy([policies.LatestN(self._keep), best])
    # A new folder for each start: an undeleted leftover may be a checkpoint of the same step.
    deleted = f"{DELETED_FOLDER}/{uuid.uuid4().hex}"
    options = ocp.CheckpointManagerOptions(
      preservation_policy=kept, best_fn=loss, best_mode="min", todelete_subdir=deleted
    )
    silence_orbax()
    return ocp.CheckpointManager(self._saved.parent, options=options, item_names=("model", "training", "data"))

  def has_any(self) -> bool:
    """Returns whether there is a finished checkpoint; all processes of a run must call it.

    Raises:
      UserError: the processes find different checkpoints.
    """
    return bool(self._saved.agree_on_steps())

  @property
  def latest_step(self) -> int | None:
    """The step of the newest finished checkpoint."""
    return max(self._saved.steps, default=None)

  def val_loss(self, step: int) -> float | None:
    """Returns the validation loss of a saved step; None if it was not measured."""
    return self._saved.val_loss(step)

  def save(self, step: int, *, model: Any, training: Any, data: Resumable, val_loss: float | None = None) -> None:
    """Starts saving a step, unless it is saved already.

    Raises:
      OSError: this save or the previous one failed.
    """
    self.wait()
    if step == self.latest_step:
      return
    items = ocp.args.Composite(
      model=ocp.args.StandardSave(model),
      training=ocp.args.StandardSave(training),
      data=grain.checkpoint.CheckpointSave(data),
    )
    with self._explain_failure():
      self._manager.save(step, args=items, metrics=None if val_loss is None else {"val_loss": val_loss})
    self._saving = self._pool.submit(self._finish, step)

  def add_val_loss(self, step: int, val_loss: float) -> None:
    """Adds the validation loss to a step that was saved without one; all processes of a run must call it.

    The checkpoint's checksums are renewed in the background.

    Raises:
      OSError: it could not be written, or the previous save failed.
    """
    self.wait()
    with self._explain_failure():
      if jax.process_index() == 0:
        self._saved.write_val_loss(step, val_loss)
    wait_for_processes("a validation loss is added")
    if "_manager" in vars(self):
      self._manager.reload()
    if jax.process_index() == 0:
      self._saving = self._pool.submit(self._saved.renew_checksums, step)

  def _finish(self, step: int) -> None:
    """Waits until a step is written, deletes the checkpoints that it replaces, and adds its checksums."""
    self._manager.wait_until_finished()
    if jax.process_index() == 0:
      self._saved.delete_outdated()
      write_checksums(self._saved.folder(step))

  def restore(self, *, model: Any, training: Any, data: Resumable) -> tuple[Any, Any]:
    """Restores the newest intact checkpoint and sets `data` to its position; sets damaged ones aside.

    Args:
      model, training: shapes, dtypes and shardings of the items.
      data: the loader.

    Returns:
      The items `model` and `training`, in their shards.

    Raises:
      UserError: no checkpoint can be restored, or the newest is damaged and `on_damaged` is STOP.
    """

    def read(folder: epath.Path) -> tuple[Any, Any]:
      items = restore_items(folder, {"model": model, "training": training})
      try:
        data.set_state(read_positions(folder / "data"))
      except Exception as error:  # a damaged state may make the loader raise anything
        raise UserError(f"{folder / 'data'} holds no position in the data: {first_line(error)}") from error
      return items["model"], items["training"]

    found, items = self._saved.read(None, read)
    self._saved.set_aside_damaged(found)
    if jax.process_index() == 0:
      self._saved.delete_outdated()
    return items

  def wait(self) -> None:
    """Waits until everything is written, with its checksums.

    Raises:
      OSError: it could not be written.
    """
    saving, self._saving = self._saving, None
    with self._explain_failure():
      if saving is not None:
        saving.result()

  @contextlib.contextmanager
  def _explain_failure(self) -> Iterator[None]:
    """Turns the failure of a save, here or in the background, into one line that names the last good checkpoint."""
    try:
      yield
    except Exception as error:
      last = "there is none yet" if self.latest_step is None else f"the last one is that of step {self.latest_step}"
      raise OSError(f"a checkpoint could not be written to {self._saved.parent}; {last}: {_reason(error)}") from error

  def close(self) -> None:
    try:
      self.wait()
    finally:
      self._pool.shutdown()
      if "_manager" in vars(self):
        self._manager.close()


def _reason(error: Exception) -> str:
  """Describes in a few words why something could not be written."""
  text = str(error)
  if code := re.search(r"os_error_code='(\d+)'", text):  # TensorStore's message is long: it names every file involved
    return os.strerror(int(code[1]))
  return next((line for line in text.splitlines() if line), type(error).__name__)
