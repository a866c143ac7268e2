"""Natural clips, and those of the photographs inside scikit-image."""

import dataclasses
import functools
import importlib.resources
from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from univid_jax.core.pixels import OPPONENT_COLORS
from univid_jax.data.media.reader import Frames
from univid_jax.data.tasks.base import from_unit, mix_channels, to_unit
from univid_jax.data.tasks.photometric import draw_duotone, duotone

Split = Literal["train", "held_out"]

# Held-out photographs show nothing that the others show.
TRAIN_PHOTOS = (
  "astronaut.png",
  "brick.png",
  "camera.png",
  "coins.png",
  "grass.png",
  "gravel.png",
  "hubble_deep_field.jpg",
  "ihc.png",
  "moon.png",
  "retina.jpg",
  "rocket.jpg",
)
HELD_OUT_PHOTOS = ("chelsea.png", "coffee.png", "motorcycle_left.png")

# A window on a photograph: its side in heights of the clip; over a video, how far it drifts at most, in sides, and how
# much the logarithm of its side changes.
WINDOW_RANGE = (0.875, 2.25)
WINDOW_DRIFT = 0.05
WINDOW_ZOOM = 0.07

# All that a grey clip can show, as one row of pixels.
GREY_LEVELS = np.linspace(np.zeros(3), np.ones(3), 256, dtype=np.float32)[None, None]


@runtime_checkable
class ClipSource(Protocol):
  """Natural clips by index; images and videos may have any size."""

  def __len__(self) -> int: ...

  def clip(self, index: int, rng: np.random.Generator, *, num_frames: int, size: tuple[int, int]) -> Frames:
    """Draws a part of the image or video at an index, of `num_frames` frames of (height, width)."""
    ...


@dataclasses.dataclass(frozen=True)
class PhotoSource:
  """Windows on photographs; a video is a slow movement of the window.

  Attributes:
    photos: RGB images.
    jitter: whether colours are varied at random, and grey photographs coloured in two tones.
  """

  photos: Sequence[Image.Image]
  jitter: bool = True

  @classmethod
  def bundled(cls, split: Split, *, jitter: bool = True) -> "PhotoSource":
    """Opens the photographs inside scikit-image; only those for training are jittered."""
    names = TRAIN_PHOTOS if split == "train" else HELD_OUT_PHOTOS
    folder = importlib.resources.files("skimage.data")
    photos = []
    for name in names:
      with importlib.resources.as_file(folder / name) as path, Image.open(path) as photo:
        photos.append(photo.convert("RGB"))
    return cls(photos, jitter=jitter and split == "train")

  def __len__(self) -> int:
    return len(self.photos)

  @functools.cached_property
  def _compact(self) -> list[Image.Image]:
    """The photographs, those that are grey with one channel: they are resized in a third of the time."""
    return [_drop_equal_channels(photo) for photo in self.photos]

  def clip(self, index: int, rng: np.random.Generator, *, num_frames: int, size: tuple[int, int]) -> Frames:
    frames = moving_window(self._compact[index], rng, num_frames=num_frames, size=size)
    return jitter_colors(frames, rng) if self.jitter else frames


def _drop_equal_channels(photo: Image.Image) -> Image.Image:
  """Returns one channel of a photograph whose channels are all the same, and any other as it is."""
  red, green, blue = photo.split()
  return red if red == green == blue else photo


def moving_window(photo: Image.Image, rng: np.random.Generator, *, num_frames: int, size: tuple[int, int]) -> Frames:
  """Cuts a random window out of an RGB or grey photograph; over a video it drifts, and grows or shrinks, a little."""
  height, width = size
  largest = min(photo.width * height / width, photo.height)
  first = min(height * rng.uniform(*WINDOW_RANGE), largest)
  last = min(first * np.exp(rng.uniform(-WINDOW_ZOOM, WINDOW_ZOOM)), largest)
  direction, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0, WINDOW_DRIFT) * first
  drift = distance * np.array([np.cos(direction), np.sin(direction)])
  origin = rng.uniform(size=2)
  whole = np.array([photo.width, photo.height])
  progress = np.linspace(0, 1, num_frames)[:, None]
  boxes = first * (last / first) ** progress * [width / height, 1]
  room = np.maximum(whole - boxes, 0)  # rounding may give less than zero
  corners = np.clip(origin * room + drift * progress, 0, room)
  windows = [
    photo.resize((width, height), Image.Resampling.BICUBIC, box=crop_box(corner, opposite))
    for corner, opposite in zip(corners, np.minimum(corners + boxes, whole))
  ]
  frames = np.stack([np.asarray(window) for window in windows])
  return np.stack([frames] * 3, axis=-1) if frames.ndim == 3 else frames


def crop_box(corner: np.ndarray, opposite: np.ndarray) -> tuple[float, float, float, float]:
  """Returns (left, top, right, bottom), as Pillow takes it."""
  return float(corner[0]), float(corner[1]), float(opposite[0]), float(opposite[1])


def jitter_colors(frames: Frames, rng: np.random.Generator) -> Frames:
  """Varies hue, saturation and brightness at random; a grey clip is coloured in two random tones first.

  So a few photographs show the colours of many.
  """
  grey = is_grey(frames)
  clip = duotone(GREY_LEVELS, **draw_duotone(rng)) if grey else to_unit(frames)
  angle, saturation = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 2.0)
  cos, sin = saturation * np.cos(angle), saturation * np.sin(angle)
  rotation = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
  clip = mix_channels(clip, OPPONENT_COLORS.T @ rotation @ OPPONENT_COLORS)
  np.clip(clip, 0, 1, out=clip)
  clip **= rng.uniform(0.7, 1.4)
  clip *= rng.uniform(0.8, 1.1)
  colors = from_unit(clip)
  return colors[0, 0].take(frames[..., 1], axis=0) if grey else colors


def is_grey(frames: Frames) -> bool:
  """Returns whether the channels of all pixels are almost the same."""
  red, green, blue = np.ascontiguousarray(np.moveaxis(frames, -1, 0))
  spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
  return bool(spread.max() < 3)
