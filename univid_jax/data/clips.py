"""Clips as the model sees them: cut, resampled and resized the same way for training, sampling and evaluation.

One thing differs: sampling does not know what clips represent, and resizes all of them as images. Clips are read on
demand, and identified by their content so that they can be cached.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from univid_jax.config.schema import DataConfig
from univid_jax.core.checks import require_list
from univid_jax.core.dims import floor_clip_length
from univid_jax.core.errors import UserError
from univid_jax.core.options import ClipFit, Resampling
from univid_jax.core.sentence import ClipRef
from univid_jax.core.text import count_noun, size_text
from univid_jax.data.identities import WatchedFile
from univid_jax.data.media.reader import ClipInfo, Frames, probe, read_parts, shows_transparency
from univid_jax.data.media.schedule import Schedule
from univid_jax.data.resizing import resize_and_crop, resize_and_pad

# Part of every key: raise it when the same file would give other pixels.
READING_VERSION = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipFormat:
  """The form in which the model sees clips.

  Attributes:
    size: height and width in pixels.
    num_frames: of a video, 4n + 1.
    fit: how clips are brought to the size.
    fps: frame rate that videos are resampled to; 0 keeps theirs.
    buckets: further sizes; a clip goes to the size nearest to its aspect ratio.
    resample: how pixels of another size come about.
    extend: whether clips are not resized but extended to the size, at the bottom and right, by repeating their edges.
  """

  size: tuple[int, int]
  num_frames: int
  fit: ClipFit = ClipFit.CROP
  fps: float = 0.0
  buckets: tuple[tuple[int, int], ...] = ()
  resample: Resampling = Resampling.BICUBIC
  extend: bool = False

  @classmethod
  def from_config(cls, config: DataConfig) -> "ClipFormat":
    size, *buckets = config.sizes
    return cls(size=size, num_frames=config.num_frames, fit=config.fit, fps=config.fps, buckets=tuple(buckets))

  def for_shape(self, shape: tuple[int, int]) -> "ClipFormat":
    """Returns the format with a single size: the one nearest to the aspect ratio of a file of (height, width)."""

    def distance(size: tuple[int, int]) -> float:
      return abs(np.log(size[0] / size[1]) - np.log(shape[0] / shape[1]))

    return dataclasses.replace(self, size=min((self.size, *self.buckets), key=distance), buckets=())

  def resize(self, frames: Frames) -> Frames:
    """Brings frames of any size to the format's."""
    if self.extend:
      missing = [(0, length - given) for length, given in zip(self.size, frames.shape[1:3])]
      return np.pad(frames, [(0, 0), *missing, (0, 0)], mode="edge")
    resize = resize_and_crop if self.fit == ClipFit.CROP else resize_and_pad
    return resize(frames, self.size, resample=self.resample)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footage:
  """What clips are taken from: a file from some frame on, or frames of another origin.

  Attributes:
    name: for messages.
    size: height and width in pixels, before they are brought to the format's.
    fps: frame rate of the file; None for images, folders and arrays.
    clip_fps: frame rate of clips, see `read_clip`.
    is_resampled: whether frames may be repeated or left out.
    num_frames: how many frames a clip can have, at the format's rate.
    form: of the clips, with one size.
    identify: returns a key of the content.
    read: returns the first n frames, before they are resized.
    start: number of the first frame in the file, at the format's rate.
    first: number of the same frame at the file's own rate, with which time begins; None if it begins with the file.
    require_unchanged: raises UserError if the content is no longer that which was opened.
    path: of the file; None for frames of another origin.
  """

  name: str
  size: tuple[int, int]
  num_frames: int
  form: ClipFormat
  identify: Callable[[], str]
  read: Callable[[int], Frames]
  start: int = 0
  first: int | None = None
  require_unchanged: Callable[[], None] = lambda: None
  path: Path | None = None
  fps: float | None = None
  clip_fps: float | None = None
  is_resampled: bool = False

  def clip(self, num_frames: int) -> ClipRef:
    """Returns a clip of the first frames."""
    identify, read = functools.partial(self._identify, num_frames), functools.partial(self._read, num_frames)
    return ClipRef(identify, read, num_frames, self.form.size)

  def _identify(self, num_frames: int) -> str:
    form, span = self.form, (self.start, num_frames, self.form.fps if self.is_resampled else 0.0)
    if self.has_own_time:  # in earlier versions time began with the file
      span = ("from its first frame", self.first, *span[1:])
    fit = "extend" if form.extend else form.fit.value
    words = (READING_VERSION, self.identify(), span, form.size, fit, form.resample.value)
    return hashlib.sha256(repr(words).encode()).hexdigest()

  @property
  def has_own_time(self) -> bool:
    """Whether frames are resampled with a time that does not begin with the file."""
    return self.is_resampled and bool(self.first)

  def span(self, num_frames: int) -> tuple[int, int, int]:
    """Returns the span of the first frames, see `read_parts`."""
    return (0, self.start, num_frames) if self.first is None else (self.first, 0, num_frames)

  def _read(self, num_frames: int) -> Frames:
    frames = self.read(num_frames)
    self.require_unchanged()
    return self.form.resize(frames)

  def describe_changes(self, num_frames: int) -> list[str]:
    """Describes, with numbers, everything that makes a clip of `num_frames` frames differ from the file."""
    changes = []
    if num_frames < self.num_frames:
      last = self.start + num_frames - 1
      shown = f"frames {self.start} to {last}" if num_frames > 1 else f"frame {self.start}"
      changes.append(f"{shown} of {self.start + self.num_frames}")
    if self.fps and self.is_resampled:
      changes.append(f"{self._describe_rate()} resampled to {self.clip_fps:.5g} frames per second")
    if self.size != self.form.size:
      changes.append(self._describe_resizing())
    return changes

  def _describe_rate(self) -> str:
    varies = self.fps and self.clip_fps and round(self.fps, 2) == round(self.clip_fps, 2)
    return "a varying rate" if varies else f"{self.fps:.5g}"

  def _describe_resizing(self) -> str:
    (height, width), (to_height, to_width) = self.size, self.form.size
    shown, to = size_text(self.size), f"{size_text(self.form.size)} (width x height)"
    if self.form.extend:
      return f"{shown} extended to {to}"
    stretch = (height / width) / (to_height / to_width)
    lost = round(100 * (1 - min(stretch, 1 / stretch)))
    how = "cropped" if self.form.fit == ClipFit.CROP else "padded with black"
    return f"{shown} resized to {to}" + (f", {lost} % {how}" if lost else "")


