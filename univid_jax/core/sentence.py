"""Visual sentences: clips in order, each with a role."""

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class Role(enum.IntEnum):
  """How the model uses a clip: context is shown clean, a target is noised and predicted."""

  CONTEXT = 0
  TARGET = 1


@dataclasses.dataclass(frozen=True)
class ClipRef:
  """A clip that is read on demand.

  Attributes:
    identify: returns `key`; may have to read the file.
    read: returns the frames, uint8 (T, H, W, 3).
    num_frames: T, known without reading.
    size: H and W, known without reading.
  """

  identify: Callable[[], str]
  read: Callable[[], np.ndarray]
  num_frames: int
  size: tuple[int, int]

  @functools.cached_property
  def key(self) -> str:
    """Identifies the content: derived from the source of the clip and every operation applied to it, never from a path
    or a date.

    Raises:
      OSError, UserError: the file has vanished or changed.
    """
    return self.identify()


Clip = np.ndarray | ClipRef


def read_frames(clip: Clip) -> np.ndarray:
  """Returns the frames of a clip, uint8 (T, H, W, 3), reading them if necessary."""
  return clip.read() if isinstance(clip, ClipRef) else clip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sentence:
  """A visual sentence.

  Attributes:
    clips: all pixels, uint8 (T, H, W, 3) or references to them, or all latents, float32 (t, y, x, c).
    roles: one per clip; targets come last.
    prompt: its text; "" is the null prompt.
    task: name of the task that the example pairs show.
    context: "I", "II", "III" or "IV" as in the paper, or the name of another pattern of images and videos.
    reverse: whether the pairs are swapped, so that the task is inverted.
    params: parameters drawn for this sentence by a computed task; None for other data.
    record: names what the sentence was made from, for messages: a line of a table, a pair.
  """

  clips: tuple[Clip, ...]
  roles: tuple[Role, ...]
  prompt: str = ""
  task: str = ""
  context: str = ""
  reverse: bool = False
  params: Mapping[str, Any] | None = None
  record: str = ""

  def __post_init__(self):
    check_roles(len(self.clips), self.roles)

  def replace(self, **changes) -> "Sentence":
    return dataclasses.replace(self, **changes)

  @property
  def is_completable(self) -> bool:
    """See `is_completable`."""
    return is_completable(self.roles)

  def with_frames(self) -> "Sentence":
    """Returns the sentence with all its clips read."""
    return self.replace(clips=tuple(read_frames(clip) for clip in self.clips))


def check_roles(num_clips: int, roles: tuple[Role, ...]) -> None:
  """Raises ValueError unless there is one role per clip, at least one target, and targets come last."""
  if num_clips != len(roles):
    raise ValueError(f"a sentence needs one role per clip: {num_clips} clips, {len(roles)} roles")
  if Role.TARGET not in roles:
    raise ValueError("a sentence needs a target clip")
  if list(roles) != sorted(roles):
    raise ValueError(f"targets must come last in a sentence, got the roles {[role.name for role in roles]}")


# Why sentences that are trained on are neither previewed nor evaluated.
NOT_COMPLETABLE = "sampling makes one target after an odd number of clips (A, A', B)"


def is_completable(roles: tuple[Role, ...]) -> bool:
  """Returns whether sampling can make the target of a sentence: it is the only one, and without it the number of clips
  is odd."""
  return roles.count(Role.TARGET) == 1 and len(roles) % 2 == 0


def reference_roles(num_clips: int) -> tuple[Role, ...]:
  """Returns the roles of UniVid's A, A', B, B': the last clip is the target, all others are context."""
  return (Role.CONTEXT,) * (num_clips - 1) + (Role.TARGET,)
