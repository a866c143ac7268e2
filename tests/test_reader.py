"""Files as people have them are read as players show them, or rejected by name and reason."""

import json
import math
import os
import re
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange

from tests.numbered_videos import encode_video, numbered_frames, read_numbers
from univid_jax.core.errors import UserError
from univid_jax.data.media import video_frames
from univid_jax.data.media.color import FrameConverter
from univid_jax.data.media.decoding import StreamDecoder
from univid_jax.data.media.h264 import _Bits
from univid_jax.data.media.reader import is_foreign, probe, read_clip, read_parts
from univid_jax.data.media.schedule import Schedule
from univid_jax.data.media.writer import write_clip

CASES = Path(__file__).parent / "cases" / "videos"
TRUTH = json.loads((CASES / "truth.json").read_text())


def middle_of_bars(frame: np.ndarray) -> np.ndarray:
  """Returns the mean colour of each of the four bars on the right half."""
  height, width = frame.shape[:2]
  bars = [frame[height * i // 4 + 4 : height * (i + 1) // 4 - 4, width * 3 // 4 : -4] for i in range(4)]
  return np.array([bar.reshape(-1, 3).mean(axis=0) for bar in bars])


def copy_packets(
  path: Path, target: Path, *, without: int | None = None, options: dict[str, str] | None = None
) -> None:
  """Copies a video, without one of its packets."""
  with av.open(str(path)) as source, av.open(str(target), "w", options=options or {}) as output:
    stream = output.add_stream_from_template(source.streams.video[0])
    for number, packet in enumerate(source.demux(video=0)):
      if packet.size and number != without:
        packet.stream = stream
        output.mux(packet)


@pytest.mark.parametrize("name", sorted(name for name, truth in TRUTH.items() if truth.get("readable", True)))
def test_cases(name: str):
  truth = TRUTH[name]
  clip, info = read_clip(CASES / name), probe(CASES / name)
  assert len(clip.frames) == info.num_frames == truth["frames"]
  assert list(clip.frames.shape[1:3]) == list(info.size) == truth["height_width"]
  if truth["number_of_each_frame"] is not None:
    frames = clip.frames[:, :, ::-1] if "numbers_on" in truth else clip.frames
    quarter = frames[:, :, : frames.shape[2] // 2]  # a circle covers the middle of one
    assert read_numbers(quarter) == truth["number_of_each_frame"]
  if truth["colours_of_first_frame"] is not None and name != "animated.gif":  # whose colours are dithered
    np.testing.assert_allclose(middle_of_bars(clip.frames[0]), truth["colours_of_first_frame"], atol=4)


@pytest.mark.parametrize("name", sorted(name for name, truth in TRUTH.items() if not truth.get("readable", True)))
def test_damaged_cases_are_named(name: str):
  with pytest.raises(UserError, match=f"cannot read .*{name}: "):
    read_clip(CASES / name)


def test_frames_are_shown_when_due_at_another_rate():
  truth = TRUTH["vfr.mp4"]["number_of_each_frame_at_16_fps"]
  clip = read_clip(CASES / "vfr.mp4", fps=16)
  assert read_numbers(clip.frames) == truth and clip.fps == 16
  assert probe(CASES / "vfr.mp4").count_at(16) == len(truth)
  assert read_numbers(read_clip(CASES / "vfr.mp4", 20, 17, fps=16.0).frames) == truth[20:37]


@pytest.mark.parametrize("fps, ticks", [(24.0, 1000), (30.0, 1000), (60.0, 1000), (30_000 / 1001, 90_000)])
def test_all_frames_count_at_their_own_rate(fps: float, ticks: int):
  """Although times are rounded to ticks: at 30 frames per second and in milliseconds they are 33 and 67."""
  for count in range(1, 40):
    assert Schedule.regular(count, fps=fps, tick=Fraction(1, ticks)).count_at(fps) == count


NTSC = 1000 / 1001
# Of MP4 in exact times, of Matroska and WebM, and of MP4 made of them.
TICKS = Fraction(1, 30_000), Fraction(1, 1000), Fraction(1, 90_000)
# Of phones.
LONG_TICK = Fraction(1, 600)


def schedules(count: int, fps: float) -> Iterator[Schedule]:
  """Those of equal videos in different containers."""
  yield Schedule.regular(count, fps=fps, tick=TICKS[0])
  yield Schedule.regular(count, fps=fps, tick=LONG_TICK)
  for tick in TICKS[1:]:
    times = np.round(np.arange(count) * 1000 / fps).astype(int)  # milliseconds
    yield Schedule(times * round(TICKS[1] / tick), round(1 / (Fraction(fps) * tick)), tick, fps)


@pytest.mark.parametrize(
  "own, fps, step",
  [
    (24 * NTSC, 24.0, 1),
    (24 * NTSC, 23.976, 1),
    (24.0, 24 * NTSC, 1),
    (30 * NTSC, 30.0, 1),
    (60 * NTSC, 30.0, 2),
    (60.0, 15 * NTSC, 4),
    (48 * NTSC, 16.0, 3),
    (30.0, 30 * NTSC, 1),
  ],
)
def test_rates_that_hardly_differ_are_the_same(own: float, fps: float, step: int):
  """No frame is repeated or left out on the way, whatever times are rounded to."""
  for schedule in schedules(2001, own):
    assert schedule.select(0, None, fps).tolist() == list(range(0, 2001, step))
    count = schedule.count_at(fps)
    assert count == len(range(0, 2001, step)) and schedule.rate_at(fps) == pytest.approx(own / step, rel=1e-12)
    assert schedule.select(5, 7, fps).tolist() == list(range(5 * step, 12 * step, step))
    assert schedule.part_at(step, 10 * step, fps) == (1, 9)
    assert schedule.shows_all_at(fps) == (step == 1)
    schedule.select(0, count, fps)
    with pytest.raises(UserError, match="is needed"):
      schedule.select(0, count + 1, fps)


@pytest.mark.parametrize("own", [24 * NTSC, 30 * NTSC, 30.0, 25.0])
@pytest.mark.parametrize("fps", [16.0, 11.0, 40.0])
def test_containers_show_the_same_at_another_rate(own: float, fps: float):
  due = [math.floor(Fraction(index) * Fraction(own).limit_denominator(1001) / int(fps)) for index in range(400)]
  for schedule in schedules(1500, own):
    assert schedule.select(0, 400, fps).tolist() == due and schedule.rate_at(fps) == fps


@pytest.mark.parametrize("own, fps, expected", [(24.0, 48.0, 24 * 2), (25 * NTSC, 50.0, 50 * NTSC)])
def test_frames_are_repeated_evenly(own: float, fps: float, expected: float):
  for schedule in schedules(900, own):
    assert schedule.select(0, None, fps).tolist() == [index // 2 for index in range(1799)]
    assert schedule.select(0, 1800, fps).tolist() == [index // 2 for index in range(1800)]
    assert schedule.rate_at(fps) == pytest.approx(expected, rel=1e-12)


def test_frames_that_come_a_little_early_or_late_are_kept():
  """As in videos of phones; at a rate that differs, their times decide."""
  late = np.random.default_rng(0).integers(0, 7, 500)
  schedule = Schedule(np.arange(500) * 100 // 3 + late, 33, Fraction(1, 1000), 30.0)
  assert schedule.shows_all_at(30 * NTSC) and schedule.select(0, None, 30.0).tolist() == list(range(500))
  assert schedule.select(0, None, 15.0).tolist() == list(range(0, 500, 2))
  due = np.searchsorted(schedule.times - schedule.times[0], np.arange(250) * 62.5 + 0.5, side="right") - 1
  assert schedule.select(0, 250, 16.0).tolist() == due.tolist() and schedule.rate_at(16.0) == 16


def test_rates_that_differ_and_vary_are_resampled():
  regular = Schedule.regular(500, fps=24.0, tick=TICKS[0])
  assert not regular.shows_all_at(24.2) and regular.rate_at(24.2) == 24.2 and regular.count_at(24.2) == 504
  varying = Schedule(np.delete(np.arange(0, 5010, 10), 250), 10, Fraction(1, 240), 24.0)
  assert not varying.shows_all_at(24.0) and varying.select(248, 4, 24.0).tolist() == [248, 249, 249, 250]
  assert regular.select(0, None, 1e-9).tolist() == [0] and varying.count_at(1e-9) == 1
  assert varying.shows_all_at(None) and Schedule.untimed(5).shows_all_at(24.0)


def test_the_last_frame_is_shown_to_its_end():
  """Frames at 0 and 1 s, each for 1 s: at 1.25 frames per second there is one more, at 1.6 s, and none at 2.4 s."""
  schedule = Schedule(np.array([0, 1]), last_duration=1, fps=1.0)
  assert schedule.count_at(1.25) == 2 and schedule.select(0, 3, 1.25).tolist() == [0, 0, 1]
  with pytest.raises(UserError, match="frame 3 is needed"):
    schedule.select(0, 4, 1.25)


def test_pixels_are_square():
  """The circle in the middle is round."""
  frame = read_clip(CASES / "anamorphic.mp4", 0, 1).frames[0]
  is_yellow = (frame[..., 0] > 200) & (frame[..., 1] > 200) & (frame[..., 2] < 60)
  rows, columns = np.flatnonzero(is_yellow.any(axis=1)), np.flatnonzero(is_yellow.any(axis=0))
  assert abs(np.ptp(rows) - np.ptp(columns)) <= 2


def test_hdr_is_mapped_to_sdr():
  """HLG codes grey as SDR does up to half: neutral, in order, neither crushed nor clipped."""
  frames = read_clip(CASES / "hlg.mp4").frames
  greys = frames[:, 20:-20, 20:200].reshape(len(frames), -1, 3).mean(axis=1)
  assert np.ptp(greys, axis=1).max() < 2
  assert (np.diff(greys[:, 0]) > 1).all() and 10 < greys[0, 0] < greys[-1, 0] < 100
  assert middle_of_bars(frames[0])[3].min() > 245


@pytest.mark.parametrize(
  "name", ["bframes_h264.avi", "trim_ss_copy.mp4", "interlaced.mp4", "cover_first.mp4", "animated.webp"]
)
def test_parts_are_the_same_as_in_the_whole(name: str):
  whole = read_clip(CASES / name).frames
  for start in (0, 1, 5, len(whole) - 3):
    np.testing.assert_array_equal(read_clip(CASES / name, start, 3).frames, whole[start : start + 3])


def test_parts_of_interlaced_videos_begin_like_the_whole(tmp_path: Path):
  """A frame needs the one before it to be deinterlaced, also if it is a key frame."""
  frames = np.random.default_rng(0).integers(0, 256, (24, 48, 64, 3), np.uint8)
  options = {"x264-params": "tff=1:scenecut=0", "crf": "1"}
  encode_video(tmp_path / "video.mkv", frames, options=options, gop=6, bframes=0)
  whole = read_clip(tmp_path / "video.mkv").frames
  for start in (6, 7, 12):
    np.testing.assert_array_equal(read_clip(tmp_path / "video.mkv", start, 2).frames, whole[start : start + 2])


def test_the_rate_is_that_of_the_frames(tmp_path: Path):
  """Whatever a header says: every 20th frame is lost of a video of 25 frames per second."""
  times = [number + number // 20 for number in range(40)]
  encode_video(tmp_path / "video.mkv", numbered_frames(40), times=times, bframes=0)
  with av.open(str(tmp_path / "video.mkv")) as container:
    assert container.streams.video[0].average_rate == 25
  assert probe(tmp_path / "video.mkv").fps == pytest.approx(25 * 39 / 40)


@pytest.mark.parametrize("name", ["plain.mp4", "bframes_mpeg4.avi", "animated.gif", "cover.png"])
def test_too_few_frames_are_named(name: str):
  count = TRUTH[name]["frames"]
  with pytest.raises(UserError, match=f"{name}: it has {count} frame.*{count + 2} is needed"):
    read_clip(CASES / name, count, 3)
  with pytest.raises(UserError, match=name):
    read_clip(CASES / name, start=count)


def test_only_the_frames_that_depend_on_damage_are_rejected(tmp_path: Path):
  frames = numbered_frames(40)
  encode_video(tmp_path / "whole.mp4", frames, gop=10, options={"x264-params": "scenecut=0"})
  with av.open(str(tmp_path / "whole.mp4")) as container:
    packets = [packet for packet in container.demux(video=0) if packet.size]
    damaged = packets[21]
    data = bytearray((tmp_path / "whole.mp4").read_bytes())
  assert damaged.pos is not None
  data[damaged.pos + 4 : damaged.pos + damaged.size] = bytes(damaged.size - 4)
  (tmp_path / "damaged.mp4").write_bytes(data)
  for start in (0, 10, 30):
    assert read_numbers(read_clip(tmp_path / "damaged.mp4", start, 10).frames) == list(range(start, start + 10))
  with pytest.raises(UserError, match=r"damaged\.mp4: frame 2\d "):
    read_clip(tmp_path / "damaged.mp4", 20, 10)
  with pytest.raises(UserError, match="damaged"):
    read_clip(tmp_path / "damaged.mp4")


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_lost_references_are_damage(tmp_path: Path, codec: str):
  """H.264's decoder repeats another frame in their place without a word."""
  frames = numbered_frames(20)
  frames[:, :, 40:] = np.random.default_rng(0).integers(0, 256, frames[:, :, 40:].shape)
  encode_video(tmp_path / "whole.mkv", frames, codec, gop=20, options={"preset": "ultrafast"})
  for lost in (1, 4, 5):
    copy_packets(tmp_path / "whole.mkv", tmp_path / "lossy.mkv", without=lost)
    assert read_numbers(read_clip(tmp_path / "lossy.mkv", 0, 1).frames) == [0]
    with pytest.raises(UserError, match="lossy"):
      read_clip(tmp_path / "lossy.mkv")


def test_wrong_checksums_are_damage(tmp_path: Path):
  """FFV1's decoder copies slices from the frame before, and only logs it."""
  encode_video(tmp_path / "video.mkv", numbered_frames(6), "ffv1", gop=1, options={"level": "3", "slicecrc": "1"})
  with av.open(str(tmp_path / "video.mkv")) as container:
    packet = [packet for packet in container.demux(video=0) if packet.size][3]
  data = bytearray((tmp_path / "video.mkv").read_bytes())
  assert packet.pos is not None
  data[packet.pos + packet.size // 2] ^= 255
  (tmp_path / "video.mkv").write_bytes(data)
  assert read_numbers(read_clip(tmp_path / "video.mkv", 0, 3).frames) == [0, 1, 2]
  with pytest.raises(UserError, match="frame 3 is damaged: slice CRC mismatch"):
    read_clip(tmp_path / "video.mkv", 2, 2)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "webm"])
def test_truncated_files_are_not_read_to_their_end(tmp_path: Path, suffix: str):
  path = tmp_path / f"video.{suffix}"
  if suffix == "webm":
    encode_video(path, numbered_frames(30), "libvpx-vp9")
  else:
    encode_video(path, numbered_frames(30), "mpeg4", options={"qmin": "1", "qmax": "2"})
  if suffix == "mp4":  # with the index in front
    with (
      av.open(str(path)) as source,
      av.open(str(tmp_path / "fast.mp4"), "w", options={"movflags": "faststart"}) as fast,
    ):
      stream = fast.add_stream_from_template(source.streams.video[0])
      for packet in source.demux(video=0):
        if packet.size:
          packet.stream = stream
          fast.mux(packet)
    path = tmp_path / "fast.mp4"
  path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
  for read in (read_clip, probe):
    with pytest.raises(UserError, match=rf"{path.name}: .*(truncated|intact)"):
      read(path)
  if suffix != "avi":
    assert read_numbers(read_clip(path, 0, 5).frames) == list(range(5))


@pytest.mark.parametrize(
  "options, pixel_format",
  [
    ({"x264-params": "cqm=jvt"}, "yuv420p"),
    ({"x264-params": "tff=1:cqm=jvt"}, "yuv422p"),
    ({"x264-params": "ref=16:bframes=8:b-pyramid=strict:slices=4"}, "yuv420p"),
    ({"x264-params": "nal-hrd=vbr:aud=1", "maxrate": "1M", "bufsize": "1M"}, "yuv420p10le"),
    ({"x264-params": "weightp=0:8x8dct=0", "profile": "baseline"}, "yuv420p"),
  ],
)
@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_h264_without_losses(tmp_path: Path, suffix: str, options: dict[str, str], pixel_format: str):
  """No reference is found missing where none is."""
  encode_video(
    tmp_path / f"video.{suffix}",
    numbered_frames(50),
    options={"crf": "1", **options},
    pixel_format=pixel_format,
    gop=40,
  )
  assert read_numbers(read_clip(tmp_path / f"video.{suffix}").frames) == list(range(50))


def test_open_groups_of_pictures(tmp_path: Path):
  """Frames after a key frame may name references before it that they do not use."""
  path = tmp_path / "open.mp4"
  encode_video(path, numbered_frames(50), options={"x264-params": "open-gop=1:scenecut=0"}, gop=10)
  for start in range(0, 50, 7):
    assert read_numbers(read_clip(path, start, 1).frames) == [start]


def test_intra_refresh(tmp_path: Path):
  """Frames marked as key frames from which decoding cannot start."""
  path = tmp_path / "refresh.mp4"
  encode_video(path, numbered_frames(50), options={"x264-params": "intra-refresh=1:keyint=10:scenecut=0"}, bframes=0)
  for start in range(0, 50, 7):
    assert read_numbers(read_clip(path, start, 1).frames) == [start]


def test_hidden_frames_are_not_counted(tmp_path: Path):
  """VP8 has frames that are only referred to; here they are made from others by clearing the bit that shows them."""
  encode_video(tmp_path / "shown.webm", numbered_frames(20), "libvpx", options={"b": "2M"})
  with av.open(str(tmp_path / "shown.webm")) as source, av.open(str(tmp_path / "hidden.webm"), "w") as target:
    stream = target.add_stream_from_template(source.streams.video[0])
    for number, packet in enumerate(source.demux(video=0)):
      if packet.size:
        data = bytearray(bytes(packet))
        data[0] &= 0xEF if number in (3, 7) else 0xFF
        hidden = av.Packet(bytes(data))
        hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
        hidden.stream, hidden.is_keyframe = stream, packet.is_keyframe
        target.mux(hidden)
  shown = [number for number in range(20) if number not in (3, 7)]
  assert read_numbers(read_clip(tmp_path / "hidden.webm").frames) == shown
  assert read_numbers(read_clip(tmp_path / "hidden.webm", 14, 2).frames) == shown[14:16]
  assert probe(tmp_path / "hidden.webm").num_frames == 18


@pytest.mark.parametrize(
  "codec, pixel_format, suffix", [("ffv1", "bgra", "mkv"), ("png", "rgba", "mov"), ("libvpx-vp9", "yuva420p", "webm")]
)
def test_transparency_is_white(tmp_path: Path, codec: str, pixel_format: str, suffix: str):
  frames = np.zeros((3, 48, 64, 4), np.uint8)
  frames[:, :, 32:, 3] = 255
  encode_video(tmp_path / f"alpha.{suffix}", frames, codec, pixel_format=pixel_format)
  read = read_clip(tmp_path / f"alpha.{suffix}").frames
  assert read[:, :, :28].min() > 250 and read[:, :, 36:].max() < 5


@pytest.mark.parametrize(
  "codec, pixel_format",
  [
    ("libx264", "yuv420p10le"),
    ("libx265", "yuv420p10le"),
    ("libx265", "yuv422p12le"),
    ("prores_ks", "yuv422p10le"),
    *(("ffv1", f"yuv{chroma}p{bits}le") for chroma in (420, 422, 444) for bits in (10, 12, 16)),
  ],
)
def test_deep_colours_reach_black_and_white(tmp_path: Path, codec: str, pixel_format: str):
  """Greys of limited range in more than 8 bits; swscale's quick way loses two of 255 levels where chroma is halved."""
  path, lumas = tmp_path / "deep.mov", (16, 64, 126, 200, 235)
  if codec == "ffv1":
    path = path.with_suffix(".mkv")
  bits = int(re.sub(r".*p(\d+)le", r"\1", pixel_format))
  options = {"libx265": {"x265-params": "lossless=1:log-level=none"}, "libx264": {"qp": "0"}}.get(codec, {})
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=25, options=options)
    stream.width, stream.height, stream.pix_fmt = 64, 48, pixel_format
    for luma in lumas:
      frame = av.VideoFrame(64, 48, pixel_format)
      for plane, value in zip(frame.planes, (luma, 128, 128)):
        plane.update(np.full(plane.buffer_size // 2, value << (bits - 8), np.uint16).tobytes())
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  frames = read_clip(path).frames.astype(int)
  expected = np.broadcast_to(np.array([0, 56, 128, 214, 255])[:, None, None, None], frames.shape)
  np.testing.assert_allclose(frames, expected, atol=0 if codec != "prores_ks" else 1)


@pytest.mark.parametrize("color_range", [ColorRange.UNSPECIFIED, ColorRange.MPEG, ColorRange.JPEG])
@pytest.mark.parametrize(
  "codec, pixel_format, suffix",
  [
    ("libx265", "gray", "mp4"),
    ("libx265", "gray10le", "mp4"),
    ("ffv1", "gray", "mkv"),
    ("ffv1", "gray10le", "mkv"),
    ("ffv1", "gray12le", "mkv"),
    ("ffv1", "gray16le", "mkv"),
    ("ffv1", "ya8", "mkv"),
  ],
)
def test_grey_has_the_range_that_it_is_tagged_with(
  tmp_path: Path, codec: str, pixel_format: str, suffix: str, color_range: ColorRange
):
  """Black, mid-grey and white of limited range are those of any other video. Without a tag the codec decides."""
  path, lumas = tmp_path / f"grey.{suffix}", (16, 126, 235)
  bits = int(re.sub(r"\D", "", pixel_format.removeprefix("ya")) or 8)
  with av.open(str(path), "w") as container:
    options = {"x265-params": "lossless=1:log-level=none"} if codec == "libx265" else {}
    stream = container.add_stream(codec, rate=25, options=options)
    stream.width, stream.height, stream.pix_fmt = 64, 48, pixel_format
    stream.codec_context.color_range = color_range
    for luma in lumas:
      values = np.full((48, 64), luma << (bits - 8), np.uint8 if bits == 8 else np.uint16)
      if pixel_format == "ya8":
        frame = av.VideoFrame(64, 48, pixel_format)
        frame.planes[0].update(np.stack([values, np.full_like(values, 255)], axis=-1).tobytes())
      else:
        frame = av.VideoFrame.from_ndarray(values, format=pixel_format)
      frame.color_range = color_range
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  is_limited = color_range == ColorRange.MPEG or (codec == "libx265" and color_range == ColorRange.UNSPECIFIED)
  expected = np.array([0, 128, 255] if is_limited else lumas)
  frames = read_clip(path).frames
  np.testing.assert_array_equal(frames, np.broadcast_to(expected[:, None, None, None], frames.shape))
  np.testing.assert_array_equal(np.concatenate(read_parts(path, [(0, 0, 1), (0, 1, 2)])), frames)


@pytest.mark.parametrize(
  "size, is_hd", [((576, 720), False), ((578, 720), True), ((544, 1278), False), ((544, 1280), True)]
)
def test_untagged_colours_are_those_of_the_size(size: tuple[int, int], is_hd: bool):
  """By BT.601 up to 576 lines of less than 1280 pixels, and else by BT.709; Y'CbCr is (120, 100, 160)."""
  planes = np.repeat(np.array([120, 100, 160], np.uint8), np.prod(size)).reshape(3, *size)
  pixels = FrameConverter().convert(av.VideoFrame.from_ndarray(planes, format="yuv444p"))
  grey = 255 / 219 * (120 - 16)
  red, green_blue, green_red, blue = (1.793, 0.213, 0.533, 2.112) if is_hd else (1.596, 0.392, 0.813, 2.017)
  expected = grey + red * 32, grey + green_blue * 28 - green_red * 32, grey - blue * 28
  np.testing.assert_allclose(pixels[size[0] // 2, size[1] // 2], expected, atol=1)


def test_unusual_colours_are_named(tmp_path: Path):
  with av.open(str(tmp_path / "ictcp.mkv"), "w") as container:
    stream = container.add_stream("ffv1", rate=25)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10le"
    stream.codec_context.colorspace = 14
    frame = av.VideoFrame.from_ndarray(numbered_frames(1)[0]).reformat(format="yuv420p10le")
    frame.colorspace = 14
    container.mux(stream.encode(frame))
    container.mux(stream.encode())
  with pytest.raises(UserError, match=r"ictcp\.mkv: .*BT\.709"):
    read_clip(tmp_path / "ictcp.mkv")


def test_foreign_files():
  for name in ("._a.mp4", ".DS_Store", "Thumbs.db", ".ipynb_checkpoints", "@eaDir", ".hidden.png", "desktop.ini"):
    assert is_foreign(Path("data") / name)
  assert not is_foreign(".cache/clip.mp4") and not is_foreign("a.mp4") and not is_foreign("frames")


def test_names_with_colons_and_other_characters(tmp_path: Path):
  encode_video(tmp_path / "plain.mp4", numbered_frames(3))
  for name in ("a:b.mp4", "-i ü %d.mp4", "concat:a|b.mp4"):
    (tmp_path / name).write_bytes((tmp_path / "plain.mp4").read_bytes())
    assert read_numbers(read_clip(tmp_path / name).frames) == [0, 1, 2]


def test_playlists_are_not_followed(tmp_path: Path):
  """FFmpeg would open what is named in them, on this machine or elsewhere."""
  encode_video(tmp_path / "plain.mp4", numbered_frames(3))
  (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile plain.mp4\n")
  (tmp_path / "playlist.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nplain.mp4\n#EXT-X-ENDLIST\n")
  for name in ("list.mp4", "playlist.mp4"):
    with pytest.raises(UserError, match=name):
      read_clip(tmp_path / name)


def test_long_videos_cost_the_memory_of_the_frames_that_are_read(tmp_path: Path):
  """The frames of the whole would be 1.8 GB."""
  path = tmp_path / "long.mp4"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
    stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
    frame = av.VideoFrame.from_ndarray(np.zeros((240, 320, 3), np.uint8)).reformat(format="yuv420p")
    for index in range(8000):
      frame.pts, frame.time_base = index, Fraction(1, 25)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  read_clip(path, 0, 1)
  tracemalloc.start()
  clip = read_clip(path, 7900, 17)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2 * clip.frames.nbytes
  with pytest.raises(UserError, match="read fewer"):
    read_clip(path, 0, 40_000, fps=1e6)


def test_threads(tmp_path: Path):
  """NumPy parses headers of .npy with Python's ast, which fails now and then when threads use it at once."""
  np.save(tmp_path / "clip.npy", numbered_frames(2))
  with ThreadPoolExecutor(8) as threads:
    for clip in threads.map(read_clip, [tmp_path / "clip.npy", CASES / "plain.mp4"] * 50):
      assert len(clip.frames) in (2, 50)


def test_damaged_h264_headers_cost_no_memory():
  """A number whose code claims thousands of bits: it was built in full, gigabytes for a few kilobytes."""
  for data in (bytes(4000), bytes(3999) + b"\xff", b"\0" * 2000 + b"\x55" * 2000):
    assert _Bits(data).take_golomb() < 1 << 33
    assert _Bits(data).take(1 << 40) == 0


def test_parts_are_read_together(tmp_path: Path):
  """With key frames in some gaps and not in others, overlapping, repeated, in any order, at other rates."""
  for name, gop in (("few", 1000), ("many", 12)):
    path = tmp_path / f"{name}.mp4"
    encode_video(path, numbered_frames(250), gop=gop)
    whole = read_clip(path).frames
    for spans in ([(0, 5), (60, 5), (120, 5), (180, 5)], [(240, 10), (0, 1), (3, 9), (0, 1)], [(7, 100), (50, 2)]):
      for fps in (None, 8.0):
        if fps:
          spans = [(first, count // 4 + 1) for first, count in spans]
        parts = read_parts(path, [(first, 0, count) for first, count in spans], fps=fps)
        due = [[first + (n * 25 // 8 if fps else n) for n in range(count)] for first, count in spans]
        expected = [whole[indices] for indices in due]
        assert all(np.array_equal(*pair) for pair in zip(parts, expected, strict=True))


@pytest.mark.parametrize("bframes", [0, 2])
def test_only_what_is_needed_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bframes: int):
  """Reading at an offset seeks to the nearest key frame, and so does reading of the next part after a gap."""
  path = tmp_path / "video.mp4"
  encode_video(path, numbered_frames(180), gop=12, bframes=bframes, options={"sc_threshold": "0"})
  probe(path)
  decoders: list[StreamDecoder] = []

  def make_decoder(*args: Any, **kwargs: Any) -> StreamDecoder:
    decoders.append(StreamDecoder(*args, **kwargs))
    return decoders[-1]

  monkeypatch.setattr(video_frames, "StreamDecoder", make_decoder)
  # Frames are decoded ahead of the last one shown: what is reordered, and the packets that tell of damage to it.
  ahead = 3 + 2 * bframes
  for start, count in ((100, 5), (168, 12), (12, 1)):
    decoders.clear()
    read_clip(path, start, count)
    assert sum(len(decoder.packets) for decoder in decoders) <= start % 12 + count + ahead
  decoders.clear()
  parts = read_parts(path, [(quarter * 45, 0, 17) for quarter in range(4)])
  assert [len(part) for part in parts] == [17] * 4
  from_keys = sum(quarter * 45 % 12 for quarter in range(4))
  assert sum(len(decoder.packets) for decoder in decoders) <= 4 * (17 + ahead) + from_keys


def test_pictures_beside_a_video_are_not_read(tmp_path: Path):
  """Cover art that is larger than the video, and that is not marked as such."""
  encode_video(tmp_path / "video.mp4", numbered_frames(5))
  encode_video(tmp_path / "cover.mp4", numbered_frames(1, (96, 128)), "png", pixel_format="rgb24")
  for first, second in (("cover", "video"), ("video", "cover")):
    path = tmp_path / f"{first}_{second}.mp4"
    with av.open(str(path), "w") as target:
      sources = [av.open(str(tmp_path / f"{name}.mp4")) for name in (first, second)]
      streams = [target.add_stream_from_template(source.streams.video[0]) for source in sources]
      for source, stream in zip(sources, streams, strict=True):
        for packet in source.demux(video=0):
          if packet.size:
            packet.stream = stream
            target.mux(packet)
        source.close()
    assert read_numbers(read_clip(path).frames) == list(range(5))


def test_titles_have_any_encoding(tmp_path: Path):
  path = tmp_path / "titled.mkv"
  encode_video(path, numbered_frames(5), title="Café")
  written = path.read_bytes()
  assert written.count("Café".encode()) == 1
  path.write_bytes(written.replace("Café".encode(), "Café ".encode("latin-1")))
  assert read_numbers(read_clip(path).frames) == list(range(5))


def test_what_only_has_the_name_of_a_clip_is_refused(tmp_path: Path):
  os.mkfifo(tmp_path / "pipe.mp4")
  with (tmp_path / "archive.npy").open("wb") as file:
    np.savez(file, frames=np.zeros((1, 4, 4, 3), np.uint8))
  (tmp_path / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
  reasons = {
    "pipe.mp4": "neither a file nor a folder",
    "archive.npy": "archive of arrays",
    "pointer.png": "git lfs pull",
  }
  with pytest.raises(UserError, match="a clip needs a name"):
    read_clip("")
  for name, reason in reasons.items():
    for read in (probe, read_clip):
      with pytest.raises(UserError, match=f"cannot read .*{name}: .*{reason}"):
        read(tmp_path / name)


@pytest.mark.parametrize(
  "content, name, message",
  [
    ("a.png", "clip.mp4", r"clip\.mp4: by its content it is a PNG, not \.mp4: rename it to \.png"),
    ("a.mp4", "clip.png", r"clip\.png: by its content it is an MP4, not \.png: rename it to \.mp4"),
    ("a.mp4", "clip.npy", r"clip\.npy: by its content it is an MP4, not \.npy: rename it to \.mp4"),
    (b"<!DOCTYPE html><html>", "clip.webm", r"by its content it is a web page, not \.webm: convert it"),
    (b"nonsense", "clip.mp4", r"not an intact MP4"),
    (b"\0\0\0\x18ftypmp42", "clip.mp4", r"not an intact MP4"),
    (b"\xff\xd8\xff" + bytes(200), "clip.jpeg", r"clip\.jpeg: (?!by its content)"),
    (b"\x89PNG\r\n\x1a\n" + bytes(80), "clip.apng", r"clip\.apng: (?!by its content)"),
    (b"\x1aE\xdf\xa3" + bytes(80), "clip.webm", r"clip\.webm: (?!by its content)"),
    (b"\0\0\0\x18ftypqt  ", "clip.m4v", r"clip\.m4v: (?!by its content)"),
  ],
)
def test_content_of_another_kind_than_the_suffix_is_named(tmp_path, content, name, message):
  """FFmpeg and Pillow only say that they cannot read it."""
  frames = np.zeros((1, 32, 32, 3), np.uint8)
  if isinstance(content, str):
    write_clip(tmp_path / content, frames)
    content = (tmp_path / content).read_bytes()
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    read_clip(tmp_path / name)
