"""Videos whose frames carry their number as a grey level, and what ffmpeg reads from them."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIZE = (48, 64)
# Numbers 0 to 58 differ by four grey levels.
MAX_FRAMES = 56


def find_ffmpeg() -> str | None:
  """Returns the path of an ffmpeg program: $FFMPEG, on the path, or imageio-ffmpeg's; None if there is none."""
  try:
    import imageio_ffmpeg  # pyright: ignore[reportMissingImports]
  except ImportError:
    return os.environ.get("FFMPEG") or shutil.which("ffmpeg")
  return os.environ.get("FFMPEG") or imageio_ffmpeg.get_ffmpeg_exe()


FFMPEG = find_ffmpeg()


def numbered_frames(count: int, size: tuple[int, int] = SIZE) -> np.ndarray:
  """Returns frames with the number on the left half; on the right a white part above a red one, uint8 (T, H, W, 3)."""
  height, width = size
  frames = np.empty((count, height, width, 3), np.uint8)
  frames[:, :, : width // 2] = (20 + 4 * np.arange(count))[:, None, None, None]
  frames[:, : height // 2, width // 2 :] = 255
  frames[:, height // 2 :, width // 2 :] = (200, 30, 30)
  return frames


def read_numbers(frames: np.ndarray) -> list[int]:
  """Returns the numbers of upright frames."""
  if not len(frames):
    return []
  width = frames.shape[2]
  grey = frames[:, 2:-2, 2 : width // 2 - 6].reshape(len(frames), -1).mean(axis=1)
  # Codecs lose a little, mostly downwards.
  return ((grey - 19) / 4).round().astype(int).tolist()


def encode_video(
  path: Path,
  frames: np.ndarray,
  codec: str = "libx264",
  *,
  rate: Fraction = Fraction(25),
  times: Sequence[int] | None = None,
  pixel_format: str = "yuv420p",
  options: dict[str, str] | None = None,
  gop: int = 12,
  bframes: int = 2,
  trim: Fraction = Fraction(0),
  rotation: int = 0,
  is_mirrored: bool = False,
  title: str = "",
) -> None:
  """Encodes RGB or RGBA frames.

  Args:
    times: of frames in units of 1 / rate; consecutive by default.
    trim: seconds that are cut off without encoding again, as by `ffmpeg -ss ... -c copy`: everything from the last key
      frame before is kept, and its time is negative.
    rotation: degrees anticlockwise by which players turn the frames.
    is_mirrored: players then mirror the frames.
  """
  with av.open(str(path), "w") as container:
    if title:
      container.metadata["title"] = title
    stream = container.add_stream(codec, rate=rate, options=options or {})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt, stream.gop_size, stream.max_b_frames = pixel_format, gop, bframes
    stream.codec_context.time_base = 1 / rate
    if rotation or is_mirrored:
      stream.set_display_rotation(rotation, hflip=is_mirrored)
    packets = []
    for index, frame in enumerate(frames):
      picture = av.VideoFrame.from_ndarray(frame, format="rgba" if frame.shape[-1] == 4 else "rgb24")
      picture.pts, picture.time_base = index if times is None else times[index], 1 / rate
      packets.extend(stream.encode(picture))
    packets.extend(stream.encode())
    shift = trim // Fraction(packets[0].time_base)
    start = max(i for i, packet in enumerate(packets) if packet.is_keyframe and packet.pts <= shift)
    for packet in packets[start:]:
      packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
      container.mux(packet)


def read_with_ffmpeg(path: Path, size: tuple[int, int], *filters: str) -> np.ndarray:
  """Returns the frames that ffmpeg shows, uint8 (T, *size, 3)."""
  assert FFMPEG is not None
  chain = ["-vf", ",".join(filters)] if filters else []
  command = [FFMPEG, "-v", "error", "-i", str(path), *chain, "-fps_mode", "passthrough", "-f", "rawvideo"]
  done = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], check=True, capture_output=True)
  return np.frombuffer(done.stdout, np.uint8).reshape(-1, *size, 3)
