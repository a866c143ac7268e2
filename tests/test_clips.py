"""Clips that are read on demand, and the cache of what is computed from them."""

import dataclasses
import functools
import gc
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tests.clip_files import FORM, read_greys, write_image, write_video
from univid_jax.config.boundary import override
from univid_jax.config.presets import tiny
from univid_jax.core.errors import UserError
from univid_jax.core.options import ClipFit, Resampling
from univid_jax.core.sentence import read_frames
from univid_jax.data.cache.entries import Cache
from univid_jax.data.clips import (
  ClipFormat,
  ContextClip,
  Footage,
  context_shape,
  frame_rate,
  open_footage,
  read_context,
  resize_and_crop,
)
from univid_jax.data.identities import identify_all
from univid_jax.data.media.reader import read_clip
from univid_jax.data.media.writer import write_clip


class TestClips:
  @pytest.mark.parametrize("fps, expected", [(4.0, [0, 16, 32, 48, 64]), (16.0, [0, 0, 8, 8, 16])])
  def test_other_frame_rates(self, tmp_path, fps, expected):
    """A video of 8 frames per second, with frames dropped or repeated: the same by every way of reading."""
    path = write_video(tmp_path / "v.mp4", 20)
    form = ClipFormat(size=(16, 24), num_frames=5, fps=fps)
    footage = open_footage(path, form)
    clip = footage.clip(5)
    assert clip.num_frames == 5 and clip.size == (16, 24) and read_greys(clip) == expected
    (context,) = read_context([path], form)
    assert np.array_equal(context.frames, read_frames(clip)) and context.fps == fps
    used = f"frames 0 to 4 of {footage.num_frames}"
    resized = "48 x 32 resized to 24 x 16 (width x height)"
    assert context.changes == (used, f"8 resampled to {fps:g} frames per second", resized)

  @pytest.mark.parametrize("fps, length", [(16.0, 9), (4.0, 1)])
  def test_a_context_is_as_long_as_its_clip_at_another_rate(self, tmp_path, fps, length):
    """Five frames at 8 frames per second are nine at 16, and three at 4, of which one is 4n + 1."""
    path = write_video(tmp_path / "v.mp4", 5)
    form = ClipFormat(size=(16, 24), num_frames=17, fps=fps)
    (context,) = read_context([path], form)
    assert len(context.frames) == length and context_shape(path, form) == (length, 16, 24)

  def test_rates_that_are_almost_the_same_are_described(self, tmp_path):
    write_clip(tmp_path / "v.mp4", np.zeros((5, 16, 24, 3), np.uint8), fps=29.97)
    for fps, changes in ((30.2, ["29.97 resampled to 30.2 frames per second"]), (30.0, []), (29.97, [])):
      footage = open_footage(tmp_path / "v.mp4", ClipFormat(size=(16, 24), num_frames=5, fps=fps))
      assert footage.describe_changes(5) == changes

  def test_crop_and_pad(self):
    frames = np.full((1, 20, 60, 3), 200, np.uint8)
    assert ClipFormat(size=(16, 24), num_frames=5).resize(frames).min() == 200
    padded = ClipFormat(size=(16, 24), num_frames=5, fit=ClipFit.PAD).resize(frames)
    assert padded.shape == (1, 16, 24, 3) and padded[0, 8].min() == 200 and padded[0, 0].max() == 0

  @pytest.mark.parametrize("shape, expected", [((110, 100), (32, 16)), ((100, 110), (16, 32))])
  def test_the_nearest_size_is_that_which_crops_least(self, shape, expected):
    """Shapes are compared by ratios: 1.1 to 2 is 0.55, and 0.5 to 1.1 less, though it is nearer by difference."""
    for sizes in (((16, 32), (32, 16)), ((32, 16), (16, 32))):
      assert ClipFormat(size=sizes[0], num_frames=5, buckets=sizes[1:]).for_shape(shape).size == expected

  def test_formats_from_the_config(self):
    changes = {"data.height": 16, "data.width": 24, "data.buckets": ["32x16"], "data.fit": "pad", "data.fps": 8}
    form = ClipFormat.from_config(override(tiny(), changes).data)
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
      return open_footage(path, form, start=start).clip(count).key

    assert key(path) == key(copy)
    square = ClipFormat(size=(16, 16), num_frames=5)
    padded = ClipFormat(size=(16, 24), num_frames=5, fit=ClipFit.PAD)
    nearest = ClipFormat(size=(16, 24), num_frames=5, resample=Resampling.NEAREST)
    keys = [key(path), key(other), key(path, start=1), key(path, count=1)]
    keys += [key(path, form=form) for form in (square, padded, nearest)]
    assert len(set(keys)) == len(keys)

  def test_keys_are_stable(self, tmp_path):
    """If these keys change, every cached latent is computed again: raise READING_VERSION only for other pixels."""

    def key(fps, **changes):
      options = dict(name="", size=(4, 4), num_frames=9, form=FORM, identify=lambda: "x") | changes
      return Footage(fps=fps, clip_fps=fps, read=lambda count: np.zeros((count, 4, 4, 3)), **options).clip(5).key

    from_start = dict(is_resampled=True, form=dataclasses.replace(FORM, fps=6.4))
    assert key(8.0, **from_start) == "50f81d22ab45006843eaedda97c897956bc4235b0d8df498b011bee8002173cc"
    assert (
      key(8.0, start=5)
      == key(8.0, start=5, first=5)
      == "a33893f6fec587fa6b0591ee6419c439ecbccc9dbb151fa54c5dfc46f295a883"
    )
    began_at_5 = "e1222fc9cc8845d45fb31ff607124bee1b712372ae8717d0f8afd8293037be9f"  # resampled with the whole file
    assert key(8.0, **from_start, start=5, first=6) != key(8.0, **from_start, start=4, first=5) != began_at_5
    assert key(8.0) == key(None) == "f0671e921b5f87ef1f8453198f80e29df053c8200cb888f9c7826851a3cbdfa9"

  def test_a_changed_file_is_noticed(self, tmp_path):
    """Even if its size and its dates stay the same, as after `cp -p`."""
    path = write_image(tmp_path / "a.bmp", shade=50)
    clip = open_footage(path, FORM).clip(1)
    key = clip.key
    assert clip.read().max() == 50
    os.link(path, tmp_path / "link.bmp")
    os.utime(path)
    assert clip.read().max() == 50, "the content is the same"
    dates = path.stat()
    write_image(path, shade=90)
    os.utime(path, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    with pytest.raises(UserError, match=r"a\.bmp changed while it was in use"):
      clip.read()
    changed = open_footage(path, FORM).clip(1)
    assert changed.key != key and changed.read().max() == 90

  def test_many_files_are_identified_at_a_time_in_order(self):
    """Storage that is slow to answer is asked for several; the first failure is raised."""
    both_have_started = threading.Barrier(2, timeout=30)

    def identify(name):
      if name in ("2", "5"):
        both_have_started.wait()
      if name in ("7", "8"):
        raise FileNotFoundError(name)
      return name

    names = [str(number) for number in range(10)]
    assert identify_all([functools.partial(identify, name) for name in names[:7]]) == names[:7]
    with pytest.raises(FileNotFoundError, match="7"):
      identify_all([functools.partial(identify, name) for name in names[6:]])

  def test_folders_are_hashed_in_the_order_in_which_they_are_read(self, tmp_path):
    for name, shade in (("f2.png", 8), ("f10.png", 16)):
      for folder, frame in (("a", name), ("b", {"f2.png": "f10.png", "f10.png": "f2.png"}[name])):
        (tmp_path / folder).mkdir(exist_ok=True)
        write_image(tmp_path / folder / frame, shade=shade)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c" / "._f2.png").write_bytes(b"left by a Mac")
    clips = {name: open_footage(tmp_path / name, FORM).clip(2) for name in "abc"}
    assert [read_greys(clips[name]) for name in "abc"] == [[8, 16], [16, 8], [8, 16]]
    assert clips["a"].key == clips["c"].key != clips["b"].key

  def test_transparency_is_described(self, tmp_path):
    """Only where there is some; not an alpha channel without, nor in other clips than images."""
    form, pixels = ClipFormat(size=(16, 16), num_frames=5), np.full((16, 16, 4), 255, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "opaque.png")
    pixels[0, 0, 3] = 254
    for name in ("clear.png", "clear.webp"):
      Image.fromarray(pixels).save(tmp_path / name, lossless=True)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png", transparency=255)
    np.save(tmp_path / "array.npy", pixels[None, ..., :3])
    found = {path.name: clip.changes for path in tmp_path.iterdir() for clip in read_context([path], form)}
    white = ("transparent pixels are white",)
    transparent = dict.fromkeys(("clear.png", "clear.webp", "grey.png"), white)
    assert found == {"opaque.png": (), "array.npy": ()} | transparent

  def test_changes_are_described_with_numbers(self, tmp_path):
    path = write_video(tmp_path / "v.mp4", 30, size=(36, 64))
    for fit, how in ((ClipFit.CROP, "cropped"), (ClipFit.PAD, "padded with black")):
      footage = open_footage(path, ClipFormat(size=(16, 24), num_frames=5, fit=fit, fps=4.0), start=2)
      assert footage.describe_changes(5) == [
        "frames 2 to 6 of 15",
        "8 resampled to 4 frames per second",
        f"64 x 36 resized to 24 x 16 (width x height), 16 % {how}",
      ]
    assert open_footage(path, ClipFormat(size=(36, 64), num_frames=29)).describe_changes(30) == []


class TestContext:
  def test_videos_are_cut_to_4n_plus_1_frames(self, tmp_path):
    video, image = write_video(tmp_path / "v.mp4", 12), write_image(tmp_path / "i.png")
    clips = read_context([video, video, image], ClipFormat(size=(16, 24), num_frames=17))
    assert [clip.frames.shape for clip in clips] == [(9, 16, 24, 3), (9, 16, 24, 3), (1, 16, 24, 3)]
    assert frame_rate(clips) == 8 and clips[0].changes[0] == "frames 0 to 8 of 12"

  def test_the_query_decides_between_sizes(self, tmp_path):
    wide, tall = write_image(tmp_path / "wide.png", size=(20, 30)), write_image(tmp_path / "tall.png", size=(30, 20))
    form = ClipFormat(size=(16, 24), num_frames=5, buckets=((24, 16),))
    assert {clip.frames.shape for clip in read_context([wide, wide, tall], form)} == {(1, 24, 16, 3)}

  def test_only_the_query_is_extended(self, tmp_path):
    """Of 8 columns, half black: resized to 24 the other half begins at 12, extended still at 4."""
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, 4:] = 255
    Image.fromarray(half).save(tmp_path / "half.png")
    clips = read_context([tmp_path / "half.png"] * 3, ClipFormat(size=(24, 24), num_frames=5), extend_query=True)
    assert [int((clip.frames[0, 0, :, 0] > 127).argmax()) for clip in clips] == [12, 12, 4]

  @pytest.mark.parametrize(
    "rates, expected", [((24, None, 30), 30), ((24, 12, None), 24), ((None, 12, None), 12), ((None, None, None), None)]
  )
  def test_the_rate_is_the_query_s(self, rates, expected):
    frames = np.zeros((1, 4, 4, 3), np.uint8)
    assert frame_rate([ContextClip("", frames, fps, "", ()) for fps in rates]) == expected

  def test_clips_that_have_to_be_videos(self, tmp_path):
    video, image = write_video(tmp_path / "v.mp4", 12), write_image(tmp_path / "i.png")
    clips = read_context([video, video], FORM, videos=(False, True))
    assert [len(clip.frames) for clip in clips] == [1, 5]
    with pytest.raises(UserError, match=r"i\.png has 1 frame, and 5 are needed here"):
      read_context([image], FORM, videos=(True,))


