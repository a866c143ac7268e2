"""Whole videos: windows fit together without seams, and a killed sample is resumed to the bit."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.helpers import random_pipeline, relative_error
from univid_jax.config.boundary import override
from univid_jax.core.errors import UserError
from univid_jax.data.media.writer import write_clip
from univid_jax.inference.long_video import VideoReader
from univid_jax.inference.progress_file import ProgressFile
from univid_jax.inference.windows import Windows
from univid_jax.parallel.mesh import make_mesh


def moving_video(count: int, size: tuple[int, int] = (16, 16), seed: int = 0) -> np.ndarray:
  """A smooth pattern that moves a pixel a frame."""
  height, width = size
  rng = np.random.default_rng(seed)
  texture = np.kron(rng.uniform(0, 255, (height // 4 + 1, (width + count) // 4 + 2, 3)), np.ones((4, 4, 1)))
  return np.stack([texture[:height, t : t + width] for t in range(count)]).astype(np.uint8)


@pytest.fixture(scope="module")
def pipeline(tiny_config):
  return random_pipeline(override(tiny_config, {"data.num_frames": 9}), make_mesh({}, jax.devices()[:1]))


@pytest.mark.parametrize("num_frames", [1, 5, 17, 18, 21, 150, 601])
@pytest.mark.parametrize("length, overlap", [(2, 0), (3, 1), (5, 2), (21, 10)])
def test_windows_share_all_groups(num_frames, length, overlap):
  windows = Windows.spread(num_frames, length=length, temporal_stride=4, overlap=overlap)
  assert windows.total == max(-(-(num_frames - 1) // 4) + 1, length)
  assert windows.starts[0] == 0 and windows.starts[-1] == windows.total - length
  total = np.zeros(windows.num_entries)
  for window in range(len(windows.starts)):
    entries, weights = windows.entries(window), windows.weights[window]
    assert (weights > 0).all() and len(set(entries)) == length
    total[entries] += weights
  np.testing.assert_allclose(total, 1, atol=1e-6)
  assert all(length - 1 - (b - a) >= overlap for a, b in itertools.pairwise(windows.starts))


def test_frames_after_the_end_repeat_the_last():
  video = VideoReader.from_frames(moving_video(7))
  assert np.array_equal(video.read_padded(4, 5)[:3], moving_video(7)[4:])
  assert np.array_equal(video.read_padded(4, 5)[2:], moving_video(7)[-1:].repeat(3, axis=0))
  assert np.array_equal(video.read_padded(9, 2), moving_video(7)[-1:].repeat(2, axis=0))


@pytest.mark.parametrize("solver", ["euler", pytest.param("unipc", marks=pytest.mark.long)])
@pytest.mark.parametrize("guidance_scale", [pytest.param(1.0, marks=pytest.mark.long), 2.0])
def test_one_window_is_a_sample(pipeline, solver, guidance_scale):
  a, query = moving_video(9), moving_video(9, seed=1)
  options = dict(num_inference_steps=3, solver=solver, guidance_scale=guidance_scale)
  video = pipeline.sample_video([a, a], query, **options)
  noise = np.stack([jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (4, 4, 16)) for t in range(3)])
  alone = pipeline.sample([a, a, query], latents=noise, **options)
  frames = np.concatenate(list(video))
  assert video.num_windows == 1 and frames.shape == (9, 16, 16, 3)
  assert np.abs(frames.astype(int) - alone.frames).max() <= 1


@pytest.mark.parametrize("carry_context", [False, True])
def test_killed_and_resumed(pipeline, tmp_path: Path, monkeypatch, carry_context):
  """Another process goes on from the last saved state; the state of another command is not used."""
  a, query = moving_video(9), moving_video(30, seed=1)
  options = dict(num_inference_steps=4, solver="unipc", carry_context=carry_context)
  monkeypatch.setattr("univid_jax.inference.progress_file.SAVE_SECONDS", 0.0)
  steps: list[int] = []

  def frames(request: str, stop: int | None = None) -> np.ndarray:
    def progress(taken: int) -> None:
      steps.append(taken)
      if taken == stop:
        raise KeyboardInterrupt

    saved = ProgressFile(tmp_path / "state.npz", {"request": request})
    return np.concatenate(list(pipeline.sample_video([a, a], query, saved=saved, progress=progress, **options)))

  whole = np.concatenate(list(pipeline.sample_video([a, a], query, **options)))
  assert whole.shape == (30, 16, 16, 3)
  with pytest.raises(KeyboardInterrupt):
    frames("this", stop=11)
  steps.clear()
  assert np.array_equal(frames("this"), whole)
  assert min(steps) == (4 if carry_context else 11), "a window that was sampled is decoded again"
  steps.clear()
  assert np.array_equal(frames("other"), whole) and min(steps) == 1
  (tmp_path / "state.npz").write_bytes(b"damaged")
  assert np.array_equal(frames("this"), whole)


def test_resumed_in_the_middle_of_a_batch(tiny_config, tmp_path: Path, monkeypatch):
  """Of two devices, and five windows; batches stay the same, and so do the bytes."""
  pipeline = random_pipeline(override(tiny_config, {"data.num_frames": 9}), make_mesh({"data": 2}, jax.devices()[:2]))
  a, query = moving_video(9), moving_video(24, seed=1)
  monkeypatch.setattr("univid_jax.inference.progress_file.SAVE_SECONDS", 0.0)
  steps: list[int] = []

  def sample(stop: int | None = None, **options) -> np.ndarray:
    def progress(taken: int) -> None:
      steps.append(taken)
      if taken == stop:
        raise KeyboardInterrupt

    return np.concatenate(
      list(pipeline.sample_video([a, a], query, num_inference_steps=2, progress=progress, **options))
    )

  whole, saved = sample(), ProgressFile(tmp_path / "state.npz", {})
  for stop in (2, 4, 6):
    with pytest.raises(KeyboardInterrupt):
      sample(stop, saved=saved)
  assert np.array_equal(sample(saved=saved), whole)
  assert steps == [*range(1, 11), *(1, 2), *(2, 3, 4), *(4, 5, 6), *range(6, 11)]


def test_eight_devices_are_one(tiny_config, pipeline):
  spread = random_pipeline(override(tiny_config, {"data.num_frames": 9}), make_mesh({"data": -1}))
  a, query = moving_video(9), moving_video(24, seed=1)
  one, eight = (
    np.concatenate(list(pipe.sample_video([a, a], query, num_inference_steps=2))) for pipe in (pipeline, spread)
  )
  assert relative_error(one, eight) <= 1e-2


@pytest.mark.parametrize("attention", ["full", "context_causal"])
def test_the_latents_are_a_fixed_point_of_overlap(tiny_config, attention):
  """A window's velocity is the model's on a sentence of its own clip; checked with a single step."""
  config = override(tiny_config, {"data.num_frames": 9, "model.attention": attention})
  pipeline = random_pipeline(config, make_mesh({}, jax.devices()[:1]))
  a, query = moving_video(9), moving_video(17, seed=1)
  video = pipeline.sample_video([a, a], query, num_inference_steps=1)
  windows = Windows.spread(17, length=3, temporal_stride=4, overlap=1)
  noise = np.stack([jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (4, 4, 16)) for t in range(5)])
  expected = np.zeros((windows.num_entries, 4, 4, 16), np.float32)
  for window, start in enumerate(windows.starts):
    part = noise[start : start + 3]
    sample = pipeline.sample([a, a, query[4 * start : 4 * start + 9]], latents=part, num_inference_steps=1)
    expected[windows.entries(window)] += sample.latents * windows.weights[window][:, None, None, None]
  frames = np.concatenate(list(video))
  decoded = (pipeline.decode(expected[:5]) + 1) * 127.5
  assert np.abs(frames - decoded).max() <= 1.0


def test_what_does_not_fit(pipeline):
  a, query = moving_video(9), moving_video(30)
  for examples, options, message in (
    ([a], {}, "an odd number of clips .* got 2"),
    ([a[:, :8], a[:, :8]], {}, "all clips must have the same size"),
    ([a, a], {"num_frames": 1}, "windows need several frames"),
    ([a, a], {"num_frames": 6}, r"4n \+ 1 frames, got 6"),
  ):
    with pytest.raises(UserError, match=message):
      pipeline.sample_video(examples, query, **options)


def test_a_file_is_read_at_the_size_of_the_examples(pipeline, tmp_path: Path):
  """As docs/guide/sampling.md shows it: files of any size and length."""
  paths = [str(tmp_path / f"{name}.mp4") for name in ("a", "a2", "long")]
  for path, count, size in zip(paths, (9, 9, 21), ((32, 48), (16, 16), (64, 32))):
    write_clip(path, moving_video(count, size))
  a, a2 = pipeline.read_clips(paths[:2])
  blocks = list(pipeline.sample_video([a, a2], paths[2], num_inference_steps=1))
  assert np.concatenate(blocks).shape == (21, *a.shape[1:])
  reader = VideoReader.open(Path(paths[2]), pipeline.clip_format)
  assert reader.num_frames == 21 and reader.read(19, 2).shape == (2, *pipeline.size, 3)