def open_footage(path: Path, form: ClipFormat, *, start: int = 0, has_own_time: bool = False) -> Footage:
  """Opens a file from a frame on, counted at the format's rate; clips have its size nearest to the file's shape.

  Args:
    path: the file.
    form: format of the clips.
    start: the first frame.
    has_own_time: whether the time of clips begins with that frame, so that they are aligned with others of the same
      file, instead of with the file.

  Raises:
    FileNotFoundError: there is no such file.
    UserError: it is not a clip, or has no frame at `start`.
  """
  found = probe(path)
  count, schedule = found.count_at(form.fps), found.schedule
  if not 0 <= start < count:
    raise UserError(f"{path} has {count_noun(count, 'frame')} and cannot start at frame {start}")
  if not has_own_time:
    return file_footage(path, found, form, start=start, num_frames=count - start)
  first = int(schedule.select(start, 1, form.fps)[0])
  _, num_frames = schedule.part_at(first, found.num_frames, form.fps)
  return file_footage(path, found, form, start=start, first=first, num_frames=num_frames)


def resampling_to(schedule: Schedule, fps: float) -> dict[str, Any]:
  """Returns the arguments of `Footage` that say how a file is read at a frame rate."""
  read_at, is_resampled = schedule.rate_at(fps), not schedule.shows_all_at(fps)
  return {"fps": schedule.fps, "clip_fps": read_at, "is_resampled": is_resampled}