def test_cropping_keeps_the_aspect_ratio_and_the_centre():
  video = np.zeros((2, 40, 80, 3), np.uint8)
  video[:, :, 20:60] = 200
  cropped = resize_and_crop(video, (20, 20))
  assert (cropped[:, :, 2:-2] == 200).all() and cropped.min() > 150
  assert resize_and_crop(video, (64, 32)).shape == (2, 64, 32, 3)


@pytest.mark.parametrize("shape, size", [((2, 5), (2, 2)), ((5, 2), (2, 2)), ((6, 9), (4, 4)), ((9, 6), (5, 7))])
def test_what_is_cropped_is_the_same_on_both_sides(shape, size):
  frames = np.random.default_rng(0).integers(0, 256, (1, *shape, 3), np.uint8)
  cropped = resize_and_crop(frames, size).astype(int)
  for axis in (1, 2):
    mirrored = resize_and_crop(np.flip(frames, axis), size)
    assert np.abs(np.flip(mirrored, axis) - cropped).max() <= 1


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

  def test_corruption_is_detected(self, tmp_path, caplog):
    cache = Cache(tmp_path, "a")
    cache.put("k", np.zeros(5))
    data = bytearray(cache.path("k").read_bytes())
    data[-40] ^= 1
    cache.path("k").write_bytes(data)
    assert cache.get("k") is None
    assert f"{cache.path('k')} is corrupt and is computed again" in caplog.messages
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
