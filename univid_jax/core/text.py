"""Words and lists in messages."""

from collections.abc import Iterable


def plural(number: int, noun: str) -> str:
  """Returns a number with its noun, as in "1 clip" and "1,200 clips"."""
  return f"{number:,} {noun}{'' if number == 1 else 's'}"


def list_first(items: Iterable[str], limit: int) -> str:
  """Lists the first items, and says how many more there are."""
  items = list(items)
  left = len(items) - limit
  return ", ".join(items[:limit]) + (f" and {left} more" if left > 0 else "")
