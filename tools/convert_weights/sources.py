"""What a path holds: components of Wan2.1, in which layout, found from the names and shapes of their tensors."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from univid_jax.models.clip import CLIPConfig
from univid_jax.models.dit import PRESETS, DiTConfig
from univid_jax.models.umt5 import UMT5Config
from univid_jax.models.vae import VAEConfig
from univid_jax.weights.files import TensorFile, TensorInfo, find_tensor_files, open_tensors
from univid_jax.weights.lora import is_lora
from univid_jax.weights.names import name_from_diffusers

# A tensor that only this component has, in this layout.
SIGNATURES = {
    ("transformer", "original"): "blocks.0.self_attn.q.weight",
    ("transformer", "diffusers"): "blocks.0.attn1.to_q.weight",
    ("vae", "original"): "encoder.downsamples.0.residual.2.weight",
    ("vae", "diffusers"): "encoder.down_blocks.0.conv1.weight",
    ("text_encoder", "original"): "blocks.0.pos_embedding.embedding.weight",
    ("text_encoder", "diffusers"): "encoder.block.0.layer.0.SelfAttention.q.weight",
    ("image_encoder", "original"): "visual.transformer.0.attn.to_qkv.weight",
}

# In front of all names in single files that other programs wrote.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")

# Variants that share most names with Wan2.1's T2V and I2V, by a part of a name that only they have.
OTHER_VARIANTS = {"vace_": "VACE", "img_emb.emb_pos": "FLF2V (first and last frame)", "control_adapter": "Fun-Control",
                  "ref_conv": "Fun-Control", "motion_encoder": "Animate", "casual_audio_encoder": "S2V",
                  "condition_embedder.image_embedder.pos_embed": "FLF2V (first and last frame)"}


@dataclasses.dataclass(frozen=True)
class Source:
  """A component as it was found.

  Attributes:
    component: transformer, vae, text_encoder or image_encoder.
    layout: original or diffusers.
    path: of its file or index.
    config: its shape.
    tensors: under their official names.
    left_out: names in the file that the model does not use, by the reason.
  """

  component: str
  layout: str
  path: Path
  config: Any
  tensors: TensorFile
  left_out: Mapping[str, tuple[str, ...]]

  @property
  def nbytes(self) -> int:
    return sum(info.nbytes for info in self.tensors.infos.values())


@dataclasses.dataclass(frozen=True)
class Release:
  """All that was found in a folder or file.

  Attributes:
    sources: its components.
    tokenizer: the folder of the tokenizer's files, or None.
    notes: what else was there and stays behind, a line each.
  """

  sources: tuple[Source, ...]
  tokenizer: Path | None
  notes: tuple[str, ...]

  @property
  def variant(self) -> str:
    """The published model that the transformer is, else "custom"."""
    return variant_name(next((source.config for source in self.sources if source.component == "transformer"), None))


def variant_name(config: DiTConfig | None) -> str:
  """The name of the published model with this shape; "custom" where there is none."""
  return next((name for name, preset in PRESETS.items() if preset == config), "custom")


def find_release(path: Path) -> Release:
  """Finds out what a folder (official or of diffusers) or a file holds.

  Raises:
    FileNotFoundError: there is nothing, or a part of it is missing.
    ValueError: a file cannot be read, is no part of Wan2.1 or of a variant that is not supported, or stands there twice.
  """
  if not path.exists():
    raise FileNotFoundError(f"no such file or folder: {path}")
  folders = [path, *sorted(p for p in path.iterdir() if p.is_dir())] if path.is_dir() else []
  files = [file for folder in folders for file in find_tensor_files(folder)] if folders else [path]
  if not files:
    raise FileNotFoundError(f"no files of tensors (.safetensors, .pth) in {path}")
  sources: dict[str, Source] = {}
  notes = []
  for file in files:
    tensors = open_tensors(file)
    if is_lora(tensors.infos):
      notes.append(f"{file} is a LoRA: convert it on its own")
      continue
    if path.is_dir() and is_transformers_clip(tensors.infos):
      notes.append(f"{file} is a CLIP tower in transformers' layout, which is not read: only the official "
                   "models_clip_*.pth is")
      continue
    source = identify(file, tensors)
    if source.component in sources:
      raise ValueError(f"{path} holds two of {source.component}: {sources[source.component].path} and {file}; give one of them")
    sources[source.component] = source
  if not sources:
    raise ValueError(f"no part of a Wan2.1 model in {path}: {'; '.join(notes)}")
  order = [component for component, _ in SIGNATURES]
  found = tuple(sorted(sources.values(), key=lambda source: order.index(source.component)))
  tokenizers = sorted(file.parent for file in path.rglob("tokenizer.json")) if path.is_dir() else []
  tokenizer = next((folder for folder in tokenizers if "umt5" in folder.name or folder.name == "tokenizer"), None)
  return Release(found, tokenizer, tuple(notes))


def is_transformers_clip(infos: Mapping[str, TensorInfo]) -> bool:
  return "vision_model.encoder.layers.0.self_attn.q_proj.weight" in infos


def identify(path: Path, tensors: TensorFile) -> Source:
  """Which component a file holds, in which layout and shape.

  Raises:
    ValueError: none that is known, or a variant that is not supported.
  """
  names = {name: name for name in tensors.infos}
  for prefix in PREFIXES:
    if all(name.startswith(prefix) for name in names):
      names = {name: name.removeprefix(prefix) for name in names}
  found = next((kind for kind, signature in SIGNATURES.items() if signature in names.values()), None)
  if found is None:
    first = ", ".join(sorted(tensors.infos)[:3])
    raise ValueError(f"{path} holds no part of Wan2.1 that is known (its names begin with {first})")
  component, layout = found
  if component == "transformer":
    for part, variant in OTHER_VARIANTS.items():
      if any(part in name for name in names.values()):
        raise ValueError(f"{path} is a {variant} model, which is not supported: only T2V and I2V of Wan2.1 are")
  left_out: dict[str, tuple[str, ...]] = {}
  if component == "image_encoder":
    names, left_out = _vision_tower(names)
  if layout == "diffusers":
    if component == "text_encoder" and {"shared.weight", "encoder.embed_tokens.weight"} <= names.keys():
      del names["encoder.embed_tokens.weight"]
      left_out["a second copy of the token embedding"] = ("encoder.embed_tokens.weight",)
    names = {old: name_from_diffusers(component, name) for old, name in names.items()}
  official = tensors.renamed(names)
  try:
    config = _CONFIGS[component](official.infos, read_config(path))
  except KeyError as error:
    raise ValueError(f"{path} looks like a {component}, but {error.args[0]} is missing") from error
  return Source(component, layout, path, config, official, left_out)


def read_config(path: Path) -> dict[str, Any]:
  """The config.json beside a file, or {} where there is none.

  Raises:
    ValueError: it is no JSON.
  """
  file = path.parent / "config.json"
  if not file.exists():
    return {}
  try:
    return json.loads(file.read_text())
  except ValueError as error:
    raise ValueError(f"{file} is not JSON: {error}") from error


def _vision_tower(names: Mapping[str, str]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
  """Of a whole CLIP, what Wan2.1 uses: the image tower without its last block."""
  visual = {name: new.removeprefix("visual.") for name, new in names.items() if new.startswith("visual.")}
  last = "transformer.{}.".format(_count(visual.values(), r"transformer\.(\d+)\.") - 1)
  unused = {name for name, new in visual.items() if new.startswith((last, "post_norm.")) or new == "head"}
  return ({name: new for name, new in visual.items() if name not in unused},
          {"the text tower": tuple(sorted(names.keys() - visual.keys())),
           "the image tower's last block and head": tuple(sorted(unused))})


def _count(names, pattern: str) -> int:
  """One more than the highest number that the pattern finds at the start of a name."""
  return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def transformer_config(infos: Mapping[str, TensorInfo], values: Mapping[str, Any]) -> DiTConfig:
  """The transformer's shape: what tensors show, and from config.json what they do not (heads, eps, text length).

  Raises:
    ValueError: config.json is of another variant, contradicts the tensors, or is needed and not there.
  """
  dim, in_dim, *patch_size = infos["patch_embedding.weight"].shape
  shown = {
      "dim": dim,
      "ffn_dim": infos["blocks.0.ffn.0.weight"].shape[0],
      "num_layers": _count(infos, r"blocks\.(\d+)\."),
      "in_dim": in_dim,
      "out_dim": infos["head.head.weight"].shape[0] // (patch_size[0] * patch_size[1] * patch_size[2]),
      "freq_dim": infos["time_embedding.0.weight"].shape[1],
      "text_dim": infos["text_embedding.0.weight"].shape[1],
      "patch_size": tuple(patch_size),
      "model_type": "i2v" if "img_emb.proj.1.weight" in infos else "t2v",
  }
  if shown["model_type"] == "i2v":
    shown["image_dim"] = infos["img_emb.proj.1.weight"].shape[0]
  values = dict(values)
  if values.get("model_type", "t2v") not in ("t2v", "i2v"):
    raise ValueError(f"a model of model_type {values['model_type']!r} is not supported: only t2v and i2v of Wan2.1 are")
  if values.get("_class_name") == "WanTransformer3DModel":
    values = {"num_heads": values["num_attention_heads"], "eps": values.get("eps", 1e-6), "_class_name": "WanModel",
              "model_type": shown["model_type"], "in_dim": values["in_channels"], "out_dim": values["out_channels"],
              "ffn_dim": values["ffn_dim"], "num_layers": values["num_layers"]}
  if "num_heads" not in values:
    if dim % 128:
      raise ValueError(f"tensors do not show the number of heads, and dim {dim} is no multiple of Wan2.1's 128 a head: "
                       "put the model's config.json beside them")
    values["num_heads"] = dim // 128
  for key, value in shown.items():
    if key in values and (tuple(values[key]) if key == "patch_size" else values[key]) != value:
      raise ValueError(f"config.json says {key} = {values[key]}, the tensors show {value}")
  return DiTConfig.from_json({**values, **shown})


def vae_config(infos: Mapping[str, TensorInfo], values: Mapping[str, Any]) -> VAEConfig:
  """The autoencoder's shape, from its tensors; all of Wan2.1's have one."""
  del values
  latent_channels = infos["conv2.weight"].shape[0]
  if latent_channels != VAEConfig.latent_channels:
    raise ValueError(f"an autoencoder with {latent_channels} latent channels is not Wan2.1's, which has "
                     f"{VAEConfig.latent_channels}; that of Wan2.2 is not supported")
  return VAEConfig(dim=infos["encoder.conv1.weight"].shape[0])


def text_encoder_config(infos: Mapping[str, TensorInfo], values: Mapping[str, Any]) -> UMT5Config:
  """The text encoder's shape, from its tensors."""
  del values
  vocab_size, dim = infos["token_embedding.weight"].shape
  num_buckets, num_heads = infos["blocks.0.pos_embedding.embedding.weight"].shape
  return UMT5Config(vocab_size=vocab_size, dim=dim, attention_dim=infos["blocks.0.attn.q.weight"].shape[0],
                    ffn_dim=infos["blocks.0.ffn.fc1.weight"].shape[0], num_heads=num_heads, num_buckets=num_buckets,
                    num_layers=_count(infos, r"blocks\.(\d+)\."))


def image_encoder_config(infos: Mapping[str, TensorInfo], values: Mapping[str, Any]) -> CLIPConfig:
  """The image tower's shape, from its tensors; the number of heads is the release's."""
  del values
  dim, _, patch_size, _ = infos["patch_embedding.weight"].shape
  side = round((infos["pos_embedding"].shape[-2] - 1) ** 0.5)
  return CLIPConfig(image_size=side * patch_size, patch_size=patch_size, dim=dim,
                    mlp_ratio=infos["transformer.0.mlp.0.weight"].shape[0] // dim,
                    num_layers=_count(infos, r"transformer\.(\d+)\.") + 1)


_CONFIGS = {"transformer": transformer_config, "vae": vae_config, "text_encoder": text_encoder_config,
            "image_encoder": image_encoder_config}
