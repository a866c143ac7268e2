"""Frames of one size to another: cropped or padded, and mixed or not."""

import numpy as np
from PIL import Image

from univid_jax.core.options import Resampling
from univid_jax.data.media.reader import Frames


def resize_and_crop(frames: Frames, size: tuple[int, int], *, resample: Resampling = Resampling.BICUBIC) -> Frames:
  """Resizes frames, keeping their aspect ratio, until they cover (height, width), and crops the centre."""
  height, width = size
  if frames.shape[1:3] == (height, width):
    return frames
  scale = max(height / frames.shape[1], width / frames.shape[2])
  # Rounding may exceed the frame.
  box_height, box_width = min(height / scale, frames.shape[1]), min(width / scale, frames.shape[2])
  top, left = (frames.shape[1] - box_height) / 2, (frames.shape[2] - box_width) / 2
  if resample is Resampling.MAX:
    return _brightest(frames, (top, top + box_height, height), (left, left + box_width, width))
  box = (left, top, left + box_width, top + box_height)
  method = Image.Resampling[resample.name]
  return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), method, box=box)) for frame in frames])


def _brightest(frames: Frames, *axes: tuple[float, float, int]) -> Frames:
  """Resizes frames: each pixel becomes the brightest of those whose centres fall into it, or else the nearest.

  Args:
    frames: to resize.
    *axes: of height and width, where what is shown starts and ends, and into how many pixels it is divided.
  """
  for axis, (start, end, count) in enumerate(axes, 1):
    edges = np.linspace(start, end, count + 1)
    if count > end - start:
      nearest = ((edges[:-1] + edges[1:]) / 2).astype(int)
      frames = frames.take(nearest, axis)
      continue
    first = np.ceil(edges - 0.5).astype(int).clip(0, frames.shape[axis])
    frames = np.maximum.reduceat(frames.take(range(first[-1]), axis), first[:-1], axis)
  return frames


def resize_and_pad(frames: Frames, size: tuple[int, int], *, resample: Resampling = Resampling.BICUBIC) -> Frames:
  """Resizes frames, keeping their aspect ratio, until they fit into (height, width), and adds black bars."""
  height, width = size
  scale = min(height / frames.shape[1], width / frames.shape[2])
  inner = max(round(frames.shape[1] * scale), 1), max(round(frames.shape[2] * scale), 1)
  top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
  out = np.zeros((len(frames), height, width, 3), np.uint8)
  out[:, top : top + inner[0], left : left + inner[1]] = resize_and_crop(frames, inner, resample=resample)
  return out
