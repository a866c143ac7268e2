"""Whole videos: windows fit together without seams, and a killed sample is resumed to the bit."""

import itertools
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from tests.helpers import random_pipeline, relative_error
from univid_jax.config.boundary import override
from univid_jax.core.errors import UserError
from univid_jax.data.media.writer import write_clip
from univid_jax.inference import long_video, progress_file
from univid_jax.inference.jobs import Job
from univid_jax.inference.long_video import VideoReader, VideoSample
from univid_jax.inference.plan import SamplingPlan
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


def test_weights_fall_linearly_towards_the_end_of_a_window():
  """Of five latent frames, two windows share two; the first latent frame of the second is its own."""
  first, second = Windows(7, 5, (0, 2)).weights
  np.testing.assert_allclose(first, [1, 1, 1, 2 / 3, 1 / 3])
  np.testing.assert_allclose(second, [1, 1 / 3, 2 / 3, 1, 1])


class RecordingPipeline:
  """Latents and frames are filled with numbers that tell what they are of.

  Those of frames are the first one's grey; the result of the n-th window consists of 100 + 10 n in latents, and of the
  greys from 100 + 10 n on in frames.
  """

  def __init__(self):
    self.encoders = mock.Mock(codec=mock.Mock(temporal_stride=4, latent_channels=3))
    self.config = mock.Mock(takes_condition=False, patch_size=(1, 1, 1))
    self.features, self.experts, self.joint_sampler = mock.Mock(), mock.Mock(), mock.Mock()
    self.jobs: list[tuple[list[float], np.ndarray, bool]] = []

  def latent_shape(self, shape):
    return 1 + (shape[0] - 1) // 4, 2, 2

  def encode(self, frames):
    return np.full((1 + (len(frames) - 1) // 4, 2, 2, 3), frames[0, 0, 0, 0], np.float32)

  def decode(self, latents):
    greys = latents[0, 0, 0, 0] + np.arange(4 * len(latents) - 3, dtype=np.float32)
    return greys[:, None, None, None] / 127.5 - np.ones((len(greys), 8, 8, 3), np.float32)

  def warn_of_first_frame(self):
    pass

  def pack_job(self, job, embeds):
    return []

  def decode_parts(self, latents):
    return []

  def sample_job(self, job, embeds, plan, *, progress):
    return np.full((3, 2, 2, 3), 90 + 10 * len(self.jobs), np.float32)

  def make_job(self, clips, noise, *, has_first_frame, **_):
    self.jobs.append(([float(clip[0, 0, 0, 0]) for clip in clips], noise, has_first_frame))
    return mock.Mock(spec=Job)


def record_sampling(monkeypatch, *, num_frames, window_frames, carry_context):
  """Returns the pipeline, a sample over a query whose greys number its frames, and the noise of all latent frames."""
  pipeline = RecordingPipeline()
  monkeypatch.setattr(long_video, "make_job", pipeline.make_job)
  monkeypatch.setattr(long_video, "JointWindows", mock.Mock())
  numbers = np.arange(num_frames, dtype=np.uint8)[:, None, None, None] + np.zeros((num_frames, 8, 8, 3), np.uint8)
  video = VideoSample(
    pipeline,
    [np.full((1, 8, 8, 3), grey, np.uint8) for grey in (200, 201)],
    VideoReader.from_frames(numbers),
    embeds=[],
    plan=mock.Mock(spec=SamplingPlan, sigmas=np.ones(1), step_cache=None),
    window_frames=window_frames,
    seed=5,
    carry_context=carry_context,
  )
  key = jax.random.key(5)
  noise = [jax.random.normal(jax.random.fold_in(key, t), (2, 2, 3)) for t in range(1 + (num_frames - 1) // 4)]
  return pipeline, video, np.stack(noise)


def test_what_each_window_in_turn_is_given(monkeypatch):
  """The examples, the window before and its result, its own part of the query, and the last frame of that result."""
  pipeline, video, noise = record_sampling(monkeypatch, num_frames=25, window_frames=9, carry_context=True)
  greys = np.concatenate(list(video))[:, 0, 0, 0]
  clips, noises, has_first_frame = zip(*pipeline.jobs)
  assert list(clips) == [[200, 201, 0, 0], [200, 201, 0, 100, 8, 108, 0], [200, 201, 8, 110, 16, 118, 0]]
  assert has_first_frame == (False, True, True)
  for found, expected in zip(noises, (noise[0:3], noise[3:5], noise[5:7]), strict=True):
    np.testing.assert_array_equal(found, expected)
  assert greys.tolist() == [*range(100, 109), *range(111, 119), *range(121, 129)]


def test_the_noise_of_windows_that_advance_together(monkeypatch):
  """Each latent frame of the video has its own, which the first one of a window shares, wherever it is."""
  pipeline, video, noise = record_sampling(monkeypatch, num_frames=33, window_frames=17, carry_context=False)
  pipeline.joint_sampler.sample = lambda experts, joint, noise, *_, **__: given.append(noise) or noise
  given: list[np.ndarray] = []
  assert list(video) == [] and video.num_windows == 3
  np.testing.assert_array_equal(given[0].reshape(-1, 2, 2, 3), noise[[*range(9), 2, 4]])


@pytest.mark.parametrize("seconds, interval", [(0.5, 30.0), (4.0, 120.0)])
def test_saving_takes_a_thirtieth_of_the_time_at_most(tmp_path: Path, monkeypatch, seconds, interval):
  clock = [1000.0]
  monkeypatch.setattr(progress_file, "time", mock.Mock(monotonic=lambda: clock[0]))
  monkeypatch.setattr(progress_file.np, "savez", lambda *_, **__: clock.append(clock.pop() + seconds))
  progress = ProgressFile(tmp_path / "state.npz", {})
  progress.save({})
  for passed, is_due in ((interval - 1, False), (interval, True)):
    clock[0] = 1000 + seconds + passed
    assert progress.is_due() == is_due


def test_frames_after_the_end_repeat_the_last():
  video = VideoReader.from_frames(moving_video(7))
  assert np.array_equal(video.read_padded(4, 5)[:3], moving_video(7)[4:])
  assert np.array_equal(video.read_padded(4, 5)[2:], moving_video(7)[-1:].repeat(3, axis=0))
  assert np.array_equal(video.read_padded(9, 2), moving_video(7)[-1:].repeat(2, axis=0))


@pytest.mark.parametrize("solver", ["euler", pytest.param("unipc", marks=pytest.mark.long)])
@pytest.mark.parametrize("guidance_scale", [pytest.param(1.0, marks=pytest.mark.long), 2.0])
def test_one_window_is_a_sample(pipeline, monkeypatch, solver, guidance_scale):
  a, query = moving_video(9), moving_video(9, seed=1)
  monkeypatch.setattr(pipeline.encoders, "embed_prompt", lambda text: np.ones((len(text), pipeline.config.text_dim)))
  options = dict(num_inference_steps=3, solver=solver, guidance_scale=guidance_scale, negative_prompt="no")
  video = pipeline.sample_video([a, a], query, **options)
  noise = np.stack([jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (4, 4, 16)) for t in range(3)])
  alone = pipeline.sample([a, a, query], latents=noise, **options)
  frames = np.concatenate(list(video))
  assert video.num_windows == 1 and frames.shape == (9, 16, 16, 3)
  assert np.abs(frames.astype(int) - alone.frames).max() <= 1


@pytest.mark.parametrize("carry_context", [pytest.param(False, marks=pytest.mark.long), True])
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


@pytest.mark.parametrize("attention", [pytest.param("full", marks=pytest.mark.long), "context_causal"])
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
