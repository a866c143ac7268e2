"""Written videos are tagged as they are converted, and play everywhere."""

from pathlib import Path

import av
import numpy as np
import pytest

from tests.helpers import left_by_killed
from tests.numbered_videos import FFMPEG, encode_video, numbered_frames, read_numbers, read_with_ffmpeg
from tests.test_long_video import moving_video
from tests.typecheck import unchecked
from univid_jax.cli.sampling import plan_requests
from univid_jax.core.errors import UserError
from univid_jax.data.media.reader import read_clip
from univid_jax.data.media.writer import check_target, write_clip, write_frames


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".gif"])
@pytest.mark.parametrize("size", [(48, 64), (33, 51)])
def test_videos_come_back(tmp_path: Path, suffix: str, size: tuple[int, int]):
  frames = numbered_frames(9, size)
  path = tmp_path / f"a clip ü{suffix}"
  write_clip(path, frames, fps=10)
  clip = read_clip(path)
  height, width = size if suffix == ".gif" else (size[0] + size[0] % 2, size[1] + size[1] % 2)
  assert clip.frames.shape == (9, height, width, 3) and clip.fps == pytest.approx(10)
  assert np.abs(clip.frames[:, : size[0], : size[1]].astype(int) - frames).mean() < 4
  assert read_numbers(clip.frames) == list(range(9))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi", ".webm"])
def test_other_readers_see_frames_in_their_order(tmp_path: Path, suffix: str):
  """By the times in the file, which must not jump back."""
  write_clip(tmp_path / f"clip{suffix}", numbered_frames(20), fps=10)
  with av.open(str(tmp_path / f"clip{suffix}")) as container:
    times = [frame.time for frame in container.decode(video=0)]
  np.testing.assert_allclose(np.diff(times), 0.1, atol=1e-3)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_videos_are_tagged(tmp_path: Path, suffix: str):
  """With what they are converted to, whatever their size."""
  write_clip(tmp_path / f"clip{suffix}", numbered_frames(3), fps=24)
  with av.open(str(tmp_path / f"clip{suffix}")) as container:
    context = container.streams.video[0].codec_context
    assert context.pix_fmt == "yuv420p"
    tags = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
    assert tags == (1, 1, 1, 1)  # BT.709, limited


@pytest.mark.skipif(FFMPEG is None, reason="no ffmpeg program: install imageio-ffmpeg, or set FFMPEG")
def test_ffmpeg_sees_the_same_colours(tmp_path: Path):
  frames = numbered_frames(3)
  write_clip(tmp_path / "clip.mp4", frames)
  shown = read_with_ffmpeg(tmp_path / "clip.mp4", (48, 64))
  assert np.abs(shown[:, :20, 40:].astype(int) - frames[:, :20, 40:]).max() < 5
  assert np.abs(shown[:, 30:, 40:].astype(int) - frames[:, 30:, 40:]).max() < 8


@pytest.mark.parametrize("name", ["clip.npy", "frames"])
def test_lossless(tmp_path: Path, name: str):
  frames = np.random.default_rng(0).integers(0, 256, (12, 9, 7, 3)).astype(np.uint8)
  write_clip(tmp_path / "new" / name, frames, fps=10)
  np.testing.assert_array_equal(read_clip(tmp_path / "new" / name).frames, frames)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_equal_frames_make_equal_bytes(tmp_path: Path, suffix: str):
  frames, contents = moving_video(50 if suffix != ".webm" else 10, (48, 64)), set()
  for number in range(20 if suffix != ".webm" else 5):
    write_clip(path := tmp_path / f"{number}{suffix}", frames, fps=25)
    contents.add(path.read_bytes())
  assert len(contents) == 1


@pytest.mark.parametrize("fps, expected", [(None, 10), (20, 20)])
def test_what_was_read_is_written_at_its_own_rate(tmp_path: Path, fps: float | None, expected: float):
  write_clip(tmp_path / "source.mp4", numbered_frames(5), fps=10)
  loaded = read_clip(tmp_path / "source.mp4")
  write_clip(tmp_path / "clip.mp4", loaded, fps=fps)
  found = read_clip(tmp_path / "clip.mp4")
  assert found.fps == expected and found.frames.shape == loaded.frames.shape


