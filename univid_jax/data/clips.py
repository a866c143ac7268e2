"""Clips that are read when they are needed: what they are made from is known before, so that their latents can be kept."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from univid_jax.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, fit_clip, iterate_video, read_clip, read_video_frames

# Part of every key: to be raised whenever the same file would give other pixels.
READING_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ClipRef:
  """A clip to be read.

  Attributes:
    key: names its content: what it is made from and how, and nothing else (no path, no date).
    read: gives its frames, uint8 (T, H, W, 3).
  """

  key: str
  read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipFormat:
  """What clips look like to the model.

  Attributes:
    size: height and width in pixels.
    num_frames: of a video, 4n + 1.
    fit: "crop" cuts the middle out of the resized frames, "pad" keeps all of them between black bars.
    fps: frames a second that videos are thinned (or held) to; 0 leaves them as they are.
    buckets: other sizes; a clip goes to the size whose shape is nearest to its own.
    resample: "bicubic", or "nearest" for labels, depth and normals, whose values must not mix.
  """

  size: tuple[int, int]
  num_frames: int
  fit: str = "crop"
  fps: float = 0.0
  buckets: tuple[tuple[int, int], ...] = ()
  resample: str = "bicubic"

  def for_shape(self, shape: tuple[int, int]) -> "ClipFormat":
    """The format of clips whose files have a shape (height, width): one size of those there are."""
    def distance(size):
      return abs(np.log(size[0] / size[1]) - np.log(shape[0] / shape[1]))
    return dataclasses.replace(self, size=min((self.size, *self.buckets), key=distance), buckets=())

  def __post_init__(self):
    if self.fit not in ("crop", "pad"):
      raise ValueError(f"clips are fitted by crop or pad, got {self.fit!r}")
    if self.num_frames % 4 != 1:
      below = (self.num_frames - 1) // 4 * 4 + 1
      raise ValueError(f"videos have 4n + 1 frames, got {self.num_frames}; the nearest are {max(below, 1)} and {below + 4}")


@functools.lru_cache(maxsize=65536)
def _file_hash(path: str, size: int, modified: int) -> str:
  del size, modified
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: Path) -> str:
  """SHA-256 of a file's content (of all files' in a folder of frames)."""
  if path.is_dir():
    parts = [file_hash(part) for part in sorted(path.iterdir()) if part.suffix.lower() in IMAGE_SUFFIXES]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
  status = path.stat()
  return _file_hash(str(path.resolve()), status.st_size, status.st_mtime_ns)


@dataclasses.dataclass(frozen=True)
class Probe:
  """What a clip's file holds: frames, by counting and not by its header; frames a second, or None; height and width."""

  frames: int
  fps: float | None
  size: tuple[int, int]


def probe(path: Path) -> Probe:
  """Looks into a clip's file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no clip, or broken.
  """
  if path.suffix.lower() not in VIDEO_SUFFIXES:
    frames = read_clip(path).frames
    return Probe(len(frames), None, frames.shape[1:3])
  if not path.exists():
    raise FileNotFoundError(f"no such clip: {path}")
  try:
    with av.open(str(path)) as container:
      if not container.streams.video:
        raise ValueError(f"no video in {path}")
      stream = container.streams.video[0]
      count = sum(packet.pts is not None for packet in container.demux(stream))
      first = next(iterate_video(path))  # the decoder takes it
      return Probe(count, float(stream.average_rate or 0) or None, first.shape[:2])
  except (av.FFmpegError, StopIteration) as error:
    raise ValueError(f"cannot read {path}: {error}") from error


def frame_indices(start: int, count: int, *, fps: float | None, target_fps: float) -> np.ndarray:
  """The frames of a file that make a clip of so many: one after another, or the nearest in time at another rate."""
  if not target_fps or not fps:
    return start + np.arange(count)
  return start + np.floor(np.arange(count) * fps / target_fps + 0.5).astype(int)


def available(num_frames: int, *, fps: float | None, target_fps: float) -> int:
  """Frames that a file of `num_frames` gives at another rate."""
  if not target_fps or not fps:
    return num_frames
  return int((num_frames - 1 + 0.5) * target_fps / fps - 1e-9) + 1


def file_clip(path: Path, *, start: int, count: int, form: ClipFormat, fps: float | None = None) -> ClipRef:
  """Some frames of a file as a clip.

  Args:
    path: an image, a video, a folder of frames or a .npy.
    start: first frame.
    count: frames of the clip.
    form: size, fit and rate.
    fps: of the file.
  """
  indices = frame_indices(start, count, fps=fps, target_fps=form.fps)
  words = (READING_VERSION, file_hash(path), list(map(int, indices)), form.size, form.fit, form.resample)
  return ClipRef(hashlib.sha256(repr(words).encode()).hexdigest(), functools.partial(_read, path, tuple(indices), form))


def _read(path: Path, indices: tuple[int, ...], form: ClipFormat) -> np.ndarray:
  if path.suffix.lower() in VIDEO_SUFFIXES:
    try:
      return fit(read_video_frames(path, indices), form)
    except av.FFmpegError as error:
      raise ValueError(f"cannot read {path}: {error}") from error
  frames = read_clip(path).frames
  if max(indices) >= len(frames):
    raise ValueError(f"{path} has only {len(frames)} frames, frame {max(indices)} is needed")
  return fit(frames[list(indices)], form)


def fit(frames: np.ndarray, form: ClipFormat) -> np.ndarray:
  """Frames of any size at the size of a format."""
  if form.fit == "crop":
    return fit_clip(frames, form.size, resample=form.resample)
  height, width = form.size
  scale = min(height / frames.shape[1], width / frames.shape[2])
  inner = max(round(frames.shape[1] * scale), 1), max(round(frames.shape[2] * scale), 1)
  top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
  out = np.zeros((len(frames), height, width, 3), np.uint8)
  out[:, top:top + inner[0], left:left + inner[1]] = fit_clip(frames, inner, resample=form.resample)
  return out


def array_clip(key: str, read: Callable[[], np.ndarray], form: ClipFormat) -> ClipRef:
  """A clip from anything else: `read` gives uint8 frames of any size, `key` names what they are."""
  words = (READING_VERSION, key, form.size, form.fit, form.resample)
  return ClipRef(hashlib.sha256(repr(words).encode()).hexdigest(), lambda: fit(read(), form))


def natural_path(root: str | os.PathLike, name: str, *, folders: tuple[str, ...] = ("",)) -> Path:
  """A file by the name that a table gives it, in one of several folders.

  Raises:
    FileNotFoundError: none of them has it.
  """
  for folder in folders:
    path = Path(root) / folder / name
    if path.exists():
      return path
  raise FileNotFoundError(f"no such file: {Path(root) / name}")
