"""Frames to write, in the forms that Python code passes."""

from typing import Any

import numpy as np
from typing_extensions import Protocol, runtime_checkable

from univid_jax.core.errors import UserError
from univid_jax.core.text import describe_value


@runtime_checkable
class HasFrames(Protocol):
  """An object with frames to write, uint8 (T, H, W, 3), and perhaps a frame rate `fps`: a clip or a sample."""

  @property
  def frames(self) -> np.ndarray: ...


def to_frames(frames: Any) -> np.ndarray:
  """Converts frames, for instance a list of them, to an array.

  Raises:
    UserError: they are not uint8 (T, H, W, 3), or there are none.
  """
  try:
    array = np.asarray(frames)
  except ValueError as error:
    raise UserError(f"frames must be uint8 (T, H, W, 3), all of one size ({error})") from error
  if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not array.size:
    hint = "; a single image is frames[None]" if array.ndim == 3 else ""
    raise UserError(f"frames must be uint8 (T, H, W, 3), got {describe_value(array if array.ndim else frames)}{hint}")
  return array