def test_images(tmp_path: Path):
  frame = numbered_frames(1)
  for suffix in (".png", ".jpg", ".webp", ".bmp", ".avif", ".tiff"):
    write_clip(tmp_path / f"image{suffix}", frame)
    assert np.abs(read_clip(tmp_path / f"image{suffix}").frames.astype(int) - frame).mean() < 4


@pytest.mark.parametrize("fps", [16, 24, 30])
def test_gifs_keep_their_rate_on_average(tmp_path: Path, fps: float):
  """Their delays are multiples of 10 ms."""
  write_clip(tmp_path / "clip.gif", numbered_frames(50), fps=fps)
  assert read_clip(tmp_path / "clip.gif").fps == pytest.approx(fps, rel=0.01)


@pytest.mark.parametrize("fps", [50, 60])
def test_gifs_that_are_slower_than_asked_for(tmp_path: Path, caplog, fps: float):
  write_clip(tmp_path / "clip.gif", numbered_frames(50), fps=fps)
  assert read_clip(tmp_path / "clip.gif").fps == pytest.approx(50)
  warnings = ["clip.gif is slower than its 60 frames per second: GIF allows at most 50; use .mp4"]
  assert [record.getMessage() for record in caplog.records] == (warnings if fps > 50 else [])


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi", ".webm"])
@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
def test_sound_is_copied_as_far_as_the_video_lasts(tmp_path: Path, suffix: str, codec: str):
  source = tmp_path / "source.mov"
  write_video_with_sound(source, codec, seconds=2.0)
  write_clip(tmp_path / f"clip{suffix}", numbered_frames(25), fps=25, audio_from=source)
  with av.open(str(tmp_path / f"clip{suffix}")) as container:
    samples = [frame.to_ndarray() for frame in container.decode(container.streams.audio[0])]
    rate = container.streams.audio[0].rate
  duration = sum(part.shape[-1] for part in samples) / rate
  assert duration == pytest.approx(1.0, abs=0.15)
  assert max(np.abs(part.astype(float)).max() for part in samples) > 0.2
  assert read_numbers(read_clip(tmp_path / f"clip{suffix}").frames) == list(range(25))


@pytest.mark.parametrize("codec", ["aac", "libopus"])
def test_sound_that_starts_late_or_pauses_stays_where_it_was(tmp_path: Path, codec: str):
  """Whether it is copied or encoded again."""
  write_video_with_sound(tmp_path / "source.mkv", codec, seconds=3.0, silent=((0.0, 1.0), (1.5, 2.0)))
  write_clip(tmp_path / "clip.mp4", numbered_frames(75), fps=25, audio_from=tmp_path / "source.mkv")
  loudness = np.zeros(60)  # in twentieths of a second
  with av.open(str(tmp_path / "clip.mp4")) as container:
    for frame in container.decode(container.streams.audio[0]):
      loudness[min(59, round(frame.time * 20))] += np.abs(frame.to_ndarray().astype(np.float64)).mean()
  is_loud = loudness > loudness.max() / 10
  assert not is_loud[1:18].any() and is_loud[22:28].all() and not is_loud[33:37].any() and is_loud[43:58].all()


def write_video_with_sound(
  path: Path, codec: str, *, seconds: float, silent: tuple[tuple[float, float], ...] = ()
) -> None:
  """Writes a video with a tone, whose stream has no packets where it is silent."""
  rate = 48000 if codec == "libopus" else 44100  # Opus has no other
  with av.open(str(path), "w") as container:
    video, audio = container.add_stream("libx264", rate=25), container.add_stream(codec, rate=rate)
    video.width, video.height, video.pix_fmt, audio.layout = 64, 48, "yuv420p", "mono"
    for frame in numbered_frames(round(25 * seconds)):
      container.mux(video.encode(av.VideoFrame.from_ndarray(frame)))
    container.mux(video.encode())
    tone = (np.sin(np.arange(round(rate * seconds)) * 440 * 2 * np.pi / rate) * 20000).astype(np.int16)
    for start in range(0, len(tone), 1024):
      if any(first <= start / rate < last for first, last in silent):
        continue
      part = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="s16", layout="mono")
      part.rate, part.pts = rate, start
      container.mux(audio.encode(part))
    container.mux(audio.encode())


