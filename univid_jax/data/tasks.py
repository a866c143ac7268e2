"""Computed tasks: what A' is of A, made from natural clips without any annotation.

A task draws its parameters once a sentence and applies them to both pairs, so that only the example pair tells what they
are. Clips are float32 (T, H, W, 3) in [0, 1].
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

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
    prompt_name: what the paper's detailed prompt calls the result.
  """

  draw: Callable[[np.random.Generator], Params]
  apply: Callable[..., np.ndarray]
  reversible: bool = True
  animates: bool = False
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
  down, across = (ndimage.gaussian_filter(grey, (0, 1, 1), order=order) for order in ((0, 1, 0), (0, 0, 1)))
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
  aspect = max(height / width, width / height)
  out = []
  for i, frame in enumerate(clip):
    progress = i / max(len(clip) - 1, 1)
    radians = np.deg2rad(angle * progress)
    cos, sin = np.cos(radians), np.sin(radians)
    needed = cos + aspect * abs(sin)
    scale = max(zoom**progress, needed)
    free = 0.5 * (1 - needed / scale) * progress
    center = (0.5 + shift[0] * free) * width, (0.5 + shift[1] * free) * height
    a, b = cos / scale, sin / scale
    matrix = (a, -b, center[0] - a * width / 2 + b * height / 2, b, a, center[1] - b * width / 2 - a * height / 2)
    image = Image.fromarray((frame * 255 + 0.5).astype(np.uint8))
    out.append(np.asarray(image.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)))
  return np.stack(out).astype(np.float32) / 255


TASKS: Mapping[str, Task] = {
    "greyscale": Task(draw=no_params, apply=greyscale, prompt_name="greyscale version"),
    "invert": Task(draw=no_params, apply=invert, prompt_name="negative"),
    "invert_brightness": Task(draw=no_params, apply=invert_brightness, prompt_name="version with its brightness inverted"),
    "swap_channels": Task(draw=no_params, apply=swap_channels, prompt_name="version with red and blue swapped"),
    "duotone": Task(draw=draw_duotone, apply=duotone, prompt_name="duotone version"),
    "low_light": Task(draw=draw_low_light, apply=low_light, prompt_name="low-light version"),
    "scribble": Task(draw=draw_scribble, apply=scribble, prompt_name="scribble map"),
    "camera_movement": Task(draw=draw_camera_movement, apply=camera_movement, reversible=False, animates=True,
                            prompt_name="camera movement"),
}
