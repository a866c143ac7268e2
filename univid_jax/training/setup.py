"""Sets up what a run needs before its first step: devices, data, base and the description of its state."""

import dataclasses
import functools
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

import univid_jax
from univid_jax.checkpoints.built_in import locate
from univid_jax.checkpoints.checksums import verified
from univid_jax.checkpoints.run import RunRecord, has_checkpoint, require_run
from univid_jax.checkpoints.run_parts import (
  base_checksums,
  check_base,
  codec_shape,
  context_mode,
  open_base,
  open_encoders,
  split_config,
  transformer_config,
  with_stored_base,
)
from univid_jax.checkpoints.sentence_lengths import check_rows
from univid_jax.checkpoints.trained import expert_configs, load_base, run_usage
from univid_jax.config.schema import CodecConfig, ModelConfig, RunConfig
from univid_jax.core.checks import require_flag, require_folder
from univid_jax.core.errors import UserError, name_key
from univid_jax.core.options import AttentionBackend, TrainedExpert
from univid_jax.core.paths import bucket_errors
from univid_jax.core.protocols import Encoders
from univid_jax.core.sentence import Sentence
from univid_jax.data.features import FeatureCaches, FeatureMaker
from univid_jax.data.prepare import PreparationReport, prepare
from univid_jax.data.rows.packing import RowShape
from univid_jax.data.sources.open import DataSources, open_data, require_config, require_sources
from univid_jax.data.sources.unused_keys import adapt_clips
from univid_jax.inference.distillation_loras import DistillationLoRAs, read_distillation
from univid_jax.inference.experts import Transformer
from univid_jax.inference.pipeline import Pipeline
from univid_jax.models.lora import join
from univid_jax.models.variants import DiTConfig
from univid_jax.parallel.mesh import make_mesh
from univid_jax.platform.current import Platform, current_platform
from univid_jax.training.same_run import check_same_data, check_same_run
from univid_jax.training.state import Params, StateSpec, describe_training
from univid_jax.training.validation import leave_out_unusable, select_sentences

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """The parts of a run that stay the same from the first step to the last.

  Attributes:
    record: the config, and whatever else identifies the run.
    workdir: a folder or a bucket.
    mesh: the devices.
    shape: shape of the transformer.
    optimizers: one for each transformer that is trained.
    spec: description of the training state.
    base_graph: the transformer without adapters if adapters are trained, else None.
    frozen: parameters that are not trained; those of both experts by name, see `TrainedExpert.join_trees`.
    encoders: encoders of clips and prompts.
    data: where sentences come from.
    features: encodes sentences, with filled caches.
    validation: the sentences to validate on, if the run validates.
    distillation: the distillation LoRAs for sampling previews, if any.
  """

  record: RunRecord
  workdir: str
  mesh: Mesh
  shape: DiTConfig
  optimizers: Sequence[optax.GradientTransformation]
  spec: StateSpec
  base_graph: nnx.GraphDef | None
  frozen: Params
  encoders: Encoders
  data: DataSources
  features: FeatureMaker
  validation: Sequence[Sentence]
  distillation: DistillationLoRAs | None

  @property
  def config(self) -> RunConfig:
    return self.record.config

  @functools.cached_property
  def _untrained(self) -> dict[TrainedExpert, Transformer]:
    """The base's untrained expert, by name; a run of one process keeps it in host memory until it is used."""
    others = {part.model.expert: part for part in expert_configs(self.config)}
    for part in self.config.model.expert.parts:
      del others[part]
    loaded = {expert: Transformer(*load_base(part, self.mesh)) for expert, part in others.items()}
    return loaded if jax.process_count() > 1 else {expert: each.offload() for expert, each in loaded.items()}

  def create_pipeline(self, params: Params) -> Pipeline:
    """Returns the model trained so far, for sampling."""
    expert = self.config.model.expert
    parts = zip(expert.split_tree(self.frozen), expert.split_tree(params), strict=True)
    return self.complete([Transformer(self.spec.graph, join(frozen, trained)) for frozen, trained in parts])

  def complete(self, trained: Sequence[Transformer]) -> Pipeline:
    """Returns a pipeline of the trained transformers and, if only one of two experts is trained, the other."""
    transformers = dict(zip(self.config.model.expert.parts, trained, strict=True)) | self._untrained
    return Pipeline(
      self.shape,
      [transformers[expert] for expert in TrainedExpert if expert in transformers],
      encoders=self.encoders,
      mesh=self.mesh,
      usage=run_usage(self.record),
    )


