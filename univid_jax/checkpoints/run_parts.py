"""The parts of a run that depend on its base: shapes of transformer and latents, a model to train, the encoders."""

import contextlib
import dataclasses
import math
import shlex

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from univid_jax.checkpoints.mistaken import describe_mistaken
from univid_jax.checkpoints.pretrained import PretrainedCheckpoint
from univid_jax.checkpoints.run import read_run
from univid_jax.codecs.dct import DCTCodec
from univid_jax.codecs.encoders import PlainEncoders, PretrainedEncoders
from univid_jax.codecs.tiling import Tiling
from univid_jax.codecs.vae_config import find_autoencoder
from univid_jax.config.boundary import override
from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import UserError, name_key
from univid_jax.core.options import Expert, Quantize, TrainedExpert
from univid_jax.core.packed_row import ContextMode
from univid_jax.core.protocols import CodecShape, Encoders
from univid_jax.core.seeds import random_key
from univid_jax.diffusion.flow import REFERENCE_TOKENS, FlowMatching
from univid_jax.models.dit import DiT
from univid_jax.models.in_context import look_back
from univid_jax.models.layers import quantize_linears
from univid_jax.models.lora import attach
from univid_jax.models.umt5 import UMT5Config
from univid_jax.models.variants import VARIANTS, DiTConfig

# Pixels along each side of a patch: the autoencoder's stride times the patch's.
WAN21_PATCH_PIXELS = 16


def open_base(config: RunConfig) -> PretrainedCheckpoint | None:
  """Opens the base of a run, which reads its checkpoint.json; None if the run starts from scratch.

  Raises:
    FileNotFoundError: it is not a converted checkpoint; the message says what it is, and what to do.
    UserError: see `PretrainedCheckpoint.open`.
  """
  if not config.init_from:
    return None
  with name_key("init_from"):
    try:
      return PretrainedCheckpoint.open(config.init_from)
    except FileNotFoundError as error:
      raise FileNotFoundError(f"{error}{_explain_no_base(config.init_from)}") from error


def _explain_no_base(path: str) -> str:
  """Returns the end of a message about a path that is not a base: what it is, and what to do."""
  record = None
  with contextlib.suppress(UserError):  # its config.json describes something else
    record = read_run(path)
  if record is None:
    advice = "training starts from a base, to which it adds a new LoRA; name the base"
    hint = describe_mistaken(path, use_of_lora=advice)
    return hint or "; create one with python -m univid_jax.convert SRC DST"
  source, base = shlex.quote(path), record.config.init_from
  own = f"only the same run continues it: --workdir={source} with a larger config.num_steps"
  if record.config.lora.enabled and base:
    return f"; it is the workdir of a run that trained a LoRA on {base}: name its base instead, as {own}"
  if record.config.lora.enabled:
    return f"; it is the workdir of a run that trained a LoRA on random weights: {own}"
  if base:
    return f"; it is the workdir of a run that trained all of {base}, which is no base: {own}"
  return f"; it is the workdir of a run: python -m univid_jax.convert {source} DST makes a base of it"


def transformer_config(config: RunConfig) -> DiTConfig:
  """Returns the transformer's shape: the base's, a published model's, or the config's own.

  Raises:
    UserError: there is no such published model, or the base is another one.
  """
  return _transformer_config(config, open_base(config))


def _transformer_config(config: RunConfig, base: PretrainedCheckpoint | None) -> DiTConfig:
  options = config.model
  if options.variant and options.variant not in VARIANTS:
    raise UserError(f"config.model.variant must be one of {', '.join(VARIANTS)} or empty, got {options.variant!r}")
  if base is not None:
    shape = base.config(trained_component(split_config(config)[0], base))
    if options.variant and shape != VARIANTS[options.variant]:
      raise UserError(
        f"config.model.variant is {options.variant}, but the base {config.init_from} has another shape; "
        "--config.model.variant= takes the base's"
      )
    return shape
  if options.variant:
    return VARIANTS[options.variant]
  channels = config.codec.latent_channels
  return DiTConfig(
    dim=options.dim,
    ffn_dim=options.ffn_dim,
    num_heads=options.num_heads,
    num_layers=options.num_layers,
    freq_dim=options.freq_dim,
    text_dim=options.text_dim,
    in_dim=channels,
    out_dim=channels,
    rope_theta=options.rope_theta,
    rope_scale=options.rope_scale,
  )


