"""Loads pipelines from converted checkpoints and from training runs, with LoRAs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from univid_jax.checkpoints.built_in import locate, require_checkpoint
from univid_jax.checkpoints.checksums import verified
from univid_jax.checkpoints.pretrained import PretrainedCheckpoint, is_converted, require_no_step
from univid_jax.checkpoints.run import RunRecord, require_run
from univid_jax.checkpoints.run_parts import (
  base_encoders,
  open_base,
  open_encoders,
  transformer_config,
  with_stored_base,
)
from univid_jax.checkpoints.saved import SavedCheckpoints
from univid_jax.checkpoints.trained import expert_configs, load_base, restore_loras, restore_transformer, run_usage
from univid_jax.checkpoints.usage import Usage
from univid_jax.codecs.encoders import PretrainedEncoders
from univid_jax.config.boundary import override
from univid_jax.config.model import DTYPES
from univid_jax.config.schema import RunConfig
from univid_jax.core.checks import require_flag
from univid_jax.core.errors import UserError
from univid_jax.core.options import Attention, AttentionBackend, ContextTimestep, OnDamaged, Quantize, parse_option
from univid_jax.core.packed_row import ContextMode
from univid_jax.core.protocols import Encoders
from univid_jax.diffusion.distillations import Distillation
from univid_jax.inference.added_loras import add_to_transformer
from univid_jax.inference.distillation_loras import DistillationLoRAs, read_distillation
from univid_jax.inference.experts import Transformer
from univid_jax.inference.lora_specs import (
  LoRASpecs,
  RequestedLoRA,
  lora_usage,
  read_loras,
  select_loras,
  warn_of_other_context,
  warn_of_repetitions,
)
from univid_jax.inference.partial import PartialPipeline
from univid_jax.inference.pipeline import Pipeline
from univid_jax.models.layers import quantize_linears
from univid_jax.models.variants import DiTConfig
from univid_jax.parallel.mesh import make_mesh, require_mesh
from univid_jax.parallel.sharding import parameter_shardings

# Wan2.2's own for T2V-A14B, where the paper's shift would leave little to the high-noise expert.
A14B_SHIFT = 12.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
  """How `load_pipeline` loads, whatever it loads; see its arguments."""

  mesh: Mesh
  dtype: str | None
  quantize: Quantize | None
  merge_lora: bool
  lora_skip_unmatched: bool
  offload_inactive: bool
  attention: Attention | None
  context_timestep: ContextTimestep | None

  def make_pipeline(
    self,
    config: DiTConfig,
    transformers: Sequence[Transformer],
    *,
    encoders: Encoders,
    usage: Usage | None,
    distillation: Distillation | None,
  ) -> Pipeline:
    return Pipeline(
      config,
      transformers,
      encoders=encoders,
      mesh=self.mesh,
      usage=usage,
      attention=self.attention,
      context_timestep=self.context_timestep,
      distillation=distillation,
    )


def load_pipeline(
  checkpoint: str,
  lora: LoRASpecs | Mapping[str, LoRASpecs] | None = None,
  dtype: str | None = None,
  *,
  accelerate: str | Sequence[str] | DistillationLoRAs | None = None,
  lora_steps: Mapping[str, int] | None = None,
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
    lora: a LoRA file of any trainer, a folder of PEFT or of this project, or a workdir: one or several, each PATH,
      "PATH:w" or (PATH, w), with weight 1 by default. Where a LoRA alone makes W' of a tensor W, it adds w (W' - W).
      For a base with two experts {"high": ..., "low": ...} (or "both"); else metadata or names must say it.
    dtype: of transformer and encoders; by default bfloat16, or that of the run; of a base that was trained from scratch
      float32.
    accelerate: a distillation LoRA, `[EXPERT=]PATH[:WEIGHT][:KIND]`, or one per expert; see
      `diffusion.distillations`.
    lora_steps: checkpoints of the workdirs in `lora`, by path as it is there; by default the latest.
    merge_lora: adds LoRAs to the weights instead of computing them separately.
    lora_skip_unmatched: leaves out, with a warning, tensors of LoRAs that have no counterpart in the base.
    offload_inactive: keeps the expert that is not in use in host memory.
    mesh: the devices, with the axes of `parallel.mesh.make_mesh`; by default all, with parameters sharded over them.
    attention, context_timestep: "full" or "context_causal", "target" or "zero"; by default those of training.
    quantize: "int8", "fp8" or "nf4", of the blocks' linear weights; by default as they are stored or were trained.
    step: checkpoint of a workdir: a number, "best" (the lowest validation loss) or None for the latest.
    verify_weights: compares every file with its checksum while the weights are loaded.
    on_damaged_checkpoint: "fallback" takes the newest that is intact if the latest of a workdir is not, "stop" raises.

  Raises:
    FileNotFoundError: there is no such checkpoint, run or LoRA.
    UserError: an option is unknown, of another type or does not apply, one of these cannot be read or differs from its
      checksum (DamagedError), or a LoRA is for another base.
  """
  require_checkpoint(checkpoint)
  verify_weights = require_flag("verify_weights", verify_weights)
  on_damaged = parse_option(OnDamaged, "on_damaged_checkpoint", on_damaged_checkpoint)
  attends, timestep = _parse_context(attention, context_timestep)
  options = _Options(
    mesh=make_mesh({"data": 1, "fsdp": -1}) if mesh is None else require_mesh(mesh),
    dtype=None if dtype is None else _parse_dtype(dtype),
    quantize=None if quantize is None else parse_option(Quantize, "quantize", quantize),
    merge_lora=require_flag("merge_lora", merge_lora),
    lora_skip_unmatched=require_flag("lora_skip_unmatched", lora_skip_unmatched),
    offload_inactive=require_flag("offload_inactive", offload_inactive),
    attention=attends,
    context_timestep=timestep,
  )
  is_base = is_converted(checkpoint)
  if is_base:
    require_no_step(checkpoint, step)
  loras = read_loras(lora, verify=verify_weights, steps=lora_steps)
  distillation = None if accelerate in (None, [], ()) else read_distillation(accelerate, verify=verify_weights)
  loras += distillation.loras if distillation else ()
  kind = distillation and distillation.kind
  if is_base:
    with verified(locate(checkpoint), enabled=verify_weights):
      return _open_base(checkpoint, loras, options, distillation=kind)
  record = _override(require_run(checkpoint), options)
  saved = SavedCheckpoints(checkpoint, model_only=True, verify=verify_weights, on_damaged=on_damaged)
  with verified(record.config.init_from and locate(record.config.init_from), enabled=verify_weights):
    return _open_run(saved, record, loras, options, step=step, distillation=kind)


