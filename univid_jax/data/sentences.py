"""How clips become visual sentences: contexts, shots, reversal and prompts, as the UniVid paper defines them."""

from collections.abc import Mapping, Sequence

import numpy as np

from univid_jax.types import Sentence, reference_roles

# Which clips are videos: (source, target) of the example pairs, then (source, target) of the query pair.
CONTEXTS: Mapping[str, tuple[tuple[bool, bool], tuple[bool, bool]]] = {
    "I": ((True, True), (True, True)),
    "II": ((False, False), (False, False)),
    "III": ((False, False), (True, True)),
    "IV": ((False, True), (False, True)),
}
# How often the paper draws each, for tasks in general and for camera movement.
PAPER_CONTEXTS: Mapping[str, float] = {"I": 0.3, "II": 0.3, "III": 0.4, "IV": 0.0}
PAPER_CAMERA_CONTEXTS: Mapping[str, float] = {"I": 0.5, "II": 0.0, "III": 0.0, "IV": 0.5}

ROUGH_PROMPT = ("[clip1] and [clip2] form an editing pair. Apply the same transformation observed from [clip1] to [clip2] "
                "to [clip3], and generate [clip4].")
CAMERA_PROMPT = ("[clip1] is the original source video, and [clip2] is the same clip with camera motion applied. [clip3] is a "
                 "different source video. For [clip4], apply the exact same camera movement transformation from [clip1] to "
                 "[clip2] on [clip3].")
DETAILED_PROMPT = ("[clip1] is the original source video, and [clip2] is its corresponding {name}. [clip3] is another, "
                   "different source video. In [clip4], the {name} transformation applied from [clip1] to [clip2] is similarly "
                   "applied to [clip3].")
PROMPT_STYLES = ("detailed", "rough", "null")


def video_pattern(context: str, num_clips: int) -> tuple[bool, ...]:
  """Whether each clip of a sentence is a video.

  Raises:
    ValueError: the context is unknown or the number of clips is odd or below four.
  """
  if context not in CONTEXTS:
    raise ValueError(f"unknown context {context!r}; there are {', '.join(CONTEXTS)}")
  if num_clips < 4 or num_clips % 2:
    raise ValueError(f"a sentence has 4, 6, 8, ... clips, got {num_clips}")
  example, query = CONTEXTS[context]
  return example * (num_clips // 2 - 1) + query


def prompt_for(task_name: str, style: str) -> str:
  """The paper's prompt for a task: detailed, rough or null.

  Args:
    task_name: "camera movement", or what the result is called, for instance "scribble map".
    style: one of PROMPT_STYLES.
  """
  if style not in PROMPT_STYLES:
    raise ValueError(f"unknown prompt style {style!r}; there are {', '.join(PROMPT_STYLES)}")
  if style == "null":
    return ""
  if style == "rough":
    return ROUGH_PROMPT
  return CAMERA_PROMPT if task_name == "camera movement" else DETAILED_PROMPT.format(name=task_name)


def make_sentence(pairs: Sequence[tuple[np.ndarray, np.ndarray]], *, reverse: bool = False, prompt: str = "",
                  task: str = "", context: str = "") -> Sentence:
  """Puts (source, target) pairs in a row; the last clip is what the model shall paint.

  Args:
    pairs: example pairs, then the query pair, each two clips.
    reverse: turns every pair round, so that understanding becomes generation.
    prompt: the text.
    task: name of the task.
    context: name of the pattern of images and videos.
  """
  clips = tuple(clip for pair in pairs for clip in (pair[::-1] if reverse else pair))
  return Sentence(clips=clips, roles=reference_roles(len(clips)), prompt=prompt, task=task, context=context, reverse=reverse)
