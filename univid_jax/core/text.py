"""Formatting for messages: counts, bytes, lists, sizes of pictures, and wrong values."""

import enum
import reprlib
from collections.abc import Iterable, Sequence

_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def count_noun(count: int, noun: str, plural: str = "") -> str:
  """Returns a number with its noun: "1 file", "2 files", "1,000 files"."""
  return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def is_or_are(count: int) -> str:
  """Returns the verb of `count_noun`."""
  return "is" if count == 1 else "are"


def list_first(items: Iterable[str], limit: int) -> str:
  """Lists the first items, and how many more there are."""
  items = list(items)
  left = len(items) - limit
  return ", ".join(items[:limit]) + (f" and {left} more" if left > 0 else "")


def join_words(items: Iterable[object], word: str) -> str:
  """Lists a few items: "a", "a or b", "a, b or c"."""
  *others, last = map(str, items)
  return f"{', '.join(others)} {word} {last}" if others else last


def format_bytes(count: int) -> str:
  """Returns a number of bytes in the largest unit that fits: "12.29 kB"."""
  unit, size = next(((unit, size) for unit, size in _UNITS if count >= size), ("", 1))
  return f"{count / size:,.2f} {unit}" if unit else f"{count} bytes"


def size_text(size: Sequence[int]) -> str:
  """Formats (height, width) as image viewers show it: "WIDTH x HEIGHT"."""
  height, width = size
  return f"{width} x {height}"


def describe_value(value: object) -> str:
  """Describes a wrong value in a message: dtype and shape of an array, else the value, shortened."""
  value = value.value if isinstance(value, enum.Enum) else value
  shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
  return f"{dtype} {shape}" if isinstance(shape, tuple) and shape and dtype is not None else reprlib.repr(value)
