"""The component that a file contains: identified, checked, and with its tensors under their official names.

Formats are tables: SIGNATURES and NAMES for layouts, OTHER_VARIANTS and LEFT_OUT for what is refused and left out.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from univid_jax.checkpoints.experts import find_expert
from univid_jax.checkpoints.tensor_files import TensorFile
from univid_jax.convert.component_configs import count_blocks, infer_config
from univid_jax.convert.layout import Layout
from univid_jax.convert.quantized import FLOATS, dequantize
from univid_jax.core.errors import UserError
from univid_jax.core.json_files import read_json_object
from univid_jax.core.options import Expert
from univid_jax.models.names import diffusers_table, name_from_diffusers, name_from_llama_cpp

# A tensor that only this component has, in this layout.
SIGNATURES = {
  ("transformer", Layout.ORIGINAL): "blocks.0.self_attn.q.weight",
  ("transformer", Layout.DIFFUSERS): "blocks.0.attn1.to_q.weight",
  ("vae", Layout.ORIGINAL): "encoder.middle.1.to_qkv.weight",
  ("vae", Layout.DIFFUSERS): "encoder.mid_block.attentions.0.to_qkv.weight",
  ("text_encoder", Layout.ORIGINAL): "blocks.0.pos_embedding.embedding.weight",
  ("text_encoder", Layout.DIFFUSERS): "encoder.block.0.layer.0.SelfAttention.q.weight",
  ("text_encoder", Layout.LLAMA_CPP): "enc.blk.0.attn_q.weight",
  ("image_encoder", Layout.ORIGINAL): "visual.transformer.0.attn.to_qkv.weight",
  ("image_encoder", Layout.DIFFUSERS): "vision_model.encoder.layers.0.self_attn.q_proj.weight",
}

# Official names from those of other layouts.
NAMES: Mapping[Layout, Callable[[str, str], str]] = {
  Layout.DIFFUSERS: name_from_diffusers,
  Layout.LLAMA_CPP: lambda component, name: name_from_llama_cpp(name),
}

# Variants that share most names with the supported ones, by a part of a name that only they have.
OTHER_VARIANTS = {
  "vace_": "VACE",
  "img_emb.emb_pos": "FLF2V (first and last frame)",
  "condition_embedder.image_embedder.pos_embed": "FLF2V (first and last frame)",
  "control_adapter": "Fun-Control camera",
  "ref_conv": "Fun-Control",
  "motion_encoder": "Animate",
  "face_adapter": "Animate",
  "pose_patch_embedding": "Animate",
  "audio_encoder": "S2V",
  "audio_injector": "S2V",
  "audio_proj": "S2V or another audio",
  "cam_encoder": "camera",
  "cam_injector": "camera",
}

# Tensors that Wan does not use: why, and what matches the beginnings of their names in the file.
LEFT_OUT: Mapping[tuple[str, Layout], Mapping[str, str]] = {
  ("text_encoder", Layout.DIFFUSERS): {"the decoder": r"(decoder|lm_head)\."},
  ("text_encoder", Layout.LLAMA_CPP): {"the decoder": r"(dec|output)\."},
  ("image_encoder", Layout.ORIGINAL): {"the text tower": r"(?!visual\.)"},
  ("image_encoder", Layout.DIFFUSERS): {
    "the text tower": r"text_(model|projection)\.",
    "indices of positions": r"vision_model\.embeddings\.position_ids",
  },
}


@dataclasses.dataclass(frozen=True)
class Source:
  """The files of one component.

  Attributes:
    component: a name in `checkpoints.pretrained.COMPONENTS`.
    layout: of the files.
    path: the file or index.
    config: the component's config, inferred from the tensors and config.json.
    tensors: by official name, dequantised.
    left_out: names of tensors in the file that the model does not use, by reason.
    expert: of Wan2.2 A14B, if the component is one.
  """

  component: str
  layout: Layout
  path: Path
  config: Any
  tensors: TensorFile
  left_out: Mapping[str, tuple[str, ...]]
  expert: Expert | None = None

  @property
  def nbytes(self) -> int:
    """Of the dequantised tensors."""
    return sum(info.nbytes for info in self.tensors.infos.values())

  @property
  def dtypes(self) -> Counter[str]:
    """How many tensors have each dtype, dequantised."""
    return Counter(info.dtype for info in self.tensors.infos.values())

  @property
  def stored_dtypes(self) -> Counter[str]:
    """How many tensors the file stores in each way."""
    return Counter(self.tensors.stored.get(name, info.dtype) for name, info in self.tensors.infos.items())


def identify(path: Path, tensors: TensorFile) -> Source:
  """Identifies the component that a part of a file contains, its layout and its config.

  Args:
    path: of the file.
    tensors: names without prefix.

  Raises:
    UserError: it is none of the supported models, or is damaged.
  """
  found = next((kind for kind, signature in SIGNATURES.items() if signature in tensors.infos), None)
  if found is None:
    first = ", ".join(sorted(tensors.infos)[:3])
    raise UserError(f"{path} is not a known component of Wan (its first tensors are {first})")
  component, layout = found
  if component == "transformer":
    for part, variant in OTHER_VARIANTS.items():
      if any(part in name for name in tensors.infos):
        raise UserError(f"{path} is a {variant} model, which is not supported")
  weights, activation_scales = dequantize(tensors)
  values = read_config(path)
  try:
    names, left_out = _select_tensors(component, layout, weights)
    official = _fuse_attention(weights.rename(names)) if component == "image_encoder" else weights.rename(names)
    _check_weights(official)
    config = infer_config(component, official.infos, values)
  except KeyError as error:
    raise UserError(f"{path} looks like a {component}, but {error.args[0]} is missing") from error
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  left_out = {"scales of activations": activation_scales, **left_out}
  expert = find_expert(path, tensors.metadata, config) if component == "transformer" else None
  return Source(component, layout, path, config, official, left_out, expert)


def read_config(path: Path) -> dict[str, Any]:
  """Reads the config.json next to a file; {} if there is none. Raises like `read_json_object`."""
  file = path.parent / "config.json"
  return read_json_object(file) if file.exists() else {}


def _check_weights(tensors: TensorFile) -> None:
  for name, info in tensors.infos.items():
    if info.dtype not in FLOATS:
      raise UserError(
        f"{name} has the dtype {info.dtype}, which is not supported: weights are floats, or quantised as "
        "docs/formats.md says"
      )
    if 0 in info.shape:
      raise UserError(f"{name} is empty: its shape is {info.shape}")


def _select_tensors(
  component: str, layout: Layout, tensors: TensorFile
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
  """Returns the official names of the tensors that Wan uses by their names in the file, and the others by reason."""
  left_out = {
    reason: tuple(name for name in tensors.infos if re.match(pattern, name))
    for reason, pattern in LEFT_OUT.get((component, layout), {}).items()
  }
  dropped = {name for names in left_out.values() for name in names}
  table = diffusers_table(component, tensors.infos)
  convert = functools.partial(NAMES[layout], table) if layout in NAMES else lambda name: name.removeprefix("visual.")
  names = {name: convert(name) for name in tensors.infos if name not in dropped}
  if component == "image_encoder":
    unused = _unused_vision(names)
    left_out["the image tower's last block and head"] = tuple(sorted(unused))
    names = {name: new for name, new in names.items() if name not in unused}
  copy, original = "encoder.embed_tokens.weight", "shared.weight"
  if component == "text_encoder" and copy in names:
    if original in names:
      del names[copy]
      left_out["a second copy of the token embedding"] = (copy,)
    else:
      names[copy] = convert(original)
  return names, left_out


def _unused_vision(names: Mapping[str, str]) -> set[str]:
  """Returns the tensors of CLIP's image tower that Wan does not use: those of the last block, and after it."""
  last = "transformer.{}.".format(count_blocks(names.values(), r"transformer\.(\d{1,9})\.") - 1)
  return {name for name, new in names.items() if new.startswith((last, "post_norm.")) or new == "head"}


def _fuse_attention(tensors: TensorFile) -> TensorFile:
  """Concatenates queries, keys and values, which transformers' layout has apart."""
  parts = {}
  for name in tensors.infos:
    stem, dot, leaf = name.rpartition(".")
    if stem.endswith(".attn.q"):
      parts[f"{stem.removesuffix('q')}to_qkv.{leaf}"] = tuple(f"{stem[:-1]}{part}{dot}{leaf}" for part in "qkv")
  return tensors.concatenate(parts)
