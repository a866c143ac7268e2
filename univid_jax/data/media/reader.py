"""Reads clips: the only way from a file to frames."""

import contextlib
import dataclasses
import enum
import math
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from av.error import FFmpegError
from jaxtyping import Int, UInt8

from univid_jax.core.errors import UserError
from univid_jax.core.paths import is_lfs_pointer, require_local
from univid_jax.core.text import describe_value, size_text
from univid_jax.data.media.color import Frame
from univid_jax.data.media.content import describe_content
from univid_jax.data.media.images import is_transparent, read_animation, read_image_frames
from univid_jax.data.media.schedule import Schedule
from univid_jax.data.media.timeline import read_timeline, scan_timeline
from univid_jax.data.media.video_frames import read_video_frames

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".tif", ".tiff")
ANIMATION_SUFFIXES = (".gif", ".webp", ".png", ".apng", ".avif")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v", ".gif", ".apng")
CLIP_SUFFIXES = (*dict.fromkeys((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, *ANIMATION_SUFFIXES)), ".npy")
CLIP_KINDS = (
  "an image (png, jpg, webp, avif, bmp, tiff), a video (mp4, webm, mov, mkv, avi, gif, animated webp, png or avif), "
  "a folder of frames, or a .npy of uint8 (T, H, W, 3)"
)

# The frame rate of clips that have none: Wan2.1's.
DEFAULT_FPS = 16.0

# Files that operating systems and tools leave in folders. All hidden files are foreign, too.
FOREIGN_NAMES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "__macosx", "$recycle.bin", "lost+found")

# NumPy parses the header of a .npy with Python's ast, which in Python 3.11 sometimes fails when several threads use it.
_HEADER_LOCK = threading.Lock()

# The lengths and sizes of clips are not checked against each other.
Frames = UInt8[np.ndarray, "_T _H _W 3"]


class _Kind(enum.Enum):
  """What a clip is read from; an image may be animated."""

  FOLDER = enum.auto()
  ARRAY = enum.auto()
  IMAGE = enum.auto()
  VIDEO = enum.auto()


@dataclasses.dataclass(frozen=True)
class LoadedClip:
  """Frames, and their rate per second; None if the file has none."""

  frames: Frames
  fps: float | None = None


@dataclasses.dataclass(frozen=True)
class ClipInfo:
  """What a file shows.

  Attributes:
    size: height and width in pixels.
    schedule: when its frames are shown.
  """

  size: tuple[int, int]
  schedule: Schedule = dataclasses.field(repr=False)

  @property
  def num_frames(self) -> int:
    """Number of frames that are shown, whatever a header says, except those that an edit list hides."""
    return len(self.schedule.times)

  @property
  def fps(self) -> float | None:
    """Mean frame rate; None for images, folders and arrays."""
    return self.schedule.fps

  @property
  def duration(self) -> float | None:
    """Duration in seconds; None without a frame rate."""
    return self.schedule.duration

  def count_at(self, fps: float | None) -> int:
    """Returns how many frames `read_clip` reads at a frame rate; None and 0 mean the file's own."""
    return self.schedule.count_at(fps)


def is_foreign(path: str | os.PathLike) -> bool:
  """Returns whether a file or folder is not the user's: hidden, or left by an operating system or tool (`._a.mp4`)."""
  name = os.path.basename(os.fspath(path))
  return name.startswith(".") or name.lower() in FOREIGN_NAMES


def read_clip(
  path: str | os.PathLike, start: int = 0, num_frames: int | None = None, fps: float | None = None
) -> LoadedClip:
  """Reads a clip of any kind, as a player shows it.

  Args:
    path: an image, a video, a folder of frames in natural order, or a .npy; see CLIP_KINDS.
    start: the first frame, counted at `fps` if that is given.
    num_frames: length of the clip; None reads to the end, which is the beginning of the last frame.
    fps: frame rate: frame n is the one shown (start + n) / fps seconds after the first; None keeps each frame once. A
      clip's own rate that is within 0.2 % of fps, or of a multiple or fraction of it, is kept, or divided by a whole
      number: 23.976 for 24, 29.97 of 59.94 for 30; unless it varies so much that a frame may be missing. Folders,
      arrays and images have no times, and ignore fps.

  Raises:
    FileNotFoundError: there is no such file.
    UserError: the file is not a clip or has too few frames, or one of those asked for is damaged; the message names it.
  """
  path = _clip_path(path)
  if start < 0 or (num_frames is not None and num_frames < 1) or (fps is not None and not 0 < fps < math.inf):
    raise UserError(f"start must be at least 0, num_frames and fps positive: got {start}, {num_frames} and {fps}")
  return _read(path, start, num_frames, fps)


