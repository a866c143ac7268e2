"""The JSON files of releases: config.json of each component, and the pipeline files of diffusers."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from univid_jax.checkpoints.info import CheckpointInfo
from univid_jax.checkpoints.pretrained import PretrainedCheckpoint
from univid_jax.checkpoints.tensor_files import TensorInfo
from univid_jax.checkpoints.usage import Usage
from univid_jax.codecs.vae_config import VAEConfig
from univid_jax.config.schema import CodecConfig
from univid_jax.convert.component_configs import default_model_type, infer_config
from univid_jax.core.errors import UserError
from univid_jax.core.options import ModelType
from univid_jax.core.text import describe_value
from univid_jax.models.umt5 import UMT5Config
from univid_jax.models.variants import DiTConfig

_OFFICIAL_KEYS = (
  "dim",
  "eps",
  "ffn_dim",
  "freq_dim",
  "in_dim",
  "model_type",
  "num_heads",
  "num_layers",
  "out_dim",
  "text_len",
)
# What a transformer's config.json says of a model that this project trained, besides its shape.
_OWN_KEY = "univid_jax"


def official_config(config: DiTConfig) -> dict[str, Any]:
  """Returns the official release's config.json, and what differs from its defaults; `DiTConfig.from_json` reads it.

  Only `image_dim`, which means nothing but for I2V models, is left to their tensors, as in the releases.
  """
  fields = (field for field in dataclasses.fields(config) if field.name != "image_dim")
  others = [field.name for field in fields if getattr(config, field.name) != field.default]
  keys = dict.fromkeys([*_OFFICIAL_KEYS, *others])
  return {"_class_name": "WanModel", **{key: getattr(config, key) for key in keys}}


def own_entries(info: CheckpointInfo) -> dict[str, Any]:
  """Returns what a transformer's config.json says of a model that this project trained; {} for other models."""
  values = {"codec": info.codec, "usage": info.usage}
  return {_OWN_KEY: {key: value for key, value in values.items() if value is not None}} if any(values.values()) else {}


def read_own_entries(values: Mapping[str, Any], source: str) -> dict[str, Any]:
  """Returns the fields of `CheckpointInfo` that `own_entries` wrote.

  Args:
    values: of the transformer's config.json.
    source: names it in messages.

  Raises:
    UserError: they are damaged.
  """
  own = values.get(_OWN_KEY, {})
  try:
    if codec := own.get("codec"):
      CodecConfig(**codec)
    if usage := own.get("usage"):
      Usage.from_metadata(usage, source=source)
  except (AttributeError, TypeError, UserError) as error:
    raise UserError(f"{source} has {_OWN_KEY} = {describe_value(own)}: {error}") from error
  return {"codec": codec, "usage": usage}


def require_readable(component: str, config: Any, infos: Mapping[str, TensorInfo], values: Mapping[str, Any]) -> None:
  """Checks that a component's tensors and config.json tell all of its config.

  Args:
    component: its name.
    config: to be told.
    infos: the tensors by official name.
    values: of config.json; {} if the layout has none.

  Raises:
    UserError: a field would be lost.
  """
  found = infer_config(component.removesuffix("_2"), infos, json.loads(json.dumps(values)))
  if isinstance(config, DiTConfig) and not config.takes_condition:
    found = dataclasses.replace(found, image_dim=config.image_dim)  # means nothing
  lost = [
    field.name for field in dataclasses.fields(config) if getattr(found, field.name) != getattr(config, field.name)
  ]
  if lost:
    described = ", ".join(f"{name} = {describe_value(getattr(config, name))}" for name in lost)
    raise UserError(
      f"this layout cannot say that the {component} has {described}: what is written would be another model"
    )


def diffusers_config(config: DiTConfig | VAEConfig | UMT5Config) -> dict[str, Any]:
  """Returns the config.json of the class of diffusers (or transformers) that has the component's shape."""
  match config:
    case DiTConfig():
      return _diffusers_transformer(config)
    case VAEConfig():
      return _diffusers_vae(config)
    case UMT5Config():
      return _transformers_text_encoder(config)