def split_config(config: RunConfig) -> list[RunConfig]:
  """Returns one config for each expert that a run trains, as if a run of its own trained it."""
  expert = config.model.expert
  return [config if part == expert else override(config, {"model.expert": str(part)}) for part in expert.parts]


def trained_component(config: RunConfig, base: PretrainedCheckpoint) -> str:
  """Returns the name of the component of its base that a run of one transformer trains.

  Raises:
    UserError: the base has no such expert, or has two and the config does not say which.
  """
  expert = config.model.expert
  experts = dict(zip(base.experts, base.transformers, strict=True)) if base.transformers else {}
  if expert == TrainedExpert.ONLY:
    if len(experts) > 1:
      raise UserError(
        f"{config.init_from} has two experts: set config.model.expert to both, or to high or low to train one of them"
      )
    return "transformer"
  if Expert.UNKNOWN in experts:
    return experts[Expert.UNKNOWN]
  (wanted,) = expert.experts
  if wanted not in experts:
    found = next(iter(experts), None)
    raise UserError(
      f"config.model.expert is {expert}, but {config.init_from} "
      + (f"is the {found}-noise expert" if found else "has a transformer for all noise levels: set it to only")
    )
  return experts[wanted]


def check_base(config: RunConfig) -> None:
  """Checks that a run has the base that it needs, with the expert to train, and noise levels to validate it at.

  Raises:
    UserError: it does not; see also `trained_component` and `validated_sigmas`.
  """
  needs_base = {
    "config.model.expert": config.model.expert != TrainedExpert.ONLY,
    "config.model.variant": config.model.variant,
  }
  for key, value in needs_base.items():
    if value and not config.init_from:
      raise UserError(f"{key} needs a base: set config.init_from to a folder written by univid-convert")
  base = open_base(config)
  for part in split_config(config):
    if base is not None:
      trained_component(part, base)
    _base_quantization(part, base)
    if config.validation.every_steps:
      _validated_sigmas(part, base)


def _base_quantization(config: RunConfig, base: PretrainedCheckpoint | None) -> Quantize:
  """Returns how the base of a run of one transformer is quantised: by the run, or as stored.

  Raises:
    UserError: the base is trained, or is stored in another quantisation.
  """
  method = config.base.quantize
  if base is not None:
    method = base.quantization(trained_component(config, base), method)
  if method != Quantize.NONE and not config.lora.enabled:
    raise UserError(
      f"a base in {method} cannot be trained, only adapters on it: set config.lora.rank, or config.base.quantize to "
      "none and config.init_from to a base in floats"
    )
  return method


def with_stored_base(config: RunConfig) -> RunConfig:
  """Returns a config that names the quantisation of its base, which may come from the stored files.

  Raises:
    UserError: the base is trained, or is stored in another quantisation.
  """
  return override(config, {"base.quantize": str(_base_quantization(split_config(config)[0], open_base(config)))})


def validated_sigmas(config: RunConfig) -> list[float]:
  """Returns the validation noise levels that a run of one transformer trains; raises UserError if there are none."""
  return _validated_sigmas(config, open_base(config))


def _validated_sigmas(config: RunConfig, base: PretrainedCheckpoint | None) -> list[float]:
  low, high = _noise_range(config, base)
  sigmas = [sigma for sigma in config.validation.sigmas if np.float32(low) <= np.float32(sigma) < np.float32(high)]
  if not sigmas:
    raise UserError(
      f"config.validation.sigmas must have a noise level of the {config.model.expert}-noise expert, from {low:g} to "
      f"{min(high, 1):g}, got {config.validation.sigmas}"
    )
  return sigmas


def _noise_range(config: RunConfig, base: PretrainedCheckpoint | None) -> tuple[float, float]:
  """Returns the noise levels [low, high) of the transformer that a run trains; the upper range always includes 1."""
  boundary = _transformer_config(config, base).expert_boundary
  ranges = {TrainedExpert.HIGH: (boundary, math.inf), TrainedExpert.LOW: (0.0, boundary)}
  return ranges.get(config.model.expert, (0.0, math.inf))


def make_flow(config: RunConfig) -> FlowMatching:
  """Returns how a run of one transformer draws noise levels.

  RESOLUTION_SHIFT depends on the number of tokens, of which TI2V's autoencoder yields a quarter; with this project's
  codec they are counted as with Wan2.1's.
  """
  reference, base = REFERENCE_TOKENS, open_base(config)
  if base is not None or config.model.variant:
    reference = reference * WAN21_PATCH_PIXELS**2 // _patch_strides(config, base)[1] ** 2
  return FlowMatching.from_config(config.flow, noise_range=_noise_range(config, base), reference_tokens=reference)


