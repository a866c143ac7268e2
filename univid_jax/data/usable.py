"""Sentences to validate or evaluate on, without those that cannot be read."""

import logging
from collections.abc import Callable, Sequence

from univid_jax.core.errors import UserError
from univid_jax.core.sentence import Sentence, read_frames
from univid_jax.data.sources.base import drop
from univid_jax.runtime.processes import sum_over_processes

log = logging.getLogger(__name__)


def read_usable(readers: Sequence[Callable[[], Sentence]], kind: str, *, allow_dropped: bool) -> list[Sentence]:
  """Returns sentences, the same in every process; all processes must call it.

  Args:
    readers: each returns a sentence.
    kind: what messages call the sentences: held-out or training.
    allow_dropped: also read every clip, and leave out and log the sentences that a process cannot read.

  Raises:
    OSError, UserError: a sentence cannot be read and that is not allowed, or none can.
  """
  if not allow_dropped:
    return [read() for read in readers]
  found = [_read(read, kind) for read in readers]
  num_failed = [sum_over_processes(sentence is None) for sentence in found]
  usable = [sentence for sentence, count in zip(found, num_failed, strict=True) if sentence is not None and not count]
  if readers and not usable:
    raise UserError(f"none of the {len(readers)} {kind} sentences can be read; the log names them")
  return usable


def _read(read: Callable[[], Sentence], kind: str) -> Sentence | None:
  record = f"a {kind} sentence"
  try:
    sentence = read()
    record = sentence.record
    for clip in sentence.clips:
      read_frames(clip)
  except (OSError, UserError) as error:
    log.warning("dropped: %s", drop(record, error))
    return None
  return sentence
