"""Conversions between `RunConfig`, JSON and `ml_collections.ConfigDict`, which only the commands use."""

import collections.abc
import dataclasses
import enum
import functools
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import UserError
from univid_jax.core.options import parse_option


def to_config_dict(config: RunConfig) -> ml_collections.ConfigDict:
  """Converts a config for flags, which override its values."""
  return ml_collections.ConfigDict(_plain(config, sequence=tuple))


def from_config_dict(values: ml_collections.ConfigDict) -> RunConfig:
  """Converts a config from flags or from a user's config file.

  Raises:
    UserError: a key is unknown or a value is invalid; the message names both.
  """
  return _build(RunConfig, values.to_dict(), "config")


def to_json(config: RunConfig) -> dict[str, Any]:
  """Converts a config to JSON-compatible values."""
  return _plain(config, sequence=list)


def from_json(values: Mapping[str, Any]) -> RunConfig:
  """Converts a config from JSON; keys that an earlier version lacked take their defaults.

  Raises:
    UserError: a key is unknown or a value is invalid.
  """
  return _build(RunConfig, values, "config")


def override(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
  """Returns the config with other values, by dotted key: `override(config, {"model.dim": 64})`.

  Raises:
    UserError: a key is unknown or a value is invalid.
  """
  tree = to_json(config)
  for key, value in values.items():
    branch, *rest = tree, *key.split(".")
    for part in rest[:-1]:
      if not isinstance(branch.get(part), dict):
        raise UserError(f"unknown key config.{key}")
      branch = branch[part]
    branch[rest[-1]] = value
  return from_json(tree)


def differences(before: RunConfig, after: RunConfig) -> Iterator[tuple[str, Any, Any]]:
  """Yields (key, value before, value after) for every value that differs, in the order of keys.

  A weight of 0 equals none, as of a task that an earlier version did not have.
  """
  values = [dict(_leaves(to_json(config))) for config in (before, after)]
  for key in sorted(values[0].keys() | values[1].keys()):
    old, new = (each.get(key) for each in values)
    if old != new and not (None in (old, new) and 0 in (old, new)):
      yield key, old, new


def find_keys(name: str) -> list[str]:
  """Returns the dotted keys of the default config whose last part is `name`."""
  return [key for key, _ in _leaves(to_json(RunConfig())) if key.rpartition(".")[2] == name]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
  if not isinstance(value, dict):
    yield key, value
    return
  for name, item in value.items():
    yield from _leaves(item, f"{key}.{name}" if key else name)


def _plain(value: Any, *, sequence: type) -> Any:
  """Dataclasses and mappings as dicts, enums as strings, tuples as `sequence`."""
  if dataclasses.is_dataclass(value):
    return {field.name: _plain(getattr(value, field.name), sequence=sequence) for field in dataclasses.fields(value)}
  if isinstance(value, Mapping):
    return {str(key): _plain(item, sequence=sequence) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return sequence(_plain(item, sequence=sequence) for item in value)
  return value.value if isinstance(value, enum.Enum) else value


def _build(kind: Any, value: Any, key: str) -> Any:
  """Converts a plain value to the type `kind`; `key` names it in errors."""
  if dataclasses.is_dataclass(kind):
    return _build_section(kind, value, key)
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple:
    if not isinstance(value, (list, tuple)):
      raise UserError(f"{key} must be a list, got {value!r}")
    if arguments[-1] is Ellipsis:
      return tuple(_build(arguments[0], item, key) for item in value)
    if len(value) != len(arguments):
      raise UserError(f"{key} must have {len(arguments)} values, got {value!r}")
    return tuple(_build(part, item, key) for part, item in zip(arguments, value))
  if origin is collections.abc.Mapping:
    if not isinstance(value, Mapping):
      raise UserError(f"{key} must be a mapping, got {value!r}")
    return {str(name): _build(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
  if issubclass(kind, enum.StrEnum):
    return parse_option(kind, key, value)
  return _build_scalar(kind, value, key)


def _build_section(kind: Any, values: Any, key: str) -> Any:
  if not isinstance(values, Mapping):
    raise UserError(f"{key} must be a mapping, got {values!r}")
  types = _field_types(kind)
  names = {field.name for field in dataclasses.fields(kind)}
  unknown = sorted(set(values) - names)
  if unknown:
    raise UserError(f"unknown key {key}.{unknown[0]}; there are {', '.join(sorted(names))}")
  return kind(**{name: _build(types[name], value, f"{key}.{name}") for name, value in values.items()})


@functools.cache
def _field_types(section: type) -> Mapping[str, Any]:
  """Returns the types of the fields of a dataclass."""
  return typing.get_type_hints(section)


def _build_scalar(kind: type, value: Any, key: str) -> Any:
  """Accepts an integer, or a float without a fraction, where the other is expected; never a bool for a number."""
  names = {int: "an integer", float: "a number", str: "text", bool: "True or False"}
  if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
    return value
  if (
    kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool) and _converts(value, kind)
  ):
    return kind(value)
  raise UserError(f"{key} must be {names[kind]}, got {value!r}")


def _converts(value: int | float, kind: type[int] | type[float]) -> bool:
  """Returns whether a number is the same as another kind of number; infinity is no integer."""
  try:
    return kind(value) == value
  except (OverflowError, ValueError):
    return False
