"""Checks of arguments that Python code passes to public functions; flags and config keys have their own checks."""

import math
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from univid_jax.core.errors import UserError
from univid_jax.core.text import describe_value


def require_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
  """Returns a whole number of any type but bool; raises UserError if the value is not one, or is out of range."""
  try:
    number = None if isinstance(value, bool) else operator.index(value)
  except TypeError:
    number = None
  if number is None or number < minimum or (maximum is not None and number > maximum):
    limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    raise UserError(f"{name} must be a whole number {limits}, got {describe_value(value)}")
  return number


def require_number(name: str, value: Any, *, is_positive: bool = False) -> float:
  """Returns a number of any type but bool as a float; raises UserError for anything else.

  With `is_positive` the number must also be positive and finite.
  """
  is_array = getattr(value, "shape", None) == () and jnp.issubdtype(value.dtype, jnp.number)  # bfloat16 is no Real
  try:
    number = float(value) if is_array or (isinstance(value, numbers.Real) and not isinstance(value, bool)) else None
  except (OverflowError, TypeError):  # a tracer's error is a TypeError
    number = None
  if number is None or (is_positive and not 0 < number < math.inf):
    raise UserError(f"{name} must be a {'positive ' if is_positive else ''}number, got {describe_value(value)}")
  return number


def require_flag(name: str, value: Any) -> bool:
  """Returns True or False; raises UserError for anything else, even if Python treats it as true or false."""
  if not isinstance(value, bool | np.bool_):
    raise UserError(f"{name} must be True or False, got {describe_value(value)}")
  return bool(value)


def require_text(name: str, value: Any) -> str:
  """Returns text; raises UserError if the value is not text."""
  if not isinstance(value, str):
    raise UserError(f"{name} must be text, got {describe_value(value)}")
  return value


def require_folder(name: str, value: Any) -> str:
  """Returns the path of a folder or a bucket as text; raises UserError if it is not a path, or empty."""
  if not isinstance(value, str | os.PathLike) or not os.fspath(value):
    raise UserError(f"{name} must name a folder or a bucket, got {describe_value(value)}")
  return os.fspath(value)


def require_instance(name: str, value: Any, kind: type, hint: str) -> None:
  """Raises UserError, with a hint at how to get an instance, if a value is not an instance of a class."""
  if not isinstance(value, kind):
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    raise UserError(f"{name} must be {article} {kind.__name__}, got {type(value).__name__}: {hint}")


def require_callables(**functions: Callable[..., Any] | None) -> None:
  """Raises UserError if an argument is neither a function nor None."""
  for name, value in functions.items():
    if value is not None and not callable(value):
      raise UserError(f"{name} must be a function, got {describe_value(value)}")


def require_list(name: str, values: Any, what: str) -> list[Any]:
  """Returns the items of an iterable, which may be a generator.

  Args:
    name: of the argument.
    values: the items; text, paths, mappings and arrays without dims are rejected.
    what: names the items in the message.

  Raises:
    UserError: the values are not such an iterable.
  """
  is_single = isinstance(values, (str, bytes, os.PathLike, Mapping)) or getattr(values, "shape", None) == ()
  if is_single or not isinstance(values, Iterable):
    raise UserError(f"{name} must be a list of {what}, got {describe_value(values)}")
  return list(values)
