"""Reads and writes clips: images, videos, folders of frames and arrays."""

import contextlib
import dataclasses
import itertools
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8
from PIL import Image, ImageOps

from univid_jax.core.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".gif", ".avi", ".m4v")
CLIP_KINDS = (
  "an image (png, jpg), a video (mp4, webm, mov, mkv, gif), a folder of frames, or a .npy of uint8 (T, H, W, 3)"
)

# The frame rate of clips that have none: Wan2.1's.
DEFAULT_FPS = 16.0

# Of any size: functions that change the size take and return the same type.
Frame = UInt8[np.ndarray, "_H _W 3"]
Frames = UInt8[np.ndarray, "_T _H _W 3"]

# NumPy parses the header of a .npy with Python's ast, which in Python 3.11 sometimes fails when several threads use it.
_HEADER_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class LoadedClip:
  """Frames, and their number per second; None if the file has no frame rate."""

  frames: Frames
  fps: float | None = None


@dataclasses.dataclass(frozen=True)
class Probe:
  """What a file contains.

  Attributes:
    num_frames: counted, not taken from the header.
    fps: frames per second; None if the file has no frame rate.
    size: height and width in pixels.
  """

  num_frames: int
  fps: float | None
  size: tuple[int, int]


def read_clip(
  path: str | os.PathLike,
  start: int = 0,
  num_frames: int | None = None,
  fps: float | None = None,
  *,
  short_side: int | None = None,
) -> LoadedClip:
  """Reads a clip of any kind.

  Args:
    path: an image, a video, a folder of frames or a .npy, see CLIP_KINDS.
    start: the first frame.
    num_frames: frames to read at most; None reads to the end.
    fps: resamples a video to this frame rate, by dropping or repeating frames; None keeps its own.
    short_side: reduces each frame so that its short side has at most this many pixels.

  Raises:
    FileNotFoundError: there is no such file.
    UserError: the file is not a clip, is broken, or has no frame at `start`; the message names it.
  """
  path = Path(path)
  if not path.exists():
    raise FileNotFoundError(f"no such clip: {path}")
  with _named_errors(path):
    if _is_video(path):
      frames, fps = _read_video(path, start, num_frames, fps, short_side)
    else:
      stop = None if num_frames is None else start + num_frames
      frames, fps = _read_still(path, slice(start, stop), short_side), None
  if not len(frames):
    raise UserError(f"no frames in {path}" + (f" from frame {start} on" if start else ""))
  if len({frame.shape for frame in frames}) > 1:
    raise UserError(f"the frames in {path} have different sizes")
  return LoadedClip(np.stack(list(frames)), fps)


def read_frames_at(path: Path, indices: Sequence[int]) -> Frames:
  """Reads certain frames of a clip of any kind.

  Raises:
    UserError: the clip cannot be read, or has fewer frames.
  """
  if _is_video(path):
    with _named_errors(path):
      return read_video_frames(path, indices)
  frames = read_clip(path).frames
  if max(indices) >= len(frames):
    raise UserError(f"{path} has only {len(frames)} frames, frame {max(indices)} is needed")
  return frames[list(indices)]


def probe(path: Path) -> Probe:
  """Inspects a file.

  Raises:
    FileNotFoundError: there is no such file.
    UserError: the file is not a clip, or is broken.
  """
  if not _is_video(path):
    frames = read_clip(path).frames
    return Probe(len(frames), None, frames.shape[1:3])
  if not path.exists():
    raise FileNotFoundError(f"no such clip: {path}")
  with _named_errors(path), _open_video(path) as (container, stream):
    count = sum(packet.pts is not None for packet in container.demux(stream))
    first = next(iterate_video(path), None)  # by the decoder, which knows the rotation
    if first is None:
      raise UserError(f"no frames in {path}")
    return Probe(count, _frame_rate(stream), (first.shape[0], first.shape[1]))


def frame_indices(start: int, count: int, *, fps: float | None, target_fps: float) -> list[int]:
  """Returns which frames of a file make a clip: consecutive ones, or the nearest in time at another rate."""
  if not target_fps or not fps:
    return list(range(start, start + count))
  return [start + _nearest_frame(i, fps, target_fps) for i in range(count)]


def count_resampled(num_frames: int, *, fps: float | None, target_fps: float) -> int:
  """Returns how many frames `num_frames` frames of a file give at another rate."""
  if not target_fps or not fps:
    return num_frames
  return int((num_frames - 1 + 0.5) * target_fps / fps - 1e-9) + 1


def iterate_video(path: str | os.PathLike, *, short_side: int | None = None) -> Iterator[Frame]:
  """Decodes a video from the start, frame by frame, rotated as its metadata says."""
  with _open_video(path) as (container, stream):
    converter = VideoReformatter()
    for frame in container.decode(stream):
      yield _to_pixels(frame, converter, short_side)


def read_video_frames(path: str | os.PathLike, indices: Sequence[int]) -> Frames:
  """Reads certain frames of a video, decoding only from the last key frame before the first of them.

  Frames are counted in the order of presentation, by the times of their packets, which needs no decoding.

  Raises:
    UserError: the video has fewer frames, or they cannot be decoded.
  """
  with _open_video(path) as (container, stream):
    times = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
    if max(indices) >= len(times):
      raise UserError(f"{path} has only {len(times)} frames, frame {max(indices)} is needed")
    wanted = {times[i] for i in indices}
    converter = VideoReformatter()
    container.seek(times[min(indices)], stream=stream, backward=True, any_frame=False)
    found = {}
    for frame in container.decode(stream):
      if frame.pts in wanted:
        found[frame.pts] = _to_pixels(frame, converter)
        if len(found) == len(wanted):
          break
  if len(found) < len(wanted):
    raise UserError(
      f"{path}: {len(wanted) - len(found)} of the frames {min(indices)} to {max(indices)} cannot be decoded"
    )
  return np.stack([found[times[i]] for i in indices])


