"""Which of two experts a step trains."""

import dataclasses

from jaxtyping import Array, Bool, Int

from univid_jax.checkpoints.run_parts import make_flow, split_config
from univid_jax.config.schema import RunConfig

PERIOD = 1000  # steps


@dataclasses.dataclass(frozen=True)
class ExpertSchedule:
  """Alternates between the experts, evenly, in proportion to the probability of their noise levels.

  Attributes:
    num_high: how many of every `PERIOD` steps train the high-noise expert.
  """

  num_high: int

  @classmethod
  def from_config(cls, config: RunConfig) -> "ExpertSchedule":
    """Returns the schedule of a run that trains both experts."""
    high, low = (make_flow(part) for part in split_config(config))
    share = high.range_probability / (high.range_probability + low.range_probability)
    return cls(round(PERIOD * share))

  def trains_high(self, step: Int[Array, ""]) -> Bool[Array, ""]:
    """Returns whether a step, counted from 0, trains the high-noise expert."""
    place = step % PERIOD
    return (place + 1) * self.num_high // PERIOD > place * self.num_high // PERIOD

  def count_steps(self, num_steps: int) -> tuple[int, int]:
    """Returns how many of the first steps train the high-noise and the low-noise expert."""
    periods, rest = divmod(num_steps, PERIOD)
    high = periods * self.num_high + rest * self.num_high // PERIOD
    return high, num_steps - high
