"""When the frames of a video are shown, and where decoding can start."""

import dataclasses
import functools
import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from jaxtyping import Int

from univid_jax.core.errors import UserError
from univid_jax.core.paths import file_state
from univid_jax.data.media.color import FrameConverter
from univid_jax.data.media.containers import missing_bytes
from univid_jax.data.media.decoding import StreamDecoder, open_video, to_fraction
from univid_jax.data.media.schedule import Schedule

# Codecs with one frame per packet, whose time is the packet's, except in AVI. Exceptions are recognised: hidden frames
# of VP8 by a bit, and packets of MPEG-4 that repeat the frame before, and yield none, by their size.
INDEXED_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "ffv1", "png")
LARGEST_REPETITION = 32
UNKNOWN, PROGRESSIVE = 0, 1

# The frame rate of videos whose header has none, as FFmpeg assumes.
DEFAULT_FPS = 25.0

# Number of first frames that are compared with their packets; more where only packets tell how many frames there are.
NUM_CHECKED, NUM_CHECKED_AVI = 3, 32


@dataclasses.dataclass(frozen=True)
class Timeline:
  """The frames of a video in the order of presentation.

  Attributes:
    schedule: None if it is only known by decoding the whole video, which `scan_timeline` does.
    keys: times in ticks at which decoding can start; empty if it has to start at the beginning.
    tick: seconds per tick.
    fps: mean frame rate; None if unknown.
    has_neighbours: frames may depend on the frames before and after, because they are deinterlaced.
    size: height and width of frames as shown.
    defect: why the video does not have all its frames; None if it does.
  """

  schedule: Schedule | None
  keys: Int[np.ndarray, "k"]
  tick: Fraction
  fps: float | None
  has_neighbours: bool
  size: tuple[int, int]
  defect: str | None

  @property
  def is_indexed(self) -> bool:
    """Whether frames are identified by their times; otherwise they are counted from the beginning."""
    return len(self.keys) > 0


@dataclasses.dataclass(frozen=True)
class _PacketTimes:
  """Times of packets in ticks.

  Attributes:
    shown: times of frames; None if not every packet yields a frame.
    keys: times of key frames; None if frames cannot be identified by their times.
    last_duration: duration of the last frame.
    defect: why packets are missing; None if they are all there.
  """

  shown: Int[np.ndarray, "n"] | None
  keys: Int[np.ndarray, "k"] | None
  last_duration: int
  defect: str | None


@dataclasses.dataclass(frozen=True)
class _FirstFrames:
  """What the first frames show.

  Attributes:
    times: times of the first frames, in ticks; empty if there is an error in them.
    size: height and width of frames as shown.
    has_gaps: some packets yielded no frame.
  """

  times: list[int]
  size: tuple[int, int]
  has_gaps: bool


def read_timeline(path: Path) -> Timeline:
  """Reads the times of all packets and decodes the first frames.

  Raises:
    UserError: no frame can be decoded.
  """
  return _read_timeline(path, file_state(path))


def scan_timeline(path: Path) -> Timeline:
  """Returns a timeline with a schedule, decoding the whole video if necessary.

  Raises:
    UserError: no frame can be decoded.
  """
  state = file_state(path)
  timeline = _read_timeline(path, state)
  return timeline if timeline.schedule else _scan_timeline(path, state)


@functools.lru_cache(maxsize=1024)
def _read_timeline(path: Path, state: tuple[int, ...]) -> Timeline:
  """Computes `read_timeline`; the argument `state` ensures that a changed file is read again."""
  del state
  with open_video(path) as (container, stream):
    packets = _read_packet_times(container, stream)
    tick = to_fraction(stream.time_base) or Fraction(1, 1000)
    codec = stream.codec_context.codec
    has_neighbours = stream.codec_context.field_order != PROGRESSIVE and not codec.intra_only
    rates = map(to_fraction, (stream.average_rate, stream.guessed_rate))
    nominal = [rate for rate in rates if rate]
  first = _decode_first_frames(path)
  shown, keys = packets.shown, packets.keys
  if keys is None and first.has_gaps:
    shown = None
  if shown is not None and keys is not None and first.times:
    # Where a video was cut, frames shown before its first key frame are not decoded.
    shown = shown[(shown >= keys[0]) | (shown >= first.times[0])]
    # Separately coded fields yield one frame for two packets, and B-frames of MPEG-4 whose references were cut yield
    # none.
    checked = {"h264": len(first.times), "mpeg4": NUM_CHECKED}.get(codec.canonical_name, 0)
    if checked and shown[:checked].tolist() != first.times:
      shown = keys = None
  schedule, rate = None, next(iter(nominal), None)
  if shown is not None:
    rate = _mean_rate(shown, tick, nominal)
    last_duration = packets.last_duration or (round(1 / rate / tick) if rate else 0)
    schedule = Schedule(shown, last_duration, tick, float(rate) if rate else None)
  lacking = missing_bytes(path)
  return Timeline(
    schedule,
    np.zeros(0, np.int64) if keys is None else keys,
    tick=tick,
    fps=float(rate) if rate else None,
    has_neighbours=has_neighbours,
    size=first.size,
    defect=f"the file is truncated: it lacks {lacking:,} bytes" if lacking else packets.defect,
  )


