"""Progress of a long task: rate and time left, as a bar on a terminal, else as a line in the log every minute."""

import collections
import logging
import time

import jax
from tqdm import tqdm

log = logging.getLogger(__name__)

# In seconds: between lines in the log, and how far back rates look.
LOG_EVERY = 60.0
WINDOW = 60.0


class Progress:
  """Progress of a task that the processes share; process 0 shows its own.

  The time left follows from the recent rate: what was done before a restart passes quickly and would distort the
  mean.

  Args:
    description: of the task.
    unit: what is done; rates are in these.
    total: steps of the task, known in advance; a step may do several units or none.
    step: name of the steps.
  """

  def __init__(self, description: str, total: int, *, unit: str, step: str):
    self._description, self._total, self._unit, self._step = description, total, unit, step
    self._is_shown = jax.process_index() == 0
    self._bar = tqdm(
      desc=description,
      total=total,
      disable=None if self._is_shown else True,
      bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} " + step + "{postfix}",
    )
    self._samples = collections.deque([(time.monotonic(), 0, 0)])
    self._logged = self._samples[0][0]

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *error: object) -> None:
    self._bar.close()

  def update(self, position: int, done: int) -> None:
    """Records how many steps have begun and how many units are done."""
    now = time.monotonic()
    if not self._is_shown or now - self._samples[-1][0] < min(1.0, LOG_EVERY):
      return
    self._samples.append((now, position, done))
    while now - self._samples[1][0] >= WINDOW:
      self._samples.popleft()
    if not self._bar.disable:
      self._bar.set_postfix_str(self._describe(), refresh=False)
      self._bar.update(position - self._bar.n)
    elif now - self._logged >= LOG_EVERY:
      self._logged = now
      log.info(
        "%s: %s of %s %s, %s", self._description, f"{position:,}", f"{self._total:,}", self._step, self._describe()
      )

  def _describe(self) -> str:
    (then, old_position, old_done), (now, position, done) = self._samples[0], self._samples[-1]
    seconds = max(now - then, 1e-9)
    rate, steps_per_second = (done - old_done) / seconds, (position - old_position) / seconds
    left = tqdm.format_interval((self._total - position) / steps_per_second) if steps_per_second else "unknown time"
    others = f" in this process, one of {jax.process_count()}" if jax.process_count() > 1 else ""
    return f"{done:,} done ({rate:.3g} {self._unit}/s{others}), {left} left"
