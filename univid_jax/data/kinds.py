"""What the pictures of a task stand for: labels, depth and normals to colours, and back."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

KIND_NAMES = ("depth", "normals", "segmentation", "edges", "saliency", "camera")
# Whose values must not mix when pictures are resized.
UNMIXED = ("depth", "normals", "segmentation")
# Of the targets of computed tasks.
COMPUTED_KINDS: Mapping[str, str] = {"scribble": "edges", "salient_object": "saliency", "moving_object": "saliency",
                                     "camera_movement": "camera"}
VOC_LABELS = 256


def resampling(kind: str | None) -> str:
  """How pictures of a kind are resized, see `ClipFormat.resample`."""
  return "nearest" if kind in UNMIXED else "bicubic"


def label_colors(labels: np.ndarray) -> np.ndarray:
  """Pascal VOC's colours: the bits of a label spread over red, green and blue, the highest first; label 0 is black."""
  labels = labels.astype(np.int64)
  color = np.zeros((*labels.shape, 3), np.uint8)
  for bit in range(8):
    for channel in range(3):
      color[..., channel] |= (((labels >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
  return color


def read_palette(path: str) -> np.ndarray:
  """The colours of labels, uint8 (labels, 3), from a text file with a line "R G B" for each; "" is Pascal VOC's 256.

  Raises:
    ValueError: the file is not of that form.
  """
  if not path:
    return label_colors(np.arange(VOC_LABELS))
  try:
    colors = np.atleast_2d(np.array([line.replace(",", " ").split() for line in Path(path).read_text().splitlines()
                                     if line.strip()], int))
  except ValueError as error:
    raise ValueError(f"{path} is no palette, a line R G B for each label: {error}") from error
  if colors.shape[1] != 3 or colors.min() < 0 or colors.max() > 255:
    raise ValueError(f"{path} is no palette: colours are three numbers from 0 to 255")
  return colors.astype(np.uint8)


def depth_picture(depth: np.ndarray, depth_range: tuple[float, float]) -> np.ndarray:
  """Depth in metres (..., 1) as grey, uint8 (..., 3): near is bright, black is unknown (0, negative or not finite).

  Args:
    depth: in metres.
    depth_range: metres that white and black stand for; what lies beyond is cut off.
  """
  near, far = depth_range
  known = np.isfinite(depth) & (depth > 0)
  grey = np.where(known, np.clip(255 * (far - np.nan_to_num(depth)) / (far - near), 1, 255), 0)
  return np.repeat(grey.round().astype(np.uint8), 3, axis=-1)


def depth_of(picture: np.ndarray, depth_range: tuple[float, float]) -> np.ndarray:
  """What a picture of depth says, in metres: uint8 (..., 3) to (...)."""
  near, far = depth_range
  return far - picture.astype(np.float64).mean(-1) / 255 * (far - near)


def normals_picture(normals: np.ndarray) -> np.ndarray:
  """Unit vectors (..., 3) as colours, uint8; black, where they are zero, is unknown."""
  colors = ((np.clip(normals, -1, 1) + 1) * 127.5).round().astype(np.uint8)
  return np.where(np.any(normals != 0, axis=-1, keepdims=True), colors, 0).astype(np.uint8)


def normals_of(picture: np.ndarray) -> np.ndarray:
  """What a picture of normals says: uint8 (..., 3) to vectors (..., 3)."""
  return picture.astype(np.float64) / 127.5 - 1


def known(picture: np.ndarray) -> np.ndarray:
  """Where a picture of depth or normals says anything: uint8 (..., 3) to bool (...)."""
  return picture.max(-1) > 0
