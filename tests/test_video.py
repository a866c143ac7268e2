"""Reading and writing clips of every kind."""

import av
import numpy as np
import pytest
from PIL import Image

from univid_jax.core.errors import UserError
from univid_jax.data.video import read_clip, write_clip


def moving_square(frames=9, height=48, width=64):
  video = np.full((frames, height, width, 3), 40, np.uint8)
  for i in range(frames):
    video[i, 8:24, 4 * i : 4 * i + 16] = (220, 60, 30)
  return video


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".gif"])
@pytest.mark.parametrize("size", [(48, 64), (33, 51)])
def test_videos_survive_writing_and_reading(tmp_path, suffix, size):
  video = moving_square(7, *size)
  path = tmp_path / f"a clip ü{suffix}"
  write_clip(path, video, fps=10)
  clip = read_clip(path)
  assert clip.frames.shape == video.shape and clip.fps == pytest.approx(10, rel=0.02)
  assert np.abs(clip.frames.astype(int) - video).mean() < 4
  np.testing.assert_array_equal(read_clip(path, num_frames=3).frames, clip.frames[:3])


def test_part_of_a_video_at_another_rate(tmp_path):
  path = tmp_path / "v.mp4"
  write_clip(path, moving_square(9), fps=8)
  whole = read_clip(path).frames
  for options, indices, fps in (
    (dict(start=4), [4, 5, 6, 7, 8], 8),
    (dict(start=2, num_frames=3), [2, 3, 4], 8),
    (dict(fps=4), [0, 2, 4, 6, 8], 4),
    (dict(start=1, num_frames=4, fps=16), [1, 2, 2, 3], 16),
  ):
    clip = read_clip(path, **options)
    np.testing.assert_array_equal(clip.frames, whole[indices])
    assert clip.fps == fps
  with pytest.raises(UserError, match=r"no frames in .*v\.mp4 from frame 9 on"):
    read_clip(path, start=9)


def test_images_of_all_modes(tmp_path):
  rgb = moving_square(1)[0]
  grey16 = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
  alpha = np.dstack([rgb, np.full(rgb.shape[:2], 0, np.uint8)])
  images = {
    "rgb.png": Image.fromarray(rgb),
    "grey.png": Image.fromarray(rgb).convert("L"),
    "deep.png": Image.fromarray(grey16),
    "clear.png": Image.fromarray(alpha),
    "palette.png": Image.fromarray(rgb).convert("P"),
  }
  for name, image in images.items():
    image.save(tmp_path / name)
    assert read_clip(tmp_path / name).frames.shape == (1, 48, 64, 3)
  np.testing.assert_array_equal(read_clip(tmp_path / "rgb.png").frames[0], rgb)
  np.testing.assert_allclose(read_clip(tmp_path / "deep.png").frames[0, ..., 0], grey16 / 257, atol=1)
  assert (read_clip(tmp_path / "clear.png").frames == 255).all()


def test_photos_are_rotated_upright(tmp_path):
  image = Image.fromarray(moving_square(1)[0])
  exif = image.getexif()
  exif[0x0112] = 6
  image.save(tmp_path / "rotated.jpg", exif=exif)
  assert read_clip(tmp_path / "rotated.jpg").frames.shape == (1, 64, 48, 3)


def test_folders_in_natural_order_and_arrays(tmp_path):
  video = moving_square(11)
  folder = tmp_path / "frames"
  folder.mkdir()
  for i, frame in enumerate(video):
    Image.fromarray(frame).save(folder / f"f{i}.png")
  np.save(tmp_path / "clip.npy", video)
  for path in (folder, tmp_path / "clip.npy"):
    np.testing.assert_array_equal(read_clip(path).frames, video)
    np.testing.assert_array_equal(read_clip(path, start=2, num_frames=3).frames, video[2:5])


def test_reading_at_a_reduced_size(tmp_path):
  write_clip(tmp_path / "v.mp4", moving_square(3))
  Image.fromarray(moving_square(1)[0]).save(tmp_path / "p.png")
  assert read_clip(tmp_path / "v.mp4", short_side=24).frames.shape == (3, 24, 32, 3)
  assert read_clip(tmp_path / "p.png", short_side=24).frames.shape == (1, 24, 32, 3)


def write_broken_files(folder):
  write_clip(folder / "whole.mp4", moving_square(30))
  data = (folder / "whole.mp4").read_bytes()
  (folder / "cut.mp4").write_bytes(data[:300])
  (folder / "empty.mp4").write_bytes(b"")
  (folder / "text.png").write_text("not an image")
  (folder / "notes.txt").write_text("not a clip")
  (folder / "folder").mkdir()
  np.save(folder / "float.npy", np.zeros((2, 4, 4, 3)))
  (folder / "bad.npy").write_bytes(b"nonsense")
  with av.open(str(folder / "sound.mp4"), "w") as container:
    stream = container.add_stream("aac", rate=44100)
    sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    sound.rate = 44100
    container.mux(stream.encode(sound))
    container.mux(stream.encode())


@pytest.mark.parametrize(
  "name",
  ["cut.mp4", "empty.mp4", "text.png", "notes.txt", "folder", "float.npy", "bad.npy", "sound.mp4", "missing.png"],
)
def test_files_that_are_not_clips_are_named(tmp_path, name):
  write_broken_files(tmp_path)
  with pytest.raises((UserError, FileNotFoundError), match=name):
    read_clip(tmp_path / name)


def test_files_that_cannot_be_written_are_named(tmp_path):
  with pytest.raises(UserError, match="is an image, but there are 3 frames"):
    write_clip(tmp_path / "x.png", moving_square(3))
  with pytest.raises(UserError, match="cannot write"):
    write_clip(tmp_path / "x.docx", moving_square(3))
