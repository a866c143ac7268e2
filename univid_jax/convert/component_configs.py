"""Configs of components, inferred from the shapes of their official tensors."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from univid_jax.checkpoints.tensor_files import TensorInfo
from univid_jax.codecs.vae_config import AUTOENCODERS, VAEConfig, find_autoencoder
from univid_jax.core.errors import UserError
from univid_jax.core.options import ModelType
from univid_jax.core.text import describe_value
from univid_jax.models.clip import CLIPConfig
from univid_jax.models.umt5 import UMT5Config
from univid_jax.models.variants import DiTConfig

Infos = Mapping[str, TensorInfo]

# Wan's, for transformers whose config.json is missing.
HEAD_DIM = 128

# Other variants by the channels of latents in and out, and whether they take image features.
OTHER_CHANNELS = {
  (32, 16, False): "a Fun-Control model",
  (48, 16, False): "a Fun-Control model",
  (48, 16, True): "a Fun-Control model",
  (52, 16, False): "a Fun-Control model",
  (52, 16, True): "a Fun-Control model",
  (100, 48, False): "a Fun-Control model",
}

# Bounds integers in config.json, and so what they can allocate; far above those of published models.
MAX_SIZE = 100_000

_KEYS = {"_class_name", *(field.name for field in dataclasses.fields(DiTConfig))}
_NAMES_OF_DIFFUSERS = {"num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim"}


def infer_config(component: str, infos: Infos, values: Mapping[str, Any]) -> Any:
  """Infers the config of a component.

  Args:
    component: a name in `checkpoints.pretrained.COMPONENTS`.
    infos: the component's tensors by official name.
    values: the contents of config.json, {} if there is none.

  Raises:
    KeyError: a tensor is missing.
    UserError: config.json contradicts the tensors, or the model is of another variant.
  """
  return _INFER[component](infos, values)


def count_blocks(names: Iterable[str], pattern: str) -> int:
  """Returns one more than the highest number that the pattern's group matches at the start of a name.

  Raises:
    UserError: there are fewer names than that.
  """
  names = list(names)
  count = 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)
  if count > len(names):
    raise UserError(f"it has only {len(names)} tensors, but the number of a block is {count - 1}")
  return count


def _transformer_config(infos: Infos, values: Mapping[str, Any]) -> DiTConfig:
  """Takes from config.json what tensors do not show: the number of heads, epsilon and the text length."""
  shown = _shown_by_tensors(infos, values.get("model_type"))
  keys = _KEYS | _NAMES_OF_DIFFUSERS.keys()
  known = {key: value for key, value in values.items() if key in keys and value is not None}
  _check_values(known)
  if known.get("model_type", "t2v") not in tuple(ModelType):
    raise UserError(
      f"config.json has the model_type {known['model_type']!r}, which is not supported, only {', '.join(ModelType)}"
    )
  if values.get("_class_name") == "WanTransformer3DModel":
    known = {_NAMES_OF_DIFFUSERS.get(key, key): value for key, value in known.items()} | {"_class_name": "WanModel"}
  if "num_heads" not in known:
    if shown["dim"] % HEAD_DIM:
      raise UserError(
        f"cannot infer the number of heads: dim {shown['dim']} is not a multiple of Wan's {HEAD_DIM} channels per "
        "head; put the model's config.json next to its weights"
      )
    known["num_heads"] = shown["dim"] // HEAD_DIM
  for key, value in shown.items():
    if key in known and (tuple(known[key]) if key == "patch_size" else known[key]) != value:
      raise UserError(f"config.json has {key} = {known[key]}, but the tensors have {value}")
  return DiTConfig.from_json({**known, **shown})


def _shown_by_tensors(infos: Infos, model_type: Any) -> dict[str, Any]:
  """Returns the values of config.json that tensors show; raises UserError for other variants.

  Args:
    infos: the tensors.
    model_type: of config.json, if it has one: without an image condition the tensors show only the latents.
  """
  shape = infos["patch_embedding.weight"].shape
  if len(shape) != 5:
    raise UserError(f"patch_embedding.weight is {shape}, expected 5 dims")
  dim, in_dim, *patch_size = shape
  takes_features = "img_emb.proj.1.weight" in infos
  out_dim = _dim(infos, "head.head.weight", 0) // max(1, patch_size[0] * patch_size[1] * patch_size[2])
  if variant := OTHER_CHANNELS.get((in_dim, out_dim, takes_features)):
    raise UserError(f"it is {variant}, which is not supported, only the models in docs/formats.md are")
  if in_dim != out_dim or takes_features:
    model_type = ModelType.I2V
  elif model_type not in (ModelType.T2V, ModelType.TI2V):
    model_type = default_model_type(out_dim)
  shown = {
    "dim": dim,
    "ffn_dim": _dim(infos, "blocks.0.ffn.0.weight", 0),
    "num_layers": count_blocks(infos, r"blocks\.(\d{1,9})\."),
    "in_dim": in_dim,
    "out_dim": out_dim,
    "freq_dim": _dim(infos, "time_embedding.0.weight", 1),
    "text_dim": _dim(infos, "text_embedding.0.weight", 1),
    "patch_size": tuple(patch_size),
    "model_type": model_type,
  }
  if model_type == ModelType.I2V:
    shown["image_dim"] = _dim(infos, "img_emb.proj.1.weight", 0) if takes_features else 0
  return shown


def default_model_type(out_dim: int) -> ModelType:
  """Returns the type of a model without an image condition whose config.json does not say it."""
  return ModelType.TI2V if out_dim == AUTOENCODERS["wan2.2"].latent_channels else ModelType.T2V


def _dim(infos: Infos, name: str, axis: int) -> int:
  """Returns a dim of a matrix."""
  shape = infos[name].shape
  if len(shape) < 2:
    raise UserError(f"{name} is {shape}, expected a matrix")
  return shape[axis]


def _check_values(values: Mapping[str, Any]) -> None:
  """Checks the types and ranges of values of config.json."""
  for key, value in values.items():
    if key in ("_class_name", "model_type"):
      valid, expected = isinstance(value, str), "a text"
    elif key == "patch_size":
      valid, expected = isinstance(value, list) and len(value) == 3 and all(map(_is_size, value)), "three integers"
    elif key in ("eps", "rope_theta", "rope_scale"):
      valid, expected = _is_positive(value), "a positive number"
    else:
      valid, expected = _is_size(value), f"an integer from 1 to {MAX_SIZE:,}"
    if not valid:
      raise UserError(f"config.json has {key} = {describe_value(value)}, expected {expected}")


def _is_positive(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _is_size(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIZE


# Keys of diffusers' config.json for what tensors do not show.
_LATENT_STATISTICS = {"latent_mean": "latents_mean", "latent_std": "latents_std"}


def _vae_config(infos: Infos, values: Mapping[str, Any]) -> VAEConfig:
  """Infers the release from the latent channels, and the widths; statistics of latents may be in config.json."""
  dim, decoder_dim = _dim(infos, "encoder.conv1.weight", 0), _dim(infos, "decoder.head.0.gamma", 0)
  statistics = {ours: _numbers(values, theirs) for ours, theirs in _LATENT_STATISTICS.items() if theirs in values}
  return dataclasses.replace(
    find_autoencoder(_dim(infos, "conv2.weight", 0)),
    dim=dim,
    decoder_dim=None if decoder_dim == dim else decoder_dim,
    **statistics,
  )


def _numbers(values: Mapping[str, Any], key: str) -> tuple[float, ...]:
  numbers = values[key]
  if not isinstance(numbers, list) or not all(type(number) in (int, float) for number in numbers):
    raise UserError(f"config.json has {key} = {describe_value(numbers)}, expected a list of numbers")
  return tuple(numbers)


def _text_encoder_config(infos: Infos, values: Mapping[str, Any]) -> UMT5Config:
  """Takes epsilon from transformers' config.json; everything else is in the tensors."""
  eps = values.get("layer_norm_epsilon", UMT5Config.eps)
  if not _is_positive(eps):
    raise UserError(f"config.json has layer_norm_epsilon = {describe_value(eps)}, expected a positive number")
  embedding, bias = "token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"
  return UMT5Config(
    vocab_size=_dim(infos, embedding, 0),
    dim=_dim(infos, embedding, 1),
    attention_dim=_dim(infos, "blocks.0.attn.q.weight", 0),
    ffn_dim=_dim(infos, "blocks.0.ffn.fc1.weight", 0),
    num_heads=_dim(infos, bias, 1),
    num_buckets=_dim(infos, bias, 0),
    num_layers=count_blocks(infos, r"blocks\.(\d{1,9})\."),
    eps=eps,
  )


