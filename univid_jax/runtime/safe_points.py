"""Where a loop can stop: the processes of a run agree on a point that none of them has passed."""

import threading
from collections.abc import Collection

# Values of the number of points passed for a process outside of the loop.
BEFORE, AFTER = -1, 1 << 60


class SafePoints:
  """The safe points that the loop of this process has passed.

  Attributes:
    is_decided: whether it has been decided where to stop.
    has_stopped: whether the loop has been told to.
  """

  def __init__(self):
    self.is_decided = False
    self.has_stopped = False
    self._condition = threading.Condition()
    self._progress = BEFORE
    self._target: int | None = None
    self._is_frozen = False

  def enter(self) -> None:
    self._move(0)

  def leave(self) -> None:
    self._move(AFTER)

  def abandon(self) -> None:
    """Leaves the loop because of an exception, even while processes are agreeing on where to stop."""
    self._progress = AFTER

  def reach(self) -> bool:
    """Passes the next point; returns whether to stop there."""
    self._move(self._progress + 1)
    self.has_stopped |= self._target is not None and self._progress >= self._target
    return self.has_stopped

  def _move(self, progress: int) -> None:
    with self._condition:
      self._condition.wait_for(lambda: not self._is_frozen)
      self._progress = progress

  def freeze(self) -> int:
    """Holds the loop until `decide`; returns the number of points passed."""
    with self._condition:
      self._is_frozen = True
      return self._progress

  def decide(self, progress: Collection[int]) -> bool:
    """Decides where to stop.

    Args:
      progress: number of points that each process has passed.

    Returns:
      Whether to stop at once: before all processes are in the loop no step is finished, and after it all is saved.
    """
    with self._condition:
      at_once = BEFORE in progress or self._progress == AFTER
      self._target = None if at_once else max(progress) + 1
      self.is_decided = True
      self._is_frozen = False
      self._condition.notify_all()
      return at_once
