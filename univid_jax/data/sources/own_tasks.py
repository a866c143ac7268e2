"""Identifies computed tasks that are not the package's by what they compute, as their functions may change anytime."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from univid_jax.core.sentence import Sentence, read_frames
from univid_jax.data.media.reader import Frames
from univid_jax.data.tasks import BUILT_IN, TASKS

# How many sentences a task is identified by, since its draws may choose between effects.
NUM_SENTENCES = 4
# The most frames of their videos.
MAX_FRAMES = 5


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


def digest(sentences: Iterable[Sentence]) -> str:
  """Returns a hash of the clips and parameters of sentences."""
  found = hashlib.sha256()
  for sentence in sentences:
    params: Any = None if sentence.params is None else dict(sentence.params)
    found.update(json.dumps(params, sort_keys=True).encode())
    for clip in sentence.clips:
      found.update(np.ascontiguousarray(read_frames(clip)).data)
  return found.hexdigest()
