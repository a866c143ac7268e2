"""LoRA files of every trainer: UniVid and DiffSynth, musubi and kohya, ComfyUI and diffusion-pipe, diffusers and PEFT.

Four tables describe them; a new format is a new entry:

_PARTS       endings of tensor names
_SPELLINGS   prefixes, and how the rest names a Linear, for reading
_UNSUPPORTED tensors that are refused, with the reason
FORMATS      what is written
"""

import dataclasses
import enum
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from univid_jax.checkpoints.lora.folder import is_lora_folder, read_lora_folder
from univid_jax.checkpoints.lora.weights import LoRALayer, LoRAWeights
from univid_jax.checkpoints.tensor_files import TensorFile, open_tensors, save_safetensors, save_torch
from univid_jax.core.errors import UserError
from univid_jax.models.names import name_from_diffusers, name_to_diffusers

# Endings of tensor names, and the part of a layer that the tensor is.
_PARTS: Mapping[str, str] = {
  ".lora_A.default.weight": "down",
  ".lora_B.default.weight": "up",
  ".lora_A.weight": "down",
  ".lora_B.weight": "up",
  ".lora_down.weight": "down",
  ".lora_up.weight": "up",
  ".alpha": "alpha",
}

# Linears outside of blocks, by official name.
_OTHER_LINEARS = (
  "text_embedding.0",
  "text_embedding.2",
  "time_embedding.0",
  "time_embedding.2",
  "time_projection.1",
  "head.head",
  "img_emb.proj.1",
  "img_emb.proj.3",
)
_BLOCK_LINEAR = re.compile(r"blocks\.\d+\.((self|cross)_attn\.(q|k|v|o|k_img|v_img)|ffn\.[02])")


# `_official` and the `_from_` functions return the official name of a Linear, or None if the name is not one. The
# `_to_` functions invert them.


def _official(name: str) -> str | None:
  return name if name in _OTHER_LINEARS or _BLOCK_LINEAR.fullmatch(name) else None


def _from_diffusers(name: str) -> str | None:
  module = name_from_diffusers("transformer", name + ".").removesuffix(".")
  return _official(module) if module != name else None


def _to_diffusers(module: str) -> str:
  return name_to_diffusers("transformer", module + ".").removesuffix(".")


def _from_underscores(name: str) -> str | None:
  block = re.fullmatch(r"blocks_(\d+)_(self_attn|cross_attn|ffn)_(\w+)", name)
  if block:
    return _official("blocks.{}.{}.{}".format(*block.groups()))
  return next((module for module in _OTHER_LINEARS if _to_underscores(module) == name), None)


def _to_underscores(module: str) -> str:
  return module.replace(".", "_")


def _unchanged(module: str) -> str:
  return module


# Spellings of module names by the prefix in front of them. The first prefix that matches a tensor name decides, and its
# spellings are tried in order: a function that returns the official name or None, and the format that uses them.
_Spelling = tuple[Callable[[str], str | None], str]
_SPELLINGS: Mapping[str, Sequence[_Spelling]] = {
  "base_model.model.": ((_from_diffusers, "diffusers"), (_official, "univid")),
  "model.diffusion_model.": ((_from_diffusers, "diffusers"), (_official, "comfyui")),
  "diffusion_model.": ((_from_diffusers, "diffusers"), (_official, "comfyui")),
  "transformer.": ((_from_diffusers, "diffusers"), (_official, "diffusers")),
  "lora_unet_": ((_from_underscores, "musubi"),),
  "": ((_from_diffusers, "diffusers"), (_official, "univid")),
}

# Patterns of tensor names that are refused, and what such tensors are.
_UNSUPPORTED = (
  (r"\.diff$", "full weight differences (.diff)"),
  (r"\.diff_b$", "bias differences (.diff_b)"),
  (r"\.(hada_w|hada_t)", "LoHa factors"),
  (r"\.lokr_", "LoKr factors"),
  (r"\.(dora_scale|lora_magnitude_vector)", "DoRA magnitudes"),
  (r"\.lora_mid\.", "Tucker factors (lora_mid)"),
  (r"\.(oft_|boft_)", "OFT factors"),
  (r"\.lora_[AB]\.bias|lora_B\.(default\.)?bias", "biases of LoRA layers"),
  (r"^lora_te", "layers of the text encoder"),
)


