"""The weights that a run trained, read from its workdir for sampling, export or further training."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

import univid_jax
from univid_jax.checkpoints.lora.stacking import unstack_lora
from univid_jax.checkpoints.lora.weights import LoRAWeights
from univid_jax.checkpoints.orbax_files import restore_items
from univid_jax.checkpoints.pretrained import abstract_parameters
from univid_jax.checkpoints.run import RunRecord, read_run, require_run
from univid_jax.checkpoints.run_parts import context_mode, create_model, open_base, split_config, trained_component
from univid_jax.checkpoints.saved import SavedCheckpoints
from univid_jax.checkpoints.usage import SOFTWARE, SOFTWARE_NAME, Usage
from univid_jax.config.boundary import override
from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import UserError
from univid_jax.core.options import Expert, OnDamaged, TrainedExpert
from univid_jax.core.params import ParamTree
from univid_jax.core.paths import is_folder
from univid_jax.models.lora import LoRAParam
from univid_jax.models.offload import offload_blocks, put_in_words
from univid_jax.parallel.mesh import make_mesh


def load_base(config: RunConfig, mesh: Mesh) -> tuple[nnx.GraphDef, ParamTree]:
  """Loads the transformer that training starts from, without adapters: the base's, or a random one from the seed."""

  def create() -> nnx.Module:
    return create_model(config, adapters=False)

  module = nnx.eval_shape(create)
  abstract = abstract_parameters(module, mesh)
  if config.base.offload:
    abstract = offload_blocks(abstract)
  if base := open_base(config):
    params = base.load_arrays(trained_component(config, base), abstract)
  else:
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    on_devices = jax.tree.map(lambda x: x.with_memory_kind(None), shardings)
    init = jax.jit(lambda: nnx.to_pure_dict(nnx.state(create(), nnx.Param)), out_shardings=on_devices)
    params = jax.device_put(init(), shardings)
  return nnx.graphdef(module), put_in_words(params) if config.base.offload else params


def expert_configs(config: RunConfig) -> list[RunConfig]:
  """Returns a config for each transformer of a run's model, trained or not, with which `load_base` loads it."""
  base = open_base(config)
  if base is None or len(base.transformers) <= 1:
    return split_config(config)
  return [override(config, {"model.expert": str(expert)}) for expert in TrainedExpert.BOTH.parts]


def restore_transformer(
  saved: SavedCheckpoints, config: RunConfig, mesh: Mesh, *, step: int | str | None
) -> tuple[nnx.GraphDef, ParamTree]:
  """Restores the transformer of a run that trained all of its weights.

  Args:
    saved: the checkpoints of the run.
    config: of the run.
    mesh: devices for the parameters.
    step: step of the checkpoint, see `SavedCheckpoints.read`.

  Raises: like `SavedCheckpoints.read`.
  """
  module = nnx.eval_shape(lambda: create_model(config))
  _, params = _restore_model(saved, step, abstract_parameters(module, mesh))
  return nnx.graphdef(module), params


def is_lora_run(path: epath.PathLike) -> bool:
  """Returns whether a path is the workdir of a LoRA run."""
  record = read_run(path) if is_folder(path) else None
  return record is not None and record.config.lora.enabled


def read_run_loras(workdir: epath.PathLike, *, step: int | str | None = None, verify: bool = True) -> list[LoRAWeights]:
  """Reads the LoRA of each transformer that a run trained from its checkpoint, see `SavedCheckpoints.read`.

  Raises:
    FileNotFoundError: there is no run, or it has no finished checkpoint.
    UserError: the run trained the whole model, or the checkpoint is damaged.
  """
  record = require_run(workdir)
  if not record.config.lora.enabled:
    raise UserError(f"{workdir} is a run that trained the whole model, not a LoRA")
  return restore_loras(SavedCheckpoints(workdir, model_only=True, verify=verify), record, step=step)


def restore_loras(saved: SavedCheckpoints, record: RunRecord, *, step: int | str | None) -> list[LoRAWeights]:
  """Reads the LoRA of each transformer that a run trained; raises like `SavedCheckpoints.read`."""
  module = nnx.eval_shape(lambda: create_model(record.config))
  local = make_mesh({"data": -1}, jax.local_devices()[:1])
  expert, abstract = record.config.model.expert, abstract_parameters(module, local, kind=LoRAParam)
  found, params = _restore_model(saved, step, expert.join_trees([abstract] * len(expert.parts)))
  return to_lora_weights(record, jax.tree.map(np.asarray, params), step=found)


def to_lora_weights(record: RunRecord, params: ParamTree, *, step: int) -> list[LoRAWeights]:
  """Returns the trained adapters of each transformer as a LoRA that records its step and how it must be run."""
  lora, loras = record.config.lora, []
  for part, adapters in zip(_split_record(record), record.config.model.expert.split_tree(params), strict=True):
    metadata = {
      SOFTWARE: f"{SOFTWARE_NAME} {univid_jax.__version__}",
      "step": str(step),
      **run_usage(part).to_metadata(),
    }
    weights = unstack_lora(adapters, alpha=lora.alpha, rslora=lora.rslora, metadata=metadata)
    loras.append(dataclasses.replace(weights, source=f"the LoRA of {part.config.name}"))
  return loras


def _split_record(record: RunRecord) -> list[RunRecord]:
  """Returns one record for each expert that a run trains, as if a run of its own trained it."""
  parts = zip(split_config(record.config), record.base, strict=True)
  return [dataclasses.replace(record, config=config, base=(checksum,)) for config, checksum in parts]


def run_usage(record: RunRecord) -> Usage:
  """Returns how the model of a run must be run."""
  config = record.config
  base = open_base(config)
  expert = config.model.expert
  return Usage.from_config(
    config,
    context_timestep=context_mode(config).timestep,
    expert=Expert(expert) if expert in (TrainedExpert.HIGH, TrainedExpert.LOW) else None,
    base_model=base.info.variant if base else config.model.variant or config.name,
    base_checksum=record.base[0] if len(record.base) == 1 else "",
    prompts=record.prompts,
    adapts_clips=record.adapts_clips,
  )


def find_step(
  workdir: epath.PathLike, step: int | str | None, *, verify: bool = True, on_damaged: OnDamaged = OnDamaged.FALLBACK
) -> int:
  """Returns the step of a checkpoint whose model is intact; see `SavedCheckpoints`, and its `read` for errors."""
  saved = SavedCheckpoints(workdir, model_only=True, verify=verify, on_damaged=on_damaged)
  return saved.read(step, lambda folder: None)[0]


def find_lora_steps(paths: Iterable[str], *, verify: bool) -> dict[str, int]:
  """Returns the newest step with an intact model for each path that is the workdir of a LoRA run; see `find_step`."""
  return {path: find_step(path, None, verify=verify) for path in paths if is_lora_run(path)}


def _restore_model(saved: SavedCheckpoints, step: int | str | None, abstract: Any) -> tuple[int, Any]:
  return saved.read(step, lambda folder: restore_items(folder, {"model": abstract})["model"])
