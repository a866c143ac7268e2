"""Writes clips: images, videos that players accept, folders of frames and arrays."""

import contextlib
import itertools
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.filter import Graph
from av.packet import Packet
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Array, UInt8
from PIL import Image

from univid_jax.core.checks import require_number
from univid_jax.core.errors import UserError
from univid_jax.core.paths import atomic_write, require_local
from univid_jax.core.unfinished import remove_abandoned, unfinished_path
from univid_jax.data.media.decoding import open_video
from univid_jax.data.media.frames import HasFrames, to_frames
from univid_jax.data.media.reader import DEFAULT_FPS, IMAGE_SUFFIXES, Frames
from univid_jax.data.media.timeline import read_timeline

log = logging.getLogger(__name__)

# Codecs of picture and sound by suffix, chosen so that the container's players support them.
CODECS = {
  ".mp4": ("libx264", "aac"),
  ".m4v": ("libx264", "aac"),
  ".mov": ("libx264", "aac"),
  ".mkv": ("libx264", "aac"),
  ".avi": ("libx264", "mp3"),
  ".webm": ("libvpx-vp9", "opus"),
}
# Without x264's macroblock tree, with which equal frames do not always yield equal bytes.
CODEC_OPTIONS = {"libx264": {"crf": "12", "mbtree": "0"}, "libvpx-vp9": {"crf": "18", "b": "0", "cpu-used": "4"}}
# Without frames that depend on later ones: AVI stores the order of decoding, not the times at which frames are shown.
AVI_OPTIONS = {"bf": "0"}
ENCODERS = {"aac": "aac", "mp3": "libmp3lame", "opus": "libopus"}
# Frame rates of videos; files express them as fractions.
MIN_FPS, MAX_FPS = 0.001, 100_000
# In ms: players show shorter delays of GIFs for 100 ms.
SHORTEST_GIF_DELAY = 20
TARGETS = (
  ".png for an image; .mp4, .mov, .mkv, .webm, .avi or .gif for a video; .npy, or NAME/ without suffix "
  "(a folder of PNGs), for lossless frames"
)


def require_short_name(path: Path) -> None:
  """Raises OSError if the name of a file, or its temporary name, is too long for the file system."""
  for each in (path, unfinished_path(path)) if path.name else ():
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
      each.lstat()


def check_target(path: str | os.PathLike, num_frames: int | None, *, is_video: bool = False) -> None:
  """Checks that `write_clip` can write this number of frames to a path, before time is spent on computing them.

  Args:
    path: see `write_clip`.
    num_frames: None if it is not known yet.
    is_video: whether there are several frames, even if their number is not known.

  Raises:
    UserError: the path is in a bucket, the suffix is unknown, a folder has this name, or several frames are to be
      written to an image.
    OSError: the name is too long.
  """
  path = require_local(path)
  require_short_name(path)
  suffix = path.suffix.lower()
  if suffix in IMAGE_SUFFIXES and (is_video or num_frames not in (None, 1)):
    what = "a video" if num_frames is None else f"{num_frames} frames"
    raise UserError(f"cannot write {what} to the image {path}: use .mp4, or NAME/ for a folder of PNGs")
  if suffix and suffix not in (*IMAGE_SUFFIXES, *CODECS, ".gif", ".npy"):
    raise UserError(f"cannot write {path}: use {TARGETS}")
  if path.is_dir() and suffix:
    raise UserError(f"cannot write {path}: it is a folder")
  if not suffix and path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f"cannot write frames to {path}: it exists; give a new or empty folder")


def write_clip(
  path: str | os.PathLike,
  frames: Frames | UInt8[Array, "_T _H _W 3"] | Sequence[UInt8[np.ndarray, "H W 3"]] | HasFrames,
  *,
  fps: float | None = None,
  audio_from: str | os.PathLike | None = None,
) -> None:
  """Writes frames in the format of the suffix.

  Videos are H.264 (VP9 in .webm), yuv420p, converted by the BT.709 matrix to limited range and tagged accordingly. Odd
  sizes are padded to even ones by repeating the last row or column. .npy and folders of PNGs are lossless. A GIF merges
  equal consecutive frames into one that is shown longer, so it may be read back as fewer frames at another rate.
  Nothing appears at `path` until everything is written; what killed processes have left of it is removed.

  Args:
    path: the file; without a suffix, a new or empty folder for one PNG per frame.
    frames: at least one frame, as an array or a list; or the result of `read_clip`, with its frame rate, or of
      `sample`.
    fps: frame rate; by default that of a clip from `read_clip`, else Wan2.1's. Images, folders and arrays have none.
    audio_from: a clip whose sound is copied for as long as the frames last; the log says if it or the format has none.

  Raises:
    UserError: see `check_target`; frames are not uint8 (T, H, W, 3), or fps is out of range. Nothing is written then.
  """
  if isinstance(frames, HasFrames):
    frames, fps = frames.frames, getattr(frames, "fps", None) if fps is None else fps
  frames = to_frames(frames)
  write_frames(path, [frames], num_frames=len(frames), fps=fps, audio_from=audio_from)


