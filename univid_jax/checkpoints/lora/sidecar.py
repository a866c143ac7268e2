"""Metadata of LoRA files whose format has no room for it: NAME.ckpt.json beside NAME.ckpt."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TypeVar

from univid_jax.core.json_files import read_json_object

_Path = TypeVar("_Path", bound=PurePath)


def write_sidecar(sidecar: Path, metadata: Mapping[str, str]) -> None:
  """Writes metadata to a sidecar, given its own path, as the file it belongs to may have a temporary name."""
  sidecar.write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_sidecar(path: Path) -> dict[str, str]:
  """Reads the metadata in a file's sidecar; empty if there is none.

  Raises:
    UserError: it is damaged.
  """
  sidecar = sidecar_path(path)
  if not sidecar.exists():
    return {}
  return {key: value for key, value in read_json_object(sidecar).items() if isinstance(value, str)}


def sidecar_path(path: _Path) -> _Path:
  """Returns the path of a file's sidecar, given the file's final name."""
  return path.with_name(f"{path.name}.json")
