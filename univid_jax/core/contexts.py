"""How clips become visual sentences: contexts, numbers of clips and reversal, as in the UniVid paper."""

import enum
from collections.abc import Mapping, Sequence

from univid_jax.core.errors import UserError
from univid_jax.core.sentence import Clip, Sentence, reference_roles

# Which clips are videos: (source, target) of the example pairs, then (source, target) of the query pair.
CONTEXTS: Mapping[str, tuple[tuple[bool, bool], tuple[bool, bool]]] = {
  "I": ((True, True), (True, True)),
  "II": ((False, False), (False, False)),
  "III": ((False, False), (True, True)),
  "IV": ((False, True), (False, True)),
}
CONTEXT_NAMES = tuple(CONTEXTS)
VIDEOS, IMAGES = "I", "II"

# The paper's weights, for tasks in general and for camera movement.
PAPER_CONTEXTS: Mapping[str, float] = {"I": 0.3, "II": 0.3, "III": 0.4, "IV": 0.0}
PAPER_CAMERA_CONTEXTS: Mapping[str, float] = {"I": 0.5, "II": 0.0, "III": 0.0, "IV": 0.5}


class Motion(enum.StrEnum):
  """Which clips of a task may be videos, and so the contexts that its sentences can have."""

  OPTIONAL = "optional"  # both clips of a pair, or neither
  ANIMATES = "animates"  # both, neither, or only the target: the task makes a video of an image
  NEEDED = "needed"  # all clips
  NONE = "none"  # no clip

  def context_of(self, drawn: str) -> str:
    """Returns the context that a sentence gets when `drawn` was drawn."""
    if self == Motion.NEEDED:
      return VIDEOS
    if self == Motion.NONE or (self == Motion.OPTIONAL and drawn == "IV"):
      return IMAGES
    return drawn


def possible_contexts(weights: Mapping[str, float], motion: Motion) -> dict[str, float]:
  """Returns the weights of the contexts that a task's sentences get, given the weights of those that are drawn."""
  if motion == Motion.NONE:
    return {IMAGES: 1.0}
  possible: dict[str, float] = {}
  for drawn, weight in weights.items():
    context = motion.context_of(drawn)
    possible[context] = possible.get(context, 0.0) + weight
  return possible


def video_pattern(context: str, num_clips: int) -> tuple[bool, ...]:
  """Returns whether each clip of a sentence is a video.

  Raises:
    UserError: the context is unknown, or the number of clips is odd or less than four.
  """
  if context not in CONTEXTS:
    raise UserError(f"unknown context {context!r}; there are {', '.join(CONTEXTS)}")
  if num_clips < 4 or num_clips % 2:
    raise UserError(f"a sentence must have 4, 6, 8, ... clips, got {num_clips}")
  example, query = CONTEXTS[context]
  return example * (num_clips // 2 - 1) + query


def limit_clips(num_clips: int, context: str, max_video_clips: int) -> int:
  """Returns how many clips a sentence has: at most `max_video_clips` (0: any number) if some of them are videos."""
  has_videos = any(video_pattern(context, num_clips=4))
  return min(num_clips, max_video_clips) if has_videos and max_video_clips else num_clips


def possible_counts(num_clips: Mapping[int, float], context: str, max_video_clips: int) -> list[int]:
  """Returns the numbers of clips that sentences of a context have, given the weights of all."""
  return sorted({limit_clips(count, context, max_video_clips) for count, weight in num_clips.items() if weight > 0})


def make_sentence(
  pairs: Sequence[tuple[Clip, Clip]], *, reverse: bool = False, prompt: str = "", task: str = "", context: str = ""
) -> Sentence:
  """Joins (source, target) pairs into a sentence whose last clip is the target of the model.

  Args:
    pairs: example pairs, then the query pair.
    reverse: swaps the clips of every pair, so that understanding becomes generation.
    prompt, task, context: see `Sentence`.
  """
  clips = tuple(clip for pair in pairs for clip in (pair[::-1] if reverse else pair))
  return Sentence(
    clips=clips, roles=reference_roles(len(clips)), prompt=prompt, task=task, context=context, reverse=reverse
  )
