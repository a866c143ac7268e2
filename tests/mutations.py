"""Strategies for damaged files: bytes, JSON values and safetensors headers with random changes."""

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

# Values that parsers trip over.
NUMBERS = (True, 0, -1, 1, 3.5, -0.0, float("nan"), float("inf"), 2**31, 2**63, 2**64, 10**30)
TEXTS = ("", "0", "nan", "../../outside", "/outside", "a\0b", "ü", "x" * 5000, "F32", "F8_E5M2", "lora_A")
NASTY = (None, *NUMBERS, *TEXTS, [], [[]], [0, -1], [2**62, 2**62], {}, {"": {}})
KINDS = ("flip", "cut", "repeat", "remove", "insert")


def damaged_bytes(original: bytes) -> st.SearchStrategy[bytes]:
  """Flips, cuts, repeats, removes and inserts parts."""
  place = st.integers(0, len(original))
  change = st.tuples(st.sampled_from(KINDS), place, place, st.binary(max_size=9))
  return st.lists(change, min_size=1, max_size=4).map(lambda changes: _apply_all(original, changes))


def _apply_all(data: bytes, changes: list[tuple[str, int, int, bytes]]) -> bytes:
  for kind, first, second, extra in changes:
    start, stop = sorted((min(first, len(data)), min(second, len(data))))
    if kind == "flip" and start < len(data):
      data = data[:start] + bytes([data[start] ^ (1 << stop % 8)]) + data[start + 1 :]
    elif kind == "cut":
      data = data[:start]
    elif kind == "repeat":
      data = data[:stop] + data[start : min(stop, start + 200)] + data[stop:]
    elif kind == "remove":
      data = data[:start] + data[stop:]
    elif kind == "insert":
      data = data[:start] + extra + data[start:]
  return data


def damaged_json(original: Any) -> st.SearchStrategy[Any]:
  """Replaces, removes, renames and adds values anywhere in a JSON value."""
  change = st.tuples(
    st.sampled_from(("replace", "remove", "rename", "add")),
    st.lists(st.integers(0, 10**6), max_size=6),
    st.sampled_from(NASTY),
  )

  def apply(changes: list[tuple[str, list[int], Any]]) -> Any:
    value = copy.deepcopy(original)
    for kind, path, nasty in changes:
      value = _change_json(value, kind, path, nasty)
    return value

  return st.lists(change, min_size=1, max_size=3).map(apply)


def _change_json(value: Any, kind: str, path: list[int], nasty: Any) -> Any:
  if not path or not isinstance(value, dict | list) or not value:
    return copy.deepcopy(nasty)
  keys = list(value) if isinstance(value, dict) else list(range(len(value)))
  key = keys[path[0] % len(keys)]
  if len(path) > 1 and isinstance(value[key], dict | list) and value[key]:
    value[key] = _change_json(value[key], kind, path[1:], nasty)
  elif kind == "remove":
    del value[key]
  elif kind == "rename" and isinstance(value, dict):
    value[str(nasty)] = value.pop(key)
  elif kind == "add" and isinstance(value, dict):
    value[str(nasty)] = copy.deepcopy(value[key])
  else:
    value[key] = copy.deepcopy(nasty)
  return value


def dump(value: Any) -> bytes:
  return json.dumps(value).encode()


def damaged_json_file(original: bytes, dump: Callable[[Any], bytes] = dump) -> st.SearchStrategy[bytes]:
  """Damages a JSON file as JSON, or as bytes."""
  return st.one_of(damaged_json(json.loads(original)).map(dump), damaged_bytes(original))


def damaged_safetensors(original: bytes) -> st.SearchStrategy[bytes]:
  """Damages the header of a safetensors file as JSON, its length, or any byte."""
  (length,) = struct.unpack("<Q", original[:8])
  header, tensors = json.loads(original[8 : 8 + length]), original[8 + length :]

  def join(changed: Any) -> bytes:
    text = dump(changed)
    return struct.pack("<Q", len(text)) + text + tensors

  lengths = st.sampled_from((0, 1, length - 1, length + 1, len(original), 2**32, 2**63, 2**64 - 1))
  return st.one_of(
    damaged_json(header).map(join),
    lengths.map(lambda value: struct.pack("<Q", value) + original[8:]),
    damaged_bytes(original),
  )
