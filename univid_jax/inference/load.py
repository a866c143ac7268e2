"""Loads pipelines from converted checkpoints and from training runs, with LoRAs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from univid_jax.checkpoints.built_in import locate
from univid_jax.checkpoints.checksums import has_checksums, verified
from univid_jax.checkpoints.info import is_checkpoint
from univid_jax.checkpoints.model import base_encoders, open_encoders, transformer_config
from univid_jax.checkpoints.pretrained import PretrainedCheckpoint
from univid_jax.checkpoints.run import RunRecord, require_run
from univid_jax.checkpoints.saved import SavedCheckpoints
from univid_jax.checkpoints.trained import expert_configs, load_base, restore_loras, restore_transformer, run_usage
from univid_jax.checkpoints.usage import Usage
from univid_jax.codecs.encoders import PretrainedEncoders
from univid_jax.config.boundary import override
from univid_jax.config.schema import RunConfig
from univid_jax.core.options import Attention, ContextTimestep, OnDamaged, Quantize, parse_option
from univid_jax.core.packed_row import ContextMode
from univid_jax.inference.added_loras import add_loras
from univid_jax.inference.distillation_loras import DistillationLoRAs, read_distillation
from univid_jax.inference.experts import OffloadedParams, Transformer
from univid_jax.inference.lora_specs import LoRASpecs, RequestedLoRA, lora_usage, read_loras, select_loras
from univid_jax.inference.partial import PartialPipeline
from univid_jax.inference.pipeline import Pipeline
from univid_jax.models.layers import quantize_linears
from univid_jax.models.variants import DiTConfig
from univid_jax.parallel.mesh import make_mesh
from univid_jax.parallel.sharding import parameter_shardings

# Wan2.2's own for T2V-A14B, where the paper's shift would leave little to the high-noise expert.
A14B_SHIFT = 12.0

# `_finish` with its options.
_Finish = Callable[[DiTConfig, Transformer, Sequence[RequestedLoRA], bool], Transformer]


def load_pipeline(
  checkpoint: str,
  lora: LoRASpecs | Mapping[str, LoRASpecs] | None = None,
  dtype: str | None = None,
  *,
  accelerate: str | Sequence[str] | DistillationLoRAs | None = None,
  merge_lora: bool = False,
  lora_skip_unmatched: bool = False,
  offload_inactive: bool = False,
  mesh: Mesh | None = None,
  attention: str | None = None,
  context_timestep: str | None = None,
  quantize: str | None = None,
  step: int | str | None = None,
  verify_weights: bool = True,
  on_damaged_checkpoint: str = OnDamaged.FALLBACK,
) -> Pipeline:
  """Loads a converted checkpoint, which may lack components, or the model of a training run, with its base.

  Args:
    checkpoint: a folder written by the converter, a workdir, or "small", the base in the package.
    lora: a LoRA file of any trainer, a folder of PEFT or of this project, or a workdir: one or several, each with an
      optional weight w. Where a LoRA alone makes W' of a tensor W, it adds w (W' - W). For a base with two experts
      {"high": ..., "low": ...} (or "both"); else metadata or names must say it.
    dtype: of transformer and encoders; by default bfloat16, or that of the run; of a base that was trained from scratch
      float32.
    accelerate: a distillation LoRA, `[EXPERT=]PATH[:WEIGHT][:KIND]`, or one per expert; see
      `diffusion.distillations`.
    merge_lora: adds LoRAs to the weights instead of computing them separately.
    lora_skip_unmatched: leaves out, with a warning, tensors of LoRAs that have no counterpart in the base.
    offload_inactive: keeps the expert that is not in use in host memory.
    mesh: the devices; by default all, with parameters sharded over them.
    attention, context_timestep: "full" or "context_causal", "target" or "zero"; by default those of training.
    quantize: "int8", "fp8" or "nf4", of the blocks' linear weights; by default as they are stored or were trained.
    step: checkpoint of a workdir: a number, "best" (the lowest validation loss) or None for the latest.
    verify_weights: compares every file with its checksum while the weights are loaded.
    on_damaged_checkpoint: "fallback" takes the newest that is intact if the latest of a workdir is not, "stop" raises.

  Raises:
    FileNotFoundError: there is no such checkpoint, run or LoRA.
    UserError: one cannot be read or differs from its checksum (DamagedError), or a LoRA is for another base.
  """
  mesh = make_mesh({"data": 1, "fsdp": -1}) if mesh is None else mesh
  _check_options(attention, context_timestep)
  method = parse_option(Quantize, "quantize", quantize) if quantize else None
  loras = read_loras(lora, verify=verify_weights)
  distillation = read_distillation(accelerate, verify=verify_weights) if accelerate else None
  loras += distillation.loras if distillation else ()
  given = {"attention": attention, "context_timestep": context_timestep}
  how = {"merged": merge_lora, "skip_unmatched": lora_skip_unmatched, "offload": offload_inactive}
  finish = functools.partial(_finish, mesh=mesh, **how)
  if is_checkpoint(checkpoint) or has_checksums(checkpoint):
    with verified(locate(checkpoint), enabled=verify_weights):
      pipeline = _open_base(checkpoint, loras, finish, mesh=mesh, dtype=dtype, quantize=method, given=given)
  else:
    record, on_damaged = _override(require_run(checkpoint), dtype, method), OnDamaged(on_damaged_checkpoint)
    saved = SavedCheckpoints(checkpoint, model_only=True, verify=verify_weights, on_damaged=on_damaged)
    with verified(record.config.init_from and locate(record.config.init_from), enabled=verify_weights):
      pipeline = _open_run(saved, record, loras, finish, mesh=mesh, step=step, quantize=method, given=given)
  pipeline.distillation = distillation and distillation.kind
  return pipeline


def _check_options(attention: str | None, context_timestep: str | None) -> None:
  """Raises UserError if one is not an option, or they exclude each other, before anything is read."""
  if attention is not None:
    parse_option(Attention, "attention", attention)
  if context_timestep is not None:
    timestep = parse_option(ContextTimestep, "context_timestep", context_timestep)
    ContextMode.from_options(Attention(attention or Attention.FULL), timestep, default=ContextTimestep.TARGET)


def _open_base(
  checkpoint: str,
  loras: Sequence[RequestedLoRA],
  finish: _Finish,
  *,
  mesh: Mesh,
  dtype: str | None,
  quantize: Quantize | None,
  given: Mapping[str, str | None],
) -> Pipeline:
  """Loads a converted checkpoint, which may lack components."""
  base = PretrainedCheckpoint.open(checkpoint)
  default = "bfloat16" if base.info.codec is None else "float32"  # what this project trains from scratch is small
  options = {"dtype": jnp.dtype(dtype or default), "quantize": quantize or Quantize.NONE}
  encoders = base_encoders(base, mesh, dtype=options["dtype"])
  if isinstance(encoders, PretrainedEncoders) and not base.transformers and not loras:
    return PartialPipeline(encoders, mesh=mesh, reason=base.explain_missing("transformer"))
  config = base.config("transformer")
  usage, transformers = _load_base(base, loras, finish, mesh=mesh, options=options, given=given)
  return Pipeline(config, transformers, encoders=encoders, mesh=mesh, usage=usage, **given)


def _open_run(
  saved: SavedCheckpoints,
  record: RunRecord,
  loras: Sequence[RequestedLoRA],
  finish: _Finish,
  *,
  mesh: Mesh,
  step: int | str | None,
  quantize: Quantize | None,
  given: Mapping[str, str | None],
) -> Pipeline:
  """Loads the model of a run."""
  encoders = open_encoders(record.config, mesh)
  transformers = _load_run(saved, record, loras, finish, mesh=mesh, step=step, quantize=quantize)
  config, usage = transformer_config(record.config), run_usage(record)
  return Pipeline(config, transformers, encoders=encoders, mesh=mesh, usage=usage, **given)


def _load_base(
  base: PretrainedCheckpoint,
  loras: Sequence[RequestedLoRA],
  finish: _Finish,
  *,
  mesh: Mesh,
  options: Mapping[str, Any],
  given: Mapping[str, str | None],
) -> tuple[Usage | None, list[Transformer]]:
  """Loads the transformers of a converted checkpoint one after another, and returns how their LoRAs are run."""
  selected = select_loras(loras, base.experts)
  pairs = list(zip(base.transformers, selected, strict=True))
  quantize = {base.quantization(name, options["quantize"]) for name in base.transformers}
  checksums = [(each, base.checksum(name)) for name, part in pairs for each in part]
  usage = lora_usage(checksums, given, quantize=quantize.pop()) or base.usage
  config = base.config("transformer")
  if usage is None and len(pairs) > 1 and not config.takes_condition:
    usage = Usage(shift=A14B_SHIFT, is_known=False)

  def load(name: str, part: Sequence[RequestedLoRA]) -> Transformer:
    return finish(config, Transformer(*base.load(name, mesh=mesh, **options)), part, len(pairs) > 1)

  return usage, [load(name, part) for name, part in pairs]


def _load_run(
  saved: SavedCheckpoints,
  record: RunRecord,
  loras: Sequence[RequestedLoRA],
  finish: _Finish,
  *,
  mesh: Mesh,
  step: int | str | None,
  quantize: Quantize | None,
) -> list[Transformer]:
  """Loads what a run has trained; of two experts, also the one of its base that it has not.

  One after the other, so that an offloaded one makes room.
  """
  config, shape = record.config, transformer_config(record.config)
  experts = PretrainedCheckpoint.open(config.init_from).experts if config.init_from else (None,)
  own = [RequestedLoRA(each) for each in restore_loras(saved, record, step=step)] if config.lora.enabled else []
  parts = expert_configs(config)

  def load(part: RunConfig, loras: Sequence[RequestedLoRA]) -> Transformer:
    is_trained = part == config and not config.lora.enabled
    loaded = restore_transformer(saved, part, mesh, step=step) if is_trained else load_base(part, mesh)
    if not config.lora.enabled and quantize not in (None, Quantize.NONE):
      loaded = _quantize(*loaded, quantize)
    return finish(shape, Transformer(*loaded), loras, len(parts) > 1)

  return [load(part, loras) for part, loras in zip(parts, select_loras([*own, *loras], experts), strict=True)]


def _finish(
  config: DiTConfig,
  transformer: Transformer,
  loras: Sequence[RequestedLoRA],
  is_one_of_two: bool,
  *,
  mesh: Mesh,
  merged: bool,
  skip_unmatched: bool,
  offload: bool,
) -> Transformer:
  """Adds LoRAs to a transformer and, if it is one of two and that is asked for, moves it to host memory."""
  if loras:
    assert not isinstance(transformer.params, OffloadedParams)
    pairs = [(lora.weights, lora.weight) for lora in loras]
    graph, params = transformer.graph, transformer.params
    changed = add_loras(config, graph, params, pairs, mesh=mesh, merged=merged, skip_unmatched=skip_unmatched)
    transformer = Transformer(*changed)
  return transformer.offload() if is_one_of_two and offload else transformer


def _override(record: RunRecord, dtype: str | None, quantize: Quantize | None) -> RunRecord:
  values = {"model.dtype": dtype, "model.param_dtype": dtype} if dtype else {}
  if quantize and record.config.lora.enabled:
    values["base.quantize"] = str(quantize)
  return dataclasses.replace(record, config=override(record.config, values)) if values else record


def _quantize(
  graph: nnx.GraphDef, params: Mapping[str, Any], method: Quantize
) -> tuple[nnx.GraphDef, Mapping[str, Any]]:
  """Quantises a transformer that was trained whole, after it was loaded."""

  def quantize(params: Mapping[str, Any]) -> Mapping[str, Any]:
    model = nnx.merge(graph, params)
    quantize_linears(model.blocks, method)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))

  mesh = jax.tree.leaves(params)[0].sharding.mesh
  shardings = parameter_shardings(nnx.eval_shape(lambda: nnx.merge(graph, quantize(params))), mesh)
  return graph, jax.jit(quantize, out_shardings=shardings)(params)
