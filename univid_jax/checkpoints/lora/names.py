"""Names of tensors in LoRA files: which tensor of the transformer they change, and which part of the change they are.

Four tables describe them; a new trainer is a new entry:

_PREFIXES    what trainers put in front of a module's name
_PARTS       endings after a module's name, and the part of a change that the tensor is
_UNSUPPORTED endings that are refused, with the reason
TARGETS      the tensor of a module that a part changes
"""

import functools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from flax import nnx, traverse_util

from univid_jax.core.options import ModelType
from univid_jax.core.text import list_first
from univid_jax.models.dit import DiT
from univid_jax.models.names import name_to_diffusers, original_name
from univid_jax.models.variants import DiTConfig

# Regular expressions of prefixes, and the format of files with official names after them (names in diffusers' spelling
# are always diffusers'). Any number of prefixes is removed. `transformer` needs its dot: transformer_blocks is a module
# of other models.
_PREFIXES: Mapping[str, str] = {
  r"diffusion_model[._]": "comfyui",
  r"lora_unet_+": "musubi",
  r"lora_transformer_+": "musubi",
  r"lycoris_+": "musubi",
  r"transformer\.": "diffusers",
  r"base_model\.model\.": "univid",
  r"pipe\.dit\.": "univid",
  r"dit\.": "univid",
  r"model\.": "univid",
  r"module\.": "univid",
  r"_orig_mod\.": "univid",
}
_NO_PREFIX = "univid"