def _read(path: Path, start: int, num_frames: int | None, fps: float | None, *, first: int = 0) -> LoadedClip:
  """Reads a clip as `read_clip` does, from the frame `first` of the file on."""
  with _named_errors(path):
    match _find_kind(path):
      case _Kind.FOLDER:
        files = list_frames(path)
        indices = Schedule.untimed(len(files)).select(start, num_frames, fps, first=first)
        return LoadedClip(_stack([read_image_frames(files[index], [0])[0] for index in indices]))
      case _Kind.ARRAY:
        array = _map_array(path)
        indices = Schedule.untimed(len(array)).select(start, num_frames, fps, first=first)
        return LoadedClip(np.array(array[indices[0] : indices[-1] + 1]))
      case _Kind.IMAGE:
        schedule = read_animation(path).schedule
        frames = _stack(read_image_frames(path, schedule.select(start, num_frames, fps, first=first).tolist()))
        return LoadedClip(frames, schedule.rate_at(fps))
      case _Kind.VIDEO:
        return _read_video(path, start, num_frames, fps, first=first)
      case None:
        raise UserError(f"it is not a clip: a clip is {CLIP_KINDS}")


def read_parts(
  path: str | os.PathLike, spans: Sequence[tuple[int, int, int]], *, fps: float | None = None
) -> list[Frames]:
  """Reads several parts of a clip, which for a video is faster than reading each alone; parts may share memory.

  Args:
    path: see `read_clip`.
    spans: of each part, the frame of the file with which its time begins, and `start` and `num_frames` counted from
      there. With `start` 0, frame n is the one shown n / fps seconds after the part's first, so that parts of equal
      length are aligned wherever they begin.
    fps: see `read_clip`.

  Raises:
    FileNotFoundError, UserError: see `read_clip`.
  """
  path = _clip_path(path)
  if len(spans) == 1 or _find_kind(path) != _Kind.VIDEO:
    return [_read(path, start, count, fps, first=first).frames for first, start, count in spans]
  with _named_errors(path):
    timeline = scan_timeline(path)
    assert timeline.schedule is not None
    parts = [timeline.schedule.select(start, count, fps, first=first) for first, start, count in spans]
    indices = np.unique(np.concatenate(parts))
    frames = read_video_frames(path, timeline, indices)
    return [_take(frames, np.searchsorted(indices, part)) for part in parts]


def _take(frames: Frames, positions: Int[np.ndarray, "n"]) -> Frames:
  """Returns frames at increasing positions, without a copy if they are contiguous."""
  begin, end = int(positions[0]), int(positions[-1]) + 1
  return frames[begin:end] if (np.diff(positions) == 1).all() else frames[positions]


def probe(path: str | os.PathLike) -> ClipInfo:
  """Inspects a file; decodes only its first frames, unless frames can only be counted by decoding.

  Raises:
    FileNotFoundError: there is no such file.
    UserError: the file is not a clip, is truncated, or its first frame cannot be decoded; the message names it.
  """
  path = _clip_path(path)
  with _named_errors(path):
    match _find_kind(path):
      case _Kind.FOLDER:
        files = list_frames(path)
        return ClipInfo(read_animation(files[0]).size, Schedule.untimed(len(files)))
      case _Kind.ARRAY:
        array = _map_array(path)
        return ClipInfo((array.shape[1], array.shape[2]), Schedule.untimed(len(array)))
      case _Kind.IMAGE:
        animation = read_animation(path)
        return ClipInfo(animation.size, animation.schedule)
      case _Kind.VIDEO:
        timeline = scan_timeline(path)
        if timeline.defect or timeline.schedule is None:
          raise UserError(timeline.defect or "its frames cannot be counted")
        return ClipInfo(timeline.size, timeline.schedule)
      case None:
        raise UserError(f"it is not a clip: a clip is {CLIP_KINDS}")


def shows_transparency(path: str | os.PathLike) -> bool:
  """Returns whether an image file has transparent pixels, which `read_clip` shows over white; False for other clips."""
  path = _clip_path(path)
  with _named_errors(path):
    return _find_kind(path) == _Kind.IMAGE and is_transparent(path)


