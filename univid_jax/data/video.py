"""Reading clips: images, videos, folders of frames and arrays; and writing what was painted."""

import dataclasses
import os
import re
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".gif", ".avi", ".m4v")
CLIP_KINDS = "an image (png, jpg), a video (mp4, webm, mov, mkv, gif), a folder of frames, or a .npy of uint8 (T, H, W, 3)"

# The frame rate of clips that have none of their own; Wan2.1's.
DEFAULT_FPS = 16.0

# NumPy reads the header of a .npy with Python's ast, which in Python 3.11 fails now and then when threads use it at once.
_HEADERS = threading.Lock()


@dataclasses.dataclass(frozen=True)
class LoadedClip:
  """Frames as they stand in a file: uint8 (T, H, W, 3), and frames a second (None where the file does not say)."""

  frames: np.ndarray
  fps: float | None = None


def read_clip(path: str | os.PathLike, *, max_frames: int | None = None, short_side: int | None = None) -> LoadedClip:
  """Reads a clip of any kind.

  Args:
    path: see CLIP_KINDS.
    max_frames: stop after so many.
    short_side: shrink each frame while reading, so that its short side has at most so many pixels.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not a clip, is broken, or holds no picture; the message names it.
  """
  path = Path(path)
  if not path.exists():
    raise FileNotFoundError(f"no such clip: {path}")
  suffix = path.suffix.lower()
  try:
    if path.is_dir():
      files = sorted((p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES), key=_natural_key)
      frames, fps = [_read_image(p, short_side) for p in files[:max_frames]], None
    elif suffix in IMAGE_SUFFIXES:
      frames, fps = [_read_image(path, short_side)], None
    elif suffix in VIDEO_SUFFIXES:
      fps = None
      with av.open(str(path)) as container:
        if container.streams.video:
          fps = float(container.streams.video[0].average_rate or 0) or None
      frames = list(iterate_video(path, max_frames=max_frames, short_side=short_side))
    elif suffix == ".npy":
      frames, fps = _read_array(path)[:max_frames], None
    else:
      raise ValueError(f"not a clip: {path}; a clip is {CLIP_KINDS}")
  except (av.FFmpegError, Image.UnidentifiedImageError, Image.DecompressionBombError) as error:
    raise ValueError(f"cannot read {path}: {error}") from error
  if not len(frames):
    raise ValueError(f"no frames in {path}")
  if len({frame.shape for frame in frames}) > 1:
    raise ValueError(f"the frames in {path} are not of one size")
  return LoadedClip(np.stack(list(frames)), fps)


def iterate_video(path: str | os.PathLike, *, max_frames: int | None = None,
                  short_side: int | None = None) -> Iterator[np.ndarray]:
  """Decodes a video frame by frame from the start, turned as its metadata says: uint8 (H, W, 3)."""
  with av.open(str(path)) as container:
    if not container.streams.video:
      raise ValueError(f"no video in {path}")
    stream = container.streams.video[0]
    # One clip at a time is decoded by each of many workers; threads inside one decoder cost more than they gain.
    stream.thread_type = "NONE"
    converter = VideoReformatter()
    for index, frame in enumerate(container.decode(stream)):
      if index == max_frames:
        return
      yield _pixels(frame, converter, short_side)


def read_video_frames(path: str | os.PathLike, indices: Sequence[int]) -> np.ndarray:
  """Certain frames of a video, uint8 (T, H, W, 3), decoding only from the last key frame before the first of them.

  Frames are counted in the order in which they are shown, by the times of their packets, which costs no decoding.

  Raises:
    ValueError: the video has fewer frames.
  """
  with av.open(str(path)) as container:
    if not container.streams.video:
      raise ValueError(f"no video in {path}")
    stream = container.streams.video[0]
    stream.thread_type = "NONE"
    times = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
    if max(indices) >= len(times):
      raise ValueError(f"{path} has only {len(times)} frames, frame {max(indices)} is needed")
    wanted = {times[i] for i in indices}
    converter = VideoReformatter()
    container.seek(times[min(indices)], stream=stream, backward=True, any_frame=False)
    found = {}
    for frame in container.decode(stream):
      if frame.pts in wanted:
        found[frame.pts] = _pixels(frame, converter)
        if len(found) == len(wanted):
          break
  if len(found) < len(wanted):
    raise ValueError(f"{path}: {len(wanted) - len(found)} of the frames {min(indices)} to {max(indices)} cannot be decoded")
  return np.stack([found[times[i]] for i in indices])


def _pixels(frame: av.VideoFrame, converter: VideoReformatter, short_side: int | None = None) -> np.ndarray:
  """A frame's pixels. The converter is the same for all frames of a video: to set one up costs more than to use it."""
  width, height = _reduced_size(frame.width, frame.height, short_side)
  pixels = converter.reformat(frame, format="rgb24", width=width, height=height, interpolation="AREA").to_ndarray()
  return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))