def _parse_dtype(dtype: DTypeLike) -> str:
  """Returns the name of a dtype; raises UserError if it is unknown, or none that models are computed in."""
  try:
    name = jnp.dtype(dtype).name
  except TypeError:
    name = ""
  if name not in DTYPES:
    raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
  return name


def _parse_context(
  attention: str | None, context_timestep: str | None
) -> tuple[Attention | None, ContextTimestep | None]:
  """Returns the options of the context; raises UserError if one is unknown, or they exclude each other."""
  attends = None if attention is None else parse_option(Attention, "attention", attention)
  timestep = None
  if context_timestep is not None:
    timestep = parse_option(ContextTimestep, "context_timestep", context_timestep)
    ContextMode.from_options(attends or Attention.FULL, timestep, default=ContextTimestep.TARGET)
  return attends, timestep


def _open_base(
  checkpoint: str, loras: Sequence[RequestedLoRA], options: _Options, *, distillation: Distillation | None
) -> Pipeline:
  """Loads a converted checkpoint, which may lack components."""
  base, mesh = PretrainedCheckpoint.open(checkpoint), options.mesh
  default = "bfloat16" if base.info.codec is None else "float32"  # what this project trains from scratch is small
  dtype = jnp.dtype(options.dtype or default)
  encoders = base_encoders(base, mesh, dtype=dtype)
  if not base.transformers:
    reason = base.explain_missing("transformer")
    if isinstance(encoders, PretrainedEncoders) and not loras:
      return PartialPipeline(encoders, mesh=mesh, reason=reason)
    raise UserError(reason)
  usage, transformers = _load_base(base, loras, options, dtype=dtype)
  return options.make_pipeline(
    base.config("transformer"), transformers, encoders=encoders, usage=usage, distillation=distillation
  )


def _open_run(
  saved: SavedCheckpoints,
  record: RunRecord,
  loras: Sequence[RequestedLoRA],
  options: _Options,
  *,
  step: int | str | None,
  distillation: Distillation | None,
) -> Pipeline:
  """Loads the model of a run."""
  usage, transformers = _load_run(saved, record, loras, options, step=step)
  encoders = open_encoders(record.config, options.mesh)
  return options.make_pipeline(
    transformer_config(record.config), transformers, encoders=encoders, usage=usage, distillation=distillation
  )


