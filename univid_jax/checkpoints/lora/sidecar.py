"""Metadata of LoRA files whose format has no room for it: NAME.ckpt.json beside NAME.ckpt."""

import json
from collections.abc import Mapping
from pathlib import Path

from univid_jax.core.errors import UserError
from univid_jax.core.json_files import parse_json
from univid_jax.core.paths import atomic_write


def write_sidecar(path: Path, metadata: Mapping[str, str]) -> None:
  """Writes the metadata of a file."""
  with atomic_write(sidecar_path(path)) as sidecar:
    sidecar.write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")


def read_sidecar(path: Path) -> dict[str, str]:
  """Reads the metadata of a file; empty if there is none.

  Raises:
    UserError: it is damaged.
  """
  sidecar = sidecar_path(path)
  if not sidecar.exists():
    return {}
  try:
    values = parse_json(sidecar.read_bytes())
  except ValueError as error:
    raise UserError(f"{sidecar} is not valid JSON: {error}") from error
  if not isinstance(values, dict):
    raise UserError(f"{sidecar} must contain an object")
  return {key: value for key, value in values.items() if isinstance(value, str)}


def sidecar_path(path: Path) -> Path:
  return path.with_name(f"{path.name}.json")
