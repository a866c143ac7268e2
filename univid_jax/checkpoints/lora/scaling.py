"""Rank and alpha of PEFT's adapters, from adapter_config.json or the header of diffusers' files."""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from univid_jax.checkpoints.tensor_files import is_tensor_file
from univid_jax.core.errors import UserError
from univid_jax.core.json_files import parse_json_object
from univid_jax.core.paths import is_file
from univid_jax.core.text import describe_value

CONFIG_FILE = "adapter_config.json"
ADAPTER_STEM = "adapter_model"
HEADER_KEY = "lora_adapter_metadata"

# Kinds of adapters that are read, with the key of alpha in their config.
_ALPHA_KEYS: Mapping[str, str] = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
_DEFAULT_ALPHA = 8.0  # PEFT's

# Options that change the base, or how an adapter is applied. Others do not affect a finished adapter.
_REFUSED = (
  "layer_replication",
  "alora_invocation_tokens",
  "use_qalora",
  "use_bdlora",
  "arrow_config",
  "monteclora_config",
)
_REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Patterns of module names are regular expressions, bounded so that matching takes no time.
_MAX_PATTERN, _MAX_QUANTIFIERS = 300, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftScaling:
  """Rank and alpha by module.

  Attributes:
    source: where they were found, for messages.
    rank: the rank; None if it is not stated.
    alpha: alpha of modules without a pattern.
    alpha_stated: whether alpha is stated, not PEFT's default.
    use_rslora: whether the scale is alpha / sqrt(rank).
    rank_pattern, alpha_pattern: values by regular expression, which must match the end of a module's name.
  """

  source: str
  rank: float | None
  alpha: float
  alpha_stated: bool
  use_rslora: bool
  rank_pattern: Mapping[re.Pattern[str], float]
  alpha_pattern: Mapping[re.Pattern[str], float]

  def alpha_of(self, module: str, rank: int | None) -> tuple[float, list[str]]:
    """Returns the alpha of a module, so that alpha / rank is its scale, and what had to be assumed.

    Args:
      module: its name in the file.
      rank: rank of its tensors; None if they have none, when alpha is the scale itself.

    Raises:
      UserError: the stated rank differs from the tensors', or is needed but missing.
    """
    stated = _find(self.rank_pattern, module) or self.rank
    if stated is not None and rank is not None and stated != rank:
      raise UserError(f"{self.source} states rank {stated:g} for {module}, whose tensors have rank {rank}")
    divisor = rank or stated
    if divisor is None:
      raise UserError(f"{self.source} states no rank r, which {module} needs")
    alpha = _find(self.alpha_pattern, module)
    assumed = [] if stated else [f"{self.source} states no rank: taken from the tensors"]
    if alpha is None:
      alpha = self.alpha
      assumed += [] if self.alpha_stated else [f"{self.source} states no alpha: taken to be PEFT's default, {alpha:g}"]
    scale = alpha / (divisor**0.5 if self.use_rslora else divisor)
    return scale * (rank or 1), assumed


def _find(patterns: Mapping[re.Pattern[str], float], module: str) -> float | None:
  names = module, module.removeprefix("transformer.")
  return next((value for pattern, value in patterns.items() if any(map(pattern.fullmatch, names))), None)


def find_adapter(folder: epath.Path) -> epath.Path | None:
  """Returns the weights in a folder of PEFT: adapter_model.*, or the only file of tensors; None if there are none."""
  files = sorted(path for path in folder.iterdir() if is_tensor_file(path) and path.name[0] != ".")
  named = [path for path in files if path.stem == ADAPTER_STEM]
  if named:
    return max(named, key=lambda path: path.suffix.lower())  # among several, the .safetensors
  return files[0] if len(files) == 1 else None


def find_config(path: epath.Path) -> epath.Path | None:
  """Returns PEFT's config of a file of weights, if there is one next to it."""
  config = path.parent / CONFIG_FILE
  if not is_file(config):
    return None
  return config if path.stem == ADAPTER_STEM or find_adapter(path.parent) == path else None


def find_scaling(path: Path, metadata: Mapping[str, str]) -> PeftScaling | None:
  """Reads rank and alpha of a file from PEFT's config next to it, or the header; returns None if neither has them.

  Raises:
    UserError: they are damaged, or for a kind of adapter that is not supported.
  """
  if config := find_config(epath.Path(path)):
    return _read_scaling(str(config), config.read_bytes())
  if HEADER_KEY in metadata:
    return _read_scaling(f"{HEADER_KEY} in the header of {path}", metadata[HEADER_KEY].encode())
  return None


def _read_scaling(source: str, text: bytes) -> PeftScaling:
  # diffusers prefixes every key with the name of the component.
  values = {key.removeprefix("transformer."): value for key, value in parse_json_object(text, source=source).items()}
  kind = str(values.get("peft_type") or "LORA")
  if kind not in _ALPHA_KEYS:
    raise UserError(f"{source}: adapters of peft_type {kind} are not supported, only {', '.join(_ALPHA_KEYS)}")
  init = values.get("init_lora_weights")
  refused = [key for key in _REFUSED if values.get(key)]
  if isinstance(init, str) and init.startswith(_REFUSED_INITS):
    refused.append(f"init_lora_weights={init}")
  if refused:
    raise UserError(f"{source}: {', '.join(refused)} is not supported: such an adapter also changes the base")
  alpha = values.get(_ALPHA_KEYS[kind])
  return PeftScaling(
    source=source,
    rank=None if values.get("r") is None else _number(source, "r", values["r"]),
    alpha=_DEFAULT_ALPHA if alpha is None else _number(source, _ALPHA_KEYS[kind], alpha),
    alpha_stated=alpha is not None,
    use_rslora=bool(values.get("use_rslora")),
    rank_pattern=_read_patterns(source, "rank_pattern", values),
    alpha_pattern=_read_patterns(source, "alpha_pattern", values),
  )


def _read_patterns(source: str, key: str, values: Mapping[str, Any]) -> dict[re.Pattern[str], float]:
  entries = values.get(key) or {}
  if not isinstance(entries, dict):
    raise UserError(f"{source}: {key} must be an object, got {describe_value(entries)}")
  patterns = {}
  for text, value in entries.items():
    if len(text) > _MAX_PATTERN or len(re.findall(r"[*+?{]", text)) > _MAX_QUANTIFIERS or re.search(r"\)[*+{]", text):
      raise UserError(f"{source}: the pattern {describe_value(text)} in {key} is too complex")
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("error")  # refuses patterns whose meaning will change
        pattern = re.compile(rf"(?:.*\.)?(?:{text})")  # as PEFT reads it
    except (re.error, OverflowError, RecursionError, Warning) as error:
      raise UserError(f"{source}: {text!r} in {key} is not a regular expression: {error}") from error
    patterns[pattern] = _number(source, f"{key}[{text}]", value)
  return patterns


def _number(source: str, key: str, value: object) -> float:
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
    raise UserError(f"{source}: {key} must be a positive number, got {describe_value(value)}")
  return float(value)
