"""Reads chosen frames of a video, decoding from the nearest key frame, and rejects damaged ones."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from av.video.frame import PictureType
from jaxtyping import Int, UInt8

from univid_jax.core.errors import UserError
from univid_jax.core.text import count_noun, size_text
from univid_jax.data.media.color import Frame, FrameConverter
from univid_jax.data.media.decoding import DecodedFrame, StreamDecoder, deinterlace, open_video, to_fraction
from univid_jax.data.media.timeline import Timeline

# Larger clips are rejected before memory is allocated for them.
MAX_BYTES = 2**33

# Damage to a reference may show only after the frames that refer to it, at most this number of frames later.
MAX_REORDERED = 32

# Opening a file again takes as long as decoding a few frames, or longer if its index is long.
MIN_SKIPPED = 12


def read_video_frames(path: Path, timeline: Timeline, indices: Int[np.ndarray, "n"]) -> UInt8[np.ndarray, "n H W 3"]:
  """Reads frames by their positions in the order of presentation; positions are sorted and may repeat.

  Frames between them are decoded only where no seek to a key frame can skip them.

  Raises:
    UserError: there are too few frames, one is damaged, or their sizes differ.
  """
  frames = _Frames(indices)
  for part in _split_at_keys(timeline, indices):
    _read_part(path, timeline, part, frames)
  assert frames.pixels is not None
  return frames.pixels


def _split_at_keys(timeline: Timeline, indices: Int[np.ndarray, "n"]) -> list[Int[np.ndarray, "_"]]:
  """Splits positions at gaps where seeking to a key frame is cheaper than decoding what is in between."""
  if timeline.schedule is None or not timeline.is_indexed:
    return [indices]
  keys = np.searchsorted(timeline.schedule.times, timeline.keys)
  gaps = np.flatnonzero(np.diff(indices) > MIN_SKIPPED)
  splits = []
  for gap in gaps:
    resumed = int(indices[gap + 1]) - timeline.has_neighbours
    if ((keys > indices[gap] + MIN_SKIPPED) & (keys <= resumed)).any():
      splits.append(gap + 1)
  return np.split(indices, splits)


def _read_part(path: Path, timeline: Timeline, indices: Int[np.ndarray, "n"], frames: "_Frames") -> None:
  reading = None
  for key in _starting_points(timeline, int(indices[0])):
    reading = _Reading(timeline, indices, frames)
    reading.run(path, key)
    if reading.lacks_references:
      reading = _Reading(timeline, indices, frames)
      reading.run(path, key, is_strict=False)
    if reading.started_at_key:
      break
  if reading is None or frames.pixels is None or reading.problem:
    raise UserError((reading and reading.problem) or "no frames")


def _starting_points(timeline: Timeline, first: int) -> list[int | None]:
  """Returns times of key frames to try to decode from, and None for the beginning of the file."""
  if timeline.schedule is None or not timeline.is_indexed:
    return [None]
  needed, start = _first_needed(timeline, first), timeline.schedule.times[0]
  keys = timeline.keys[(timeline.keys <= needed) & (timeline.keys > start)]
  return [*keys[:-3:-1].tolist(), None]


def _first_needed(timeline: Timeline, first: int) -> int | None:
  """Returns the time of the first frame needed to make a frame; None if frames are not identified by their times."""
  if timeline.schedule is None or not timeline.is_indexed:
    return None
  return int(timeline.schedule.times[max(first - timeline.has_neighbours, 0)])


class _Frames:
  """Frames at certain positions, filled in as they are decoded.

  Attributes:
    pixels: the frames; None before the size of the first is known.
  """

  def __init__(self, indices: Int[np.ndarray, "n"]):
    self.pixels: UInt8[np.ndarray, "n H W 3"] | None = None
    self._indices = indices

  def store(self, index: int, frame: Frame) -> None:
    if self.pixels is None:
      needed = len(self._indices) * frame.size
      if needed > MAX_BYTES:
        frames = f"{len(self._indices)} frames of {size_text(frame.shape[:2])} pixels"
        raise UserError(f"{frames} are {needed / 1e9:.0f} GB; read fewer")
      self.pixels = np.empty((len(self._indices), *frame.shape), np.uint8)
    if frame.shape != self.pixels.shape[1:]:
      sizes = f"{size_text(self.pixels.shape[1:3])} and {size_text(frame.shape[:2])} (width x height)"
      raise UserError(f"its frames have different sizes: {sizes}")
    begin, end = (np.searchsorted(self._indices, index, side=side) for side in ("left", "right"))
    self.pixels[begin:end] = frame


class _Reading:
  """An attempt to decode certain frames.

  Attributes:
    problem: why the frames cannot be used; None if they can.
    lacks_references: the problem may come from frames that name, but do not use, references before the first frame.
    started_at_key: decoding started at a frame that needs none before it; containers also mark others as key frames.
  """

  def __init__(self, timeline: Timeline, indices: Int[np.ndarray, "n"], frames: _Frames):
    self.problem: str | None = None
    self.lacks_references = False
    self.started_at_key = False
    self._timeline, self._indices, self._frames = timeline, indices, frames
    self._origins: dict[int, tuple[int, ...]] = {}
    self._num_shown = 0

  def run(self, path: Path, key: int | None, *, is_strict: bool = True) -> None:
    """Decodes from the key frame at a time, or from the beginning, until all frames are found."""
    wanted, last = set(self._indices.tolist()), int(self._indices[-1])
    with open_video(path) as (container, stream):
      if key is not None:
        container.seek(key, stream=stream)
      decoder = StreamDecoder(
        container, stream, is_strict=is_strict, skip_until=_first_needed(self._timeline, int(self._indices[0]))
      )
      converter = FrameConverter(to_fraction(stream.sample_aspect_ratio))
      shown = self._shown_frames(decoder, was_sought=key is not None)
      for index, decoded in shown:
        if index in wanted and index not in self._origins:
          self._origins[index] = decoded.origins
          self._frames.store(index, converter.convert(decoded.frame))
        if index >= last:
          break
      newest = max((max(numbers) for numbers in self._origins.values()), default=0)
      for _ in range(MAX_REORDERED):
        if all(number > newest for number in decoder.pending) or next(shown, None) is None:
          break
      self.problem = self._find_problem(decoder)
      self.lacks_references = bool(self.problem) and is_strict and decoder.lacks_references()

  def _shown_frames(self, decoder: StreamDecoder, *, was_sought: bool) -> Iterator[tuple[int, DecodedFrame]]:
    """Yields frames with their positions in the order of presentation."""
    times = None
    if self._timeline.schedule is not None and self._timeline.is_indexed:
      times = self._timeline.schedule.times
    for decoded in deinterlace(decoder.frames()):
      index = self._num_shown
      if times is not None:
        time = decoder.packets[decoded.number].time
        index = len(times) if time is None else int(np.searchsorted(times, time))
        # Frames shown before the key frame of the seek may refer to frames before it.
        is_cut = was_sought and decoder.is_leading(decoded.number) and not decoder.packets[decoded.number].key
        if is_cut or index == len(times) or times[index] != time:
          continue
        if not self._num_shown:
          is_intra = decoded.frame.key_frame and decoded.frame.pict_type in (PictureType.I, PictureType.NONE)
          self.started_at_key = is_intra and not decoded.number and index <= self._indices[0]
      self._num_shown += 1
      yield index, decoded

  def _find_problem(self, decoder: StreamDecoder) -> str | None:
    """Returns why the frames cannot be used; None if they can."""
    if not self._timeline.is_indexed:
      # Frames that were not decoded were not counted either.
      damage = decoder.find_any_damage(
        max(max(numbers) for numbers in self._origins.values()) if self._origins else None
      )
      if damage:
        return f"frames up to {self._indices[-1]} cannot be decoded: {damage}"
    for index in dict.fromkeys(self._indices.tolist()):
      if index not in self._origins:
        if not self._timeline.is_indexed and index >= self._num_shown:
          reason = f"; {self._timeline.defect}" if self._timeline.defect else ""
          return f"it has {count_noun(self._num_shown, 'frame')}, and frame {self._indices[-1]} is needed{reason}"
        reason = next(iter(decoder.failures.values()), self._timeline.defect or "it is missing")
        return f"frame {index} cannot be decoded: {reason}"
      for number in self._origins[index]:
        damage = decoder.find_damage(number)
        if damage:
          return f"frame {index} is damaged: {damage}"
    return None