def _read_packet_times(container: InputContainer, stream: VideoStream) -> _PacketTimes:
  codec, kind = stream.codec_context.codec, container.format.name
  is_mov, is_avi, is_vp8 = "mov" in kind, kind == "avi", codec.canonical_name == "vp8"
  count, keys, smallest = 0, [], 2**63
  durations: dict[int | None, int] = {}
  has_times, newest = True, None
  for packet in container.demux(stream):
    count += packet.size > 0 or packet.dts is not None
    if not packet.size or (is_vp8 and not memoryview(packet)[0] & 0x10):
      continue
    time = packet.dts if is_avi else packet.pts
    smallest = min(smallest, packet.size)
    if packet.is_keyframe:
      # Times overlap where parts were joined carelessly.
      has_times = has_times and time is not None and (newest is None or newest < time)
      keys.append(time)
    if time is not None:
      newest = time if newest is None else max(newest, time)
    if not packet.is_discard:
      has_times = has_times and time is not None and time not in durations
      durations[time] = packet.duration or 0
  defect = None
  if is_mov and count < len(stream.index_entries):
    defect = f"{count} of the {len(stream.index_entries)} frames in its index can be read"
  times = np.array(sorted(time for time in durations if time is not None), np.int64)
  if not has_times or not len(times):
    return _PacketTimes(None, None, 0, defect)
  last_duration = durations[int(times[-1])]
  is_indexed = codec.intra_only or (codec.canonical_name in INDEXED_CODECS and not is_avi)
  if codec.canonical_name == "mpeg4" and smallest <= LARGEST_REPETITION:
    return _PacketTimes(None, None, 0, defect)
  if is_indexed and keys and (is_mov or is_avi or kind == "matroska,webm"):
    return _PacketTimes(times, np.array(sorted(keys), np.int64), last_duration, defect)
  is_progressive = stream.codec_context.field_order in (UNKNOWN, PROGRESSIVE)
  if is_avi and is_progressive:
    # The decoder's reordering delays all frames by the same number of packets.
    return _PacketTimes(times, None, last_duration, defect)
  return _PacketTimes(None, None, 0, defect)


def _decode_first_frames(path: Path) -> _FirstFrames:
  for is_strict in (True, False):
    with open_video(path) as (container, stream):
      decoder = StreamDecoder(container, stream, is_strict=is_strict)
      converter = FrameConverter(to_fraction(stream.sample_aspect_ratio))
      count = NUM_CHECKED_AVI if container.format.name == "avi" else NUM_CHECKED
      first = list(itertools.islice(decoder.frames(), count))
      if is_strict and decoder.failures and decoder.lacks_references():
        continue
      if not first:
        raise UserError(next(iter(decoder.failures.values()), "no frame can be decoded"))
      height, width = converter.convert(first[0].frame).shape[:2]
      times = [decoder.packets[decoded.number].time for decoded in first]
      known = [time for time in times if time is not None]
      if len(known) < len(times) or any(not decoder.is_leading(number) for number in decoder.failures):
        known = []
      newest = max(decoded.number for decoded in first)
      # Reordered frames come later, unless the video has ended.
      has_gaps = any(len(first) < count or number < newest - count // 2 for number in decoder.pending)
      return _FirstFrames(known, (height, width), has_gaps)
  raise AssertionError("the second pass returns")


def _mean_rate(times: Int[np.ndarray, "n"], tick: Fraction, nominal: list[Fraction]) -> Fraction | None:
  """Returns the mean rate of times; a nominal rate if one agrees up to the rounding of times."""
  span = int(times[-1] - times[0]) * tick
  if not span:
    return next(iter(nominal), None)
  intervals = len(times) - 1
  for rate in nominal:
    if abs(intervals / rate - span) <= max(tick, span / 1000):
      return rate
  return Fraction(intervals / span).limit_denominator(1001)


@functools.lru_cache(maxsize=1024)
def _scan_timeline(path: Path, state: tuple[int, ...]) -> Timeline:
  timeline = _read_timeline(path, state)
  with open_video(path) as (container, stream):
    decoder = StreamDecoder(container, stream)
    times = [decoder.packets[decoded.number].time for decoded in decoder.frames()]
    is_avi = container.format.name == "avi"
  known = np.array([time for time in times if time is not None], np.int64)
  if is_avi:
    known.sort()
  schedule = Schedule.regular(len(times), fps=timeline.fps or DEFAULT_FPS, tick=timeline.tick)
  if len(known) == len(times) and (np.diff(known) > 0).all():
    schedule = dataclasses.replace(schedule, times=known)
  return dataclasses.replace(timeline, schedule=schedule, defect=timeline.defect or decoder.find_any_damage())
