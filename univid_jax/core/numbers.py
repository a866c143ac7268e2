"""Whole numbers."""


def ceil_div(number: int, divisor: int) -> int:
  """Divides and rounds up."""
  return -(-number // divisor)


def round_up(number: int, multiple: int) -> int:
  """Returns the smallest multiple that is no less than the number."""
  return ceil_div(number, multiple) * multiple