class Alpha(enum.Enum):
  """How a format stores alpha, so that its reader applies the right scale."""

  FOLDED = "folded"  # the reader applies no scale: `up` is multiplied by alpha / rank
  IF_NOT_RANK = "if_not_rank"  # the reader takes alpha = rank if there is none
  ALWAYS = "always"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAFormat:
  """What a format's files contain.

  Attributes:
    prefix: of every tensor name.
    spell: converts the official name of a Linear.
    down, up: endings of the names of the two matrices.
    alpha: how alpha is stored.
    suffixes: of files.
    metadata: additional header entries; values may refer to those of `LoRAWeights.file_metadata`, as in "{rank}".
  """

  prefix: str = ""
  spell: Callable[[str], str] = _unchanged
  down: str = ".lora_A.weight"
  up: str = ".lora_B.weight"
  alpha: Alpha
  suffixes: tuple[str, ...] = (".safetensors",)
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def tensors(self, module: str, layer: LoRALayer) -> dict[str, np.ndarray]:
    """Returns the named tensors of one layer."""
    name = self.prefix + self.spell(module)
    out = {name + self.down: layer.down, name + self.up: layer.folded_up if self.alpha is Alpha.FOLDED else layer.up}
    if self.alpha is Alpha.ALWAYS or (self.alpha is Alpha.IF_NOT_RANK and layer.alpha != layer.rank):
      out[f"{name}.alpha"] = np.array(layer.alpha, np.float32)
    return {key: np.ascontiguousarray(value) for key, value in out.items()}


FORMATS: Mapping[str, LoRAFormat] = {
  "univid": LoRAFormat(
    down=".lora_A.default.weight",
    up=".lora_B.default.weight",
    alpha=Alpha.FOLDED,
    suffixes=(".safetensors", ".ckpt"),  # a .ckpt needs PyTorch and has no room for metadata
  ),
  "diffusers": LoRAFormat(prefix="transformer.", spell=_to_diffusers, alpha=Alpha.FOLDED),
  "comfyui": LoRAFormat(prefix="diffusion_model.", alpha=Alpha.IF_NOT_RANK),
  "musubi": LoRAFormat(
    prefix="lora_unet_",
    spell=_to_underscores,
    down=".lora_down.weight",
    up=".lora_up.weight",
    alpha=Alpha.ALWAYS,
    metadata={"ss_network_module": "networks.lora_wan", "ss_network_dim": "{rank}", "ss_network_alpha": "{alpha}"},
  ),
}


def is_lora(names: Iterable[str]) -> bool:
  """Returns whether tensor names are those of a LoRA or one of its relatives."""
  return any(re.search(r"lora_(A|B|up|down)\.|hada_w|lokr_w", name) for name in names)


def read_lora(path: str | os.PathLike) -> LoRAWeights:
  """Reads a LoRA from a file of any trainer, or from this project's own folder.

  Raises:
    FileNotFoundError: the path does not exist.
    UserError: the contents are not a LoRA for Wan2.1's transformer, or of an unsupported kind.
  """
  return read_lora_folder(path) if is_lora_folder(path) else parse_lora(open_tensors(path))


def parse_lora(file: TensorFile) -> LoRAWeights:
  """Reads a LoRA from named tensors; raises like `read_lora`."""
  modules, formats = _group_tensors(file)
  if not formats:
    raise UserError(f"{file.path} contains no LoRA")
  if len(formats) > 1:
    raise UserError(f"{file.path} mixes the tensor names of {' and '.join(sorted(formats))}")
  layers = {module: _read_layer(file, module, parts) for module, parts in modules.items()}
  return LoRAWeights(layers, formats.pop(), dict(file.metadata))


