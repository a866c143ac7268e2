"""Goodput: how a run spends its time, over all its restarts.

At any moment a run has one activity: stepping while a step runs on the devices, whatever the host does meanwhile;
otherwise what the main thread does or waits for. Steps run asynchronously, so a thread waits for each to end.

Totals survive a kill in WORKDIR/goodput.json, which also has them as of recent checkpoints: time after the checkpoint
from which a restart resumes is lost.
"""

import concurrent.futures
import contextlib
import enum
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from univid_jax.core.json_files import parse_json, write_json
from univid_jax.core.paths import exists, read_bytes

GOODPUT_FILE = "goodput.json"
# A kill hides at most this much of the time that it costs.
WRITE_SECONDS = 10
# Checkpoints whose totals are kept: more than a run that keeps only the latest ones has.
MAX_CHECKPOINTS = 100

log = logging.getLogger(__name__)


class Activity(enum.StrEnum):
  """What a run does."""

  STEPPING = "stepping"
  WAITING = "waiting for data"  # while no step runs
  SAVING = "saving"  # only while the loop waits; most of a save happens while steps run
  COMPILING = "compiling"  # the training step
  VALIDATING = "validating"  # with previews
  STARTING = "starting"  # opening the data, loading or restoring weights
  LOST = "lost to restarts"  # anything after the checkpoint from which a restart resumed
  OTHER = "other"


Totals = dict[Activity, float]


class Goodput:
  """Measures the activities of a process in seconds, from the creation of this object on.

  Time counts as starting until `resume` is called.

  Args:
    workdir: workdir of the run.
    writes: whether this process writes the totals.
    clock: returns seconds.
  """

  def __init__(self, workdir: epath.PathLike, *, writes: bool = True, clock: Callable[[], float] = time.monotonic):
    self._path, self._writes, self._clock = epath.Path(workdir) / GOODPUT_FILE, writes, clock
    self._activity, self._totals = Activity.STARTING, _zeros()
    self._checkpoints: dict[int, Totals] = {}
    self._watcher = concurrent.futures.ThreadPoolExecutor(1, "goodput")
    self._step_end: concurrent.futures.Future[float] | None = None
    self._since, self._written = clock(), -math.inf
    self._is_resumed = False
    self._saved_step: int | None = None  # until the next step is taken

  def resume(self, step: int) -> None:
    """Adds the totals of the run before, now that the step from which it resumes is known; 0 if it starts."""
    latest, self._checkpoints = self._read()
    self._checkpoints = {saved: totals for saved, totals in self._checkpoints.items() if saved <= step}
    kept = self._checkpoints[max(self._checkpoints)] if self._checkpoints else _zeros()
    for activity, seconds in kept.items():
      self._totals[activity] += seconds
    self._totals[Activity.LOST] += max(sum(latest.values()) - sum(kept.values()), 0)
    self._enter(Activity.OTHER)
    self._is_resumed = True
    self._write()

  @contextlib.contextmanager
  def measure(self, activity: Activity) -> Iterator[None]:
    """Counts the time of a block as an activity; nested blocks may count as others."""
    outer = self._activity
    self._enter(activity)
    try:
      yield
    finally:
      self._enter(outer)

  def watch(self, step: Any) -> None:
    """Counts the time until a step's arrays are computed as stepping.

    Args:
      step: arrays that the step computes and that are not donated.
    """
    self._saved_step, self._step_end = None, self._watcher.submit(self._wait, step)

  def _wait(self, step: Any) -> float:
    jax.block_until_ready(step)
    return self._clock()

  def _enter(self, activity: Activity) -> None:
    now, busy = self._clock(), 0.0
    if self._step_end is not None:
      is_done = self._step_end.done() and self._step_end.exception() is None
      end = self._step_end.result() if is_done else now
      busy = min(max(end - self._since, 0.0), now - self._since)
    self._totals[Activity.STEPPING] += busy
    self._totals[self._activity] += now - self._since - busy
    self._since, self._activity = now, activity

  @property
  def share(self) -> float:
    """The share of stepping in the time of the run."""
    self._enter(self._activity)
    return self._totals[Activity.STEPPING] / max(sum(self._totals.values()), 1e-9)

  @property
  def seconds(self) -> Mapping[Activity, float]:
    """Seconds of each activity, over all restarts."""
    self._enter(self._activity)
    return dict(self._totals)

  def keep(self) -> None:
    """Writes the totals unless they were written recently."""
    if self._clock() - self._written >= WRITE_SECONDS:
      self._write()

  def keep_checkpoint(self, step: int) -> None:
    """Writes the totals, also as those of a saved step."""
    self._saved_step, self._checkpoints[step] = step, dict(self.seconds)
    self._checkpoints = dict(sorted(self._checkpoints.items())[-MAX_CHECKPOINTS:])
    self._write()

  def _read(self) -> tuple[Totals, dict[int, Totals]]:
    if not self._writes:
      return _zeros(), {}
    try:
      if not exists(self._path):
        return _zeros(), {}
      values = parse_json(read_bytes(self._path))
      checkpoints = {int(step): _parse(totals) for step, totals in values["checkpoints"].items()}
      return _parse(values["seconds"]), checkpoints
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
      log.warning("%s cannot be read, so the goodput of earlier runs is unknown: %s", self._path, error)
      return _zeros(), {}

  def _write(self) -> None:
    if not self._writes:
      return
    values = {"seconds": _round(self.seconds), "checkpoints": {}}
    values["checkpoints"] = {str(step): _round(totals) for step, totals in self._checkpoints.items()}
    # Only a save may end a run because the disk is full.
    with contextlib.suppress(OSError):
      write_json(self._path, values)
    self._written = self._clock()

  def __str__(self) -> str:
    seconds = self.seconds
    stepping, total = seconds[Activity.STEPPING], sum(seconds.values())
    parts = [f"{name} {value:,.1f} s" for name, value in seconds.items() if name != "stepping" and value >= 0.05]
    rest = f": {', '.join(parts)}" if parts else ""
    return f"goodput {self.share:.1%}, {stepping:,.1f} s of stepping in {total:,.1f} s{rest}"

  def close(self) -> None:
    """Writes the totals, and ends the thread."""
    if self._saved_step is not None:
      self.keep_checkpoint(self._saved_step)  # nothing after it is lost
    elif self._is_resumed:  # before that, they lack the totals of earlier starts
      self._write()
    self._watcher.shutdown(wait=False, cancel_futures=True)


def _zeros() -> Totals:
  return dict.fromkeys(Activity, 0.0)


def _parse(values: Mapping[str, Any]) -> Totals:
  """Parses the totals in a file; one that lacks an activity is from an older version."""
  return {activity: float(values.get(activity, 0)) for activity in Activity}


def _round(totals: Mapping[Activity, float]) -> dict[str, float]:
  return {str(activity): round(seconds, 3) for activity, seconds in totals.items()}