def context_mode(config: RunConfig) -> ContextMode:
  """Returns how a run computes the context of sentences.

  Raises:
    UserError: see `transformer_config` and `ContextMode.from_options`.
  """
  default = transformer_config(config).context_timestep
  return ContextMode.from_options(config.model.attention, config.model.context_timestep, default=default)


def codec_shape(config: RunConfig) -> CodecShape:
  """Returns the shape of the codec, from configs alone: the base's, a published model's, or the config's own.

  Raises:
    UserError: see `transformer_config`.
  """
  return _codec_shape(config, open_base(config))


def _codec_shape(config: RunConfig, base: PretrainedCheckpoint | None) -> CodecShape:
  if base is not None:
    if base.has("vae"):
      return base.config("vae")
    if base.info.codec is not None:
      return DCTCodec(**base.info.codec)
  elif not config.model.variant:
    return DCTCodec(**dataclasses.asdict(config.codec))
  return find_autoencoder(_transformer_config(config, base).out_dim)


def patch_strides(config: RunConfig) -> tuple[int, int]:
  """Returns the frames per latent frame, and the pixels along each side of a patch; see `codec_shape`."""
  return _patch_strides(config, open_base(config))


def _patch_strides(config: RunConfig, base: PretrainedCheckpoint | None) -> tuple[int, int]:
  codec = _codec_shape(config, base)
  return codec.temporal_stride, codec.spatial_stride * _transformer_config(config, base).patch_size[1]


def text_encoder_shape(config: RunConfig) -> UMT5Config:
  """Returns the shape of the text encoder, from configs alone: the base's, or the published models'.

  Raises:
    UserError: the model, or its base, is trained from scratch and has no text encoder.
  """
  base = open_base(config)
  if base is not None and base.has("text_encoder"):
    return base.config("text_encoder")
  if base is not None and base.info.codec is not None:
    raise UserError(
      f"{config.init_from} was trained from scratch without a text encoder: its only prompt is the null prompt"
    )
  if base is None and not config.model.variant:
    raise UserError("a model from scratch has no text encoder: its only prompt is the null prompt")
  return UMT5Config()


def create_model(config: RunConfig, *, adapters: bool = True) -> DiT:
  """Creates a model with random weights from the config's seed, quantised like its base.

  Call it under `nnx.eval_shape` or `jax.jit` if the weights must not all be on one device.

  Args:
    config: of the run.
    adapters: whether to attach the config's LoRA.
  """
  options, base, rngs = config.model, open_base(config), nnx.Rngs(random_key(config.seed))
  model = DiT(
    _transformer_config(config, base),
    dtype=jnp.dtype(options.dtype),
    param_dtype=jnp.dtype(options.param_dtype),
    remat=options.remat,
    attention_backend=options.attention_backend,
    rngs=rngs,
  )
  if options.look_back:
    look_back(model, options.look_back, rng=rngs.params())
  quantize_linears(model.blocks, _base_quantization(split_config(config)[0], base))
  if adapters and config.lora.enabled:
    attach(model, config.lora, rngs=nnx.Rngs(random_key(config.seed + 1)))
  return model


def open_encoders(config: RunConfig, mesh: Mesh) -> Encoders:
  """Returns the base's codec and encoders, or those that need no weights."""
  base = open_base(config)
  if base is None:
    return PlainEncoders(DCTCodec(**dataclasses.asdict(config.codec)), transformer_config(config).text_dim)
  tiling = Tiling(**dataclasses.asdict(config.vae_tiling)) if config.vae_tiling.size else None
  return base_encoders(base, mesh, dtype=jnp.dtype(config.model.dtype), tiling=tiling)


def base_encoders(
  base: PretrainedCheckpoint, mesh: Mesh, *, dtype: DTypeLike, tiling: Tiling | None = None
) -> PlainEncoders | PretrainedEncoders:
  """Returns a base's codec and encoders; arguments as for `PretrainedEncoders`."""
  if base.info.codec is not None:
    return PlainEncoders(DCTCodec(**base.info.codec), base.config("transformer").text_dim)
  return PretrainedEncoders(base, mesh, dtype=dtype, tiling=tiling)


def base_checksums(config: RunConfig) -> tuple[str, ...]:
  """Returns the checksum of each transformer that training starts from; one "" without a base."""
  base = open_base(config)
  if base is None:
    return ("",)
  return tuple(base.checksum(trained_component(part, base)) for part in split_config(config))