def test_videos_without_sound_give_none(tmp_path: Path, caplog):
  encode_video(tmp_path / "silent.mp4", numbered_frames(3))
  write_clip(tmp_path / "clip.mp4", numbered_frames(3), audio_from=tmp_path / "silent.mp4")
  write_clip(tmp_path / "clip.png", numbered_frames(1), audio_from=tmp_path / "silent.mp4")
  assert caplog.messages == [
    f"there is no sound to copy: {tmp_path / 'silent.mp4'} has none",
    f"{tmp_path / 'clip.png'} gets no sound: only videos have it, and GIFs have none",
  ]
  assert len(read_clip(tmp_path / "clip.mp4").frames) == 3


def test_buckets_are_refused_by_name(tmp_path: Path, monkeypatch):
  """Instead of a local folder gs:, which nobody looks for."""
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=r"gs://bucket/B2\.png is in a bucket"):
    write_clip("gs://bucket/B2.png", numbered_frames(1))
  with pytest.raises(UserError, match=r"gs://bucket/B2\.png is in a bucket"):
    plan_requests(["a.png", "a2.png", "b.png"], [], "gs://bucket/B2.png")
  with pytest.raises(UserError, match=r"gs://bucket/a\.mp4 is in a bucket"):
    read_clip("gs://bucket/a.mp4")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["clip.mp4", "frames"])
def test_what_others_write_is_left_alone(tmp_path: Path, name: str):
  """Two processes may write a clip at the same time; what killed ones have left of it is removed."""
  path, frames = tmp_path / name, numbered_frames(5)
  (killed := left_by_killed(path)).mkdir()
  (killed / "0.png").write_bytes(b"half")
  (other := left_by_killed(path, machine="f" * 8)).write_bytes(b"of another machine")
  write_clip(path, frames)
  assert set(tmp_path.iterdir()) == {path, other} and len(read_clip(path).frames) == 5


def test_names_that_are_too_long_are_refused_first(tmp_path: Path):
  name = "x" * 252 + ".png"
  with pytest.raises(OSError, match=f"File name too long: .*/{name}"):
    check_target(tmp_path / name, 1)
  check_target(tmp_path / "missing" / name[100:], 1)


@pytest.mark.parametrize("name", ["x" * 251 + ".png", "é" * 125 + ".png"])
def test_the_longest_names_are_written(tmp_path: Path, name):
  """Until it is complete a clip has another name, which would be longer."""
  (killed := left_by_killed(tmp_path / name)).touch()
  check_target(tmp_path / name, 1)
  write_clip(tmp_path / name, numbered_frames(1))
  assert [each.name for each in tmp_path.iterdir()] == [name] and not killed.exists()


def test_nothing_is_written_to_a_wrong_target(tmp_path: Path):
  frames = numbered_frames(3)
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "file").write_text("")
  for name, message in {
    "x.png": "3 frames to the image",
    "x.docx": "use .png for an image",
    "full": "it exists",
  }.items():
    with pytest.raises(UserError, match=message):
      check_target(tmp_path / name, 3)
    with pytest.raises(UserError, match=message):
      write_clip(tmp_path / name, frames)
  assert not (tmp_path / "x.png").exists() and not (tmp_path / "x.docx").exists()
  with pytest.raises(ValueError, match="uint8"), unchecked():
    write_clip(tmp_path / "x.mp4", frames.astype(np.float32))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "clip.npy", "frames"])
def test_frames_are_written_as_they_come(tmp_path: Path, name: str):
  """Nothing is at the path until all are, and the bytes are those of a clip that is written at once."""
  frames, (whole, parts) = numbered_frames(9), (tmp_path / "whole" / name, tmp_path / "parts" / name)
  write_clip(whole, frames, fps=10)
  with pytest.raises(ZeroDivisionError):
    write_frames(parts, (frames[start : start + 4] if start < 8 else 1 / 0 for start in (0, 4, 8)), num_frames=9)  # pyright: ignore
  assert not any(parts.parent.iterdir())
  write_frames(parts, (frames[start : start + 4] for start in (0, 4, 8)), num_frames=9, fps=10)
  for path in sorted(whole.iterdir()) if whole.is_dir() else [whole]:
    copy = parts / path.name if whole.is_dir() else parts
    assert copy.read_bytes() == path.read_bytes()
  assert [path.name for path in parts.parent.iterdir()] == [name]
  with pytest.raises(ValueError, match="expected 10 frames, got 9"):
    write_frames(tmp_path / "short.npy", [frames], num_frames=10)