def _find_kind(path: Path) -> _Kind | None:
  """Returns the kind of a clip, as its suffix says; None if it is none."""
  suffix = path.suffix.lower()
  if path.is_dir():
    return _Kind.FOLDER
  if suffix == ".npy":
    return _Kind.ARRAY
  if suffix in ANIMATION_SUFFIXES or suffix in IMAGE_SUFFIXES:
    return _Kind.IMAGE
  return _Kind.VIDEO if suffix in VIDEO_SUFFIXES else None


def list_frames(folder: Path) -> list[Path]:
  """Returns the images of a folder of frames in natural order.

  Raises:
    UserError: there are none, or one is a link to a file that does not exist.
  """
  with os.scandir(folder) as entries:  # knows links without a system call for each
    found = {folder / entry.name: entry.is_symlink() for entry in entries}
  files = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES and not is_foreign(file)]
  if not files:
    raise UserError("no images in the folder")
  if broken := [file.name for file in files if found[file] and not file.exists()]:
    raise UserError(f"{min(broken)} is a link to a file that does not exist")
  return sorted(files, key=_natural_key)


def _clip_path(path: str | os.PathLike) -> Path:
  if not isinstance(path, str | os.PathLike):
    raise UserError(f"a clip is read from a path, got {describe_value(path)}")
  if not os.fspath(path):
    raise UserError("a clip needs a name, got an empty one")  # Path("") is the current folder
  path = require_local(path)
  if path.is_file() and not path.stat().st_size:
    raise UserError(f"cannot read {path}: the file is empty")
  return path


def require_clip(path: str | os.PathLike) -> Path:
  """Returns the path of an existing file or folder.

  Raises:
    FileNotFoundError: it does not exist.
    UserError: the path is empty, or in a bucket.
  """
  path = _clip_path(path)
  if not path.exists():
    raise FileNotFoundError(f"no such clip: {path}")
  return path


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
  """Adds the name of the file to errors; refuses what is neither a file nor a folder."""
  require_clip(path)
  if not path.is_file() and not path.is_dir():  # reading a pipe waits for its writer
    raise UserError(f"cannot read {path}: it is neither a file nor a folder")
  if is_lfs_pointer(path):
    raise UserError(f"cannot read {path}: it is not downloaded: run git lfs pull in its repository")
  try:
    yield
  except UserError as error:
    raise UserError(f"cannot read {path}: {error}") from error
  except FFmpegError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error


def _read_video(path: Path, start: int, num_frames: int | None, fps: float | None, *, first: int) -> LoadedClip:
  timeline, rate = read_timeline(path), None
  if timeline.schedule is None and num_frames is not None and fps is None:
    # No need to count all frames: reading notices where they end.
    indices, rate = first + np.arange(start, start + num_frames), timeline.fps
  else:
    timeline = scan_timeline(path)
    assert timeline.schedule is not None
    indices = timeline.schedule.select(start, num_frames, fps, first=first)
    rate = timeline.fps and timeline.schedule.rate_at(fps)
  if num_frames is None and timeline.defect:
    raise UserError(timeline.defect)
  frames = read_video_frames(path, timeline, indices)
  return LoadedClip(frames, rate)


def _natural_key(path: Path) -> list[int | str]:
  """Returns a sorting key that puts frame2 before frame10."""
  return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def _map_array(path: Path) -> Frames:
  """Maps a .npy into memory, so that only the parts that are read take memory.

  Raises:
    UserError: it holds something other than frames.
  """
  try:
    with _HEADER_LOCK:
      array = np.load(path, mmap_mode="r", allow_pickle=False)
  except OSError:
    raise
  except Exception as error:  # damaged headers are parsed as Python, which raises all kinds of errors
    raise UserError(describe_content(path) or f"not an intact .npy ({error})") from error
  if not isinstance(array, np.ndarray):
    array.close()
    raise UserError("it is an .npz, an archive of arrays; save one array with np.save")
  if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not array.size:
    raise UserError(f"it contains {array.dtype} {array.shape}, not uint8 (T, H, W, 3)")
  return array


def _stack(frames: Sequence[Frame]) -> Frames:
  """Stacks frames.

  Raises:
    UserError: they have different sizes.
  """
  shapes = {frame.shape for frame in frames}
  if len(shapes) > 1:
    sizes = ", ".join(size_text(shape[:2]) for shape in sorted(shapes))
    raise UserError(f"its frames have different sizes: {sizes} (width x height)")
  return np.stack(frames)
