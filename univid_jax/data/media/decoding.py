"""Decodes videos with FFmpeg, and determines which frames are undamaged."""

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
import av.logging
from av.container import InputContainer
from av.error import BlockingIOError, EOFError, FFmpegError
from av.filter import Graph
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from univid_jax.core.errors import UserError
from univid_jax.data.media.color import MAX_PIXELS
from univid_jax.data.media.content import describe_content
from univid_jax.data.media.h264 import PictureReader

# Containers of single files. Others, such as playlists, make FFmpeg open further files.
CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"
# Bonus in pixels for the default stream among several videos, as in ffmpeg.
DEFAULT_BONUS = 5_000_000

NOT_A_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails

# Only libvpx decodes the alpha channel of VP8 and VP9, a second stream inside their packets.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

# Codecs that mark frames to which no other refers; HEVC's marks hold only within a temporal layer.
SKIPPING_CODECS = ("h264", "mpeg4")

# Without "explode", decoders conceal missing references and bad HEVC slices without marking the frame.
STRICT = {"err_detect": "crccheck+explode"}

# Titles may have any encoding. PyAV 19 reads all; 18, the last for Python 3.11, needs this option.
READ_METADATA: Any = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

_LOGGING_LOCK = threading.Lock()


class Rational(Protocol):
  """A fraction, or PyAV 19's own type, which is not annotated as a `numbers.Rational`."""

  @property
  def numerator(self) -> int: ...

  @property
  def denominator(self) -> int: ...


def to_fraction(rational: Rational | None) -> Fraction | None:
  """Converts a rational number of FFmpeg; returns None if it is unset: None in PyAV up to 18, later 0."""
  return Fraction(rational.numerator, rational.denominator) if rational else None


@contextlib.contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
  """Opens a file and chooses its video stream: no cover art, and among several the one that ffmpeg would choose.

  Raises:
    UserError: the file has no video that can be decoded.
  """
  options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
  try:
    # The prefix keeps FFmpeg from taking a colon in a name for a protocol.
    container = av.open(
      f"file:{path}", options={"max_pixels": str(MAX_PIXELS)}, container_options=options, **READ_METADATA
    )
  except FFmpegError as error:
    if isinstance(error, (FileNotFoundError, PermissionError)):
      raise
    if found := describe_content(path):
      raise UserError(found) from error
    raise UserError(f"not an intact MP4, MOV, MKV, WebM or AVI file ({error.strerror})") from error
  with container:
    streams = [stream for stream in container.streams.video if not stream.disposition & NOT_A_VIDEO]
    if not streams:
      raise UserError("no video, only cover art" if container.streams.video else "no video in the file")
    stream = max(streams, key=_rank)
    if not stream.codec_context:
      raise UserError("no decoder for the codec of its video; convert it to H.264")
    yield container, stream


def _rank(stream: VideoStream) -> tuple[bool, int]:
  """Ranks videos by size, with a bonus for the default one; single pictures may be unmarked cover art."""
  if not stream.codec_context:
    return False, -1
  bonus = DEFAULT_BONUS if stream.disposition & Disposition.default else 0
  return stream.frames != 1, stream.width * stream.height + bonus


@dataclasses.dataclass(frozen=True)
class PacketInfo:
  """What the container says about a packet.

  Attributes:
    time: in ticks, when it is shown; in AVI, which stores no other time, when it is decoded.
    key: number of the last key frame up to this packet, from which decoding can start; 0 if there is none.
    is_shown: whether an edit list shows it.
  """

  time: int | None
  key: int
  is_shown: bool


@dataclasses.dataclass(frozen=True)
class DecodedFrame:
  """A frame, the number of its packet, and the numbers of all frames that it was made from."""

  frame: av.VideoFrame
  number: int
  origins: tuple[int, ...]


