"""Conversions between `RunConfig`, JSON and `ml_collections.ConfigDict`, which only the commands use."""

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from univid_jax.config.schema import RunConfig
from univid_jax.config.section import convert
from univid_jax.core.errors import UserError


def to_config_dict(config: RunConfig) -> ml_collections.ConfigDict:
  """Converts a config to the ConfigDict whose values flags override."""
  return ml_collections.ConfigDict(_plain(config, sequence=tuple))


def from_config_dict(values: ml_collections.ConfigDict) -> RunConfig:
  """Converts a config from flags or from a user's config file.

  Raises:
    UserError: a key is unknown or a value is invalid; the message names both.
  """
  return convert(RunConfig, values.to_dict(), "config")


def to_json(config: RunConfig) -> dict[str, Any]:
  """Converts a config to JSON-compatible values."""
  return _plain(config, sequence=list)


def from_json(values: Mapping[str, Any]) -> RunConfig:
  """Converts a config from JSON; keys that an earlier version lacked take their defaults.

  Raises:
    UserError: a key is unknown or a value is invalid.
  """
  return convert(RunConfig, values, "config")


def override(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
  """Returns the config with other values, by dotted key: `override(config, {"model.dim": 64})`.

  A key may lie within the value of an earlier one: `{"data.tasks": tasks, "data.tasks.invert": 1}` does not change
  `tasks`.

  Raises:
    UserError: a key is unknown or a value is invalid.
  """
  tree = to_json(config)
  for key, value in values.items():
    branch, *rest = tree, *key.split(".")
    for part in rest[:-1]:
      if not isinstance(branch.get(part), Mapping):
        raise UserError(f"unknown key config.{key}")
      branch[part] = dict(branch[part])  # it may be the caller's
      branch = branch[part]
    branch[rest[-1]] = value
  return from_json(tree)


def differences(before: RunConfig, after: RunConfig) -> Iterator[tuple[str, Any, Any]]:
  """Yields (key, value before, value after) for every value that differs, in the order of keys.

  A weight of 0 equals a missing one, as for a task that an earlier version lacked.
  """
  values = [dict(_leaves(to_json(config))) for config in (before, after)]
  for key in sorted(values[0].keys() | values[1].keys()):
    old, new = (each.get(key) for each in values)
    if old != new and not (None in (old, new) and 0 in (old, new)):
      yield key, old, new


def find_keys(name: str) -> list[str]:
  """Returns the full keys of the default config, groups included, whose last part is `name`."""
  keys = [key for key, _ in _leaves(to_json(RunConfig()), "config")]
  groups = dict.fromkeys(key.rpartition(".")[0] for key in keys)
  return [key for key in [*groups, *keys] if key.rpartition(".")[2] == name]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
  if not isinstance(value, dict):
    yield key, value
    return
  for name, item in value.items():
    yield from _leaves(item, f"{key}.{name}" if key else name)


def _plain(value: Any, *, sequence: type) -> Any:
  """Converts dataclasses and mappings to dicts, enums to strings, and tuples to `sequence`."""
  if dataclasses.is_dataclass(value):
    return {field.name: _plain(getattr(value, field.name), sequence=sequence) for field in dataclasses.fields(value)}
  if isinstance(value, Mapping):
    return {str(key): _plain(item, sequence=sequence) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return sequence(_plain(item, sequence=sequence) for item in value)
  return value.value if isinstance(value, enum.Enum) else value
