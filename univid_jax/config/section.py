"""The base class of config sections: a section checks the types of its values, then the values themselves."""

import collections.abc
import dataclasses
import difflib
import enum
import functools
import math
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from univid_jax.core.errors import UserError
from univid_jax.core.options import parse_option

# Maximum for tokens, rows, steps and so on, which become 32-bit integers in arrays.
MAX_COUNT = 2**31 - 1
# Maximum for numbers that stay on the host.
MAX_HOST_COUNT = 10**12


class Section:
  """A part of the config that checks its values, whether they come from flags, JSON or Python.

  A subclass is a dataclass, and overrides `check` where types alone do not determine what is valid.

  Attributes:
    KEY: prefix of its keys in error messages, with a trailing dot; "" for the root.
  """

  KEY: ClassVar[str] = ""

  def __post_init__(self):
    for name, kind in _field_types(type(self)).items():
      value = getattr(self, name)
      converted = convert(kind, value, f"config.{self.KEY}{name}")
      if converted is not value:
        object.__setattr__(self, name, converted)  # the dataclass is frozen for everyone else
    self.check()

  def check(self) -> None:
    """Raises UserError for a value that is invalid, although its type is right."""

  def require(self, name: str, valid: bool, expected: str) -> None:
    """Raises UserError that names the key, its value and what is expected, unless `valid`."""
    if not valid:
      value = getattr(self, name)
      value = str(value) if isinstance(value, enum.StrEnum) else value
      raise UserError(f"config.{self.KEY}{name} must be {expected}, got {value!r}")

  def require_at_least(self, minimum: float, *names: str, maximum: int = MAX_COUNT) -> None:
    """Checks that values are at least `minimum` and, if they are integers, at most `maximum`."""
    for name in names:
      value = getattr(self, name)
      self.require(name, value >= minimum, f"at least {minimum:g}")
      if isinstance(value, int):
        self.require(name, value <= maximum, f"at most {maximum:,}")
      self.require(name, value < math.inf, "finite")

  def require_positive(self, *names: str) -> None:
    for name in names:
      self.require(name, getattr(self, name) > 0, "positive")
      self.require(name, getattr(self, name) < math.inf, "finite")

  def require_share(self, *names: str, closed: bool = False) -> None:
    for name in names:
      value = getattr(self, name)
      self.require(name, 0 <= value < 1 or (closed and value == 1), f"from 0 to 1{'' if closed else ' (exclusive)'}")

  def require_weights(self, *names: str) -> None:
    """Checks that all weights in mappings are at least 0, and finite."""
    for name in names:
      for key, weight in getattr(self, name).items():
        if not 0 <= weight < math.inf:
          raise UserError(f"config.{self.KEY}{name}.{key} must be at least 0, and finite, got {weight!r}")


def convert(kind: Any, value: Any, key: str) -> Any:
  """Converts a value to the type of a field; `key` names it in errors.

  A section may be given as a mapping of its keys, an option as its name, a tuple as a list; a number as another type
  (NumPy's included) that holds the same value, and text as a path. A bool is not a number.

  Raises:
    UserError: the value is of another type, or a key is unknown; the message names both.
  """
  if isinstance(value, np.generic):
    value = value.item()
  if dataclasses.is_dataclass(kind):
    return value if isinstance(value, typing.cast(type, kind)) else _build_section(kind, value, key)
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple:
    if not isinstance(value, (list, tuple)):
      raise UserError(f"{key} must be a list, got {value!r}")
    if arguments[-1] is Ellipsis:
      return tuple(convert(arguments[0], item, key) for item in value)
    if len(value) != len(arguments):
      raise UserError(f"{key} must have {len(arguments)} values, got {value!r}")
    return tuple(convert(part, item, key) for part, item in zip(arguments, value))
  if origin is collections.abc.Mapping:
    if not isinstance(value, Mapping):
      raise UserError(f"{key} must be a mapping, got {value!r}")
    return {str(name): convert(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
  if issubclass(kind, enum.StrEnum):
    return parse_option(kind, key, value)
  return _convert_scalar(kind, value, key)


def _build_section(kind: Any, values: Any, key: str) -> Any:
  if not isinstance(values, Mapping):
    raise UserError(f"{key} must be a mapping, got {values!r}")
  names = set(_field_types(kind))
  unknown = sorted(set(map(str, values)) - names)
  if unknown:
    raise UserError(describe_unknown(key, unknown[0], sorted(names)))
  return kind(**values)


def describe_unknown(group: str, name: str, names: Iterable[str], *, elsewhere: Sequence[str] = ()) -> str:
  """Describes an unknown key of a group, with similar keys and those that exist.

  Args:
    group: its full key.
    name: of the unknown key in the group.
    names: of the group's keys.
    elsewhere: full keys of that name in other groups, suggested if the group has no similar one.
  """
  names = list(names)
  similar = [f"{group}.{each}" for each in difflib.get_close_matches(name, names)[:1]] or elsewhere
  question = f"did you mean {' or '.join(similar)}? " if similar else ""
  existing = (
    f"there are {', '.join(names)}" if names else f"it is empty: set all of it, as --{group}=\"{{'{name}': ...}}\""
  )
  return f"unknown key {group}.{name}; {question}{existing[0].upper() if question else existing[0]}{existing[1:]}"


@functools.cache
def _field_types(section: Any) -> Mapping[str, Any]:
  """Returns the types of the fields of a dataclass."""
  types = typing.get_type_hints(section)
  return {field.name: types[field.name] for field in dataclasses.fields(section)}


def _convert_scalar(kind: type, value: Any, key: str) -> Any:
  """Returns a value of the type; takes 1 for 1.0 and the reverse, but never a bool for a number."""
  names = {int: "an integer", float: "a number", str: "text", bool: "True or False"}
  if kind is str and isinstance(value, os.PathLike):
    value = os.fspath(value)
  if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
    return value
  if (
    kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool) and _converts(value, kind)
  ):
    return kind(value)
  raise UserError(f"{key} must be {names[kind]}, got {value!r}")


def _converts(value: int | float, kind: type[int] | type[float]) -> bool:
  """Returns whether a number keeps its value as another type; infinity is no integer."""
  try:
    return kind(value) == value
  except (OverflowError, ValueError):
    return False
