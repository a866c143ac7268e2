"""Tasks that move the camera, mirror the picture or reverse time."""

import numpy as np
from jaxtyping import Float
from PIL import Image

from univid_jax.data.tasks.base import Params, UnitClip, from_unit, to_unit


def draw_camera_movement(rng: np.random.Generator) -> Params:
  """Draws a zoom from 1.2 to 1.6, a rotation of up to 15 degrees, and a shift as a share of the zoom's margin."""
  zoom = float(rng.uniform(1.2, 1.6))
  return {"zoom": zoom, "angle": float(rng.uniform(-15, 15)), "shift": rng.uniform(-1, 1, 2).tolist()}


def camera_movement(
  clip: UnitClip, *, zoom: float, angle: float, shift, num_frames: int | None = None
) -> Float[np.ndarray, "_T H W 3"]:
  """Zooms, rotates and pans smoothly from the original view; an image becomes a video of `num_frames`.

  The zoom is always large enough that the view shows nothing outside the frame.
  """
  if num_frames is not None and len(clip) == 1:
    clip = np.repeat(clip, num_frames, axis=0)
  height, width = clip.shape[1:3]
  frames = from_unit(clip)
  poses = camera_poses(len(clip), (height, width), zoom=zoom, angle=angle, shift=shift)
  out = [frames[0]]  # not moved yet
  for frame, (log_zoom, radians, x, y) in zip(frames[1:], poses[1:]):
    center = (0.5 + x) * width, (0.5 + y) * height
    a, b = np.cos(radians) / np.exp(log_zoom), np.sin(radians) / np.exp(log_zoom)
    matrix = (a, -b, center[0] - a * width / 2 + b * height / 2, b, a, center[1] - b * width / 2 - a * height / 2)
    image = Image.fromarray(frame)
    out.append(np.asarray(image.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)))
  return to_unit(np.stack(out))


def camera_poses(
  num_frames: int, size: tuple[int, int], *, zoom: float, angle: float, shift
) -> Float[np.ndarray, "T 4"]:
  """Returns the camera's pose in each frame: log zoom, rotation in radians, shift as shares of width and height."""
  height, width = size
  aspect = max(height / width, width / height)
  poses = []
  for i in range(num_frames):
    progress = i / max(num_frames - 1, 1)
    radians = np.deg2rad(angle * progress)
    needed = np.cos(radians) + aspect * abs(np.sin(radians))
    scale = max(zoom**progress, needed)
    free = 0.5 * (1 - needed / scale) * progress
    poses.append((np.log(scale), radians, shift[0] * free, shift[1] * free))
  return np.array(poses)


def draw_flip(rng: np.random.Generator) -> Params:
  return {"axes": ((1,), (2,), (1, 2))[rng.integers(3)]}


def flip(clip: UnitClip, *, axes) -> UnitClip:
  """Flips vertically (axis 1), horizontally (axis 2) or both."""
  return np.flip(clip, axes)


def reverse_time(clip: UnitClip) -> UnitClip:
  return clip[::-1]
