"""Clips of the model's size from files: read on demand, and identified by their content so that they can be cached."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from univid_jax.config.schema import DataConfig
from univid_jax.core.errors import UserError
from univid_jax.core.options import ClipFit
from univid_jax.core.sentence import ClipRef
from univid_jax.data.video import IMAGE_SUFFIXES, Frames, frame_indices, read_clip, read_frames_at

# Part of every key: raise it when the same file would give other pixels.
READING_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipFormat:
  """The form in which the model sees clips.

  Attributes:
    size: height and width in pixels.
    num_frames: of a video, 4n + 1.
    fit: how clips are brought to the size.
    fps: frame rate that videos are resampled to; 0 keeps theirs.
    buckets: further sizes; a clip goes to the size nearest to its aspect ratio.
    resample: filter; NEAREST for labels, depth and normals, whose values must not be mixed.
  """

  size: tuple[int, int]
  num_frames: int
  fit: ClipFit = ClipFit.CROP
  fps: float = 0.0
  buckets: tuple[tuple[int, int], ...] = ()
  resample: Image.Resampling = Image.Resampling.BICUBIC

  @classmethod
  def of(cls, config: DataConfig) -> "ClipFormat":
    size, *buckets = config.sizes
    return cls(size=size, num_frames=config.num_frames, fit=config.fit, fps=config.fps, buckets=tuple(buckets))

  def for_shape(self, shape: tuple[int, int]) -> "ClipFormat":
    """Returns the format with a single size: the one nearest to the aspect ratio of a file of (height, width)."""

    def distance(size: tuple[int, int]) -> float:
      return abs(np.log(size[0] / size[1]) - np.log(shape[0] / shape[1]))

    return dataclasses.replace(self, size=min((self.size, *self.buckets), key=distance), buckets=())

  def resize(self, frames: Frames) -> Frames:
    """Brings frames of any size to the format's."""
    resize = resize_and_crop if self.fit == ClipFit.CROP else resize_and_pad
    return resize(frames, self.size, resample=self.resample)


def resize_and_crop(
  frames: Frames, size: tuple[int, int], *, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Frames:
  """Resizes frames, keeping their aspect ratio, until they cover (height, width), and crops the centre."""
  height, width = size
  if frames.shape[1:3] == (height, width):
    return frames
  scale = max(height / frames.shape[1], width / frames.shape[2])
  # Rounding may exceed the frame.
  box_height, box_width = min(height / scale, frames.shape[1]), min(width / scale, frames.shape[2])
  top, left = (frames.shape[1] - box_height) / 2, (frames.shape[2] - box_width) / 2
  box = (left, top, left + box_width, top + box_height)
  return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), resample, box=box)) for frame in frames])


def resize_and_pad(
  frames: Frames, size: tuple[int, int], *, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Frames:
  """Resizes frames, keeping their aspect ratio, until they fit into (height, width), and adds black bars."""
  height, width = size
  scale = min(height / frames.shape[1], width / frames.shape[2])
  inner = max(round(frames.shape[1] * scale), 1), max(round(frames.shape[2] * scale), 1)
  top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
  out = np.zeros((len(frames), height, width, 3), np.uint8)
  out[:, top : top + inner[0], left : left + inner[1]] = resize_and_crop(frames, inner, resample=resample)
  return out


def file_clip(path: Path, *, start: int, count: int, form: ClipFormat, fps: float | None = None) -> ClipRef:
  """Returns a clip of `count` frames of a file.

  Args:
    path: an image, a video, a folder of frames or a .npy.
    start: the first frame.
    count: frames of the clip.
    form: size, fit and frame rate.
    fps: frame rate of the file.
  """
  indices = frame_indices(start, count, fps=fps, target_fps=form.fps)
  read = functools.partial(_read_at, path, indices, form)
  return ClipRef(_content_key(form, file_hash(path), indices), read, count)


def array_clip(key: str, read: Callable[[], Frames], count: int, form: ClipFormat) -> ClipRef:
  """Returns a clip of `count` frames from any other origin.

  Args:
    key: identifies the frames.
    read: returns them, of any size.
    count: frames of the clip.
    form: size and fit.
  """
  return ClipRef(_content_key(form, key), lambda: form.resize(read()), count)


def read_context(
  paths: Sequence[str | os.PathLike],
  *,
  num_frames: int,
  size: tuple[int, int],
  videos: Sequence[bool] | None = None,
  fit: ClipFit = ClipFit.CROP,
  fps: float = 0.0,
) -> tuple[list[Frames], float | None]:
  """Reads files as the context of a sentence: the first 4n + 1 frames of each, at one size.

  Args:
    paths: of the clips, in order.
    num_frames: of a video, at most.
    size: height and width in pixels.
    videos: which clips are to be videos, the others being first frames; None takes the files as they are.
    fit: how clips are brought to the size.
    fps: frame rate that videos are resampled to; 0 keeps theirs.

  Returns:
    The clips, uint8 (T, *size, 3), and the frame rate of the last; if that has none, of the first that has one.

  Raises:
    UserError: a file is not a clip, or is too short where a video is wanted.
  """
  form = ClipFormat(size=size, num_frames=num_frames, fit=fit, fps=fps)
  clips, rates = [], []
  for index, path in enumerate(paths):
    is_video = None if videos is None else videos[index]
    clip = read_clip(path, num_frames=1 if is_video is False else num_frames, fps=fps or None)
    if is_video and len(clip.frames) < num_frames:
      raise UserError(f"{path} has {len(clip.frames)} frames, and {num_frames} are needed here")
    usable = 4 * ((len(clip.frames) - 1) // 4) + 1
    clips.append(form.resize(clip.frames[:usable]))
    rates.append(clip.fps)
  return clips, rates[-1] or next(filter(None, rates), None)


def file_hash(path: Path) -> str:
  """Returns the SHA-256 of a file's content, or of the images in a folder."""
  if path.is_dir():
    parts = [file_hash(part) for part in sorted(path.iterdir()) if part.suffix.lower() in IMAGE_SUFFIXES]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
  status = path.stat()
  return _hash_content(str(path.resolve()), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=65536)
def _hash_content(path: str, size: int, modified: int) -> str:
  """Hashes a file; its size and time of modification are arguments so that a changed file is hashed again."""
  del size, modified
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _content_key(form: ClipFormat, *content: object) -> str:
  words = (READING_VERSION, *content, form.size, form.fit.value, form.resample.name.lower())
  return hashlib.sha256(repr(words).encode()).hexdigest()


def _read_at(path: Path, indices: Sequence[int], form: ClipFormat) -> Frames:
  return form.resize(read_frames_at(path, indices))