def _group_tensors(file: TensorFile) -> tuple[dict[str, dict[str, str]], set[str]]:
  """Returns tensor names by official module and part, and the formats that they are spelled in."""
  for pattern, what in _UNSUPPORTED:
    if found := [name for name in file.infos if re.search(pattern, name)]:
      raise UserError(f"{file.path} contains {what}, which are not supported: {_list_names(found, limit=1)}")
  modules: dict[str, dict[str, str]] = defaultdict(dict)
  formats, unknown = set(), []
  for name in file.infos:
    parsed = _parse_name(name)
    if parsed is None:
      unknown.append(name)
      continue
    module, part, format_name = parsed
    formats.add(format_name)
    if part in modules[module]:
      raise UserError(f"{file.path} has two tensors for {part} of {module}: {modules[module][part]} and {name}")
    modules[module][part] = name
  if unknown:
    raise UserError(f"{file.path} contains tensors that do not belong to a LoRA for Wan2.1: {_list_names(unknown)}")
  return modules, formats


def _parse_name(name: str) -> tuple[str, str, str] | None:
  """Returns a tensor's official module, its part and the format of its name; None if the name is unknown."""
  suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
  if suffix is None:
    return None
  prefix = next(prefix for prefix in _SPELLINGS if name.startswith(prefix))
  spelled = name.removesuffix(suffix).removeprefix(prefix)
  for read_module, format_name in _SPELLINGS[prefix]:
    if (module := read_module(spelled)) is not None:
      return module, _PARTS[suffix], format_name
  return None


def _read_layer(file: TensorFile, module: str, parts: Mapping[str, str]) -> LoRALayer:
  if not {"down", "up"} <= parts.keys():
    raise UserError(f"{file.path} has only {', '.join(parts.values())} for {module}; a LoRA needs two matrices")
  down, up = file.read(parts["down"]), file.read(parts["up"])
  if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1]:
    raise UserError(
      f"{file.path}: expected (rank, in) and (out, rank), got {parts['down']} {down.shape} and {parts['up']} {up.shape}"
    )
  if "alpha" in parts:
    return LoRALayer(down, up, float(file.read(parts["alpha"]).reshape(())))
  return LoRALayer(down, up, _alpha_in_header(file.metadata, module, len(down)))


def _alpha_in_header(metadata: Mapping[str, str], module: str, rank: int) -> float:
  """Returns the alpha that diffusers stores in a file's header, or else the rank."""
  if "lora_adapter_metadata" not in metadata:
    return float(rank)
  values = json.loads(metadata["lora_adapter_metadata"])
  values = {key.removeprefix("transformer."): value for key, value in values.items()}
  name, patterns = _to_diffusers(module), values.get("alpha_pattern") or {}
  matches = (alpha for key, alpha in patterns.items() if name == key or name.endswith(f".{key}"))
  alpha = next(matches, values.get("lora_alpha", rank))
  return float(alpha) * (rank**0.5 if values.get("use_rslora") else 1.0)


def _list_names(names: Iterable[str], limit: int = 8) -> str:
  names = sorted(names)
  return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def find_format(name: str) -> LoRAFormat:
  """Returns an entry of `FORMATS`.

  Raises:
    UserError: there is no such format.
  """
  if name not in FORMATS:
    raise UserError(f"unknown LoRA format {name!r}; valid are {', '.join(FORMATS)}")
  return FORMATS[name]


def lora_tensors(lora: LoRAWeights, to: str) -> dict[str, np.ndarray]:
  """Returns the named tensors of a LoRA in a format of `FORMATS`."""
  out: dict[str, np.ndarray] = {}
  for module, layer in sorted(lora.layers.items()):
    out |= find_format(to).tensors(module, layer)
  return out


def write_lora(
  path: str | os.PathLike, lora: LoRAWeights, to: str, *, metadata: Mapping[str, Any] | None = None
) -> None:
  """Writes a LoRA file.

  Args:
    path: ends in one of the format's suffixes.
    lora: the LoRA.
    to: name of a format in `FORMATS`.
    metadata: header entries to add to those of `LoRAWeights.file_metadata`.

  Raises:
    UserError: the format is unknown, or its files have another suffix.
  """
  path, file_format = Path(path), find_format(to)
  if path.suffix not in file_format.suffixes:
    raise UserError(f"a {to} LoRA file must be named *{' or *'.join(file_format.suffixes)}, got {path}")
  tensors = lora_tensors(lora, to)
  if path.suffix == ".ckpt":
    save_torch(path, tensors)
    return
  entries = lora.file_metadata(metadata or {})
  added = {key: value.format(**entries) for key, value in file_format.metadata.items()}
  save_safetensors(path, tensors, metadata={**added, **entries})
