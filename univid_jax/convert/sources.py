"""PyTorch weights at a path: the components of Wan2.1, identified by the names and shapes of their tensors."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from univid_jax.checkpoints.lora.names import is_lora
from univid_jax.checkpoints.tensor_files import TensorFile, TensorInfo, find_tensor_files, open_tensors
from univid_jax.convert.component_configs import count_blocks, infer_config
from univid_jax.convert.layout import Layout
from univid_jax.core.errors import UserError
from univid_jax.models.names import name_from_diffusers
from univid_jax.models.variants import VARIANTS, DiTConfig

# A tensor that only this component has, in this layout.
SIGNATURES = {
  ("transformer", Layout.ORIGINAL): "blocks.0.self_attn.q.weight",
  ("transformer", Layout.DIFFUSERS): "blocks.0.attn1.to_q.weight",
  ("vae", Layout.ORIGINAL): "encoder.downsamples.0.residual.2.weight",
  ("vae", Layout.DIFFUSERS): "encoder.down_blocks.0.conv1.weight",
  ("text_encoder", Layout.ORIGINAL): "blocks.0.pos_embedding.embedding.weight",
  ("text_encoder", Layout.DIFFUSERS): "encoder.block.0.layer.0.SelfAttention.q.weight",
  ("image_encoder", Layout.ORIGINAL): "visual.transformer.0.attn.to_qkv.weight",
}
_TRANSFORMERS_CLIP = "vision_model.encoder.layers.0.self_attn.q_proj.weight"

# Prefixes of all names in single files written by other programs.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")

# Variants that share most names with Wan2.1's T2V and I2V, by a part of a name that only they have.
OTHER_VARIANTS = {
  "vace_": "VACE",
  "img_emb.emb_pos": "FLF2V (first and last frame)",
  "control_adapter": "Fun-Control",
  "ref_conv": "Fun-Control",
  "motion_encoder": "Animate",
  "casual_audio_encoder": "S2V",
  "condition_embedder.image_embedder.pos_embed": "FLF2V (first and last frame)",
}


@dataclasses.dataclass(frozen=True)
class Source:
  """The files of one component.

  Attributes:
    component: transformer, vae, text_encoder or image_encoder.
    layout: of the files.
    path: the file or index.
    config: the component's config, inferred from the tensors and config.json.
    tensors: by official name.
    left_out: names of tensors in the file that the model does not use, by reason.
  """

  component: str
  layout: Layout
  path: Path
  config: Any
  tensors: TensorFile
  left_out: Mapping[str, tuple[str, ...]]

  @property
  def nbytes(self) -> int:
    return sum(info.nbytes for info in self.tensors.infos.values())


@dataclasses.dataclass(frozen=True)
class Release:
  """Everything usable in a folder or file.

  Attributes:
    sources: its components.
    tokenizer: the folder of the tokenizer's files, or None.
    notes: one line for each file that is not converted.
  """

  sources: tuple[Source, ...]
  tokenizer: Path | None
  notes: tuple[str, ...]

  @property
  def variant(self) -> str:
    """The name of the published model with the transformer's shape, else "custom"."""
    return variant_name(next((source.config for source in self.sources if source.component == "transformer"), None))


def variant_name(config: DiTConfig | None) -> str:
  """Returns the name of the published model with this shape, or "custom" if there is none."""
  return next((name for name, preset in VARIANTS.items() if preset == config), "custom")


def find_release(path: Path) -> Release:
  """Identifies the components in a folder (an official release or one of diffusers) or in a single file.

  Raises:
    FileNotFoundError: the path, its weights or one of their shards do not exist.
    UserError: a file is damaged, belongs to an unsupported model, or contains a component that another file has too.
  """
  if not path.exists():
    raise FileNotFoundError(f"no such file or folder: {path}")
  sources: dict[str, Source] = {}
  notes = []
  for file in _list_files(path):
    tensors = open_tensors(file)
    if is_lora(tensors.infos):
      notes.append(f"{file} is a LoRA: convert it separately")
      continue
    if path.is_dir() and _TRANSFORMERS_CLIP in tensors.infos:
      notes.append(
        f"{file} is a CLIP tower in transformers' layout, which is not supported; use the official models_clip_*.pth"
      )
      continue
    tensors.require_floats()
    source = identify(file, tensors)
    if source.component in sources:
      raise UserError(
        f"{path} has two files for {source.component}: {sources[source.component].path} and {file}; remove one of them"
      )
    sources[source.component] = source
  if not sources:
    raise UserError(f"{path} contains no component of a Wan2.1 model: {'; '.join(notes)}")
  order = [component for component, _ in SIGNATURES]
  found = tuple(sorted(sources.values(), key=lambda source: order.index(source.component)))
  return Release(found, _find_tokenizer(path), tuple(notes))