def _load_base(
  base: PretrainedCheckpoint, loras: Sequence[RequestedLoRA], options: _Options, *, dtype: DTypeLike
) -> tuple[Usage | None, list[Transformer]]:
  """Loads the transformers of a converted checkpoint one after another, and returns how their LoRAs are run."""
  warn_of_repetitions(loras)
  selected = select_loras(loras, base.experts)
  pairs = list(zip(base.transformers, selected, strict=True))
  wanted = options.quantize or Quantize.NONE
  quantize = {base.quantization(name, wanted) for name in base.transformers}
  usage = lora_usage(
    [(each, base.checksum(name)) for name, part in pairs for each in part],
    attention=options.attention,
    context_timestep=options.context_timestep,
    quantize=quantize.pop(),
  )
  if usage is None and (usage := base.usage):
    asked = {"attention": options.attention, "context_timestep": options.context_timestep}
    warn_of_other_context(str(base.folder), usage, **asked)
  config = base.config("transformer")
  if usage is None and len(pairs) > 1 and not config.takes_condition:
    usage = Usage(shift=A14B_SHIFT, is_known=False)

  def load(name: str, part: Sequence[RequestedLoRA]) -> Transformer:
    transformer = Transformer(*base.load(name, mesh=options.mesh, dtype=dtype, quantize=wanted))
    return _finish(config, transformer, part, options, is_one_of_two=len(pairs) > 1)

  return usage, [load(name, part) for name, part in pairs]


def _load_run(
  saved: SavedCheckpoints,
  record: RunRecord,
  loras: Sequence[RequestedLoRA],
  options: _Options,
  *,
  step: int | str | None,
) -> tuple[Usage | None, list[Transformer]]:
  """Loads the transformers a run trained and, of two experts, the untrained one from its base.

  They are loaded one after the other, so that an offloaded one makes room. Also returns how they are run.
  """
  config, shape, mesh = record.config, transformer_config(record.config), options.mesh
  base, parts = open_base(config), expert_configs(config)
  experts = base.experts if base else (None,)
  own = [RequestedLoRA(each) for each in restore_loras(saved, record, step=step)] if config.lora.enabled else []
  warn_of_repetitions([*own, *loras])
  added = select_loras(loras, experts)
  checksums = [""] * len(experts)
  if base is not None and config.lora.enabled:
    checksums = [base.checksum(name) for name in base.transformers]
  usage = lora_usage(
    [(lora, checksum) for checksum, part in zip(checksums, added, strict=True) for lora in part],
    attention=options.attention,
    context_timestep=options.context_timestep,
    quantize=with_stored_base(config).base.quantize if config.lora.enabled else options.quantize or Quantize.NONE,
    run=("the run", run_usage(record)),
  )

  def load(part: RunConfig, loras: Sequence[RequestedLoRA]) -> Transformer:
    is_trained = part == config and not config.lora.enabled
    loaded = restore_transformer(saved, part, mesh, step=step) if is_trained else load_base(part, mesh)
    if not config.lora.enabled and options.quantize not in (None, Quantize.NONE):
      loaded = _quantize(*loaded, options.quantize)
    return _finish(shape, Transformer(*loaded), loras, options, is_one_of_two=len(parts) > 1)

  each = zip(parts, select_loras(own, experts), added, strict=True)
  return usage, [load(part, [*first, *then]) for part, first, then in each]


def _finish(
  config: DiTConfig, transformer: Transformer, loras: Sequence[RequestedLoRA], options: _Options, *, is_one_of_two: bool
) -> Transformer:
  """Adds LoRAs to a transformer and, if it is one of two and that is asked for, moves it to host memory."""
  merged, skip = options.merge_lora, options.lora_skip_unmatched
  transformer = add_to_transformer(config, transformer, loras, mesh=options.mesh, merged=merged, skip_unmatched=skip)
  return transformer.offload() if is_one_of_two and options.offload_inactive else transformer


def _override(record: RunRecord, options: _Options) -> RunRecord:
  # The backend that suits this machine, which may lack what the run was trained on.
  values: dict[str, Any] = {"model.attention_backend": AttentionBackend.AUTO}
  if options.dtype:
    values |= {"model.dtype": options.dtype, "model.param_dtype": options.dtype}
  if options.quantize and record.config.lora.enabled:
    values["base.quantize"] = str(options.quantize)
  return dataclasses.replace(record, config=override(record.config, values))


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
