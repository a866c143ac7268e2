"""Clips are read as they are, and what is not a clip is named."""

import av
import numpy as np
import pytest
from PIL import Image

from univid_jax.data.sources import moving_window
from univid_jax.data.video import fit_clip, read_clip, write_clip


def moving_square(frames=9, height=48, width=64):
  video = np.full((frames, height, width, 3), 40, np.uint8)
  for i in range(frames):
    video[i, 8:24, 4 * i:4 * i + 16] = (220, 60, 30)
  return video


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".gif"])
@pytest.mark.parametrize("size", [(48, 64), (33, 51)])
def test_videos_come_back(tmp_path, suffix, size):
  video = moving_square(7, *size)
  path = tmp_path / f"a clip ü{suffix}"
  write_clip(path, video, fps=10)
  clip = read_clip(path)
  assert clip.frames.shape == video.shape and clip.fps == pytest.approx(10, rel=0.02)
  assert np.abs(clip.frames.astype(int) - video).mean() < 4
  np.testing.assert_array_equal(read_clip(path, max_frames=3).frames, clip.frames[:3])


def test_images_of_all_modes(tmp_path):
  rgb = moving_square(1)[0]
  grey16 = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
  alpha = np.dstack([rgb, np.full(rgb.shape[:2], 0, np.uint8)])
  pictures = {"rgb.png": Image.fromarray(rgb), "grey.png": Image.fromarray(rgb).convert("L"), "deep.png": Image.fromarray(grey16),
              "clear.png": Image.fromarray(alpha, "RGBA"), "palette.png": Image.fromarray(rgb).convert("P")}
  for name, picture in pictures.items():
    picture.save(tmp_path / name)
    assert read_clip(tmp_path / name).frames.shape == (1, 48, 64, 3)
  np.testing.assert_array_equal(read_clip(tmp_path / "rgb.png").frames[0], rgb)
  np.testing.assert_allclose(read_clip(tmp_path / "deep.png").frames[0, ..., 0], grey16 / 257, atol=1)
  assert (read_clip(tmp_path / "clear.png").frames == 255).all()


def test_a_turned_photo_stands_upright(tmp_path):
  picture = Image.fromarray(moving_square(1)[0])
  exif = picture.getexif()
  exif[0x0112] = 6
  picture.save(tmp_path / "turned.jpg", exif=exif)
  assert read_clip(tmp_path / "turned.jpg").frames.shape == (1, 64, 48, 3)


def test_folders_are_in_natural_order_and_arrays_as_they_are(tmp_path):
  video = moving_square(11)
  folder = tmp_path / "frames"
  folder.mkdir()
  for i, frame in enumerate(video):
    Image.fromarray(frame).save(folder / f"f{i}.png")
  np.testing.assert_array_equal(read_clip(folder).frames, video)
  np.save(tmp_path / "clip.npy", video)
  np.testing.assert_array_equal(read_clip(tmp_path / "clip.npy").frames, video)


def test_reading_small(tmp_path):
  write_clip(tmp_path / "v.mp4", moving_square(3))
  Image.fromarray(moving_square(1)[0]).save(tmp_path / "p.png")
  assert read_clip(tmp_path / "v.mp4", short_side=24).frames.shape == (3, 24, 32, 3)
  assert read_clip(tmp_path / "p.png", short_side=24).frames.shape == (1, 24, 32, 3)


def test_fitting_keeps_the_aspect_and_the_middle():
  video = np.zeros((2, 40, 80, 3), np.uint8)
  video[:, :, 20:60] = 200
  assert (fit_clip(video, (20, 20))[:, :, 2:-2] == 200).all() and fit_clip(video, (20, 20)).min() > 150
  assert fit_clip(video, (64, 32)).shape == (2, 64, 32, 3)


def broken_files(folder):
  write_clip(folder / "whole.mp4", moving_square(30))
  data = (folder / "whole.mp4").read_bytes()
  (folder / "cut.mp4").write_bytes(data[:300])
  (folder / "empty.mp4").write_bytes(b"")
  (folder / "text.png").write_text("I am no picture")
  (folder / "notes.txt").write_text("nor am I")
  (folder / "folder").mkdir()
  np.save(folder / "float.npy", np.zeros((2, 4, 4, 3)))
  (folder / "bad.npy").write_bytes(b"nonsense")
  with av.open(str(folder / "sound.mp4"), "w") as container:
    stream = container.add_stream("aac", rate=44100)
    sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    sound.rate = 44100
    container.mux(stream.encode(sound))
    container.mux(stream.encode())


@pytest.mark.parametrize("name", ["cut.mp4", "empty.mp4", "text.png", "notes.txt", "folder", "float.npy", "bad.npy", "sound.mp4",
                                  "missing.png"])
def test_what_is_no_clip_is_named(tmp_path, name):
  broken_files(tmp_path)
  with pytest.raises((ValueError, FileNotFoundError), match=name):
    read_clip(tmp_path / name)


def test_what_cannot_be_written(tmp_path):
  with pytest.raises(ValueError, match="is an image, but there are 3 frames"):
    write_clip(tmp_path / "x.png", moving_square(3))
  with pytest.raises(ValueError, match="cannot write"):
    write_clip(tmp_path / "x.docx", moving_square(3))


def test_any_size_fits_any_other():
  """Where a side fits exactly rounding must not reach beyond the picture: it did for one size in twenty."""
  rng = np.random.default_rng(0)
  for height, width, *size in rng.integers(8, 700, (300, 4)) // (1, 1, 2, 2):
    assert fit_clip(np.zeros((1, height, width, 3), np.uint8), tuple(map(int, size))).shape == (1, *size, 3)
  photo = Image.new("RGB", (61, 43))
  for seed in range(300):
    assert moving_window(photo, np.random.default_rng(seed), num_frames=5, size=(48, 80)).shape == (5, 48, 80, 3)
