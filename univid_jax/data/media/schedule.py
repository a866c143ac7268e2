"""When the frames of a clip are shown, and which of them make a clip at another frame rate."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
from jaxtyping import Int

from univid_jax.core.errors import UserError
from univid_jax.core.text import count_noun

# In seconds. Longer ticks, as in AVI, are intervals of frames.
LARGEST_ROUNDING = Fraction(1, 1000)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When the frames of a clip are shown.

  Attributes:
    times: of each frame, in ticks, ascending.
    last_duration: of the last frame, in ticks.
    tick: in seconds.
    fps: mean frame rate; None for frames without times, as in folders and arrays.
  """

  times: Int[np.ndarray, "n"]
  last_duration: int = 0
  tick: Fraction = Fraction(1)
  fps: float | None = None

  @classmethod
  def untimed(cls, count: int) -> "Schedule":
    return cls(np.arange(count))

  @classmethod
  def regular(cls, count: int, *, fps: float, tick: Fraction) -> "Schedule":
    """Frames that follow each other at a frame rate."""
    interval = 1 / (Fraction(fps).limit_denominator(1001) * tick)
    return cls(np.array([round(index * interval) for index in range(count)], np.int64), round(interval), tick, fps)

  @property
  def last_time(self) -> int:
    """Ticks from the first frame to the last."""
    return int(self.times[-1] - self.times[0])

  @property
  def duration(self) -> float | None:
    """Seconds."""
    return float((self.last_time + self.last_duration) * self.tick) if self.fps else None

  @property
  def _tolerance(self) -> Fraction:
    """Ticks before its time from which a frame counts as shown: times are rounded to ticks, if those are short."""
    return min(Fraction(1, 2), LARGEST_ROUNDING / self.tick)

  def count_at(self, fps: float | None) -> int:
    """Returns how many frames the clip has at a frame rate until its last frame begins; None is the clip's own."""
    if not fps or not self.fps:
      return len(self.times)
    return math.floor((self.last_time + self._tolerance) * Fraction(fps) * self.tick) + 1

  def part_at(self, first: int, stop: int, fps: float | None) -> tuple[int, int]:
    """Returns the part of the clip that shows the frames `first` to `stop - 1`, at a frame rate.

    Returns:
      The number of its first frame, and how many it has until the last one in it begins; see `count_at`.
    """
    if not fps or not self.fps:
      return first, stop - first
    rate = Fraction(fps) * self.tick
    times = (self.times - self.times[0]).tolist()
    start = math.ceil((times[first] - self._tolerance) * rate) if first else 0
    return start, math.floor((times[stop - 1] + self._tolerance) * rate) + 1 - start

  def select(self, start: int, num_frames: int | None, fps: float | None) -> Int[np.ndarray, "m"]:
    """Returns the positions of the frames that `read_clip` reads, sorted.

    Raises:
      UserError: there are too few frames.
    """
    available = most = self.count_at(fps)
    rate = Fraction(fps) * self.tick if fps and self.fps else None
    if rate:
      # The last frame is still shown for a while, so more may be asked for.
      most = max(available, math.ceil((self.last_time + self.last_duration) * rate))
    stop = available if num_frames is None else start + num_frames
    if stop > most or start >= stop:
      at_rate = f" at {fps:g} frames per second" if rate else ""
      needed = start if num_frames is None else stop - 1
      raise UserError(f"it has {count_noun(available, 'frame')}{at_rate}, and frame {needed} is needed")
    if not rate:
      return np.arange(start, stop)
    due = [math.floor(index / rate + self._tolerance) for index in range(start, stop)]
    return np.searchsorted(self.times - self.times[0], due, side="right") - 1