def _list_files(path: Path) -> list[Path]:
  """Lists the files of tensors in a folder and its direct subfolders."""
  if not path.is_dir():
    return [path]
  folders = [path, *sorted(folder for folder in path.iterdir() if folder.is_dir())]
  files = [file for folder in folders for file in find_tensor_files(folder)]
  if not files:
    raise FileNotFoundError(f"no weights (.safetensors, .pth) in {path}")
  return files


def _find_tokenizer(path: Path) -> Path | None:
  folders = sorted(file.parent for file in path.rglob("tokenizer.json")) if path.is_dir() else []
  return next((folder for folder in folders if "umt5" in folder.name or folder.name == "tokenizer"), None)


def identify(path: Path, tensors: TensorFile) -> Source:
  """Identifies the component that a file contains, its layout and its config.

  Raises:
    UserError: it is none of Wan2.1's T2V and I2V models.
  """
  names = _strip_prefixes(tensors.infos)
  found = next((kind for kind, signature in SIGNATURES.items() if signature in names.values()), None)
  if found is None:
    first = ", ".join(sorted(tensors.infos)[:3])
    raise UserError(f"{path} is not a known component of Wan2.1 (its first tensors are {first})")
  component, layout = found
  if component == "transformer":
    for part, variant in OTHER_VARIANTS.items():
      if any(part in name for name in names.values()):
        raise UserError(f"{path} is a {variant} model; only Wan2.1's T2V and I2V models are supported")
  left_out: dict[str, tuple[str, ...]] = {}
  if component == "image_encoder":
    names, left_out = _select_vision_tower(names)
  if layout is Layout.DIFFUSERS:
    if component == "text_encoder" and {"shared.weight", "encoder.embed_tokens.weight"} <= names.keys():
      del names["encoder.embed_tokens.weight"]
      left_out["a second copy of the token embedding"] = ("encoder.embed_tokens.weight",)
    names = {old: name_from_diffusers(component, name) for old, name in names.items()}
  official = tensors.rename(names)
  try:
    config = infer_config(component, official.infos, read_config(path))
  except KeyError as error:
    raise UserError(f"{path} looks like a {component}, but {error.args[0]} is missing") from error
  return Source(component, layout, path, config, official, left_out)


def _strip_prefixes(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
  """Maps the names in a file to those without the prefix that all of them have."""
  names = {name: name for name in infos}
  for prefix in PREFIXES:
    if all(name.startswith(prefix) for name in names):
      names = {name: name.removeprefix(prefix) for name in names}
  return names


def _select_vision_tower(names: Mapping[str, str]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
  """Selects what Wan2.1 uses of a whole CLIP model: the image tower without its last block."""
  visual = {name: new.removeprefix("visual.") for name, new in names.items() if new.startswith("visual.")}
  last = "transformer.{}.".format(count_blocks(visual.values(), r"transformer\.(\d+)\.") - 1)
  unused = {name for name, new in visual.items() if new.startswith((last, "post_norm.")) or new == "head"}
  return (
    {name: new for name, new in visual.items() if name not in unused},
    {
      "the text tower": tuple(sorted(names.keys() - visual.keys())),
      "the image tower's last block and head": tuple(sorted(unused)),
    },
  )


def read_config(path: Path) -> dict[str, Any]:
  """Reads the config.json next to a file; {} if there is none.

  Raises:
    UserError: it is not valid JSON.
  """
  file = path.parent / "config.json"
  if not file.exists():
    return {}
  try:
    return json.loads(file.read_text())
  except ValueError as error:
    raise UserError(f"{file} is not valid JSON: {error}") from error