def write_clip(path: str | os.PathLike, frames: Frames, *, fps: float | None = None) -> None:
  """Writes a single frame to an image file, or any number of frames to a video (H.264), a .gif or a .npy.

  Raises:
    UserError: the suffix is unknown, or several frames are to be written to an image.
  """
  path = Path(path)
  suffix = path.suffix.lower()
  path.parent.mkdir(parents=True, exist_ok=True)
  if suffix == ".npy":
    np.save(path, frames)
  elif suffix in IMAGE_SUFFIXES:
    if len(frames) != 1:
      raise UserError(f"{path} is an image, but there are {len(frames)} frames: use .mp4")
    Image.fromarray(frames[0]).save(path)
  elif suffix == ".gif":
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=1000 / (fps or DEFAULT_FPS), loop=0)
  elif suffix in VIDEO_SUFFIXES:
    _write_video(path, frames, fps or DEFAULT_FPS)
  else:
    raise UserError(f"cannot write {path}: use .png for an image, .mp4 for a video, or .npy")


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
  """Turns the errors of decoders into one line that names the file."""
  try:
    yield
  except (FFmpegError, Image.UnidentifiedImageError, Image.DecompressionBombError) as error:
    raise UserError(f"cannot read {path}: {error}") from error


def _is_video(path: Path) -> bool:
  return path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()


@contextlib.contextmanager
def _open_video(path: str | os.PathLike) -> Iterator[tuple[InputContainer, av.VideoStream]]:
  with av.open(str(path)) as container:
    if not container.streams.video:
      raise UserError(f"no video in {path}")
    stream = container.streams.video[0]
    # Many workers each decode one clip; threads inside a decoder cost more than they gain.
    stream.thread_type = "NONE"
    yield container, stream


def _frame_rate(stream: av.VideoStream) -> float | None:
  return float(stream.average_rate or 0) or None


def _nearest_frame(index: int, fps: float, target_fps: float) -> int:
  """Returns the frame of a file that is nearest in time to a frame at another rate."""
  return math.floor(index * fps / target_fps + 0.5)


def _read_video(
  path: Path, start: int, num_frames: int | None, fps: float | None, short_side: int | None
) -> tuple[list[Frame], float | None]:
  with _open_video(path) as (_, stream):
    own_fps = _frame_rate(stream)
  frames = itertools.islice(iterate_video(path, short_side=short_side), start, None)
  if fps and own_fps:
    frames = _resample(frames, fps=own_fps, target_fps=fps)
  return list(itertools.islice(frames, num_frames)), (fps or own_fps) if own_fps else None


def _resample(frames: Iterable[Frame], *, fps: float, target_fps: float) -> Iterator[Frame]:
  count = 0
  for index, frame in enumerate(frames):
    while _nearest_frame(count, fps, target_fps) == index:
      yield frame
      count += 1


def _read_still(path: Path, part: slice, short_side: int | None) -> Sequence[Frame] | Frames:
  """Reads part of an image, a folder of frames or a .npy."""
  suffix = path.suffix.lower()
  if path.is_dir():
    files = sorted((file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES), key=_natural_key)
    return [_read_image(file, short_side) for file in files[part]]
  if suffix in IMAGE_SUFFIXES:
    return [_read_image(path, short_side)][part]
  if suffix == ".npy":
    return _read_array(path)[part]
  raise UserError(f"not a clip: {path}; a clip is {CLIP_KINDS}")


def _to_pixels(frame: av.VideoFrame, converter: VideoReformatter, short_side: int | None = None) -> Frame:
  """Converts a frame; the converter is shared by all frames of a video, since setting it up is costly."""
  width, height = _reduced_size(frame.width, frame.height, short_side)
  pixels = converter.reformat(frame, format="rgb24", width=width, height=height, interpolation="AREA").to_ndarray()
  return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))


def _read_image(path: Path, short_side: int | None) -> Frame:
  with Image.open(path) as file:
    image = ImageOps.exif_transpose(file)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
      image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    elif image.mode.startswith("I") or image.mode == "F":
      # 16-bit grey, which PIL would clip at 255.
      image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
    image = image.convert("RGB")
    size = _reduced_size(image.width, image.height, short_side)
    return np.asarray(image if size == image.size else image.resize(size, Image.Resampling.BICUBIC))


def _read_array(path: Path) -> Frames:
  try:
    with _HEADER_LOCK:
      array = np.load(path, allow_pickle=False)
  except (ValueError, EOFError) as error:
    raise UserError(f"cannot read {path}: {error}") from error
  if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
    raise UserError(f"{path} contains {array.dtype} {array.shape}, not uint8 (T, H, W, 3)")
  return array


def _reduced_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
  if short_side is None or min(width, height) <= short_side:
    return width, height
  scale = short_side / min(width, height)
  return max(round(width * scale), 1), max(round(height * scale), 1)


def _natural_key(path: Path) -> list[int | str]:
  """Sorts frame2 before frame10."""
  return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _write_video(path: Path, frames: Frames, fps: float) -> None:
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
    stream.height, stream.width = frames.shape[1:3]
    even = stream.height % 2 == 0 and stream.width % 2 == 0
    stream.pix_fmt, stream.options = "yuv420p" if even else "yuv444p", {"crf": "12"}
    for frame in frames:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
    container.mux(stream.encode())
