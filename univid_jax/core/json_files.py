"""JSON: files that others wrote, read with a bound on their size and every fault in one line, and files for others."""

import json
import math
from pathlib import Path
from typing import Any

from univid_jax.core.errors import UserError

# The index of the largest model has 0.2 MB.
MAX_BYTES = 64 << 20


def read_json_object(path: Path) -> dict[str, Any]:
  """Reads a file that contains one JSON object.

  Raises:
    OSError: the file is missing or unreadable.
    UserError: it is too large, not valid JSON, or not an object; an object in it has a key twice.
  """
  if (size := path.stat().st_size) > MAX_BYTES:
    raise UserError(f"{path} has {size:,} bytes; a JSON file of a model has at most {MAX_BYTES:,}")
  try:
    values = parse_json(path.read_bytes())
  except ValueError as error:
    raise UserError(f"{path} is not valid JSON: {error}") from error
  if not isinstance(values, dict):
    raise UserError(f"{path} must contain a JSON object, got {type(values).__name__}")
  return values


def parse_json(text: str | bytes) -> Any:
  """Parses JSON; raises ValueError for faults of any kind, a key given twice and excessive nesting included."""
  try:
    return json.loads(text, object_pairs_hook=_make_object)
  except RecursionError as error:
    raise ValueError("it is nested too deeply") from error


def format_json(values: Any) -> str:
  """Formats values as indented JSON, in which numbers that are not finite are null: JSON has no others."""
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