def set_up_run(
  config: RunConfig, workdir: epath.PathLike, *, data: DataSources | None = None, verify_weights: bool = True
) -> Run:
  """Opens the data of a run, fills its caches and loads its base.

  Args:
    config: config of the run.
    workdir: a folder or a bucket.
    data: sources of your own; by default those that the config names.
    verify_weights: whether to compare every file of the base (while the data is opened) and of the previews' LoRAs with
      its checksum.

  Raises:
    DamagedError: a file of the base differs from its checksum.
    UserError: a value of the config is invalid for a run, or a record of the data cannot be used.
    OSError: a file cannot be read.
  """
  workdir = check_arguments(config, workdir, data=data, verify_weights=verify_weights)
  config = check_config(config)
  check_backend(config)
  with bucket_errors(workdir):
    epath.Path(workdir).mkdir(parents=True, exist_ok=True)
  base = open_base(config)
  record = RunRecord(
    config, base_checksums(config), univid_jax.__version__, base_contents=base.contents if base else {}
  )
  if has_checkpoint(workdir):
    check_same_run(workdir, require_run(workdir), record)  # before anything in the workdir is changed
  files = config.validation.accelerate if config.validation.every_steps else ()
  with name_key("validation.accelerate"):
    distillation = read_distillation(files, verify=verify_weights) if files else None
  mesh = make_mesh(config.mesh)
  with verified(config.init_from and locate(config.init_from), enabled=verify_weights):
    shape = transformer_config(config)
    optimizers, spec = describe_training(config, mesh)
    encoders = open_encoders(config, mesh)
    if config.data.stream_processes and encoders.has_weights:
      raise UserError(
        "config.data.stream_processes is for bases without an autoencoder: latents are encoded on the devices, which "
        "other processes cannot use; leave it off and run univid-prepare first"
      )
    data = open_data(config) if data is None else data
    if jax.process_index() == 0:  # it warns of what all processes find
      data.report(config.data)
    data.require_usable(config.data)
  check_same_data(workdir, data, config)
  features = open_features(config, encoders, data, workdir)
  validation = select_sentences(data, config) if config.validation.every_steps else []
  if features.caches is not None:
    fill_caches(config, features, data, validation)
  row_shape = RowShape.from_config(config.rows, context_mode(config))
  validation = leave_out_unusable(validation, features, row_shape, allow_dropped=config.data.allow_dropped)
  base_graph, frozen = None, {}
  if config.lora.enabled:
    bases = [load_base(part, mesh) for part in split_config(config)]
    base_graph, frozen = bases[0][0], config.model.expert.join_trees([params for _, params in bases])
  return Run(
    record=dataclasses.replace(record, prompts=data.prompts, adapts_clips=adapt_clips(data.sources.values())),
    workdir=workdir,
    mesh=mesh,
    shape=shape,
    optimizers=optimizers,
    spec=spec,
    base_graph=base_graph,
    frozen=frozen,
    encoders=encoders,
    data=data,
    features=features,
    validation=validation,
    distillation=distillation,
  )


def check_arguments(
  config: RunConfig, workdir: epath.PathLike, *, data: DataSources | None, verify_weights: bool
) -> str:
  """Returns the workdir as text.

  Raises:
    UserError: an argument of `set_up_run` has another type, or the workdir is not named.
  """
  require_config(config)
  if data is not None:
    require_sources(data)
  require_flag("verify_weights", verify_weights)
  return require_folder("workdir", workdir)