def _read_image(path: Path, short_side: int | None) -> np.ndarray:
  with Image.open(path) as image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
      image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    elif image.mode.startswith("I") or image.mode == "F":
      # 16-bit grey: PIL would clip it at 255.
      image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
    size = _reduced_size(*image.size, short_side)
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC) if size != image.size else image.convert("RGB"))


def _read_array(path: Path) -> np.ndarray:
  try:
    with _HEADERS:
      array = np.load(path, allow_pickle=False)
  except (ValueError, EOFError) as error:
    raise ValueError(f"cannot read {path}: {error}") from error
  if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
    raise ValueError(f"{path} holds {array.dtype} {array.shape}, not uint8 (T, H, W, 3)")
  return array


def _reduced_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
  if short_side is None or min(width, height) <= short_side:
    return width, height
  scale = short_side / min(width, height)
  return max(round(width * scale), 1), max(round(height * scale), 1)


def _natural_key(path: Path) -> list:
  """frame2 before frame10."""
  return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def fit_clip(frames: np.ndarray, size: tuple[int, int], *, resample: str = "bicubic") -> np.ndarray:
  """Resizes a clip, aspect kept, until it covers a size, and cuts the middle out: uint8 (T, *size, 3).

  Args:
    frames: uint8 (T, H, W, 3).
    size: height and width.
    resample: "bicubic", or "nearest" where values must not mix.
  """
  height, width = size
  if frames.shape[1:3] == (height, width):
    return frames
  scale = max(height / frames.shape[1], width / frames.shape[2])
  box_height, box_width = min(height / scale, frames.shape[1]), min(width / scale, frames.shape[2])  # as rounding may exceed
  top, left = (frames.shape[1] - box_height) / 2, (frames.shape[2] - box_width) / 2
  box = (left, top, left + box_width, top + box_height)
  method = Image.Resampling[resample.upper()]
  return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), method, box=box)) for frame in frames])


def read_context(paths: Sequence[str | os.PathLike], *, num_frames: int, size: tuple[int, int],
                 videos: Sequence[bool] | None = None) -> tuple[list[np.ndarray], float | None]:
  """Files as the context of a sentence: resized and cut to a size, the first 4n + 1 frames of each video.

  Args:
    paths: of the clips, in order.
    num_frames: of a video at most.
    size: height and width in pixels.
    videos: which of them are to be videos, the others being their first frames; None takes them as they are.

  Returns:
    The clips, uint8 (T, *size, 3), and the frame rate of the last that has one.

  Raises:
    ValueError: a file is no clip, or an image where a video is wanted.
  """
  clips, rates = [], []
  for index, path in enumerate(paths):
    is_video = None if videos is None else videos[index]
    clip = read_clip(path, max_frames=1 if is_video is False else num_frames)
    if is_video and len(clip.frames) < num_frames:
      raise ValueError(f"{path} has {len(clip.frames)} frames, and {num_frames} are needed here")
    usable = 4 * ((len(clip.frames) - 1) // 4) + 1
    clips.append(fit_clip(clip.frames[:usable], size))
    rates.append(clip.fps)
  return clips, rates[-1] or next(filter(None, rates), None)


def write_clip(path: str | os.PathLike, frames: np.ndarray, *, fps: float | None = None) -> None:
  """Writes uint8 (T, H, W, 3): a single frame to an image file, any number to a video (H.264), a .gif or a .npy.

  Raises:
    ValueError: the ending fits neither, or a video shall go into an image.
  """
  path = Path(path)
  suffix = path.suffix.lower()
  path.parent.mkdir(parents=True, exist_ok=True)
  if suffix == ".npy":
    np.save(path, frames)
  elif suffix in IMAGE_SUFFIXES:
    if len(frames) != 1:
      raise ValueError(f"{path} is an image, but there are {len(frames)} frames: use .mp4")
    Image.fromarray(frames[0]).save(path)
  elif suffix == ".gif":
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 / (fps or DEFAULT_FPS), loop=0)
  elif suffix in VIDEO_SUFFIXES:
    _write_video(path, frames, fps or DEFAULT_FPS)
  else:
    raise ValueError(f"cannot write {path}: use .png for an image, .mp4 for a video, or .npy")


def _write_video(path: Path, frames: np.ndarray, fps: float) -> None:
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
    stream.height, stream.width = frames.shape[1:3]
    even = stream.height % 2 == 0 and stream.width % 2 == 0
    stream.pix_fmt, stream.options = "yuv420p" if even else "yuv444p", {"crf": "12"}
    for frame in frames:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
    container.mux(stream.encode())
