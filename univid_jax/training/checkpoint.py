"""Checkpoints of a run: everything that a run needs to go on as if it had never stopped."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from univid_jax.files import absolute
from univid_jax.training.step import TrainState

CONFIG_FILE = "config.json"


class Checkpointer:
  """Saves asynchronously and atomically under WORKDIR/checkpoints; a save that was cut off does not count.

  The last `keep` are kept, and the one with the lowest validation loss. A checkpoint holds `model` (what to sample with),
  `training` (step, raw weights, optimizer) and `data` (the place in the stream of sentences).
  """

  def __init__(self, workdir: str, *, keep: int = 2, read_only: bool = False):
    def loss(metrics):
      return metrics["val_loss"]

    policies = ocp.checkpoint_managers
    best = policies.BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    kept = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
    options = ocp.CheckpointManagerOptions(preservation_policy=None if read_only else kept, best_fn=loss, best_mode="min",
                                           create=not read_only, read_only=read_only)
    self._manager = ocp.CheckpointManager(absolute(workdir) / "checkpoints", options=options,
                                          item_names=("model", "training", "data"))

  @property
  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  @property
  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  @property
  def best_step(self) -> int | None:
    """The step with the lowest validation loss, or None where none was measured."""
    return self._manager.best_step()

  def save(self, state: TrainState, data: grain.DatasetIterator, *, val_loss: float | None = None) -> None:
    """Starts to save; a step that is saved already is left as it is.

    Raises:
      OSError: this save or the one before could not be written.
    """
    step = int(state.step)
    if step != self.latest_step:
      with self._said():
        self._manager.save(step, args=ocp.args.Composite(
            model=ocp.args.StandardSave(state.model_params),
            training=ocp.args.StandardSave(_training_items(state)),
            data=grain.checkpoint.CheckpointSave(data),
        ), metrics=None if val_loss is None else {"val_loss": val_loss})

  def restore(self, abstract: TrainState, data: grain.DatasetIterator) -> TrainState:
    """The latest state, straight in the shards that `abstract` names; puts `data` where it was.

    Raises:
      ValueError: the checkpoint cannot be read.
    """
    step = self.latest_step
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(
          model=ocp.args.StandardRestore(abstract.model_params),
          training=ocp.args.StandardRestore(_training_items(abstract)),
          data=grain.checkpoint.CheckpointRestore(data),
      ))
    except Exception as error:
      raise ValueError(f"the checkpoint of step {step} in {self._manager.directory} cannot be restored: {error}") from error
    training = restored["training"]
    has_ema = abstract.ema is not None
    return TrainState(step=training["step"], params=training["params"] if has_ema else restored["model"],
                      ema=restored["model"] if has_ema else None, opt_state=training["opt_state"])

  def restore_model(self, abstract_params: Any, step: int) -> Any:
    """Only what is needed to sample."""
    args = ocp.args.Composite(model=ocp.args.StandardRestore(abstract_params))
    return self._manager.restore(step, args=args)["model"]

  def wait(self) -> None:
    """Returns when all that was started is on disk.

    Raises:
      OSError: it could not be written.
    """
    with self._said():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _said(self) -> Iterator[None]:
    """Says of a save that failed, now or in the background, which checkpoint there is."""
    try:
      yield
    except Exception as error:
      self._manager.reload()
      kept = "there is none yet" if self.latest_step is None else f"that of step {self.latest_step} is the last"
      reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
      raise OSError(f"a checkpoint could not be written to {self._manager.directory}; {kept}: {reason}") from error

  def close(self) -> None:
    self._manager.close()


def _training_items(state: TrainState) -> dict[str, Any]:
  items = {"step": state.step, "opt_state": state.opt_state}
  return items | ({"params": state.params} if state.ema is not None else {})


def write_config(workdir: str, config: dict[str, Any]) -> None:
  """Keeps the config of a run beside its checkpoints."""
  if jax.process_index() == 0:
    (epath.Path(workdir) / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def read_config(workdir: str) -> dict[str, Any] | None:
  """The config of a run, or None where there is no run."""
  path = epath.Path(workdir) / CONFIG_FILE
  return json.loads(path.read_text()) if path.exists() else None
