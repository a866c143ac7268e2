"""Clips that are read when needed, and what is kept of them."""

import gc
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.test_datasets import FORM, greys, video
from univid_jax.data.cache import Cache
from univid_jax.data.clips import ClipFormat, file_clip, fit, probe
from univid_jax.data.video import iterate_video, read_clip, read_video_frames, write_clip


class TestClips:
  def test_other_rates(self, tmp_path):
    """8 frames a second thinned to 4, and held at 16."""
    path = video(tmp_path / "v.mp4", 20)
    for fps, expected in ((4.0, [0, 16, 32, 48, 64]), (16.0, [0, 8, 8, 16, 16])):
      form = ClipFormat(size=(16, 24), num_frames=5, fps=fps)
      assert greys(file_clip(path, start=0, count=5, form=form, fps=8.0)) == expected

  def test_fit(self):
    frames = np.full((1, 20, 60, 3), 200, np.uint8)
    assert fit(frames, ClipFormat(size=(16, 24), num_frames=5)).min() == 200
    padded = fit(frames, ClipFormat(size=(16, 24), num_frames=5, fit="pad"))
    assert padded.shape == (1, 16, 24, 3) and padded[0, 8].min() == 200 and padded[0, 0].max() == 0
    with pytest.raises(ValueError, match="crop or pad"):
      ClipFormat(size=(16, 24), num_frames=5, fit="squash")
    with pytest.raises(ValueError, match="got 8; the nearest are 5 and 9"):
      ClipFormat(size=(16, 24), num_frames=8)

  def test_keys_name_content(self, tmp_path):
    """The same content elsewhere has the same key; another frame, size or file has not."""
    path = video(tmp_path / "v.mp4", 20)
    copy = shutil.copy(path, tmp_path / "copy.mp4")
    other = video(tmp_path / "other.mp4", 20, shade=8)
    make = lambda p, start=0, count=5, form=FORM: file_clip(p, start=start, count=count, form=form).key  # noqa: E731
    assert make(path) == make(tmp_path / "copy.mp4") and copy
    square, padded = ClipFormat(size=(16, 16), num_frames=5), ClipFormat(size=(16, 24), num_frames=5, fit="pad")
    variants = [make(path), make(other), make(path, start=1), make(path, count=1), make(path, form=square),
                make(path, form=padded)]
    assert len(set(variants)) == len(variants)

  def test_frames_are_counted(self, tmp_path):
    found = probe(video(tmp_path / "v.mp4", 13))
    assert (found.frames, found.fps, found.size) == (13, 8.0, (32, 48))

  def test_any_frames_of_a_video(self, tmp_path):
    """From the middle, across key frames, repeated and out of order: what decoding from the start gives."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (61, 4, 4, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    write_clip(tmp_path / "v.mp4", noise, fps=8)
    whole = np.stack(list(iterate_video(tmp_path / "v.mp4")))
    for indices in ([0], [60], [30, 31, 32], [7, 7, 50], [59, 3]):
      assert np.array_equal(read_video_frames(tmp_path / "v.mp4", indices), whole[indices])
    with pytest.raises(ValueError, match="has only 61 frames, frame 61 is needed"):
      read_video_frames(tmp_path / "v.mp4", [60, 61])


class TestCache:
  def test_there_and_back(self, tmp_path):
    cache, value = Cache(tmp_path, "a"), np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    assert cache.get("k") is None and cache.missing(["k", "l"]) == ["k", "l"]
    assert np.array_equal(cache.get_or_compute("k", lambda: value), value)
    assert np.array_equal(cache.get_or_compute("k", lambda: 1 / 0), value)
    assert "k" not in Cache(tmp_path, "b"), "other weights are another cache"

  def test_damage_is_seen(self, tmp_path):
    cache = Cache(tmp_path, "a")
    cache.put("k", np.zeros(5))
    data = bytearray(cache.path("k").read_bytes())
    data[-40] ^= 1
    cache.path("k").write_bytes(data)
    with pytest.warns(UserWarning, match="is damaged and is computed again"):
      assert cache.get("k") is None
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      assert cache.get_or_compute("k", lambda: np.ones(2)).tolist() == [1, 1]
    assert cache.get("k").tolist() == [1, 1]

  def test_many_threads_read(self, tmp_path):
    """Python 3.11's ast, with which NumPy reads its headers, fails when threads change places within it."""
    cache, clip = Cache(tmp_path, "a"), np.zeros((1, 2, 2, 3), np.uint8)
    cache.put("k", clip)
    np.save(tmp_path / "clip.npy", clip)
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(5)  # JAX collects what is its own then
    sys.setswitchinterval(1e-6)
    try:
      with ThreadPoolExecutor(8) as threads:
        assert all(np.array_equal(value, clip) for value in threads.map(cache.get, ["k"] * 400))
        assert all(np.array_equal(loaded.frames, clip) for loaded in threads.map(read_clip, [tmp_path / "clip.npy"] * 400))
    finally:
      gc.set_threshold(*threshold)
      sys.setswitchinterval(interval)