# PEFT puts the name of an adapter, which contains no dot, before the last word.
_ADAPTER = r"(?:\.[^.]+)?"
_PARTS: Mapping[str, str] = {
  rf"lora_(?:A|down){_ADAPTER}\.weight|lora\.down\.weight|lora_linear_layer\.down\.weight": "down",
  rf"lora_(?:B|up){_ADAPTER}\.weight|lora\.up\.weight|lora_linear_layer\.up\.weight": "up",
  r"lora_mid\.weight": "mid",
  rf"lora_B{_ADAPTER}\.bias": "up_bias",
  "alpha": "alpha",
  "diff|w_norm": "diff",
  "diff_b|b_norm": "diff_b",
  "diff_m": "diff_m",
  **{rf"hada_{part}{_ADAPTER}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
  **{rf"lokr_{part}{_ADAPTER}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
  "dora_scale": "dora_scale",
  rf"lora_magnitude_vector{_ADAPTER}(?:\.weight)?": "magnitude",
}
_ENDING = re.compile("|".join(f"(?P<p{i}>{ending})" for i, ending in enumerate(_PARTS)))

# The tensor of a module that a part changes; all other parts change the weight.
TARGETS: Mapping[str, str] = {"up_bias": ".bias", "diff_b": ".bias", "diff_m": ".modulation"}

WHOLE_WEIGHTS = "whole weights (PEFT's modules_to_save), not changes of them"
_UNSUPPORTED: Mapping[str, str] = {
  r"\.(oft_|boft_)": "OFT factors",
  r"\.(vera_lambda_|vblora_|ia3_|glora_)": "factors of VeRA, VB-LoRA, IA3 or GLoRA",
  r"\.(a1|a2|b1|b2)\.weight$": "GLoRA factors",
  r"\.(set_weight|reshape_weight)$": "weights that replace or reshape those of the base",
  r"\.lora_A.*\.bias$": "biases of the first matrix",
  r"\.(weight|bias)$": WHOLE_WEIGHTS,
}

# Tensors that are not weights but concern the whole file: musubi's LoKr stores its factor, see `building`.
MARKERS = ("lokr_factor",)

# Limits on block numbers and lengths of names, so that a malformed file costs neither memory nor time.
_MAX_BLOCKS, _MAX_NAME = 1000, 300
_MAX_LISTED = 24


class Part(NamedTuple):
  """The meaning of a tensor in a file.

  Attributes:
    tensor: the official name of the tensor that it changes.
    part: a value of `_PARTS`.
    module: name of its module as spelled in the file, without `base_model.model.`.
    format: the format that the name belongs to.
  """

  tensor: str
  part: str
  module: str
  format: str


def is_lora(names: Collection[str]) -> bool:
  """Returns whether tensor names are those of a LoRA or one of its relatives."""
  return any(part != "alpha" for _, part in map(_split, names) if part)


def is_transformer(names: Collection[str]) -> bool:
  """Returns whether tensor names are those of a whole transformer in any layout: only it has a text embedding."""
  return any("text_embed" in name and name.endswith(".weight") for name in names) and not is_lora(names)


def parse_name(name: str) -> Part | None:
  """Identifies a tensor of a LoRA file; returns None if no transformer of Wan has a tensor that it could change."""
  module, part = _split(name)
  if part is None or (found := _find_tensor(module + TARGETS.get(part, ""))) is None:
    return None
  tensor, format_name = found
  return Part(tensor, part, module.removeprefix("base_model.model."), format_name)


def unsupported(name: str) -> str | None:
  """Describes a tensor that belongs to a module of the transformer, but to no known kind of change."""
  if len(name) > _MAX_NAME:
    return f"names of more than {_MAX_NAME} characters"
  if _split(name)[1] is not None:
    return None
  words = name.split(".")
  modules = (".".join(words[:end]) for end in range(1, len(words)))
  if all(_find_tensor(module) is None and _find_tensor(f"{module}.bias") is None for module in modules):
    return None
  return next(
    (what for pattern, what in _UNSUPPORTED.items() if re.search(pattern, name)), "tensors of an unknown kind"
  )


def list_names(names: Iterable[str]) -> str:
  """Lists up to `_MAX_LISTED` names; only the first of those that differ just in the number of their block."""
  groups: dict[str, list[str]] = defaultdict(list)
  for name in names:
    groups[re.sub(r"blocks([._])\d+", r"blocks\1#", name)].append(name[:_MAX_NAME])
  texts = [f"{first} (and in {len(rest)} other blocks)" if rest else first for first, *rest in groups.values()]
  return list_first(texts, _MAX_LISTED)


def _split(name: str) -> tuple[str, str | None]:
  """Splits a tensor's name into its module's name and the part of a change, which is None if there is none."""
  for dot in (i for i, character in enumerate(name[:_MAX_NAME]) if character == "."):
    if match := _ENDING.fullmatch(name, dot + 1):
      return name[:dot], list(_PARTS.values())[int(str(match.lastgroup)[1:])]
  return name, None


def _find_tensor(name: str) -> tuple[str, str] | None:
  """Returns the official name of a tensor, and the format of its spelling, given the name without `.weight`."""
  format_name = None
  while True:
    key, number = _key(name), "#"
    block = re.fullmatch(r"blocks_(\d{1,9})_(.+)", key)
    if block and int(block[1]) < _MAX_BLOCKS:
      key, number = f"blocks_#_{block[2]}", str(int(block[1]))
    if key in _tensors():
      tensor, diffusers = _tensors()[key]
      return tensor.replace("#", number), "diffusers" if diffusers else format_name or _NO_PREFIX
    prefix = next((prefix for prefix in _PREFIXES if re.match(prefix, name)), None)
    if prefix is None:
      return None
    format_name = format_name or _PREFIXES[prefix]
    name = re.sub(prefix, "", name, count=1)


def _key(name: str) -> str:
  """Returns a name with "_" for every separator, since trainers mix them."""
  return re.sub(r"[._]+", "_", name).strip("_")


@functools.cache
def _tensors() -> dict[str, tuple[str, bool]]:
  """Returns the tensors of Wan's transformers by key, in official and in diffusers' spelling.

  Blocks have the number #. The second value is whether the spelling is diffusers' alone.
  """
  small = DiTConfig(
    dim=2, ffn_dim=2, num_heads=1, num_layers=1, model_type=ModelType.I2V, freq_dim=2, text_dim=2, image_dim=2
  )
  params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: DiT(small, rngs=nnx.Rngs(0))), nnx.Param))
  found: dict[str, tuple[str, bool]] = {}
  for path in traverse_util.flatten_dict(params):
    name = original_name("transformer", path, 0 if path[0] == "blocks" else None)
    tensor = re.sub(r"^blocks\.0\.", "blocks.#.", name)
    for spelled, diffusers in ((name_to_diffusers("transformer", name), True), (name, False)):
      key = _key(spelled.removesuffix(".weight"))
      found[re.sub(r"^blocks_0_", "blocks_#_", key)] = (tensor, diffusers)
  return found