class StreamDecoder:
  """Decodes a video stream from the position of its container, and records what may be damaged.

  Packets are numbered in the order of decoding. The number replaces a packet's timestamps, so that the decoder passes
  it on to the packet's frame: this identifies frames however wrong the timestamps are.

  Args:
    container: the container, at the position where decoding starts.
    stream: the video.
    is_strict: whether missing references are errors.
    skip_until: time in ticks before which frames are decoded only if others refer to them.

  Attributes:
    starts_open: the first frame is an H.264 key frame after which frames may name references before it without using
      them.
    packets: the packets by number.
    failures: reasons by number, for packets that are incomplete or were decoded with errors.
    pending: numbers of packets to be shown that have yielded neither a frame nor an error.
  """

  def __init__(
    self, container: InputContainer, stream: VideoStream, *, is_strict: bool = True, skip_until: int | None = None
  ):
    self.starts_open = False
    self.packets: list[PacketInfo] = []
    self.failures: dict[int, str] = {}
    self.pending: set[int] = set()
    self._first_key: int | None = None
    self._container, self._stream = container, stream
    self._skip_until = skip_until if stream.codec_context.codec.canonical_name in SKIPPING_CODECS else None
    is_h264 = stream.codec_context.codec.canonical_name == "h264"
    self._pictures = PictureReader(stream.codec_context.extradata) if is_h264 else None
    self._is_avi = container.format.name == "avi"
    self._context = _decoder_context(stream, is_strict=is_strict)

  def frames(self) -> Iterator[DecodedFrame]:
    """Yields frames in the order of presentation, except those that an edit list hides."""
    packets = self._container.demux(self._stream)
    while True:
      try:
        packet = next(packets, None)
      except FFmpegError as error:
        self.failures[len(self.packets)] = str(error.strerror)
        packet = None
      if packet is None:
        yield from self._decode(None)
        return
      # AVI has empty packets for repeated frames, which FFmpeg would mistake for the end of the stream.
      if packet.size:
        number = len(self.packets)
        time = packet.dts if self._is_avi else packet.pts
        if packet.is_keyframe and self._first_key is None:
          self._first_key = number
        key = number if packet.is_keyframe or not number else self.packets[-1].key
        self.packets.append(PacketInfo(time, key, not packet.is_discard))
        if self._pictures:
          picture = self._pictures.read(bytes(packet))
          if not number:
            self.starts_open = packet.is_keyframe and not picture.is_idr
          if picture.lacks_reference:
            self.failures[number] = "a frame before it is missing"
        if packet.is_corrupt:
          self.failures[number] = "incomplete data"
        is_skipped = self._skip_until is not None and time is not None and time < self._skip_until
        self._context.skip_frame = "NONREF" if is_skipped else "DEFAULT"
        if not packet.is_discard and not is_skipped:
          self.pending.add(number)
        packet.pts = packet.dts = number
        yield from self._decode(packet)

  def _decode(self, packet: av.Packet | None) -> Iterator[DecodedFrame]:
    latest = len(self.packets) - 1
    try:
      with _logged_errors() if self._context.name == "ffv1" else contextlib.nullcontext([]) as logged:
        frames = self._context.decode(packet)
      if logged:
        self.failures.setdefault(latest, logged[0])
    except FFmpegError as error:
      self.failures.setdefault(max(latest, 0), str(error.strerror))
      self.pending.discard(latest)
      return
    for frame in frames:
      number = latest if frame.pts is None else frame.pts
      self.pending.discard(number)
      if frame.is_corrupt:
        self.failures.setdefault(number, "missing or damaged parts")
      # Where a video was cut, frames shown before the first key frame refer to others before it.
      is_cut = self.starts_open and self.is_leading(number) and not self.packets[number].key
      if self.packets[number].is_shown and not is_cut:
        yield DecodedFrame(frame, number, (number,))

  def is_leading(self, number: int) -> bool:
    """Returns whether a frame is shown before the key frame that precedes it in the order of decoding."""
    if number == len(self.packets):  # the number of a failed read, at the end
      return False
    packet = self.packets[number]
    time, key_time = packet.time, self.packets[packet.key].time
    return time is not None and key_time is not None and time < key_time

  def find_damage(self, number: int) -> str | None:
    """Returns the error in a frame, or in frames that it may have been predicted from; None if there is none."""
    is_leading, start = self.is_leading(number), self.packets[number].key
    if is_leading and start:
      start = self.packets[start - 1].key
    for failed, reason in sorted(self.failures.items()):
      # Frames after a key frame do not refer to those shown before it.
      if start <= failed <= number and (is_leading or not self.is_leading(failed)):
        return reason
    return None

  def lacks_references(self) -> bool:
    """Returns whether all errors may come from frames that name, but do not use, references before the first frame."""
    end = len(self.packets)
    return self.starts_open and not any(failed == end or self.packets[failed].key for failed in self.failures)

  def find_any_damage(self, newest: int | None = None) -> str | None:
    """Returns the first error from the first key frame on, up to what is shown before frame `newest`, or None."""
    first = self._first_key or 0
    last = len(self.packets) if newest is None else newest + self._context.reorder_depth + 1
    return next((reason for number, reason in sorted(self.failures.items()) if first <= number <= last), None)