def file_footage(
  path: Path, found: ClipInfo, form: ClipFormat, *, num_frames: int, start: int = 0, first: int | None = None
) -> Footage:
  """Returns part of a file that was probed already, see `Footage`."""
  file = WatchedFile(path)
  footage = Footage(
    name=str(path),
    size=found.size,
    **resampling_to(found.schedule, form.fps),
    num_frames=num_frames,
    form=form.for_shape(found.size),
    identify=file.identify,
    read=lambda count: read_parts(path, [footage.span(count)], fps=form.fps or None)[0],
    start=start,
    first=first,
    require_unchanged=file.require_unchanged,
    path=path,
  )
  return footage


@dataclasses.dataclass(frozen=True)
class ContextClip:
  """A clip of the context of a sentence to sample.

  Attributes:
    path: of its file.
    frames: as the model sees them.
    fps: frame rate; None for images, folders and arrays.
    sha256: of the file.
    changes: see `Footage.describe_changes`.
  """

  path: str
  frames: Frames
  fps: float | None
  sha256: str
  changes: tuple[str, ...]

  def describe(self) -> dict[str, Any]:
    """Returns what the record of a result says of the clip."""
    return {"path": self.path, "sha256": self.sha256, "num_frames": len(self.frames), "changes": self.changes}


def read_context(
  paths: Iterable[str | os.PathLike],
  form: ClipFormat,
  *,
  videos: Sequence[bool] | None = None,
  extend_query: bool = False,
) -> list[ContextClip]:
  """Reads files as the context of a sentence, as training reads images: the first 4n + 1 frames of each, at one size.

  Resizing mixes values, also those of A' that are depth, normals or labels, which training keeps apart
  (`config.data.kinds`): nothing says what clips represent. Files of the format's size are not resized.

  Args:
    paths: of the clips, in order; the last is the query, whose shape decides between the format's sizes.
    form: of the clips; `num_frames` is of a video, at most.
    videos: which clips are to be videos, the others being first frames; None takes the files as they are.
    extend_query: whether the last clip is not resized, see `ClipFormat`.

  Raises:
    OSError, UserError: there are no paths, a file is not a clip, or is too short where a video is wanted.
  """
  paths = require_list("paths", paths, "paths of clips")
  if not paths:
    raise UserError("paths must be those of one or more clips, got none")
  found = [probe(path) for path in paths]
  form = form.for_shape(found[-1].size)
  clips = []
  for index, (path, info) in enumerate(zip(map(Path, paths), found)):
    own = dataclasses.replace(form, extend=extend_query and index == len(paths) - 1)
    footage = file_footage(path, info, own, num_frames=info.count_at(form.fps))
    is_video = videos[index] if videos else None
    if is_video and footage.num_frames < form.num_frames:
      raise UserError(f"{path} has {count_noun(footage.num_frames, 'frame')}, and {form.num_frames} are needed here")
    count = 1 if is_video is False else _context_length(info, form)
    clip = footage.clip(count)
    changes = [
      *footage.describe_changes(count),
      *(["transparent pixels are white"] if shows_transparency(path) else []),
    ]
    clips.append(ContextClip(str(path), clip.read(), footage.clip_fps, footage.identify(), tuple(changes)))
  return clips


def context_shape(path: str | os.PathLike, form: ClipFormat) -> tuple[int, int, int]:
  """Returns frames, height and width of a file as the query of a context, before it is read; see `read_context`."""
  info = probe(path)
  return _context_length(info, form), *form.for_shape(info.size).size


def _context_length(info: ClipInfo, form: ClipFormat) -> int:
  return floor_clip_length(min(info.count_at(form.fps), form.num_frames))


def frame_rate(clips: Sequence[ContextClip]) -> float | None:
  """Returns the frame rate of the last clip; if that has none, of the first that has one."""
  return clips[-1].fps or next((clip.fps for clip in clips if clip.fps), None)
