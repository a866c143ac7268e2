"""How messages say numbers of things and sizes of pictures."""

from collections.abc import Sequence


def count_noun(count: int, noun: str, plural: str = "") -> str:
  """Returns a number with its noun: "1 file", "2 files", "1,000 files"."""
  return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def size_text(size: Sequence[int]) -> str:
  """Returns (height, width) as people read it, as viewers of pictures show it: "WIDTH x HEIGHT"."""
  height, width = size
  return f"{width} x {height}"
