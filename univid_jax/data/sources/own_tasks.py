"""Identifies computed tasks that are not the package's by what they compute, as their functions may change anytime."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from univid_jax.core.errors import first_line
from univid_jax.core.sentence import Sentence, read_frames
from univid_jax.data.media.reader import Frames
from univid_jax.data.tasks import BUILT_IN, TASKS

log = logging.getLogger(__name__)

# How many sentences a task is identified by, since its draws may choose between effects.
NUM_SENTENCES = 4


class Noise:
  """Clips that are the same for everybody."""

  def __len__(self) -> int:
    return NUM_SENTENCES

  def clip(self, index: int, rng: np.random.Generator, *, num_frames: int, size: tuple[int, int]) -> Frames:
    """See `ClipSource`."""
    del rng
    return np.random.default_rng(index).integers(0, 256, (num_frames, *size, 3), np.uint8)


def own_tasks(weights: Mapping[str, float]) -> list[str]:
  """Returns the tasks of a positive weight that are not the package's, or that replace one of them."""
  return sorted(name for name, weight in weights.items() if weight and TASKS[name] is not BUILT_IN.get(name))


def identify(task: str, read: Callable[[int], Sentence]) -> str:
  """Returns a hash of what a task makes of noise; "" with a warning if it cannot be identified by that.

  Args:
    task: name of the task.
    read: returns a sentence of the task, made of noise, by its index.
  """
  try:
    found = digest(map(read, range(NUM_SENTENCES)))
    reason = "" if digest([read(0)]) == digest([read(0)]) else "they are not deterministic"
  except Exception as error:  # whatever functions of the user raise
    found, reason = "", f"they fail on noise: {type(error).__name__}: {first_line(error)}"
  if not reason:
    return found
  advice = "delete cached latents and samples after a change"
  log.warning("task %s: changes of its functions go unnoticed, as %s: %s", task, reason, advice)
  return ""


def digest(sentences: Iterable[Sentence]) -> str:
  """Returns a hash of the clips and parameters of sentences."""
  found = hashlib.sha256()
  for sentence in sentences:
    params: Any = None if sentence.params is None else dict(sentence.params)
    found.update(json.dumps(params, sort_keys=True).encode())
    for clip in sentence.clips:
      found.update(np.ascontiguousarray(read_frames(clip)).data)
  return found.hexdigest()
