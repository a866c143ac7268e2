"""Random videos are read as they were encoded, and as ffmpeg reads them."""

import dataclasses
import random
import subprocess
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.numbered_videos import FFMPEG, SIZE, encode_video, numbered_frames, read_numbers, read_with_ffmpeg
from univid_jax.data.media.reader import probe, read_clip

CODECS = {
  "libx264": ("mp4", "mov", "mkv", "avi", "m4v"),
  "libx265": ("mp4", "mov", "mkv"),
  "libvpx-vp9": ("webm", "mkv", "mp4"),
  "libvpx": ("webm", "mkv"),
  "mpeg4": ("mp4", "mov", "mkv", "avi"),
  "mjpeg": ("avi", "mov", "mkv"),
  "prores_ks": ("mov", "mkv"),
  "ffv1": ("mkv", "avi"),
}
PIXEL_FORMATS = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}
OPTIONS = {
  "libx264": {"crf": "6", "preset": "ultrafast"},
  "libx265": {"crf": "6", "preset": "ultrafast", "x265-params": "log-level=-1"},
  "libvpx-vp9": {"crf": "10", "b": "0", "cpu-used": "8", "deadline": "realtime"},
  "libvpx": {"b": "2M", "cpu-used": "8", "deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "10"},
  "mpeg4": {"qmin": "1", "qmax": "2"},
}
B_FRAMES = ("libx264", "libx265", "mpeg4")
ROTATING = ("mp4", "mov", "m4v")
RATES = (Fraction(16), Fraction(24), Fraction(30000, 1001), Fraction(25, 2), Fraction(60))


@dataclasses.dataclass(frozen=True)
class Example:
  """How a video is encoded; `steps` are the durations of its frames in units of 1 / rate."""

  codec: str
  container: str
  steps: tuple[int, ...]
  rate: Fraction
  gop: int
  bframes: int
  rotation: int
  is_mirrored: bool
  trim_share: float

  def times(self) -> list[int]:
    return np.cumsum([0, *self.steps[:-1]]).tolist()

  def trim(self) -> Fraction:
    """Whole steps, since containers round times."""
    return int(self.trim_share * self.times()[-1]) / self.rate


@st.composite
def examples(draw: st.DrawFn) -> Example:
  codec = draw(st.sampled_from(sorted(CODECS)))
  container = draw(st.sampled_from(CODECS[codec]))
  steps = st.just(1) if container == "avi" or draw(st.booleans()) else st.integers(1, 4)
  can_rotate, can_trim = container in ROTATING, container in ROTATING and codec != "libvpx"
  # x265 gives a single frame times that MP4 cannot hold.
  min_size = 4 if codec == "libx265" else 1
  return Example(
    codec=codec,
    container=container,
    steps=tuple(draw(st.lists(steps, min_size=min_size, max_size=40))),
    rate=draw(st.sampled_from(RATES)),
    gop=draw(st.integers(1, 20)),
    bframes=draw(st.integers(0, 3)) if codec in B_FRAMES else 0,
    rotation=draw(st.sampled_from([0, 90, 180, 270])) if can_rotate else 0,
    is_mirrored=draw(st.booleans()) if can_rotate else False,
    trim_share=draw(st.floats(0, 0.9)) if can_trim else 0.0,
  )


def upright(frames: np.ndarray, example: Example) -> np.ndarray:
  """Undoes the rotation and mirroring that players apply."""
  frames = frames[:, :, ::-1] if example.is_mirrored else frames
  return np.rot90(frames, -(example.rotation // 90), axes=(1, 2))


def check(example: Example) -> None:
  frames = numbered_frames(len(example.steps))
  times = example.times()
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / f"video.{example.container}"
    encode_video(
      path,
      frames,
      example.codec,
      rate=example.rate,
      times=times,
      pixel_format=PIXEL_FORMATS.get(example.codec, "yuv420p"),
      options=OPTIONS.get(example.codec),
      gop=example.gop,
      bframes=example.bframes,
      trim=example.trim(),
      rotation=example.rotation,
      is_mirrored=example.is_mirrored,
    )
    clip = read_clip(path)
    numbers = read_numbers(upright(clip.frames, example))
    start = example.trim() * example.rate
    assert numbers == [number for number, time in enumerate(times) if time >= start]
    if FFMPEG:
      shown = read_with_ffmpeg(path, clip.frames.shape[1:3])
      assert read_numbers(upright(shown, example)) == numbers
    assert upright(clip.frames, example)[0, :24, 40:].mean() > 240
    assert probe(path).num_frames == len(numbers) and probe(path).size == clip.frames.shape[1:3]
    check_windows(path, clip.frames, example)
    check_rate(path, numbers, [time for time in times if time >= start], example)


def check_windows(path: Path, frames: np.ndarray, example: Example) -> None:
  """Any part is the same as in the whole."""
  rng = random.Random(len(frames))
  for _ in range(3):
    start = rng.randrange(len(frames))
    count = rng.randint(1, len(frames) - start)
    np.testing.assert_array_equal(read_clip(path, start, count).frames, frames[start : start + count])


def check_rate(path: Path, numbers: list[int], times: list[int], example: Example) -> None:
  """At another rate, frame n is the one shown at n / fps."""
  fps = 10.0
  seconds = [float((time - times[0]) / example.rate) for time in times]
  clip = read_clip(path, fps=fps)
  for index, number in enumerate(read_numbers(upright(clip.frames, example))):
    shown = numbers.index(number)
    # Containers round times, to a millisecond at worst.
    assert seconds[shown] <= index / fps + 0.0011
    assert shown + 1 == len(seconds) or index / fps < seconds[shown + 1] + 0.0011
  assert abs(len(clip.frames) - (seconds[-1] * fps + 1)) <= 1


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(examples())
def test_random_videos(example: Example):
  check(example)


@pytest.mark.long
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(examples())
def test_many_random_videos(example: Example):
  check(example)


@dataclasses.dataclass(frozen=True)
class Trim:
  """A part of a video, in seconds, that ffmpeg copies to another container."""

  container: str
  start: float
  length: float


trims = st.builds(
  Trim, container=st.sampled_from(["mp4", "mov", "mkv", "avi"]), start=st.floats(0, 2), length=st.floats(0.3, 2)
)


def check_trim(example: Example, trim: Trim) -> None:
  """What ffmpeg cuts out without encoding it again is read as ffmpeg reads it."""
  with tempfile.TemporaryDirectory() as folder:
    source, path = Path(folder) / f"source.{example.container}", Path(folder) / f"trimmed.{trim.container}"
    options = OPTIONS.get(example.codec)
    encode_video(source, numbered_frames(40), example.codec, options=options, gop=example.gop, bframes=example.bframes)
    cut = [FFMPEG, "-v", "error", "-ss", f"{trim.start:.3f}", "-i", source, "-t", f"{trim.length:.3f}", "-c", "copy"]
    done = subprocess.run([*map(str, cut), str(path)], check=False, capture_output=True)
    try:
      shown = read_numbers(read_with_ffmpeg(path, SIZE)) if not done.returncode else []
    except subprocess.CalledProcessError:
      shown = []
    # Not every container takes every codec, and a trim may hold no frame.
    if shown:
      assert read_numbers(read_clip(path).frames) == shown


trimmed = examples().filter(
  lambda example: example.codec in ("libx264", "libx265", "mpeg4") and example.container != "avi"
)


CUT_OFF = Example("mpeg4", "mp4", (1,), Fraction(16), gop=2, bframes=2, rotation=0, is_mirrored=False, trim_share=0.0)


@pytest.mark.skipif(FFMPEG is None, reason="no ffmpeg program: install imageio-ffmpeg, or set FFMPEG")
@example(CUT_OFF, Trim("mkv", 2.0, 1.0))  # frames that refer to what was cut come after the key frame, by their times
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(trimmed, trims)
def test_trims_by_ffmpeg(example: Example, trim: Trim):
  check_trim(example, trim)


@pytest.mark.long
@pytest.mark.skipif(FFMPEG is None, reason="no ffmpeg program: install imageio-ffmpeg, or set FFMPEG")
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(trimmed, trims)
def test_many_trims_by_ffmpeg(example: Example, trim: Trim):
  check_trim(example, trim)