def ignored_options(config: RunConfig) -> list[str]:
  """Returns `KEY = VALUE (what applies instead)` for values of a config that its base, or variant, overrides.

  Values that equal the defaults are not listed, since the user may not have set them.
  """
  ignored = []
  codec = codec_shape(config)
  if config.vae_tiling.size and not codec.has_weights:
    ignored.append(f"config.vae_tiling.size = {config.vae_tiling.size} (for autoencoders only)")
  if not (config.init_from or config.model.variant):
    return ignored
  names = ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "rope_theta", "rope_scale")
  sections = (
    ("model", names, ModelConfig(), transformer_config(config)),
    ("codec", ("latent_channels", "spatial_stride"), CodecConfig(), codec),
  )
  for section, names, defaults, holds in sections:
    values = {name: getattr(getattr(config, section), name) for name in names}
    for name, value in values.items():
      if value not in (getattr(defaults, name), getattr(holds, name)):
        ignored.append(f"config.{section}.{name} = {value} (it is {getattr(holds, name)})")
  if config.init_from and config.model.look_back not in ((), ModelConfig().look_back):
    ignored.append(f"config.model.look_back = {config.model.look_back} (for new weights only)")
  return ignored


def check_config(config: RunConfig) -> RunConfig:
  """Checks what depends on the base; returns the config with the quantisation of its base.

  Raises:
    UserError: a value is invalid for a run.
  """
  check_rows(config)
  check_base(config)
  check_precision(config)
  if ignored := ignored_options(config):
    decider = config.init_from or config.model.variant
    log.warning("ignored%s: %s", f", because {decider} sets them" if decider else "", ", ".join(ignored))
  return with_stored_base(config)


def check_backend(config: RunConfig) -> None:
  """Raises UserError if the attention backend cannot run on this machine."""
  platform = current_platform()
  if config.model.attention_backend == AttentionBackend.CUDNN and platform != Platform.GPU:
    raise UserError(
      f"config.model.attention_backend = cudnn needs an NVIDIA GPU, and JAX runs on a {str(platform).upper()} here: "
      "leave it at auto"
    )


def check_precision(config: RunConfig) -> None:
  """Checks that small gradients and updates are not lost; only warns of the latter.

  Raises:
    UserError: a model that computes in float16 cannot be trained.
  """
  model = config.model
  if model.dtype == "float16":
    raise UserError(
      "config.model.dtype = float16 loses small gradients, as the loss is not scaled: train in bfloat16 or float32"
    )
  if model.param_dtype != "float32" and not config.lora.enabled:
    log.warning(
      "config.model.param_dtype = %s, and all weights are trained: updates below about 1/%d of a weight are rounded "
      "away; use float32",
      model.param_dtype,
      round(3 / float(jnp.finfo(model.param_dtype).eps)),
    )


def open_features(config: RunConfig, encoders: Encoders, data: DataSources, workdir: str) -> FeatureMaker:
  """Returns the encoder of a run's sentences, with the run's caches if there is anything to cache.

  Raises:
    UserError: tasks have prompts, and there is no text encoder.
  """
  if any(data.prompts.values()) and not encoders.has_weights:
    model = config.init_from or "a model from scratch"
    raise UserError(f"config.data.prompt = {config.data.prompt} needs a text encoder, and {model} has none: use null")
  return FeatureMaker(
    encoders,
    shape=transformer_config(config),
    task_names=data.task_names,
    caches=FeatureCaches.open(config, encoders, workdir),
    clip_gap=config.model.clip_gap,
  )


def fill_caches(
  config: RunConfig, features: FeatureMaker, data: DataSources, validation: Sequence[Sentence], *, verify: bool = False
) -> PreparationReport:
  """Fills the caches with what training and validation read; see `data.prepare.prepare`."""
  return prepare(
    features,
    data,
    row_shape=RowShape.from_config(config.rows, context_mode(config)),
    held_out=validation,
    allow_dropped=config.data.allow_dropped,
    verify=verify,
  )