def _decoder_context(stream: VideoStream, *, is_strict: bool) -> VideoCodecContext:
  context = stream.codec_context
  name = ALPHA_DECODERS.get(context.codec.canonical_name)
  if name and stream.metadata.get("alpha_mode") == "1":
    alpha = av.CodecContext.create(name, "r")
    assert isinstance(alpha, VideoCodecContext)
    alpha.extradata = context.extradata
    context = alpha
  # Many workers each decode one clip; threads inside a decoder cost more than they gain.
  context.thread_type, context.thread_count = "NONE", 1
  context.options = {"max_pixels": str(MAX_PIXELS)} | (STRICT if is_strict else {})
  return context


@contextlib.contextmanager
def _logged_errors() -> Iterator[list[str]]:
  """Yields a list to which FFmpeg's error messages are added on exit.

  FFV1's decoder replaces slices with wrong checksums by those of the frame before, and reports it only in the log.
  FFmpeg has one log level for the whole process.
  """
  messages: list[str] = []
  with _LOGGING_LOCK:
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
      with av.logging.Capture() as logs:
        yield messages
      messages.extend(message.strip() for _, _, message in logs)
    finally:
      av.logging.set_level(level)


def deinterlace(frames: Iterable[DecodedFrame]) -> Iterator[DecodedFrame]:
  """Replaces interlaced frames by progressive ones, one for one (bwdif); others pass unchanged.

  A deinterlaced frame is made from its neighbours too.
  """
  graph: Graph | None = None
  waiting: deque[DecodedFrame] = deque()
  previous: tuple[int, ...] = ()
  for count, decoded in enumerate(frames):
    if graph is None:
      if not decoded.frame.interlaced_frame:
        yield decoded
        continue
      graph = _deinterlacing_graph(decoded.frame)
    waiting.append(decoded)
    decoded.frame.pts, decoded.frame.time_base = count, Fraction(1, 25)
    graph.vpush(decoded.frame)
    for frame in _pull_frames(graph):
      source = waiting.popleft()
      yield DecodedFrame(frame, source.number, (*previous, source.number, *(later.number for later in waiting)))
      previous = (source.number,)
  if graph is not None:
    graph.vpush(None)
    for frame in _pull_frames(graph):
      source = waiting.popleft()
      yield DecodedFrame(frame, source.number, (*previous, source.number))
      previous = (source.number,)


def _deinterlacing_graph(frame: av.VideoFrame) -> Graph:
  graph = Graph()
  graph.threads = 1
  source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))
  graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")).configure()
  return graph


def _pull_frames(graph: Graph) -> Iterator[av.VideoFrame]:
  while True:
    try:
      yield graph.vpull()
    except (BlockingIOError, EOFError):
      return
