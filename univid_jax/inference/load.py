"""Loads pipelines from converted checkpoints and from training runs, with LoRAs."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import Mesh

from univid_jax.checkpoints.lora.formats import read_lora
from univid_jax.checkpoints.lora.stacking import stack_loras
from univid_jax.checkpoints.lora.weights import LoRAWeights
from univid_jax.checkpoints.model import open_encoders, transformer_config
from univid_jax.checkpoints.pretrained import CHECKPOINT_FILE, PretrainedCheckpoint, is_checkpoint
from univid_jax.checkpoints.run import CONFIG_FILE, read_run
from univid_jax.checkpoints.trained import restore_run
from univid_jax.codecs.encoders import PretrainedEncoders
from univid_jax.config.boundary import override
from univid_jax.config.schema import LoRAConfig
from univid_jax.core.errors import UserError
from univid_jax.core.options import Attention
from univid_jax.inference.pipeline import Pipeline
from univid_jax.models.lora import LoRAParam, attach, join, linear_name, merge
from univid_jax.models.variants import DiTConfig
from univid_jax.parallel.mesh import make_mesh
from univid_jax.parallel.sharding import parameter_shardings

LoRASpec = str | tuple[str, float]


def load_pipeline(
  checkpoint: str,
  lora: LoRASpec | Sequence[LoRASpec] | None = None,
  dtype: str | None = None,
  *,
  merge_lora: bool = False,
  mesh: Mesh | None = None,
  attention: str | None = None,
  step: int | str | None = None,
) -> Pipeline:
  """Loads a converted checkpoint, or the model of a training run.

  Args:
    checkpoint: a folder written by the converter, or a workdir. The workdir of a LoRA run includes its base.
    lora: a LoRA file of any trainer, or a LoRA folder of this project: one or several, each with an optional weight.
    dtype: of the transformer and of the encoders of text and images; by default bfloat16, or that of the run.
    merge_lora: adds LoRAs to the weights instead of computing them separately.
    mesh: the devices; by default all, with parameters sharded over them.
    attention: "full" or "context_causal"; by default what the run or the LoRAs were trained with.
    step: checkpoint of a workdir: a number, "best" (the lowest validation loss) or None for the latest.

  Raises:
    FileNotFoundError: there is no such checkpoint, run or LoRA.
    UserError: it cannot be read, or a LoRA is for another base.
  """
  mesh = make_mesh({"data": 1, "fsdp": -1}) if mesh is None else mesh
  loras = [(read_lora(path), weight) for path, weight in _parse_loras(lora)]
  run = None
  if is_checkpoint(checkpoint):
    base = PretrainedCheckpoint.open(checkpoint)
    compute_dtype = jnp.dtype(dtype or "bfloat16")
    encoders = PretrainedEncoders(base, mesh, dtype=compute_dtype)
    config = base.config("transformer")
    graph, params = base.load("transformer", mesh=mesh, dtype=compute_dtype)
  else:
    record = read_run(checkpoint)
    if record is None:
      raise FileNotFoundError(
        f"{checkpoint} is neither a converted checkpoint (no {CHECKPOINT_FILE}) nor the workdir of a training run (no "
        f"{CONFIG_FILE})"
      )
    run = record.config
    if dtype:
      run = override(run, {"model.dtype": dtype, "model.param_dtype": dtype})
    config, encoders = transformer_config(run), open_encoders(run, mesh)
    graph, params, trained = restore_run(checkpoint, run, mesh, step=step)
    loras = [(each, 1.0) for each in trained] + loras
  if loras:
    graph, params = add_loras(config, graph, params, loras, mesh=mesh, merged=merge_lora)
  if attention is None and run is None:
    attention = _trained_attention([each for each, _ in loras])
  return Pipeline(config, graph, params, encoders=encoders, mesh=mesh, run=run, attention=attention)


def add_loras(
  config: DiTConfig,
  graph: nnx.GraphDef,
  params: Mapping[str, Any],
  loras: Sequence[tuple[LoRAWeights, float]],
  *,
  mesh: Mesh,
  merged: bool,
) -> tuple[nnx.GraphDef, Mapping[str, Any]]:
  """Returns a transformer with LoRAs, each with its weight, added to the weights or computed separately."""
  leaves: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(params))
  shapes = {path: value.shape for path, value in leaves.items()}
  adapters, rank = stack_loras(loras, config, shapes)
  if merged:
    return graph, jax.jit(merge, donate_argnums=0)(params, adapters)
  targets = tuple(
    linear_name(path[:-2], 0 if path[0] == "blocks" else None)
    for path in traverse_util.flatten_dict(adapters)
    if path[-1] == "down"
  )

  def attached() -> nnx.Module:
    module = nnx.merge(graph, params)
    attach(module, LoRAConfig(rank=rank, alpha=rank, targets=targets), rngs=nnx.Rngs(0))
    return module

  module = nnx.eval_shape(attached)
  shardings = parameter_shardings(module, mesh, kind=LoRAParam)
  return nnx.graphdef(module), join(params, jax.device_put(adapters, shardings))


def _parse_loras(lora: LoRASpec | Sequence[LoRASpec] | None) -> list[tuple[str, float]]:
  if lora is None:
    return []
  if isinstance(lora, str):
    return [(lora, 1.0)]
  if isinstance(lora, tuple) and len(lora) == 2 and isinstance(lora[1], int | float):
    return [(str(lora[0]), float(lora[1]))]
  return [pair for spec in lora if isinstance(spec, str | tuple) for pair in _parse_loras(spec)]


def _trained_attention(loras: Sequence[LoRAWeights]) -> str | None:
  found = {lora.metadata.get("attention", str(Attention.FULL)) for lora in loras}
  if len(found) > 1:
    raise UserError(
      "the LoRAs were trained with different attention (full and context_causal): choose one with attention="
    )
  return next(iter(found), None)
