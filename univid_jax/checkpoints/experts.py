"""Experts of Wan2.2 A14B: transformers that only names distinguish from each other and, for T2V, from Wan2.1's 14B.

Also parses how users name files for them: [EXPERT=]PATH[:WEIGHT].
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from univid_jax.core.errors import UserError
from univid_jax.core.options import Expert, ModelType, TrainedExpert
from univid_jax.models.variants import VARIANTS, DiTConfig

# Which of two experts a LoRA can be meant for.
LORA_EXPERTS = (TrainedExpert.HIGH, TrainedExpert.LOW, TrainedExpert.BOTH)

# The A14B variant of each Wan2.1 model that has the same tensors.
SAME_TENSORS = {"wan2.1-t2v-14b": "wan2.2-t2v-a14b"}

_VERSION = re.compile(r"wan[ _.-]*2[ _.-]?([12])(?!\d)", re.IGNORECASE)
_NOISE = re.compile(r"(high|low)[ _.-]*noise", re.IGNORECASE)
_BARE = re.compile(r"(?<![a-z])(high|low)(?![a-z])", re.IGNORECASE)

# Nouns that high and low may describe instead.
_OTHER_NOUN = re.compile(
  r"[ _.-]*(rank|quality|res|detail|contrast|key|light|speed|vram|step|lr|poly|angle)", re.IGNORECASE
)

# Folders of diffusers' pipelines with two transformers.
_DIFFUSERS_FOLDERS = {"transformer": Expert.HIGH, "transformer_2": Expert.LOW}

# Number of parts of a path that are searched: Wan2.2-T2V-A14B/high_noise_model/diffusion_pytorch_model.safetensors.
_DEPTH = 3
# Length in characters from which metadata are configs or prompts.
_LONG = 200


def find_expert(path: Path, metadata: Mapping[str, str], config: DiTConfig) -> Expert | None:
  """Returns which expert of Wan2.2 A14B a transformer is; None if it is of another model or nothing identifies it.

  Args:
    path: path of its file. The file's own name takes precedence over its folders'.
    metadata: the texts in the file's header.
    config: the transformer's shape.
  """
  if config.model_type == ModelType.TI2V or config.takes_image_features:
    return None
  texts = list(describing_texts(path, metadata))
  version = next((match[1] for text in texts if (match := _VERSION.search(text))), None)
  is_wan22 = version == "2" or any("a14b" in text.lower() for text in texts)
  if version == "1":
    return None
  for text in texts:
    if match := _NOISE.search(text) or (_BARE.search(text) if is_wan22 else None):
      return Expert(match[1].lower())
  if (path.parent.parent / "transformer_2").is_dir() and path.parent.name in _DIFFUSERS_FOLDERS:
    return _DIFFUSERS_FOLDERS[path.parent.name]
  is_expert = config == VARIANTS.get("wan2.2-i2v-a14b") or (is_wan22 and config == VARIANTS.get("wan2.1-t2v-14b"))
  return Expert.UNKNOWN if is_expert else None


def split_expert(text: str) -> tuple[TrainedExpert | None, str]:
  """Splits high=PATH, low=PATH or both=PATH of a LoRA into expert and path; (None, PATH) without an expert."""
  expert, equals, path = text.partition("=")
  return (TrainedExpert(expert), path) if equals and expert in LORA_EXPERTS else (None, text)


def split_weight(text: str) -> tuple[str, float]:
  """Splits [EXPERT=]PATH[:WEIGHT]; the weight is 1 by default, and no part of an existing path is a weight.

  Raises:
    UserError: the weight has a decimal comma.
  """
  path, _, weight = text.rpartition(":")
  if not path or os.path.exists(split_expert(text)[1]):
    return text, 1.0
  try:
    return path, float(weight)
  except ValueError:
    if re.fullmatch(r"[+-]?\d*,\d+", weight):
      raise _decimal_comma(text) from None
    return text, 1.0


def join_weight(path: str, weight: float) -> str:
  """Returns PATH:WEIGHT, without a weight that is 1; `split_weight` inverts it."""
  return path if weight == 1 else f"{path}:{weight:g}"


def split_loras(items: Sequence[str]) -> list[tuple[str, float]]:
  """Splits each item of a list with `split_weight`; raises like that and `check_commas`."""
  check_commas(items)
  return [split_weight(item) for item in items]


def check_commas(items: Sequence[str]) -> None:
  """Raises UserError if a list of LoRAs was split at the decimal comma of a weight."""
  for first, second in itertools.pairwise(items):
    is_split = re.search(r":[+-]?\d*$", first) and re.fullmatch(r"\d+(:\w+)?", second)
    if is_split and not os.path.exists(split_expert(first)[1]) and not os.path.exists(second):
      raise _decimal_comma(f"{first},{second}")


def _decimal_comma(text: str) -> UserError:
  path, _, weight = text.rpartition(",")
  return UserError(f"{text}: a weight has a decimal point, as in {path}.{weight}; commas separate LoRAs")


def named_expert(path: str) -> Expert | None:
  """Returns the expert that the name of a LoRA, or else of its folder, mentions; None if that is ambiguous.

  "low" in low_rank does not count, and a name with both words names neither.
  """
  name, folder = list(reversed(Path(path).absolute().parts))[:2]
  found = {match[1].lower() for match in _NOISE.finditer(name)}
  found = found or {match[1].lower() for match in _BARE.finditer(name) if not _OTHER_NOUN.match(name[match.end() :])}
  if not found and (match := re.fullmatch(r"(high|low)([ _.-]*noise([ _.-]*model)?)?", folder, re.IGNORECASE)):
    found = {match[1].lower()}
  return Expert(found.pop()) if len(found) == 1 else None


def surely_named_expert(path: str) -> Expert | None:
  """Returns the expert that the name of a LoRA's file states beyond doubt: high_noise, or high as its last word."""
  stem = Path(path).stem
  found = {
    match[1].lower() for match in (_NOISE.search(stem), re.search(r"(?<![a-z])(high|low)$", stem, re.I)) if match
  }
  return Expert(found.pop()) if len(found) == 1 else None


def may_be_expert(path: Path, metadata: Mapping[str, str], variant: str) -> bool:
  """Returns whether a transformer that nothing identifies as Wan2.2's could still be one of its experts."""
  return variant in SAME_TENSORS and not any(_VERSION.search(text) for text in describing_texts(path, metadata))


def describing_texts(path: Path, metadata: Mapping[str, str]) -> Iterator[str]:
  """Yields texts that may identify a file's model, best first: its name, its folders' names, short metadata."""
  yield from list(reversed(path.absolute().parts))[:_DEPTH]
  yield from (value for _, value in sorted(metadata.items()) if len(value) < _LONG)
