"""Defines computed tasks: how their targets are made from natural clips, without annotation.

A task draws its parameters once per sentence and applies them to every pair, so that only the example pairs reveal
them. What they must not reveal, such as the noise in B, is drawn for every pair. Tasks work on clips in float32
(T, H, W, 3), [0, 1].
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from univid_jax.core.contexts import Motion
from univid_jax.core.errors import UserError

Params = Mapping[str, Any]
UnitClip = Float[np.ndarray, "T H W 3"]

# The luma of ITU-R BT.601, as in PIL's conversion to grey.
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


# How far values may lie outside [0, 1] before they are clipped: resampling and noise overshoot by less.
MAX_OVERSHOOT = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A computed task.

  Attributes:
    draw: draws a sentence's parameters: JSON values by name (Python's numbers, not NumPy's), since an evaluation stores
      them with its results.
    apply: maps (clip, **parameters) to the clip's target, of the same shape; values slightly outside [0, 1] are
      clipped. An animating task also takes `num_frames`, and turns an image into a video.
    reversible: whether the task with swapped pairs (A', A, B', B) is a task too.
    motion: which clips may be videos. With an animating task the target of an image may be one, so it cannot be
      reversible.
    varies: whether `apply` also takes `pair`, the number of the pair, and draws what differs between pairs.
    restores: whether `apply` makes the source, and the natural clip is the target.
    prompt_name: what the paper's detailed prompt calls the target.
  """

  draw: Callable[[np.random.Generator], Params]
  apply: Callable[..., UnitClip]
  reversible: bool = True
  motion: Motion = Motion.OPTIONAL
  varies: bool = False
  restores: bool = False
  prompt_name: str = ""

  def __post_init__(self):
    if self.animates and self.reversible:
      raise ValueError("an animating task cannot be reversible: its inverse would make an image of a video")

  @property
  def animates(self) -> bool:
    return self.motion == Motion.ANIMATES

  @property
  def videos_only(self) -> bool:
    """Whether the task is meaningless for images."""
    return self.motion == Motion.NEEDED


# The tasks whose `draw` was checked, by name. They are kept alive, since a new task could get the id of a deleted one.
_checked: dict[str, Task] = {}


def check_draw(name: str, task: Task) -> None:
  """Checks what a task's `draw` returns, once per task, with a generator of its own.

  Raises:
    UserError: it does not return JSON values by name.
  """
  if _checked.get(name) is task:
    return
  params = task.draw(np.random.default_rng(0))
  try:
    if not isinstance(params, Mapping):
      raise TypeError(f"it returns {type(params).__name__}, not a mapping")
    json.dumps(dict(params))
  except (TypeError, ValueError) as error:
    raise UserError(
      f"draw of the task {name} must return JSON values by name, Python's numbers and not NumPy's: {error}"
    ) from error
  _checked[name] = task


def check_result(name: str, result: Any, shape: tuple[int, ...]) -> None:
  """Checks what a task's `apply` returns.

  Raises:
    UserError: it is not an array of floats of this shape, or its values are not finite or far outside [0, 1].
  """
  got = ""
  if not (isinstance(result, np.ndarray) and result.shape == shape and result.dtype.kind == "f"):
    got = f"{result.dtype} {result.shape}" if isinstance(result, np.ndarray) else type(result).__name__
  elif not (result.min() >= -MAX_OVERSHOOT and result.max() <= 1 + MAX_OVERSHOOT):  # also catches NaN
    got = f"values from {result.min():.4g} to {result.max():.4g}"
  if got:
    raise UserError(
      f"apply of the task {name} must return a NumPy array of floats of shape {shape}, in [0, 1], got {got}"
    )


def draw_nothing(rng: np.random.Generator) -> Params:
  """Draws the parameters of a task that has none."""
  del rng
  return {}


def compute_luma(clip: UnitClip) -> Float[np.ndarray, "T H W 1"]:
  return (clip @ LUMA)[..., None]


def mix_channels(clip: UnitClip, matrix: np.ndarray) -> UnitClip:
  """Returns linear combinations of each pixel's channels, one per row of a matrix."""
  columns = np.ascontiguousarray(matrix.T, np.float32)
  return (clip.reshape(-1, clip.shape[-1]) @ columns).reshape(*clip.shape[:-1], len(matrix))


def blend(strength: Float[np.ndarray, "T H W"], start, end) -> UnitClip:
  """Interpolates between two colours: the first where the strength is 0, the second where it is 1."""
  out = np.empty((*strength.shape, 3), np.float32)
  for channel, (first, second) in enumerate(zip(np.asarray(start, np.float32), np.asarray(end, np.float32))):
    part = np.multiply(strength, second - first, out=out[..., channel])
    part += first
  return out


def to_unit(frames: UInt8[np.ndarray, "T H W 3"]) -> UnitClip:
  """Converts uint8 frames to float32 in [0, 1]."""
  clip = frames.astype(np.float32)
  clip /= 255
  return clip


def from_unit(clip: UnitClip) -> UInt8[np.ndarray, "T H W 3"]:
  """Converts frames in [0, 1] to uint8, rounding and clipping."""
  levels = clip * 255
  levels += 0.5
  return np.clip(levels, 0, 255, out=levels).astype(np.uint8)
