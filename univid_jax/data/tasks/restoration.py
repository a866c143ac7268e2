"""Degradations, whose inverses are the restoration tasks."""

import numpy as np
import scipy
from PIL import Image

from univid_jax.data.tasks.base import Params, UnitClip, from_unit, to_unit


def draw_holes(rng: np.random.Generator) -> Params:
  """Draws one to three rectangles (top, left, bottom, right, as shares of the frame) and a colour."""
  holes = []
  for _ in range(rng.integers(1, 4)):
    size = rng.uniform(0.2, 0.5, 2)
    corner = rng.uniform(0, 1 - size)
    holes.append([*corner.tolist(), *(corner + size).tolist()])
  return {"holes": holes, "filling": rng.uniform(0, 1, 3).tolist()}


def cover(clip: UnitClip, *, holes, filling) -> UnitClip:
  """Covers rectangles with a colour."""
  out = clip.copy()
  sides = np.array([*clip.shape[1:3], *clip.shape[1:3]])
  for hole in holes:
    top, left, bottom, right = np.round(np.array(hole) * sides).astype(int)
    out[:, top:bottom, left:right] = filling
  return out


def draw_factor(rng: np.random.Generator) -> Params:
  return {"factor": int(rng.integers(2, 5))}


def shrink(clip: UnitClip, *, factor: int) -> UnitClip:
  """Reduces the resolution (box filter), then resizes back (bicubic)."""
  height, width = clip.shape[1:3]
  small = max(round(width / factor), 1), max(round(height / factor), 1)

  def shrink_frame(frame):
    image = Image.fromarray(frame).resize(small, Image.Resampling.BOX)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))

  return to_unit(np.stack([shrink_frame(frame) for frame in from_unit(clip)]))


def draw_blur(rng: np.random.Generator) -> Params:
  return {"radius": float(rng.uniform(0.01, 0.04))}


def blur(clip: UnitClip, *, radius: float) -> UnitClip:
  """Blurs with a Gaussian; the radius is its standard deviation as a share of the frame's height."""
  sigma = radius * clip.shape[1]
  return scipy.ndimage.gaussian_filter(clip, (0, sigma, sigma, 0))


def draw_noise(rng: np.random.Generator) -> Params:
  return {"strength": float(rng.uniform(0.05, 0.25)), "seed": int(rng.integers(2**31))}


def add_noise(clip: UnitClip, *, strength: float, seed: int, pair: int = 0) -> UnitClip:
  """Adds sensor noise: normal, independent in every pixel of every pair."""
  out = np.random.default_rng((seed, pair)).standard_normal(clip.shape, np.float32)
  out *= strength
  out += clip
  return np.clip(out, 0, 1, out=out)


def draw_rain(rng: np.random.Generator) -> Params:
  return {
    "count": int(rng.integers(40, 120)),
    "slant": float(rng.uniform(-0.4, 0.4)),
    "strength": float(rng.uniform(0.3, 0.7)),
    "seed": int(rng.integers(2**31)),
  }


def add_rain(clip: UnitClip, *, count: int, slant: float, strength: float, seed: int, pair: int = 0) -> UnitClip:
  """Adds bright streaks that fall from frame to frame, all at the same slant; their positions differ between pairs."""
  rng = np.random.default_rng((seed, pair))
  frames, height, width = clip.shape[:3]
  start, speed = rng.uniform(0, 1, (count, 2)), rng.uniform(0.15, 0.35, count)
  length = rng.uniform(0.05, 0.15, count)
  points = np.maximum((length * height * 2).astype(int), 2)
  streak = np.repeat(np.arange(count), points)
  along = np.arange(len(streak)) - np.repeat(np.cumsum(points) - points, points)
  steps = along * (length / (points - 1))[streak]
  y, x, fallen = start[streak, 0], start[streak, 1], np.arange(frames)[:, None] * speed[streak]
  rows = (((y + fallen) % 1.15 - 0.15 + steps) * height).astype(int)
  columns = ((x + slant * (fallen + steps)) % 1 * width).astype(int)
  frame, point = np.nonzero((rows >= 0) & (rows < height))
  layer = np.zeros((frames, height, width), np.float32)
  layer[frame, rows[frame, point], columns[frame, point]] = 1
  layer = scipy.ndimage.gaussian_filter(layer, (0, 0.4, 0.4)) * np.float32(strength)
  layer = np.stack([layer] * 3, axis=-1)
  out = 1 - layer
  out *= clip
  out += layer
  return out
