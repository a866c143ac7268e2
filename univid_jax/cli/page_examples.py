"""Examples for the demo page: photographs inside scikit-image, and grids."""

import abc
import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from univid_jax.config.schema import DataConfig, GridsConfig
from univid_jax.data.media.reader import DEFAULT_FPS, Frames
from univid_jax.data.media.writer import write_clip
from univid_jax.data.sources.photos import PhotoSource
from univid_jax.data.tasks import TASKS
from univid_jax.data.tasks.base import from_unit, to_unit
from univid_jax.data.tasks.grids import GRID_FAMILIES
from univid_jax.data.tasks.grids.rendering import Rendering

NAMES = ("A", "A2", "B")  # of the files; A2 is A'
THUMBNAIL = 96  # height and width in pixels
LAST_SIDE = 0.75  # of what the last frame of a video shows, relative to the first


@dataclasses.dataclass(frozen=True)
class Example(abc.ABC):
  """A task on two clips; `title` is for people."""

  title: str

  @abc.abstractmethod
  def draw(self, size: tuple[int, int], num_frames: int) -> list[Frames]:
    """Draws A, A' and B, uint8 (T, H, W, 3), at a size; `num_frames` are those of a video."""

  def write(self, folder: Path, *, size: tuple[int, int], num_frames: int) -> list[Path]:
    """Writes A, A' and B into a folder, lossless if they are images."""
    clips = self.draw(size, num_frames)
    suffix = ".mp4" if len(clips[0]) > 1 else ".png"
    paths = [folder / f"{name}{suffix}" for name in NAMES]
    for path, frames in zip(paths, clips):
      write_clip(path, frames, fps=DEFAULT_FPS)
    return paths

  def thumbnail(self) -> np.ndarray:
    """Draws A, A' and B side by side."""
    gap = np.full((THUMBNAIL, 4, 3), 255, np.uint8)
    a, a2, b = (clip[0] for clip in self.draw((THUMBNAIL, THUMBNAIL), 5))
    return np.concatenate([a, gap, a2, gap, b], axis=1)


@dataclasses.dataclass(frozen=True)
class PhotoExample(Example):
  """A computed task on two photographs.

  Attributes:
    task: its name.
    photo: number of the photograph of A, among those for training.
    query: number of the photograph of B, among those that are held out.
    is_video: whether all clips are videos.
    seed: of the task's parameters.
  """

  task: str
  photo: int
  query: int
  is_video: bool = False
  seed: int = 0

  def draw(self, size: tuple[int, int], num_frames: int) -> list[Frames]:
    rng, count, task = np.random.default_rng(self.seed), num_frames if self.is_video else 1, TASKS[self.task]
    a = zoom(PhotoSource.bundled("train").photos[self.photo], size, count)
    b = zoom(PhotoSource.bundled("held_out").photos[self.query], size, count)
    return [a, from_unit(task.apply(to_unit(a), **task.draw(rng))), b]


@dataclasses.dataclass(frozen=True)
class GridExample(Example):
  """A family of grid tasks on two grids of 8x8 cells.

  Attributes:
    family: its name.
    seed: of its parameters and the grids.
  """

  family: str
  seed: int = 0

  def draw(self, size: tuple[int, int], num_frames: int) -> list[Frames]:
    rng, family = np.random.default_rng(self.seed), GRID_FAMILIES[self.family]
    config = DataConfig(height=size[0], width=size[1], grids=GridsConfig(cell=max(min(size) // 8, 1)))
    params, rendering = family.draw(rng, (8, 8)), Rendering.from_config(config)
    a, b = (family.make(rng, (8, 8), **params) for _ in range(2))
    return [rendering.render([grid]) for grid in (a, family.apply(a, **params), b)]


def zoom(photo: Image.Image, size: tuple[int, int], num_frames: int) -> Frames:
  """Shows a photograph as large as a size permits; a video slowly approaches its centre."""
  height, width = size
  scale = min(photo.width / width, photo.height / height)
  frames = []
  for side in np.linspace(1, LAST_SIDE, num_frames):
    half = np.array([width, height]) * scale * side / 2
    left, top, right, bottom = np.concatenate([np.array(photo.size) / 2 - half, np.array(photo.size) / 2 + half])
    box = (max(left, 0.0), max(top, 0.0), min(right, photo.width), min(bottom, photo.height))
    frames.append(np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS, box=box)))
  return np.stack(frames)


EXAMPLES = (
  GridExample("colours permuted", "recolor", seed=1),
  GridExample("enclosed areas filled", "fill", seed=2),
  PhotoExample("colours swapped", "swap_channels", photo=10, query=1),
  PhotoExample("negative", "invert", photo=0, query=0),
  PhotoExample("duotone", "duotone", photo=9, query=0, seed=2),
  PhotoExample("negative of a video", "invert", photo=10, query=1, is_video=True),
  PhotoExample("greyscale", "greyscale", photo=0, query=1),
  PhotoExample("scribble", "scribble", photo=0, query=0, seed=3),
)
