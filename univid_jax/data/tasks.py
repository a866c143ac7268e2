"""Computed tasks: what A' is of A, made from natural clips without any annotation.

A task draws its parameters once a sentence and applies them to both pairs, so that only the example pair tells what they
are. Clips are float32 (T, H, W, 3) in [0, 1].
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy
import skimage
from PIL import Image

Params = Mapping[str, Any]

# The luma of ITU-R BT.601, as in PIL's conversion to grey.
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A computed task.

  Attributes:
    draw: gives the parameters of a sentence.
    apply: makes the target of a clip; an animating task also takes `num_frames` and makes a video of an image.
    reversible: whether turning the pairs round (A' A B' B) is a task too.
    animates: whether the target is a video even of an image.
    restores: whether `apply` makes the source, and the target is the natural clip.
    videos_only: whether it means nothing for an image.
    prompt_name: what the paper's detailed prompt calls the result.
  """

  draw: Callable[[np.random.Generator], Params]
  apply: Callable[..., np.ndarray]
  reversible: bool = True
  animates: bool = False
  restores: bool = False
  videos_only: bool = False
  prompt_name: str = ""


def luma(clip: np.ndarray) -> np.ndarray:
  """Brightness, (T, H, W, 1)."""
  return (clip @ LUMA)[..., None]


def no_params(rng: np.random.Generator) -> Params:
  del rng
  return {}


def greyscale(clip: np.ndarray) -> np.ndarray:
  return np.repeat(luma(clip), 3, axis=-1)


def invert(clip: np.ndarray) -> np.ndarray:
  return 1 - clip


def invert_brightness(clip: np.ndarray) -> np.ndarray:
  """Dark becomes light and light dark; hues stay, as far as there is room for them."""
  return np.clip(clip + 1 - 2 * clip.mean(axis=-1, keepdims=True), 0, 1)


def swap_channels(clip: np.ndarray) -> np.ndarray:
  """Red becomes blue and blue red."""
  return clip[..., ::-1]


def draw_duotone(rng: np.random.Generator) -> Params:
  """A random dark colour and the light one opposite to it, as often as not in each other's place."""
  dark = rng.uniform(0, 0.3, 3)
  colors = [dark.tolist(), (1 - dark).tolist()]
  dark, light = colors if rng.random() < 0.5 else colors[::-1]
  return {"dark": dark, "light": light}


def duotone(clip: np.ndarray, *, dark, light) -> np.ndarray:
  """Brightness from one colour to another."""
  dark, light = np.asarray(dark, np.float32), np.asarray(light, np.float32)
  return dark + (light - dark) * luma(clip)


def draw_low_light(rng: np.random.Generator) -> Params:
  return {"gain": float(rng.uniform(0.15, 0.5)), "gamma": float(rng.uniform(1.0, 1.8))}


def low_light(clip: np.ndarray, *, gain: float, gamma: float) -> np.ndarray:
  """What a short exposure would show."""
  return gain * clip**gamma


def draw_scribble(rng: np.random.Generator) -> Params:
  """Ink on paper, or chalk on a board, each in a random colour."""
  paper, ink = rng.uniform(0.75, 1, 3), rng.uniform(0, 0.4, 3)
  if rng.random() < 0.5:
    paper, ink = 1 - paper, 1 - ink
  return {"paper": paper.tolist(), "ink": ink.tolist()}


def scribble(clip: np.ndarray, *, paper, ink) -> np.ndarray:
  """Soft edges (the gradient of the smoothed brightness) drawn in one colour on another."""
  grey = luma(clip)[..., 0]
  down, across = (scipy.ndimage.gaussian_filter(grey, (0, 1, 1), order=order) for order in ((0, 1, 0), (0, 0, 1)))
  strength = np.clip(4 * np.hypot(down, across), 0, 1)[..., None].astype(np.float32)
  paper, ink = np.asarray(paper, np.float32), np.asarray(ink, np.float32)
  return paper + (ink - paper) * strength


def draw_camera_movement(rng: np.random.Generator) -> Params:
  """A zoom to 1.2 to 1.6, turned by up to 15 degrees and shifted by up to what the zoom leaves free."""
  zoom = float(rng.uniform(1.2, 1.6))
  return {"zoom": zoom, "angle": float(rng.uniform(-15, 15)), "shift": rng.uniform(-1, 1, 2).tolist()}


