"""What the pixels of targets represent: labels, depth and normals to colours, and back. Grids: `tasks.grids`."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8

from univid_jax.config.schema import DataConfig
from univid_jax.core.errors import UserError
from univid_jax.core.options import Resampling, TargetKind
from univid_jax.core.paths import read_bytes, to_path
from univid_jax.data.tasks.grids import GRID_FAMILIES
from univid_jax.data.tasks.grids.base import ARC_TASK, GridSplit, task_name

# Kinds of targets of the computed tasks, of grids and of ARC; all others are images. They say nothing about tasks of
# own data that have the same names.
COMPUTED_KINDS: Mapping[str, TargetKind] = {
  "scribble": TargetKind.EDGES,
  "salient_object": TargetKind.SALIENCY,
  "moving_object": TargetKind.SALIENCY,
  "camera_movement": TargetKind.CAMERA,
  ARC_TASK: TargetKind.GRID,
  **{task_name(family, split): TargetKind.GRID for family in GRID_FAMILIES for split in GridSplit},
}
# Kinds whose values must not be mixed by resizing.
_UNMIXED = (TargetKind.DEPTH, TargetKind.NORMALS, TargetKind.SEGMENTATION, TargetKind.GRID)
_VOC_LABELS = 256


def own_kinds(config: DataConfig) -> Mapping[str, TargetKind]:
  """Returns the kind of the targets of tasks of own data: pairs, tables, manifests, TFDS.

  The targets of tasks that are not in it are images. A record without a task has the task "".
  """
  tfds = config.tfds
  of_tfds = {tfds.task: tfds.kind} if tfds.name and tfds.kind != TargetKind.IMAGE else {}
  return {**of_tfds, **config.kinds}


def resampling(kind: TargetKind) -> Resampling:
  """Returns how targets of a kind are resized."""
  if kind is TargetKind.EDGES:
    return Resampling.MAX
  return Resampling.NEAREST if kind in _UNMIXED else Resampling.BICUBIC


def label_colors(labels: Integer[np.ndarray, "*dims"]) -> UInt8[np.ndarray, "*dims 3"]:
  """Returns Pascal VOC's colours of labels.

  The bits of a label are spread over red, green and blue, the highest bit of a channel first; label 0 is black.
  """
  labels = labels.astype(np.int64)
  color = np.zeros((*labels.shape, 3), np.uint8)
  for bit in range(8):
    for channel in range(3):
      color[..., channel] |= (((labels >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
  return color


def read_palette(path: str) -> UInt8[np.ndarray, "labels 3"]:
  """Reads the colours of labels from a text file with one line "R G B" per label; "" returns Pascal VOC's 256 colours.

  Raises:
    OSError: the file cannot be read.
    UserError: it has another form.
  """
  if not path:
    return label_colors(np.arange(_VOC_LABELS))
  file = to_path(path)
  try:
    lines = [line.replace(",", " ").split() for line in read_bytes(file).decode().splitlines() if line.strip()]
    colors = np.atleast_2d(np.array(lines, int))
  except ValueError as error:
    raise UserError(f"{path} is not a palette, one line R G B per label: {error}") from error
  if colors.shape[1] != 3 or colors.min() < 0 or colors.max() > 255:
    raise UserError(f"{path} is not a palette: a colour must be three numbers from 0 to 255")
  return colors.astype(np.uint8)


def depth_to_image(
  depth: Float[np.ndarray, "*dims 1"], depth_range: tuple[float, float]
) -> UInt8[np.ndarray, "*dims 3"]:
  """Converts depth to grey: near is bright, black is unknown (0, negative or not finite).

  Args:
    depth: in metres.
    depth_range: metres that white and black represent; depth beyond them is clipped.
  """
  near, far = depth_range
  known = np.isfinite(depth) & (depth > 0)
  grey = np.where(known, np.clip(255 * (far - np.where(known, depth, far)) / (far - near), 1, 255), 0)
  return np.repeat(grey.round().astype(np.uint8), 3, axis=-1)


def image_to_depth(image: UInt8[np.ndarray, "*dims 3"], depth_range: tuple[float, float]) -> Float[np.ndarray, "*dims"]:
  """Converts an image of depth to metres."""
  near, far = depth_range
  return far - image.astype(np.float64).mean(-1) / 255 * (far - near)


def normals_to_image(normals: Float[np.ndarray, "*dims 3"]) -> UInt8[np.ndarray, "*dims 3"]:
  """Converts unit vectors to colours; black represents zero vectors, which are unknown."""
  colors = ((np.clip(normals, -1, 1) + 1) * 127.5).round().astype(np.uint8)
  return np.where(np.any(normals != 0, axis=-1, keepdims=True), colors, 0).astype(np.uint8)


def image_to_normals(image: UInt8[np.ndarray, "*dims 3"]) -> Float[np.ndarray, "*dims 3"]:
  """Converts colours to vectors, not normalised."""
  return image.astype(np.float64) / 127.5 - 1


def known_pixels(image: UInt8[np.ndarray, "*dims 3"]) -> Bool[np.ndarray, "*dims"]:
  """Returns where an image of depth or normals has a value."""
  return image.max(-1) > 0
