"""Clips that are read on demand, and the cache of what is computed from them."""

import gc
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tests.clip_files import FORM, read_greys, write_image, write_video
from univid_jax.config.boundary import override
from univid_jax.config.presets import tiny
from univid_jax.core.errors import UserError
from univid_jax.core.options import ClipFit
from univid_jax.core.sentence import read_frames
from univid_jax.data.cache import Cache
from univid_jax.data.clips import ClipFormat, array_clip, file_clip, read_context, resize_and_crop
from univid_jax.data.video import iterate_video, probe, read_clip, read_video_frames, write_clip


class TestClips:
  @pytest.mark.parametrize("fps, expected", [(4.0, [0, 16, 32, 48, 64]), (16.0, [0, 8, 8, 16, 16])])
  def test_other_frame_rates(self, tmp_path, fps, expected):
    """A video of 8 frames per second, with frames dropped or repeated: the same by every way of reading."""
    path = write_video(tmp_path / "v.mp4", 20)
    form = ClipFormat(size=(16, 24), num_frames=5, fps=fps)
    clip = file_clip(path, start=0, count=5, form=form, fps=8.0)
    assert clip.num_frames == 5 and read_greys(clip) == expected
    context, rate = read_context([path], num_frames=5, size=(16, 24), fps=fps)
    assert np.array_equal(context[0], read_frames(clip)) and rate == fps

  def test_crop_and_pad(self):
    frames = np.full((1, 20, 60, 3), 200, np.uint8)
    assert ClipFormat(size=(16, 24), num_frames=5).resize(frames).min() == 200
    padded = ClipFormat(size=(16, 24), num_frames=5, fit=ClipFit.PAD).resize(frames)
    assert padded.shape == (1, 16, 24, 3) and padded[0, 8].min() == 200 and padded[0, 0].max() == 0

  def test_formats_from_the_config(self):
    changes = {"data.height": 16, "data.width": 24, "data.buckets": ["32x16"], "data.fit": "pad", "data.fps": 8}
    form = ClipFormat.of(override(tiny(), changes).data)
    assert form == ClipFormat(size=(16, 24), num_frames=5, fit=ClipFit.PAD, fps=8.0, buckets=((32, 16),))
    assert form.for_shape((60, 40)).size == (32, 16) and form.for_shape((40, 60)).size == (16, 24)
    for key, value, message in (
      ("data.fit", "squash", "one of crop, pad, got 'squash'"),
      ("data.num_frames", 8, r"4n \+ 1 \(5 or 9\), got 8"),
    ):
      with pytest.raises(UserError, match=f"config.{key} must be {message}"):
        override(tiny(), {key: value})

  def test_keys_identify_content(self, tmp_path):
    """The same content in another file has the same key; another frame, size, fit or content has not."""
    path = write_video(tmp_path / "v.mp4", 20)
    copy = shutil.copy(path, tmp_path / "copy.mp4")
    other = write_video(tmp_path / "other.mp4", 20, shade=8)

    def key(path, start=0, count=5, form=FORM):
      return file_clip(path, start=start, count=count, form=form).key

    assert key(path) == key(copy)
    square = ClipFormat(size=(16, 16), num_frames=5)
    padded = ClipFormat(size=(16, 24), num_frames=5, fit=ClipFit.PAD)
    nearest = ClipFormat(size=(16, 24), num_frames=5, resample=Image.Resampling.NEAREST)
    keys = [key(path), key(other), key(path, start=1), key(path, count=1)]
    keys += [key(path, form=form) for form in (square, padded, nearest)]
    assert len(set(keys)) == len(keys)

  def test_keys_are_stable(self, tmp_path):
    """If these keys change, every cached latent is computed again: raise READING_VERSION only for other pixels."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"content")
    clips = (
      file_clip(path, start=0, count=5, form=FORM),
      array_clip("scenes|0|image", lambda: np.zeros((1, 4, 4, 3), np.uint8), 1, FORM),
    )
    assert [clip.key for clip in clips] == [
      "91df39be71779f7065ba9fe310ae99185a9784189a41ab08d29c7d1c1727182a",
      "28c70a075faa27f01a2c5f2daa6fe27d86274308797a49b3e168bb0b98b67ef1",
    ]

  def test_frames_are_counted(self, tmp_path):
    found = probe(write_video(tmp_path / "v.mp4", 13))
    assert (found.num_frames, found.fps, found.size) == (13, 8.0, (32, 48))

  def test_any_frames_of_a_video(self, tmp_path):
    """Across key frames, repeated and out of order: as decoded from the start."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (61, 4, 4, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    write_clip(tmp_path / "v.mp4", noise, fps=8)
    whole = np.stack(list(iterate_video(tmp_path / "v.mp4")))
    for indices in ([0], [60], [30, 31, 32], [7, 7, 50], [59, 3]):
      assert np.array_equal(read_video_frames(tmp_path / "v.mp4", indices), whole[indices])
    with pytest.raises(UserError, match="has only 61 frames, frame 61 is needed"):
      read_video_frames(tmp_path / "v.mp4", [60, 61])