def camera_movement(clip: np.ndarray, *, zoom: float, angle: float, shift, num_frames: int | None = None) -> np.ndarray:
  """A smooth zoom, turn and pan from the clip as it is to its end state; an image becomes a video of num_frames.

  The end state's zoom is never so small that a corner of the frame leaves the picture.
  """
  if num_frames is not None and len(clip) == 1:
    clip = np.repeat(clip, num_frames, axis=0)
  height, width = clip.shape[1:3]
  out = []
  for frame, pose in zip(clip, camera_poses(len(clip), (height, width), zoom=zoom, angle=angle, shift=shift)):
    log_zoom, radians, x, y = pose
    center = (0.5 + x) * width, (0.5 + y) * height
    a, b = np.cos(radians) / np.exp(log_zoom), np.sin(radians) / np.exp(log_zoom)
    matrix = (a, -b, center[0] - a * width / 2 + b * height / 2, b, a, center[1] - b * width / 2 - a * height / 2)
    image = Image.fromarray((frame * 255 + 0.5).astype(np.uint8))
    out.append(np.asarray(image.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)))
  return np.stack(out).astype(np.float32) / 255


def camera_poses(num_frames: int, size: tuple[int, int], *, zoom: float, angle: float, shift) -> np.ndarray:
  """Where the camera of `camera_movement` is at each frame: log zoom, radians, shift in shares of width and height (n, 4)."""
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


def draw_holes(rng: np.random.Generator) -> Params:
  """One to three rectangles of one colour, corners and sizes in shares of the frame."""
  holes = []
  for _ in range(rng.integers(1, 4)):
    size = rng.uniform(0.2, 0.5, 2)
    corner = rng.uniform(0, 1 - size)
    holes.append([*corner.tolist(), *(corner + size).tolist()])
  return {"holes": holes, "filling": rng.uniform(0, 1, 3).tolist()}


def cover(clip: np.ndarray, *, holes, filling) -> np.ndarray:
  """Covers rectangles (top, left, bottom, right) with a colour."""
  out = clip.copy()
  sides = np.array([*clip.shape[1:3], *clip.shape[1:3]])
  for hole in holes:
    top, left, bottom, right = np.round(np.array(hole) * sides).astype(int)
    out[:, top:bottom, left:right] = filling
  return out


def draw_factor(rng: np.random.Generator) -> Params:
  return {"factor": int(rng.integers(2, 5))}


def shrink(clip: np.ndarray, *, factor: int) -> np.ndarray:
  """Fewer pixels (means over squares), then as many as before (bicubic)."""
  height, width = clip.shape[1:3]
  small = max(round(width / factor), 1), max(round(height / factor), 1)

  def one(frame):
    image = Image.fromarray((frame * 255 + 0.5).astype(np.uint8)).resize(small, Image.Resampling.BOX)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
  return np.stack([one(frame) for frame in clip])


def draw_blur(rng: np.random.Generator) -> Params:
  return {"radius": float(rng.uniform(0.01, 0.04))}


def blur(clip: np.ndarray, *, radius: float) -> np.ndarray:
  """Out of focus; the radius (a standard deviation) in heights of the frame."""
  sigma = radius * clip.shape[1]
  return scipy.ndimage.gaussian_filter(clip, (0, sigma, sigma, 0))


def draw_noise(rng: np.random.Generator) -> Params:
  return {"strength": float(rng.uniform(0.05, 0.25)), "seed": int(rng.integers(2**31))}


def add_noise(clip: np.ndarray, *, strength: float, seed: int) -> np.ndarray:
  """Noise of a sensor: normal, on its own in every pixel."""
  noise = np.random.default_rng(seed).standard_normal(clip.shape, np.float32)
  return np.clip(clip + strength * noise, 0, 1)


def draw_rain(rng: np.random.Generator) -> Params:
  return {"count": int(rng.integers(40, 120)), "slant": float(rng.uniform(-0.4, 0.4)), "strength": float(rng.uniform(0.3, 0.7)),
          "seed": int(rng.integers(2**31))}


def rain(clip: np.ndarray, *, count: int, slant: float, strength: float, seed: int) -> np.ndarray:
  """Bright streaks that fall from frame to frame, all at one slant."""
  rng = np.random.default_rng(seed)
  frames, height, width = clip.shape[:3]
  start, speed = rng.uniform(0, 1, (count, 2)), rng.uniform(0.15, 0.35, count)
  length = rng.uniform(0.05, 0.15, count)
  out = clip.copy()
  for i in range(frames):
    layer = np.zeros((height, width), np.float32)
    for (y, x), drop, size in zip(start, speed, length):
      top = (y + drop * i) % 1.15 - 0.15
      steps = np.linspace(0, size, max(int(size * height * 2), 2))
      rows = ((top + steps) * height).astype(int)
      columns = (((x + slant * (drop * i + steps)) % 1) * width).astype(int)
      inside = (rows >= 0) & (rows < height)
      layer[rows[inside], columns[inside]] = 1
    layer = scipy.ndimage.gaussian_filter(layer, 0.4)[..., None] * strength
    out[i] = clip[i] * (1 - layer) + layer
  return out


