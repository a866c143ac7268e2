"""What a run has trained, read from its workdir: to sample with, to export, or to train on."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

import univid_jax
from univid_jax.checkpoints.lora.stacking import unstack_lora
from univid_jax.checkpoints.lora.weights import LoRAWeights
from univid_jax.checkpoints.model import create_model
from univid_jax.checkpoints.pretrained import PretrainedCheckpoint, abstract_parameters
from univid_jax.checkpoints.run import CONFIG_FILE, Checkpointer, RunRecord, read_run
from univid_jax.checkpoints.usage import SOFTWARE, SOFTWARE_NAME, Usage
from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import UserError
from univid_jax.models.lora import LoRAParam
from univid_jax.parallel.mesh import make_mesh

Params = Mapping[str, Any]


def load_base(config: RunConfig, mesh: Mesh) -> tuple[nnx.GraphDef, Params]:
  """Loads the transformer that training starts from, without adapters: that of the base, else random from the seed."""

  def create() -> nnx.Module:
    return create_model(config, adapters=False)

  module = nnx.eval_shape(create)
  abstract = abstract_parameters(module, mesh)
  if config.init_from:
    return nnx.graphdef(module), PretrainedCheckpoint.open(config.init_from).load_arrays("transformer", abstract)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  init = jax.jit(lambda: nnx.to_pure_dict(nnx.state(create(), nnx.Param)), out_shardings=shardings)
  return nnx.graphdef(module), init()


def restore_run(
  workdir: epath.PathLike, config: RunConfig, mesh: Mesh, *, step: int | str | None = None
) -> tuple[nnx.GraphDef, Params, list[LoRAWeights]]:
  """Restores what a run trained: a transformer with its parameters and, for a LoRA run, the adapters.

  Args:
    workdir: of the run.
    config: of the run.
    mesh: where the parameters go.
    step: of the checkpoint, see `find_step`.

  Raises:
    FileNotFoundError: the run has no finished checkpoint.
    UserError: it cannot be read.
  """
  if config.lora.enabled:
    return *load_base(config, mesh), [read_run_lora(workdir, step=step)]
  module = nnx.eval_shape(lambda: create_model(config))
  params = _restore_model(workdir, abstract_parameters(module, mesh), find_step(workdir, step))
  return nnx.graphdef(module), params, []


def is_lora_run(path: epath.PathLike) -> bool:
  """Returns whether a folder is the workdir of a LoRA run."""
  record = read_run(path)
  return record is not None and record.config.lora.enabled


def read_run_lora(workdir: epath.PathLike, *, step: int | str | None = None) -> LoRAWeights:
  """Reads the LoRA that a run trained from its checkpoint (see `find_step`).

  Raises:
    FileNotFoundError: there is no run, or it has no finished checkpoint.
    UserError: the run trained the whole model.
  """
  record = read_run(workdir)
  if record is None:
    raise FileNotFoundError(f"no {CONFIG_FILE} in {workdir}: it is not the workdir of a training run")
  if not record.config.lora.enabled:
    raise UserError(f"{workdir} is a run that trained the whole model, not a LoRA")
  module = nnx.eval_shape(lambda: create_model(record.config))
  local = make_mesh({"data": -1}, jax.local_devices()[:1])
  found = find_step(workdir, step)
  params = _restore_model(workdir, abstract_parameters(module, local, kind=LoRAParam), found)
  return to_lora_weights(record, jax.tree.map(np.asarray, params), step=found)


def to_lora_weights(record: RunRecord, params: Params, *, step: int) -> LoRAWeights:
  """Returns trained adapters as a LoRA that records its step and how it has to be run."""
  lora = record.config.lora
  metadata = {
    SOFTWARE: f"{SOFTWARE_NAME} {univid_jax.__version__}",
    "step": str(step),
    **run_usage(record).to_metadata(),
  }
  return unstack_lora(params, alpha=lora.alpha, rslora=lora.rslora, metadata=metadata)


def run_usage(record: RunRecord) -> Usage:
  """Returns how the model of a run has to be run."""
  config = record.config
  if config.init_from:
    base = PretrainedCheckpoint.open(config.init_from).info.variant
  else:
    base = config.model.variant or config.name
  return Usage.of(config, base_model=base, base_checksum=record.base, prompts=record.prompts)


def find_step(workdir: epath.PathLike, step: int | str | None) -> int:
  """Returns the step of a finished checkpoint: the given one, the "best" by validation loss, or the latest for None.

  Raises:
    FileNotFoundError: there is none.
    UserError: `step` is neither a number nor "best".
  """
  if isinstance(step, str) and step != "best" and not step.isdigit():
    raise UserError(f'the step of a checkpoint must be a number or "best", got {step!r}')
  with contextlib.closing(Checkpointer(workdir, read_only=True)) as checkpointer:
    if step is None or step == "best":
      found = checkpointer.latest_step if step is None else checkpointer.best_step
      if found is None:
        kind = "" if step is None else "with a validation loss "
        raise FileNotFoundError(f"no finished checkpoint {kind}in {workdir}")
      return found
    if int(step) not in checkpointer.steps:
      existing = ", ".join(map(str, checkpointer.steps)) or "none"
      raise FileNotFoundError(f"no checkpoint of step {step} in {workdir}; there are {existing}")
    return int(step)


def _restore_model(workdir: epath.PathLike, abstract: Any, step: int) -> Any:
  with contextlib.closing(Checkpointer(workdir, read_only=True)) as checkpointer:
    return checkpointer.restore_model(abstract, step)