def write_frames(
  path: str | os.PathLike,
  blocks: Iterable[Frames],
  *,
  num_frames: int,
  fps: float | None = None,
  audio_from: str | os.PathLike | None = None,
) -> None:
  """Writes frames as they arrive, in the way of `write_clip`.

  Args:
    path: see `write_clip`.
    blocks: clips of one size that follow each other.
    num_frames: total number of frames.
    fps, audio_from: see `write_clip`.

  Raises:
    UserError: see `check_target`, or fps is out of range; nothing is written then.
  """
  if fps is not None and not MIN_FPS <= (fps := require_number("fps", fps, is_positive=True)) <= MAX_FPS:
    raise UserError(f"fps must be from {MIN_FPS} to {MAX_FPS:,} frames per second, got {fps:g}")
  check_target(path, num_frames)
  path = Path(path)
  remove_abandoned(path)
  with atomic_write(path) as unfinished:
    _write(unfinished, blocks, target=path, num_frames=num_frames, fps=fps, audio_from=audio_from)


def _write(
  path: Path,
  blocks: Iterable[Frames],
  *,
  target: Path,
  num_frames: int,
  fps: float | None,
  audio_from: str | os.PathLike | None,
) -> None:
  """Writes to `path` the file or folder that will be renamed to `target`."""
  suffix = target.suffix.lower()
  if audio_from and suffix not in CODECS:
    log.warning("%s gets no sound: only videos have it, and GIFs have none", target)
  parts = iter(blocks)
  first = next(parts)
  frames = _each_frame(itertools.chain([first], parts), num_frames)
  rate = DEFAULT_FPS if fps is None else fps
  if suffix == ".npy":
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (num_frames, *first.shape[1:]))
    for index, frame in enumerate(frames):
      array[index] = frame
    array.flush()
  elif suffix in IMAGE_SUFFIXES:
    (frame,) = frames
    Image.fromarray(frame).save(path)
  elif suffix == ".gif":
    if rate * SHORTEST_GIF_DELAY > 1000:
      message = "%s is slower than its %g frames per second: GIF allows at most 50; use .mp4"
      log.warning(message, target.name, rate)
    _write_gif(path, frames, num_frames=num_frames, fps=rate)
  elif suffix:
    audio = Path(audio_from) if audio_from else None
    _write_video(path, frames, num_frames=num_frames, size=first.shape[1:3], fps=rate, audio_from=audio)
  else:
    path.mkdir(exist_ok=True)
    for index, frame in enumerate(frames):
      Image.fromarray(frame).save(path / f"{index:05d}.png")


def _each_frame(blocks: Iterable[Frames], num_frames: int) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
  count = 0
  for block in blocks:
    to_frames(block)
    count += len(block)
    yield from block
  if count != num_frames:
    raise ValueError(f"expected {num_frames} frames, got {count}")


def _write_gif(path: Path, frames: Iterator[np.ndarray], *, num_frames: int, fps: float) -> None:
  """Writes a GIF; its delays are multiples of 10 ms, so they vary to keep the mean rate as far as possible."""
  times = np.round(np.arange(num_frames + 1) * 100 / fps).astype(int)
  delays = [max(int(delay) * 10, SHORTEST_GIF_DELAY) for delay in np.diff(times)]
  images = map(Image.fromarray, frames)
  next(images).save(path, save_all=True, append_images=images, duration=delays, loop=0)


def _write_video(
  path: Path,
  frames: Iterable[np.ndarray],
  *,
  num_frames: int,
  size: tuple[int, int],
  fps: float,
  audio_from: Path | None,
) -> None:
  height, width = size
  rate = Fraction(fps).limit_denominator(1001)
  suffix = path.suffix.lower()
  codec, audio_codec = CODECS[suffix]
  # The index comes first, so that browsers can play before everything is loaded.
  is_mp4 = suffix in (".mp4", ".m4v", ".mov")
  # Matroska's identifiers would otherwise be random.
  options = {"movflags": "+faststart"} if is_mp4 else {"fflags": "+bitexact"}
  with av.open(f"file:{path}", "w", options=options) as container:
    codec_options = CODEC_OPTIONS[codec] | (AVI_OPTIONS if suffix == ".avi" else {})
    stream = container.add_stream(codec, rate=rate, options=codec_options)
    assert isinstance(stream, VideoStream)
    stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
    context = stream.codec_context
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    sound = deque(_copy_sound(audio_from, container, audio_codec, end=num_frames / rate) if audio_from else ())
    if audio_from and not sound:
      log.warning("there is no sound to copy: %s has none", audio_from)
    converter = VideoReformatter()
    for index, frame in enumerate(frames):
      while sound and (sound[0].pts or 0) * sound[0].time_base <= index / rate:
        container.mux(sound.popleft())
      container.mux(stream.encode(_to_yuv(frame, converter)))
    container.mux(stream.encode())
    container.mux(list(sound))


