"""When the frames of a clip are shown, and which of them make a clip at another frame rate."""

import dataclasses
import functools
import math
from fractions import Fraction

import numpy as np
from jaxtyping import Int

from univid_jax.core.errors import UserError
from univid_jax.core.text import count_noun

# Maximum rounding of times, in seconds. Longer ticks, as in AVI, are intervals of frames.
LARGEST_ROUNDING = Fraction(1, 1000)

# Maximum ratio of frame rates that count as the same when frames are chosen: NTSC's are slower than their nominal whole
# numbers by a factor of 1.001.
LARGEST_RATIO = Fraction(1002, 1000)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When the frames of a clip are shown.

  Attributes:
    times: time of each frame, in ticks, ascending.
    last_duration: duration of the last frame, in ticks.
    tick: seconds per tick.
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
    """Returns the schedule of frames that follow each other at a frame rate."""
    interval = 1 / (Fraction(fps).limit_denominator(1001) * tick)
    return cls(np.array([round(index * interval) for index in range(count)], np.int64), round(interval), tick, fps)

  @property
  def last_time(self) -> int:
    """Ticks from the first frame to the last."""
    return int(self.times[-1] - self.times[0])

  @property
  def duration(self) -> float | None:
    """Duration in seconds; None for frames without times."""
    return float((self.last_time + self.last_duration) * self.tick) if self.fps else None

  def rate_at(self, fps: float | None) -> float | None:
    """Returns the rate of the frames that are read at a frame rate: a multiple or fraction of the clip's own rate if
    one is near enough, so that no single frame is repeated or left out.
    """
    if not fps or not self.fps:
      return self.fps
    spacing = self._spacing(fps)
    return self.fps / float(spacing) if spacing is not None and 1 in spacing.as_integer_ratio() else fps

  def shows_all_at(self, fps: float | None) -> bool:
    """Returns whether each frame is read once at a frame rate."""
    return not fps or not self.fps or self._spacing(fps) == 1

  def _spacing(self, fps: float) -> Fraction | None:
    """Returns the distance in frames between two that are read at a frame rate; None if times decide."""
    assert self.fps
    spacing = _to_fraction(self.fps) / _to_fraction(fps)
    nearest = Fraction(round(spacing)) if spacing > 1 else 1 / Fraction(round(1 / spacing))
    if is_same_rate(spacing, nearest):
      return nearest if self._is_steady else None
    return spacing if self._is_regular else None

  @functools.cached_property
  def _is_regular(self) -> bool:
    """Whether frames follow each other at `fps`, up to the rounding of their times."""
    rounding = max(1.0, float(LARGEST_ROUNDING / self.tick))
    return self._deviation(self._interval) <= (rounding if rounding < self._interval / 4 else 0) + 1e-6

  @functools.cached_property
  def _is_steady(self) -> bool:
    """Whether frames follow each other at about `fps` and none is missing, though their times vary a little."""
    count, largest = len(self.times) - 1, self._interval / 4
    is_at_rate = abs(self.last_time - count * self._interval) <= max(largest, self.last_time * float(LARGEST_RATIO - 1))
    return self._is_regular or (is_at_rate and self._deviation(self.last_time / count) < largest)

  @property
  def _interval(self) -> float:
    """Ticks between frames at `fps`."""
    assert self.fps
    return 1 / (self.fps * float(self.tick))

  def _deviation(self, interval: float) -> float:
    """Returns the range, in ticks, by which frames are early or late if they should be an interval apart."""
    return float(np.ptp(self.times - self.times[0] - np.arange(len(self.times)) * interval))

  def _timing(self, fps: float) -> "_Timing":
    assert self.fps
    spacing = self._spacing(fps)
    if spacing is not None:
      rest = (self.last_duration * self.tick - LARGEST_ROUNDING) * _to_fraction(self.fps)
      return _Timing(np.arange(len(self.times)), rest, Fraction(0), 1 / spacing)
    tolerance = min(Fraction(1, 2), LARGEST_ROUNDING / self.tick)
    return _Timing(self.times - self.times[0], Fraction(self.last_duration), tolerance, _to_fraction(fps) * self.tick)

  def count_at(self, fps: float | None) -> int:
    """Returns how many frames the clip has at a frame rate until its last frame begins; None is the clip's own."""
    return self._timing(fps).count_until(-1) if fps and self.fps else len(self.times)

  def part_at(self, first: int, stop: int, fps: float | None) -> tuple[int, int]:
    """Returns the part of the clip, at a frame rate, that shows the frames `first` to `stop - 1`.

    Returns:
      The number of the first frame of the whole clip that begins in it, and how many frames it has until its last one
      begins, the first of which is `first`; see `count_at`.
    """
    if not fps or not self.fps:
      return first, stop - first
    timing = self._timing(fps)
    start = math.ceil((int(timing.times[first]) - timing.tolerance) * timing.rate) if first else 0
    return start, timing.count_until(stop - 1, first)

  def select(self, start: int, num_frames: int | None, fps: float | None, *, first: int = 0) -> Int[np.ndarray, "m"]:
    """Returns the positions of the frames that `read_clip` reads, sorted.

    Args:
      start, num_frames, fps: see `read_clip`.
      first: position of the frame from which `start` is counted, and with which time begins.

    Raises:
      UserError: there are too few frames.
    """
    timing = self._timing(fps) if fps and self.fps else None
    available = most = timing.count_until(-1, first) if timing else len(self.times) - first
    if timing:
      # The last frame is still shown for a while, so more may be asked for.
      most = max(available, math.ceil((timing.since(first, -1) + timing.last_duration) * timing.rate))
    stop = available if num_frames is None else start + num_frames
    if stop > most or start >= stop:
      at_rate = f" at {fps:g} frames per second" if timing else ""
      needed = start if num_frames is None else stop - 1
      raise UserError(f"it has {count_noun(available, 'frame')}{at_rate}, and frame {needed} is needed")
    if not timing:
      return np.arange(first + start, first + stop)
    due = [math.floor(index / timing.rate + timing.tolerance) for index in range(start, stop)]
    return np.searchsorted(timing.times - timing.times[first], due, side="right") - 1


@dataclasses.dataclass(frozen=True)
class _Timing:
  """Times for reading frames at a frame rate, in ticks, or for a regular clip in frames.

  Attributes:
    times: time of each frame, from 0 on.
    last_duration: duration of the last frame.
    tolerance: how long before its time a frame counts as shown, since times are rounded to ticks if those are short.
    rate: number of frames that are read per unit of time.
  """

  times: Int[np.ndarray, "n"]
  last_duration: Fraction
  tolerance: Fraction
  rate: Fraction

  def since(self, first: int, position: int) -> int:
    """Returns the time from one frame to another."""
    return int(self.times[position] - self.times[first])

  def count_until(self, position: int, first: int = 0) -> int:
    """Returns how many frames are read, from the first one on, until the frame at a position begins."""
    return math.floor((self.since(first, position) + self.tolerance) * self.rate) + 1


def is_same_rate(rate: float | Fraction, other: float | Fraction) -> bool:
  """Returns whether a clip of one frame rate is read unchanged when the other is asked for."""
  return max(rate, other) <= LARGEST_RATIO * min(rate, other)


def _to_fraction(rate: float) -> Fraction:
  return Fraction(rate).limit_denominator(1_000_000) or Fraction(rate)