def draw_flip(rng: np.random.Generator) -> Params:
  return {"axes": ((1,), (2,), (1, 2))[rng.integers(3)]}


def flip(clip: np.ndarray, *, axes) -> np.ndarray:
  """Upside down (1), left to right (2) or both."""
  return np.flip(clip, axes)


def reverse_time(clip: np.ndarray) -> np.ndarray:
  return clip[::-1]


def draw_mask_colors(rng: np.random.Generator) -> Params:
  """A bright colour for the object, a dark one for the rest."""
  return {"object_color": rng.uniform(0.6, 1, 3).tolist(), "background": rng.uniform(0, 0.25, 3).tolist()}


def salient_mask(clip: np.ndarray, *, object_color, background) -> np.ndarray:
  """What differs most from the clip's mean colour (Achanta et al. 2009, "Frequency-tuned salient region detection")."""
  lab = skimage.color.rgb2lab(clip)
  smooth = scipy.ndimage.gaussian_filter(lab, (0, 1, 1, 0))
  return painted_mask(np.linalg.norm(smooth - lab.mean(axis=(1, 2), keepdims=True), axis=-1), object_color, background)


def moving_mask(clip: np.ndarray, *, object_color, background) -> np.ndarray:
  """What moves against the scene: frames are shifted onto the middle one, and what differs from their median moves."""
  grey = luma(clip)[..., 0]
  middle = grey[len(grey) // 2]
  shifts = [skimage.registration.phase_cross_correlation(middle, frame, upsample_factor=4)[0] for frame in grey]
  aligned = np.stack([scipy.ndimage.shift(frame, shift, order=1, mode="nearest") for frame, shift in zip(grey, shifts)])
  difference = np.abs(aligned - np.median(aligned, axis=0))
  back = np.stack([scipy.ndimage.shift(part, -shift, order=1, mode="nearest") for part, shift in zip(difference, shifts)])
  sigma = max(clip.shape[1] / 120, 1)
  return painted_mask(scipy.ndimage.gaussian_filter(back, (0.5, sigma, sigma)), object_color, background)


def painted_mask(strength: np.ndarray, object_color, background) -> np.ndarray:
  """A map (T, H, W) cut in two at Otsu's threshold, small specks and holes closed, in two colours."""
  mask = strength > skimage.filters.threshold_otsu(strength) if np.ptp(strength) > 1e-6 else np.zeros(strength.shape, bool)
  square, reach = np.ones((3, 3), bool), max(strength.shape[1] // 60, 1)

  def whole(frame):
    opened = scipy.ndimage.binary_opening(frame, square)
    return scipy.ndimage.binary_fill_holes(scipy.ndimage.binary_closing(opened, square, reach))

  mask = np.stack([whole(frame) for frame in mask])
  return np.where(mask[..., None], np.asarray(object_color, np.float32), np.asarray(background, np.float32))


TASKS: Mapping[str, Task] = {
    "greyscale": Task(draw=no_params, apply=greyscale, prompt_name="greyscale version"),
    "invert": Task(draw=no_params, apply=invert, prompt_name="negative"),
    "invert_brightness": Task(draw=no_params, apply=invert_brightness, prompt_name="version with its brightness inverted"),
    "swap_channels": Task(draw=no_params, apply=swap_channels, prompt_name="version with red and blue swapped"),
    "duotone": Task(draw=draw_duotone, apply=duotone, prompt_name="duotone version"),
    "low_light": Task(draw=draw_low_light, apply=low_light, prompt_name="low-light version"),
    "scribble": Task(draw=draw_scribble, apply=scribble, prompt_name="scribble map"),
    "inpainting": Task(draw=draw_holes, apply=cover, restores=True, prompt_name="completed version"),
    "colorization": Task(draw=no_params, apply=greyscale, restores=True, prompt_name="colour version"),
    "super_resolution": Task(draw=draw_factor, apply=shrink, restores=True, prompt_name="high-resolution version"),
    "deblurring": Task(draw=draw_blur, apply=blur, restores=True, prompt_name="sharp version"),
    "denoising": Task(draw=draw_noise, apply=add_noise, restores=True, prompt_name="version without noise"),
    "deraining": Task(draw=draw_rain, apply=rain, restores=True, prompt_name="version without rain"),
    "flip": Task(draw=draw_flip, apply=flip, prompt_name="mirrored version"),
    "time_reversal": Task(draw=no_params, apply=reverse_time, videos_only=True, prompt_name="version played backwards"),
    "salient_object": Task(draw=draw_mask_colors, apply=salient_mask, prompt_name="salient object map"),
    "moving_object": Task(draw=draw_mask_colors, apply=moving_mask, videos_only=True, prompt_name="moving object map"),
    "camera_movement": Task(draw=draw_camera_movement, apply=camera_movement, reversible=False, animates=True,
                            prompt_name="camera movement"),
}
