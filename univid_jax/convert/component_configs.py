"""Configs of components, inferred from the shapes of their official tensors."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from univid_jax.checkpoints.tensor_files import TensorInfo
from univid_jax.codecs.wan_vae import VAEConfig
from univid_jax.core.errors import UserError
from univid_jax.models.clip import CLIPConfig
from univid_jax.models.umt5 import UMT5Config
from univid_jax.models.variants import DiTConfig

Infos = Mapping[str, TensorInfo]

# Wan2.1's, for transformers whose config.json is missing.
HEAD_DIM = 128


def infer_config(component: str, infos: Infos, values: Mapping[str, Any]) -> Any:
  """Infers the config of a component.

  Args:
    component: a name in `checkpoints.pretrained.COMPONENTS`.
    infos: the component's tensors by official name.
    values: the contents of config.json, {} if there is none.

  Raises:
    KeyError: a tensor is missing.
    UserError: config.json contradicts the tensors, or the model is not one of Wan2.1's.
  """
  return _INFER[component](infos, values)


def count_blocks(names: Iterable[str], pattern: str) -> int:
  """Returns one more than the highest number that the pattern's group matches at the start of a name."""
  return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def _transformer_config(infos: Infos, values: Mapping[str, Any]) -> DiTConfig:
  """Takes from config.json what tensors do not show: the number of heads, epsilon and the text length."""
  dim, in_dim, *patch_size = infos["patch_embedding.weight"].shape
  is_i2v = "img_emb.proj.1.weight" in infos
  shown = {
    "dim": dim,
    "ffn_dim": infos["blocks.0.ffn.0.weight"].shape[0],
    "num_layers": count_blocks(infos, r"blocks\.(\d+)\."),
    "in_dim": in_dim,
    "out_dim": infos["head.head.weight"].shape[0] // (patch_size[0] * patch_size[1] * patch_size[2]),
    "freq_dim": infos["time_embedding.0.weight"].shape[1],
    "text_dim": infos["text_embedding.0.weight"].shape[1],
    "patch_size": tuple(patch_size),
    "model_type": "i2v" if is_i2v else "t2v",
  }
  if is_i2v:
    shown["image_dim"] = infos["img_emb.proj.1.weight"].shape[0]
  values = dict(values)
  if values.get("model_type", "t2v") not in ("t2v", "i2v"):
    raise UserError(
      f"config.json has the model_type {values['model_type']!r}, which is not supported; supported are t2v and i2v"
    )
  if values.get("_class_name") == "WanTransformer3DModel":
    values = _config_from_diffusers(values, model_type=shown["model_type"])
  if "num_heads" not in values:
    if dim % HEAD_DIM:
      raise UserError(
        f"cannot infer the number of heads: dim {dim} is not a multiple of Wan2.1's {HEAD_DIM} channels per head; "
        "put the model's config.json next to its weights"
      )
    values["num_heads"] = dim // HEAD_DIM
  for key, value in shown.items():
    if key in values and (tuple(values[key]) if key == "patch_size" else values[key]) != value:
      raise UserError(f"config.json has {key} = {values[key]}, but the tensors have {value}")
  return DiTConfig.from_json({**values, **shown})


def _config_from_diffusers(values: Mapping[str, Any], *, model_type: str) -> dict[str, Any]:
  return {
    "num_heads": values["num_attention_heads"],
    "eps": values.get("eps", 1e-6),
    "_class_name": "WanModel",
    "model_type": model_type,
    "in_dim": values["in_channels"],
    "out_dim": values["out_channels"],
    "ffn_dim": values["ffn_dim"],
    "num_layers": values["num_layers"],
  }


def _vae_config(infos: Infos, values: Mapping[str, Any]) -> VAEConfig:
  del values
  latent_channels = infos["conv2.weight"].shape[0]
  if latent_channels != VAEConfig.latent_channels:
    raise UserError(
      f"the autoencoder has {latent_channels} latent channels instead of Wan2.1's {VAEConfig.latent_channels}; "
      "Wan2.2's autoencoder is not supported"
    )
  return VAEConfig(dim=infos["encoder.conv1.weight"].shape[0])


def _text_encoder_config(infos: Infos, values: Mapping[str, Any]) -> UMT5Config:
  del values
  vocab_size, dim = infos["token_embedding.weight"].shape
  num_buckets, num_heads = infos["blocks.0.pos_embedding.embedding.weight"].shape
  return UMT5Config(
    vocab_size=vocab_size,
    dim=dim,
    attention_dim=infos["blocks.0.attn.q.weight"].shape[0],
    ffn_dim=infos["blocks.0.ffn.fc1.weight"].shape[0],
    num_heads=num_heads,
    num_buckets=num_buckets,
    num_layers=count_blocks(infos, r"blocks\.(\d+)\."),
  )


def _image_encoder_config(infos: Infos, values: Mapping[str, Any]) -> CLIPConfig:
  """The last block is not among the tensors, and the number of heads is the release's."""
  del values
  dim, _, patch_size, _ = infos["patch_embedding.weight"].shape
  side = round((infos["pos_embedding"].shape[-2] - 1) ** 0.5)
  return CLIPConfig(
    image_size=side * patch_size,
    patch_size=patch_size,
    dim=dim,
    mlp_ratio=infos["transformer.0.mlp.0.weight"].shape[0] // dim,
    num_layers=count_blocks(infos, r"transformer\.(\d+)\.") + 1,
  )


_INFER: Mapping[str, Callable[[Infos, Mapping[str, Any]], Any]] = {
  "transformer": _transformer_config,
  "vae": _vae_config,
  "text_encoder": _text_encoder_config,
  "image_encoder": _image_encoder_config,
}
