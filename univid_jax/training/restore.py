"""What stands in a workdir, for those who want to use it or to train on it."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from univid_jax import build
from univid_jax.models.lora import LoRAParam
from univid_jax.parallel.mesh import make_mesh
from univid_jax.training.checkpoint import CONFIG_FILE, Checkpointer, read_config
from univid_jax.weights.checkpoint import abstract_parameters, check_files, read_info, restore_arrays
from univid_jax.weights.lora import LoRAWeights, unstack_lora


def base_parameters(config: Mapping[str, Any], mesh: Mesh) -> tuple[nnx.GraphDef, dict[str, Any]]:
  """The transformer that training starts from, without adapters: that of `init_from`, else random from the seed."""
  def init():
    return build.model(config, seed=config["seed"], adapters=False)

  module = nnx.eval_shape(init)
  abstract = abstract_parameters(module, mesh)
  if config["init_from"]:
    check_files(config["init_from"], "transformer", read_info(config["init_from"]))
    return nnx.graphdef(module), restore_arrays(epath.Path(config["init_from"]) / "transformer", abstract)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return nnx.graphdef(module), jax.jit(lambda: nnx.to_pure_dict(nnx.state(init(), nnx.Param)), out_shardings=shardings)()


def restore_run(workdir: str, config: Mapping[str, Any], mesh: Mesh, *,
                step: int | str | None = None) -> tuple[nnx.GraphDef, dict[str, Any], list[LoRAWeights]]:
  """What a run trained: a transformer with its parameters and, where adapters were trained, these.

  Args:
    workdir: of the run.
    config: of the run.
    mesh: where it shall lie.
    step: of the checkpoint, see `checkpoint_step`.

  Raises:
    FileNotFoundError: the run has no finished checkpoint.
    ValueError: it cannot be read.
  """
  if config["lora"]["rank"]:
    return *base_parameters(config, mesh), [read_run_lora(workdir, step=step)]
  module = nnx.eval_shape(lambda: build.model(config))
  return nnx.graphdef(module), _restore_model(workdir, abstract_parameters(module, mesh), step), []


def is_lora_run(path: epath.PathLike) -> bool:
  """Whether a folder is the workdir of a LoRA training."""
  config = read_config(path)
  return bool(config and config.get("lora", {}).get("rank"))


def read_run_lora(workdir: epath.PathLike, *, step: int | str | None = None) -> LoRAWeights:
  """The LoRA that a run trained, as its checkpoint at a step has it (see `checkpoint_step`).

  Raises:
    FileNotFoundError: there is no run, or no finished checkpoint.
    ValueError: the run trained no LoRA.
  """
  config = read_config(workdir)
  if config is None:
    raise FileNotFoundError(f"no {CONFIG_FILE} in {workdir}: it is not the workdir of a training run")
  if not config["lora"]["rank"]:
    raise ValueError(f"{workdir} holds a run that trained the whole model, not a LoRA")
  module = nnx.eval_shape(lambda: build.model(config))
  local = make_mesh({"data": -1}, jax.local_devices()[:1])
  step = checkpoint_step(workdir, step)
  params = _restore_model(workdir, abstract_parameters(module, local, kind=LoRAParam), step)
  return lora_weights(config, jax.tree.map(np.asarray, params), step=step)


def lora_weights(config: Mapping[str, Any], params: Mapping[str, Any], *, step: int) -> LoRAWeights:
  """Trained adapters as a LoRA that knows its base and its step."""
  lora = build.lora_config(config)
  variant = read_info(config["init_from"]).variant if config["init_from"] else config["model"]["variant"] or config["name"]
  metadata = {"step": str(step), "base_model": variant, "attention": config["model"].get("attention", "full")}
  return unstack_lora(params, alpha=lora.alpha, rslora=lora.rslora, metadata=metadata)


def checkpoint_step(workdir: epath.PathLike, step: int | str | None = None) -> int:
  """The step of a finished checkpoint: the one asked for, "best" by validation loss, or the latest.

  Raises:
    FileNotFoundError: there is none.
  """
  with contextlib.closing(Checkpointer(workdir, read_only=True)) as checkpointer:
    found = checkpointer.best_step if step == "best" else checkpointer.latest_step
    if found is None:
      raise FileNotFoundError(f"no finished checkpoint {'with a validation loss ' if step == 'best' else ''}in {workdir}")
    if step in (None, "best", found):
      return found
    if int(step) not in checkpointer.steps:
      raise FileNotFoundError(f"no checkpoint of step {step} in {workdir}, only {', '.join(map(str, checkpointer.steps))}")
    return int(step)


def _restore_model(workdir: epath.PathLike, abstract: Any, step: int | str | None) -> Any:
  step = checkpoint_step(workdir, step)
  with contextlib.closing(Checkpointer(workdir, read_only=True)) as checkpointer:
    return checkpointer.restore_model(abstract, step)