def _diffusers_transformer(config: DiTConfig) -> dict[str, Any]:
  image = {"image_dim": config.image_dim, "added_kv_proj_dim": config.dim} if config.takes_image_features else {}
  # Not arguments of the class: its pipelines get the length of prompts and `expand_timesteps` themselves.
  others: dict[str, Any] = {"text_len": config.text_len} if config.text_len != DiTConfig.text_len else {}
  if not config.takes_condition and config.model_type != default_model_type(config.out_dim):
    others["model_type"] = str(config.model_type)
  return {
    "_class_name": "WanTransformer3DModel",
    "patch_size": list(config.patch_size),
    "num_attention_heads": config.num_heads,
    "attention_head_dim": config.head_dim,
    "in_channels": config.in_dim,
    "out_channels": config.out_dim,
    "text_dim": config.text_dim,
    "freq_dim": config.freq_dim,
    "ffn_dim": config.ffn_dim,
    "num_layers": config.num_layers,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": config.eps,
    "rope_max_seq_len": 1024,
    **image,
    **others,
  }


def _diffusers_vae(config: VAEConfig) -> dict[str, Any]:
  """Leaves out what Wan2.1's config.json does not have."""
  shortcuts = {
    "decoder_base_dim": config.decoder_dim,
    "is_residual": config.level_shortcuts,
    "patch_size": config.patch_size,
    "in_channels": 3 * config.patch_size**2,
    "out_channels": 3 * config.patch_size**2,
    "scale_factor_spatial": config.spatial_stride,
    "scale_factor_temporal": config.temporal_stride,
  }
  return {
    "_class_name": "AutoencoderKLWan",
    "base_dim": config.dim,
    "z_dim": config.latent_channels,
    "dim_mult": list(config.dim_mult),
    "num_res_blocks": config.num_res_blocks,
    "attn_scales": [],
    "temperal_downsample": list(config.temporal_downsample),
    "dropout": 0.0,
    "latents_mean": list(config.latent_mean),
    "latents_std": list(config.latent_std),
    **(shortcuts if config.level_shortcuts else {}),
  }


def _transformers_text_encoder(config: UMT5Config) -> dict[str, Any]:
  return {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "vocab_size": config.vocab_size,
    "d_model": config.dim,
    "d_kv": config.attention_dim // config.num_heads,
    "d_ff": config.ffn_dim,
    "num_layers": config.num_layers,
    "num_heads": config.num_heads,
    "relative_attention_num_buckets": config.num_buckets,
    "layer_norm_epsilon": config.eps,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
  }


def scheduler_config(checkpoint: PretrainedCheckpoint) -> dict[str, Any]:
  """Returns the scheduler_config.json of diffusers' pipeline, with the shift of training if the model was trained."""
  is_ti2v = checkpoint.has("transformer") and checkpoint.config("transformer").model_type == ModelType.TI2V
  return {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": checkpoint.usage.shift if checkpoint.usage else 5.0 if is_ti2v else 3.0,
    "num_train_timesteps": 1000,
  }


def model_index(checkpoint: PretrainedCheckpoint) -> dict[str, Any]:
  """Returns the model_index.json of diffusers' pipeline."""
  transformer = checkpoint.config("transformer") if checkpoint.has("transformer") else None
  takes_condition = transformer is not None and transformer.takes_condition
  classes = {
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "transformer_2": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
  }
  image = {name: [None, None] for name in ("image_encoder", "image_processor")} if takes_condition else {}
  return {
    "_class_name": "WanImageToVideoPipeline" if takes_condition else "WanPipeline",
    "boundary_ratio": transformer.expert_boundary if transformer and checkpoint.info.has_both_experts else None,
    "expand_timesteps": transformer is not None and transformer.model_type == ModelType.TI2V,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "tokenizer": ["transformers", "T5TokenizerFast"] if checkpoint.info.tokenizer else [None, None],
    **{name: list(value) if checkpoint.has(name) else [None, None] for name, value in classes.items()},
    **image,
  }
