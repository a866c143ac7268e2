"""Controls and baselines, with which predictions are compared.

A control is sampled: the model sees altered example pairs. A baseline needs no model: it is made from the sentence's
own clips, at the length of the target. Sentences without an example pair, of B and B' alone, have no controls, and of
the baselines only the copy of B.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from univid_jax.core.contexts import CONTEXTS, video_pattern
from univid_jax.core.pixels import to_uint8
from univid_jax.core.sentence import Sentence, read_frames
from univid_jax.data.resizing import resize_and_crop
from univid_jax.evaluation.candidates import Candidate
from univid_jax.inference.pipeline import Pipeline


class Case(NamedTuple):
  """What makes sentences comparable: the task, the context and the number of clips, the target included."""

  task: str
  context: str
  num_clips: int


def choose_other_tasks(cases: Sequence[Case], rng: np.random.Generator) -> list[int | None]:
  """Chooses for each sentence one of another task, whose example pairs the control "swapped" uses.

  Candidates have the same number of clips and, if there are such, the same pattern of images and videos in the example
  pairs.

  Returns:
    The index of the chosen sentence; None if no other task has a sentence with the same number of clips.
  """
  patterns = [
    video_pattern(case.context, case.num_clips)[:-2]
    if case.context in CONTEXTS and has_pairs(case.num_clips)
    else case.context
    for case in cases
  ]
  chosen: list[int | None] = []
  for case, pattern in zip(cases, patterns):
    others = [i for i, other in enumerate(cases) if other.task != case.task and other.num_clips == case.num_clips]
    candidates = [i for i in others if patterns[i] == pattern] or others
    chosen.append(candidates[rng.integers(len(candidates))] if candidates else None)
  return chosen


def has_pairs(num_clips: int) -> bool:
  """Returns whether a sentence has example pairs besides B and B'."""
  return num_clips > 2


def replace_pairs(sentence: Sentence, other: Sentence) -> Sentence:
  """Replaces the example pairs by another sentence's, at the lengths and size of the sentence's own clips."""
  size = read_frames(sentence.clips[0]).shape[1:3]
  pairs = tuple(
    resize_and_crop(match_length(read_frames(theirs), len(read_frames(own))), size)
    for theirs, own in zip(other.clips[:-2], sentence.clips)
  )
  return sentence.replace(clips=pairs + sentence.clips[-2:])


def show_inverse_task(sentence: Sentence) -> Sentence:
  """Swaps source and target in every example pair but not in the query: the pairs then show the inverse task."""
  *examples, query, truth = sentence.clips
  swapped = [clip for source, target in zip(examples[::2], examples[1::2]) for clip in (target, source)]
  return sentence.replace(clips=(*swapped, query, truth))


def baselines(clips: Sequence[np.ndarray]) -> Mapping[str, np.ndarray]:
  """Returns the clips that a model must beat: copies of B and of A', and the mean colour of A'."""
  *examples, b, truth = clips
  made: dict[str, np.ndarray] = {Candidate.COPY_B: match_length(b, len(truth))}
  for a2 in examples[-1:]:
    made[Candidate.COPY_A2] = match_length(a2, len(truth))
    made[Candidate.MEAN_A2] = np.broadcast_to(np.round(a2.mean(axis=(0, 1, 2))), truth.shape).astype(np.uint8)
  return made


def match_length(clip: np.ndarray, num_frames: int) -> np.ndarray:
  """Cuts a clip to a number of frames, or repeats its last frame."""
  return clip[np.minimum(np.arange(num_frames), len(clip) - 1)]


def round_trip(pipeline: Pipeline, clip: np.ndarray) -> np.ndarray:
  """Encodes and decodes a clip, uint8 (T, H, W, 3): the upper bound of what the model can achieve."""
  return to_uint8(pipeline.decode(pipeline.encode(clip)))
