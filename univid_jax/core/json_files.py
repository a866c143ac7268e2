"""JSON: reads files of any origin, with a bound on their size and one-line errors, and writes files."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from univid_jax.core.errors import UserError
from univid_jax.core.paths import write_text

# The index of the largest model has 0.2 MB.
MAX_BYTES = 64 << 20


def read_json_object(path: Path) -> dict[str, Any]:
  """Reads a file that contains one JSON object.

  Raises:
    OSError: the file is missing or unreadable.
    UserError: it is too large, not valid JSON or not an object, or an object in it has a key twice.
  """
  if (size := path.stat().st_size) > MAX_BYTES:
    raise UserError(f"{path} has {size:,} bytes; a JSON file of a model has at most {MAX_BYTES:,}")
  return parse_json_object(path.read_bytes(), source=path)


def parse_json_object(text: str | bytes, *, source: object) -> dict[str, Any]:
  """Parses one JSON object; raises UserError that names the source for any fault."""
  try:
    values = parse_json(text)
  except ValueError as error:
    raise UserError(f"{source} is not valid JSON: {error}") from error
  if not isinstance(values, dict):
    raise UserError(f"{source} must contain a JSON object, got {type(values).__name__}")
  return values


def parse_json(text: str | bytes) -> Any:
  """Parses JSON; raises ValueError for any fault, duplicate keys and excessive nesting included."""
  try:
    return json.loads(text, object_pairs_hook=_make_object)
  except RecursionError as error:
    raise ValueError("it is nested too deeply") from error


def write_json(path: epath.PathLike, values: Mapping[str, Any]) -> None:
  """Writes an object as indented JSON; nothing appears, or is replaced, before it is complete."""
  write_text(path, json.dumps(values, indent=2) + "\n")


def format_json(values: Any) -> str:
  """Formats values as indented JSON, with null for numbers that are not finite, which JSON lacks."""
  return json.dumps(_without_nonfinite(values), indent=2, allow_nan=False)


def _without_nonfinite(values: Any) -> Any:
  match values:
    case dict():
      return {key: _without_nonfinite(value) for key, value in values.items()}
    case list() | tuple():
      return [_without_nonfinite(value) for value in values]
    case float() if not math.isfinite(values):
      return None
  return values


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) < len(pairs):
    keys = [key for key, _ in pairs]
    raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
  return values