def _to_yuv(frame: UInt8[np.ndarray, "H W 3"], converter: VideoReformatter) -> av.VideoFrame:
  height, width = frame.shape[:2]
  padded = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
  converted = converter.reformat(
    av.VideoFrame.from_ndarray(padded, format="rgb24"),
    format="yuv420p",
    dst_colorspace=Colorspace.ITU709,
    dst_color_range=ColorRange.MPEG,
    interpolation=Interpolation.BICUBIC,
    threads=1,
  )
  converted.color_primaries, converted.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
  for plane in converted.planes:  # encoders read beyond the end of lines, where memory is uninitialised
    np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)[:, plane.width :] = 0
  return converted


def _copy_sound(path: Path, container: OutputContainer, codec: str, *, end: Fraction) -> list[Packet]:
  """Adds a stream with a video's sound, from its first frame on; returns its packets, none if there is no sound.

  The sound is re-encoded if the container's players do not support its codec.

  Raises:
    UserError: the sound cannot be read.
  """
  if path.is_dir() or path.suffix.lower() not in CODECS:
    return []
  try:
    with open_video(path) as (source, _):
      if not source.streams.audio:
        return []
      track = source.streams.audio[0]
      origin = _first_frame_time(path)
      if track.codec_context.codec.canonical_name == codec:
        return _copy_packets(source, track, container, origin=origin, end=end)
      return _encode_sound(source, track, container, codec, origin=origin, end=end)
  except (FFmpegError, UserError) as error:
    raise UserError(f"cannot read the sound of {path}: {error}") from error


def _first_frame_time(path: Path) -> Fraction:
  """Returns the time in seconds at which a video shows its first frame; its sound may start earlier or later."""
  schedule = read_timeline(path).schedule
  return int(schedule.times[0]) * schedule.tick if schedule else Fraction(0)


def _copy_packets(
  source: InputContainer, track: AudioStream, container: OutputContainer, *, origin: Fraction, end: Fraction
) -> list[Packet]:
  stream = container.add_stream_from_template(track)
  packets = []
  for packet in source.demux(track):
    if packet.pts is None or packet.dts is None:
      continue
    shift = round(origin / packet.time_base)
    packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
    if packet.pts + (packet.duration or 0) > 0 and packet.pts * packet.time_base < end:
      packet.stream = stream
      packets.append(packet)
  return packets


def _encode_sound(
  source: InputContainer, track: AudioStream, container: OutputContainer, codec: str, *, origin: Fraction, end: Fraction
) -> list[Packet]:
  rate = 48_000
  stream = container.add_stream(ENCODERS[codec], rate=rate)
  assert isinstance(stream, AudioStream)
  stream.layout = "mono" if track.layout.nb_channels == 1 else "stereo"  # the file's layout may have no name
  graph = _make_resampler(track, format=stream.format.name, layout=stream.layout.name, rate=rate)
  packets: list[Packet] = []
  position = Fraction(0)
  for frame in source.decode(track):
    if frame.pts is not None and frame.time_base:
      position = frame.pts * frame.time_base - origin
    if 0 <= position < end:
      frame.pts, frame.time_base = round(position * frame.sample_rate), Fraction(1, frame.sample_rate)
      graph.push(frame)
      packets.extend(packet for part in _pull(graph) for packet in stream.encode(part))
    position += Fraction(frame.samples, frame.sample_rate)
  graph.push(None)
  packets.extend(packet for part in _pull(graph) for packet in stream.encode(part))
  return packets + stream.encode(None)


def _pull(graph: Graph) -> Iterator[AudioFrame]:
  """Yields the sound that a graph has ready."""
  with contextlib.suppress(BlockingIOError, EOFError):
    while True:
      frame = graph.pull()
      assert isinstance(frame, AudioFrame)
      yield frame


def _make_resampler(track: AudioStream, *, format: str, layout: str, rate: int) -> Graph:
  """Returns a filter graph that converts sound, and adds silence before it starts and in its gaps."""
  graph = Graph()
  graph.link_nodes(
    graph.add_abuffer(template=track, time_base=Fraction(1, track.rate)),
    graph.add("aresample", f"{rate}:async=1:first_pts=0"),
    graph.add("aformat", f"sample_fmts={format}:channel_layouts={layout}"),
    graph.add("abuffersink"),
  )
  graph.configure()
  return graph
