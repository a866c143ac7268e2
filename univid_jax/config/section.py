"""The base of all parts of the config."""

import enum
import math
from typing import ClassVar

from univid_jax.core.errors import UserError

# For tokens, rows, steps and so on, which become 32-bit integers in arrays.
MAX_COUNT = 2**31 - 1
# For numbers that stay on the host.
MAX_HOST_COUNT = 10**12


class Section:
  """A part of the config that checks its values.

  Attributes:
    KEY: prefix of its keys in error messages, with a trailing dot; "" for the root.
  """

  KEY: ClassVar[str] = ""

  def require(self, name: str, valid: bool, expected: str) -> None:
    """Raises UserError that names the key, its value and what is expected, unless `valid`."""
    if not valid:
      value = getattr(self, name)
      value = str(value) if isinstance(value, enum.StrEnum) else value
      raise UserError(f"config.{self.KEY}{name} must be {expected}, got {value!r}")

  def require_at_least(self, minimum: float, *names: str, maximum: int = MAX_COUNT) -> None:
    """Checks numbers; those that are not integers have no maximum but infinity."""
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
    """Checks mappings of weights: at least 0, and finite."""
    for name in names:
      for key, weight in getattr(self, name).items():
        if not 0 <= weight < math.inf:
          raise UserError(f"config.{self.KEY}{name}.{key} must be at least 0, and finite, got {weight!r}")
