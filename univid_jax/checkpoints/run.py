"""The checkpoints and the config of a run, in its workdir."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import orbax.checkpoint as ocp
from etils import epath

from univid_jax.config.boundary import from_json, to_json
from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import UserError
from univid_jax.core.paths import make_absolute

CONFIG_FILE = "config.json"
CHECKPOINTS_FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class RunRecord:
  """What WORKDIR/config.json stores.

  Attributes:
    config: of the run.
    base: checksum of the transformer that training starts from; "" without a base.
    version: of univid_jax that started or last resumed the run.
    prompts: of the tasks, as the run trains them; tasks whose records have prompts of their own are missing.
  """

  config: RunConfig
  base: str
  version: str
  prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_run(workdir: epath.PathLike, record: RunRecord) -> None:
  """Writes WORKDIR/config.json."""
  values = {**to_json(record.config), "base": record.base, "version": record.version}
  values["prompts"] = dict(record.prompts)
  (epath.Path(workdir) / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")


def read_run(workdir: epath.PathLike) -> RunRecord | None:
  """Reads WORKDIR/config.json; returns None if there is none, or one that is not of a run.

  Raises:
    UserError: it is damaged, or has keys that this version does not know.
  """
  path = epath.Path(workdir) / CONFIG_FILE
  if not path.exists():
    return None
  try:
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
      raise ValueError("it is not a JSON object")
    if not {"model", "data", "rows"} <= values.keys():
      return None  # of something else, for example of an official release
    base, version = values.pop("base", ""), values.pop("version", "unknown")
    prompts = values.pop("prompts", {})
    if not all(isinstance(text, str) for text in (base, version)) or not isinstance(prompts, dict):
      raise ValueError("base and version must be text, and prompts an object")
    return RunRecord(from_json(values), base, version, prompts)
  except ValueError as error:
    raise UserError(f"{path} cannot be read by this version: {error}") from error


def has_checkpoint(workdir: epath.PathLike) -> bool:
  """Returns whether a run has saved a step."""
  folder = epath.Path(workdir) / CHECKPOINTS_FOLDER
  return folder.exists() and any(path.name.isdigit() for path in folder.iterdir())


class Checkpointer:
  """Saves asynchronously and atomically under WORKDIR/checkpoints; an interrupted save leaves no checkpoint.

  Keeps the last `keep` checkpoints and the one with the lowest validation loss. A checkpoint has three items: `model`
  (what to sample with), `training` (step, raw weights, optimizer) and `data` (the position in the stream of sentences).
  """

  def __init__(self, workdir: epath.PathLike, *, keep: int = 2, read_only: bool = False):
    def loss(metrics: Mapping[str, float]) -> float:
      return metrics["val_loss"]

    policies = ocp.checkpoint_managers
    best = policies.BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    kept = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
    options = ocp.CheckpointManagerOptions(
      preservation_policy=None if read_only else kept,
      best_fn=loss,
      best_mode="min",
      create=not read_only,
      read_only=read_only,
    )
    self._manager = ocp.CheckpointManager(
      make_absolute(workdir) / CHECKPOINTS_FOLDER, options=options, item_names=("model", "training", "data")
    )

  @property
  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  @property
  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  @property
  def best_step(self) -> int | None:
    """The step with the lowest validation loss; None if none was measured."""
    return self._manager.best_step()

  def save(
    self, step: int, *, model: Any, training: Any, data: grain.DatasetIterator, val_loss: float | None = None
  ) -> None:
    """Starts to save a step, unless it is saved already.

    Raises:
      OSError: this save or the one before it failed.
    """
    if step == self.latest_step:
      return
    items = ocp.args.Composite(
      model=ocp.args.StandardSave(model),
      training=ocp.args.StandardSave(training),
      data=grain.checkpoint.CheckpointSave(data),
    )
    with self._explain_failure():
      self._manager.save(step, args=items, metrics=None if val_loss is None else {"val_loss": val_loss})

  def restore(self, *, model: Any, training: Any, data: grain.DatasetIterator) -> tuple[Any, Any]:
    """Restores the latest step and sets `data` to its position.

    Args:
      model, training: shapes, dtypes and shardings of the items.
      data: the loader.

    Returns:
      The items `model` and `training`, in their shards.

    Raises:
      UserError: the checkpoint cannot be restored.
    """
    step = self.latest_step
    items = ocp.args.Composite(
      model=ocp.args.StandardRestore(model),
      training=ocp.args.StandardRestore(training),
      data=grain.checkpoint.CheckpointRestore(data),
    )
    try:
      restored = self._manager.restore(step, args=items)
    except Exception as error:  # Orbax and TensorStore raise many types
      raise UserError(
        f"the checkpoint of step {step} in {self._manager.directory} cannot be restored: {error}"
      ) from error
    return restored["model"], restored["training"]

  def restore_model(self, abstract_params: Any, step: int) -> Any:
    """Restores only what sampling needs."""
    args = ocp.args.Composite(model=ocp.args.StandardRestore(abstract_params))
    return self._manager.restore(step, args=args)["model"]

  def wait(self) -> None:
    """Waits until everything is written.

    Raises:
      OSError: it could not be written.
    """
    with self._explain_failure():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _explain_failure(self) -> Iterator[None]:
    """Turns the failure of a save, now or in the background, into one line that names the last good checkpoint."""
    try:
      yield
    except Exception as error:
      self._manager.reload()
      last = "there is none yet" if self.latest_step is None else f"the last one is that of step {self.latest_step}"
      reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
      raise OSError(f"a checkpoint could not be written to {self._manager.directory}; {last}: {reason}") from error

  def close(self) -> None:
    self._manager.close()