def _image_encoder_config(infos: Infos, values: Mapping[str, Any]) -> CLIPConfig:
  """The last block is not among the tensors, and the number of heads is in transformers' config.json alone."""
  values = values.get("vision_config", values if values.get("model_type") == "clip_vision_model" else {})
  num_heads = values.get("num_attention_heads", CLIPConfig.num_heads) if isinstance(values, Mapping) else 0
  if not _is_size(num_heads) or values.get("hidden_act", "gelu") != "gelu":
    raise UserError("config.json is not that of a CLIP image encoder with num_attention_heads and hidden_act = gelu")
  patch = infos["patch_embedding.weight"].shape
  if len(patch) != 4 or not all(patch) or patch[0] % num_heads:
    raise UserError(f"patch_embedding.weight is {patch}, expected 4 dims, the first divisible by {num_heads} heads")
  dim, _, patch_size, _ = patch
  side = round((_dim(infos, "pos_embedding", -2) - 1) ** 0.5)
  return CLIPConfig(
    image_size=side * patch_size,
    patch_size=patch_size,
    dim=dim,
    mlp_ratio=_dim(infos, "transformer.0.mlp.0.weight", 0) // dim,
    num_heads=num_heads,
    num_layers=count_blocks(infos, r"transformer\.(\d{1,9})\.") + 1,
  )


_INFER: Mapping[str, Callable[[Infos, Mapping[str, Any]], Any]] = {
  "transformer": _transformer_config,
  "vae": _vae_config,
  "text_encoder": _text_encoder_config,
  "image_encoder": _image_encoder_config,
}