class TestContext:
  def test_videos_are_cut_to_4n_plus_1_frames(self, tmp_path):
    video, image = write_video(tmp_path / "v.mp4", 12), write_image(tmp_path / "i.png")
    clips, fps = read_context([video, video, image], num_frames=17, size=(16, 24))
    assert [clip.shape for clip in clips] == [(9, 16, 24, 3), (9, 16, 24, 3), (1, 16, 24, 3)] and fps == 8

  def test_clips_that_have_to_be_videos(self, tmp_path):
    video, image = write_video(tmp_path / "v.mp4", 12), write_image(tmp_path / "i.png")
    clips, _ = read_context([video, video], num_frames=5, size=(16, 24), videos=(False, True))
    assert [len(clip) for clip in clips] == [1, 5]
    with pytest.raises(UserError, match=r"i\.png has 1 frames, and 5 are needed here"):
      read_context([image], num_frames=5, size=(16, 24), videos=(True,))


def test_cropping_keeps_the_aspect_ratio_and_the_centre():
  video = np.zeros((2, 40, 80, 3), np.uint8)
  video[:, :, 20:60] = 200
  cropped = resize_and_crop(video, (20, 20))
  assert (cropped[:, :, 2:-2] == 200).all() and cropped.min() > 150
  assert resize_and_crop(video, (64, 32)).shape == (2, 64, 32, 3)


def test_any_size_fits_any_other():
  """Where a side fits exactly, rounding must not reach beyond the frame."""
  rng = np.random.default_rng(0)
  for height, width, *size in rng.integers(8, 700, (300, 4)) // (1, 1, 2, 2):
    frames = np.zeros((1, height, width, 3), np.uint8)
    assert resize_and_crop(frames, tuple(map(int, size))).shape == (1, *size, 3)


class TestCache:
  def test_values_are_computed_once(self, tmp_path):
    cache, value = Cache(tmp_path, "a"), np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    assert cache.get("k") is None and "k" not in cache
    assert np.array_equal(cache.get_or_compute("k", lambda: value), value) and "k" in cache
    assert np.array_equal(cache.get_or_compute("k", lambda: 1 / 0), value)
    assert "k" not in Cache(tmp_path, "b"), "caches of other weights are separate"

  def test_corruption_is_detected(self, tmp_path):
    cache = Cache(tmp_path, "a")
    cache.put("k", np.zeros(5))
    data = bytearray(cache.path("k").read_bytes())
    data[-40] ^= 1
    cache.path("k").write_bytes(data)
    with pytest.warns(UserWarning, match="is corrupt and is computed again"):
      assert cache.get("k") is None
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      assert cache.get_or_compute("k", lambda: np.ones(2)).tolist() == [1, 1]
    assert cache.get("k").tolist() == [1, 1]

  def test_many_threads_read(self, tmp_path):
    """Python 3.11's ast, with which NumPy parses its headers, fails if several threads use it at once."""
    cache, clip = Cache(tmp_path, "a"), np.zeros((1, 2, 2, 3), np.uint8)
    cache.put("k", clip)
    np.save(tmp_path / "clip.npy", clip)
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(5)  # JAX frees its own arrays in each collection
    sys.setswitchinterval(1e-6)
    try:
      with ThreadPoolExecutor(8) as threads:
        assert all(np.array_equal(value, clip) for value in threads.map(cache.get, ["k"] * 400))
        paths = [tmp_path / "clip.npy"] * 400
        assert all(np.array_equal(loaded.frames, clip) for loaded in threads.map(read_clip, paths))
    finally:
      gc.set_threshold(*threshold)
      sys.setswitchinterval(interval)
