"""Merges the texts in the headers of a model's shards, as if they were one file."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from univid_jax.core.errors import UserError
from univid_jax.core.json_files import parse_json

log = logging.getLogger(__name__)


def merge_texts(index: Path, shards: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
  """Returns the texts of all shards.

  Texts that differ are merged if they are JSON objects, as are the objects in them: each shard may describe its own
  layers. Others belong to one shard, such as its hash, and are left out.

  Args:
    index: path of the shards' index.
    shards: texts by name, for each shard by name.

  Raises:
    UserError: two objects contradict each other, or one is damaged.
  """
  merged: dict[str, str] = {}
  for key in dict.fromkeys(key for texts in shards.values() for key in texts):
    found = {shard: texts[key] for shard, texts in shards.items() if key in texts}
    if len(set(found.values())) == 1:
      merged[key] = next(iter(found.values()))
    elif any(text.lstrip().startswith("{") for text in found.values()):
      merged[key] = _unite(index, key, found)
    else:
      log.warning("%s: its shards have different texts for %s in their headers, which are left out", index, key)
  return merged


def _unite(index: Path, key: str, texts: Mapping[str, str]) -> str:
  united: dict[str, Any] = {}
  for shard, text in texts.items():
    try:
      for name, value in parse_json(text).items():
        if isinstance(value, dict) and isinstance(known := united.setdefault(name, {}), dict):
          for inner_name, inner in value.items():
            _add(known, inner_name, inner)
        else:
          _add(united, name, value)
    except _Contradiction as error:
      raise UserError(
        f"{index}: its shards contradict each other: {shard} has another {error} in {key} of its header; get all "
        "shards from one release"
      ) from error
    except (ValueError, AttributeError, RecursionError) as error:
      raise UserError(f"{index.parent / shard}: the entry {key} of its header is damaged ({error})") from error
  return json.dumps(united)


class _Contradiction(Exception):
  """Two shards have different values of one name."""


def _add(values: dict[str, Any], name: str, value: Any) -> None:
  if values.setdefault(name, value) != value:
    raise _Contradiction(name)
