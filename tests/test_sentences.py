"""Clips become sentences."""

import numpy as np
import pytest

from univid_jax.data.sentences import make_sentence, prompt_for, video_pattern
from univid_jax.data.sources import ComputedSentences, FolderSource, LazySentences, PhotoSource, draw
from univid_jax.data.tasks import TASKS
from univid_jax.types import Role, Sentence

CLIP = np.zeros((1, 4, 4, 3), np.uint8)


@pytest.mark.parametrize("context, num_clips, lengths", [
    ("I", 4, "VVVV"), ("II", 6, "IIIIII"), ("III", 4, "IIVV"), ("III", 8, "IIIIIIVV"), ("IV", 4, "IVIV"), ("IV", 6, "IVIVIV")])
def test_patterns(context, num_clips, lengths):
  assert video_pattern(context, num_clips) == tuple(letter == "V" for letter in lengths)


@pytest.mark.parametrize("context, num_clips", [("V", 4), ("I", 5), ("I", 2)])
def test_patterns_that_are_none(context, num_clips):
  with pytest.raises(ValueError, match=r"unknown context|4, 6, 8"):
    video_pattern(context, num_clips)


def test_reversal_turns_every_pair_round():
  a, a2, b, b2 = (np.full((1, 2, 2, 3), i, np.uint8) for i in range(4))
  sentence = make_sentence([(a, a2), (b, b2)], reverse=True)
  assert [clip[0, 0, 0, 0] for clip in sentence.clips] == [1, 0, 3, 2]
  assert sentence.roles == (Role.CONTEXT,) * 3 + (Role.TARGET,)


def test_a_sentence_needs_a_target_and_it_stands_last():
  with pytest.raises(ValueError, match="needs a target"):
    Sentence(clips=(CLIP,), roles=(Role.CONTEXT,))
  with pytest.raises(ValueError, match="targets stand last"):
    Sentence(clips=(CLIP, CLIP), roles=(Role.TARGET, Role.CONTEXT))


def test_prompts():
  assert prompt_for("depth map", "null") == ""
  assert "its corresponding depth map." in prompt_for("depth map", "detailed")
  assert "camera motion" in prompt_for("camera movement", "detailed")
  assert prompt_for("anything", "rough").startswith("[clip1] and [clip2] form an editing pair.")
  with pytest.raises(ValueError, match="unknown prompt style"):
    prompt_for("anything", "poetic")


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("frames", [1, 5])
def test_tasks(name, frames):
  if TASKS[name].videos_only and frames == 1:
    pytest.skip("means nothing for an image")
  task = TASKS[name]
  clip = np.random.default_rng(0).uniform(size=(frames, 16, 24, 3)).astype(np.float32)
  params = task.draw(np.random.default_rng(1))
  out = task.apply(clip, **params)
  assert out.shape == clip.shape
  assert out.min() >= -1e-6 and out.max() <= 1 + 1e-6
  np.testing.assert_array_equal(out, task.apply(clip, **params))
  if frames > 1 or not task.animates:
    assert np.abs(out - clip).mean() > 0.01


def test_camera_movement_starts_at_rest_and_makes_a_video_of_an_image():
  rng = np.random.default_rng(0)
  image = np.round(rng.uniform(size=(1, 16, 24, 3)) * 255).astype(np.float32) / 255
  video = TASKS["camera_movement"].apply(image, zoom=1.5, angle=20.0, shift=[1.0, -1.0], num_frames=5)
  assert video.shape == (5, 16, 24, 3)
  np.testing.assert_allclose(video[0], image[0], atol=0.5 / 255)
  steps = [np.abs(video[i] - image[0]).mean() for i in range(5)]
  assert steps[1] > 0.01 and steps[4] > steps[1]


def test_camera_movement_never_shows_what_is_outside():
  white = np.ones((1, 32, 18, 3), np.float32)
  for seed in range(50):
    params = TASKS["camera_movement"].draw(np.random.default_rng(seed))
    assert TASKS["camera_movement"].apply(white, **params, num_frames=5).min() == 1


class TestComputedSentences:
  def source(self, **options):
    defaults = dict(clips=[PhotoSource.bundled("train")], tasks=dict.fromkeys(TASKS, 1.0), num_frames=5, size=(16, 16),
                    num_sentences=100, seed=3)
    return ComputedSentences(**defaults | options)

  def test_an_index_is_always_the_same_sentence(self):
    first, again, other = self.source()[7], self.source()[7], self.source(seed=4)[7]
    assert first.task == again.task and all(np.array_equal(a, b) for a, b in zip(first.clips, again.clips))
    assert not (first.task == other.task and all(np.array_equal(a, b) for a, b in zip(first.clips, other.clips)))

  def test_both_pairs_share_the_parameters_and_the_sources_differ(self):
    source = self.source(tasks={"duotone": 1.0}, contexts={"II": 1.0})
    for index in range(10):
      a, a2, b, b2 = source[index].clips
      assert not np.array_equal(a, b)
      # A duotone's colours lie on one line; both targets lie on the same.
      colors = np.concatenate([a2.reshape(-1, 3), b2.reshape(-1, 3)]).astype(np.float64)
      variances = np.linalg.svd(colors - colors.mean(0), compute_uv=False)
      assert variances[1] < 0.02 * variances[0]

  def test_contexts_and_shots(self):
    sentence = self.source(tasks={"camera_movement": 1.0}, animating_contexts={"IV": 1.0}, num_clips={6: 1.0})[0]
    assert [len(clip) for clip in sentence.clips] == [1, 5] * 3 and sentence.context == "IV"

  def test_reversal(self):
    forward = self.source(tasks={"greyscale": 1.0}, contexts={"II": 1.0})[0]
    backward = self.source(tasks={"greyscale": 1.0}, contexts={"II": 1.0}, reverse_probability=1.0)[0]
    assert np.array_equal(forward.clips[0], backward.clips[1]) and np.array_equal(forward.clips[1], backward.clips[0])

  def test_unknown_tasks_and_bad_weights(self):
    with pytest.raises(ValueError, match="unknown task 'mowing'"):
      self.source(tasks={"mowing": 1.0})
    for weights in ({}, {"a": 0.0}, {"a": -1.0, "b": 2.0}):
      with pytest.raises(ValueError, match="weights"):
        draw(np.random.default_rng(0), weights)


def test_a_folder_of_videos_and_photos(tmp_path):
  from univid_jax.data.video import write_clip
  folder, cache = tmp_path / "my clips ü", tmp_path / "cache"
  ramp = np.broadcast_to(np.arange(12, dtype=np.uint8)[:, None, None, None] * 20, (12, 48, 64, 3))
  write_clip(folder / "a video.mp4", ramp)
  write_clip(folder / "photo.png", ramp[:1])
  (folder / "notes.txt").write_text("not a clip")
  source = FolderSource.open(str(folder), cache=str(cache), side=24)
  assert [clip.shape for clip in source.clips] == [(12, 24, 32, 3), (1, 24, 32, 3)]
  video = source.clip(0, np.random.default_rng(0), num_frames=5, size=(16, 16))
  assert video.shape == (5, 16, 16, 3)
  assert np.all(np.diff(video.mean(axis=(1, 2, 3))) > 10)
  assert source.clip(1, np.random.default_rng(0), num_frames=5, size=(16, 16)).shape == (5, 16, 16, 3)
  written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
  FolderSource.open(str(folder), cache=str(cache), side=24)
  assert written == {path: path.stat().st_mtime_ns for path in cache.iterdir()}


def test_folders_without_clips(tmp_path):
  (tmp_path / "notes.txt").write_text("not a clip")
  with pytest.raises(ValueError, match="no images or videos in"):
    FolderSource.open(str(tmp_path), cache=str(tmp_path), side=24)
  with pytest.raises(FileNotFoundError, match="no such folder"):
    FolderSource.open(str(tmp_path / "missing"), cache=str(tmp_path), side=24)


def test_lazy_sentences_are_the_same_sentences():
  """Known before any picture is made: task, context, prompt and keys; the clips are those of the sentence itself."""
  computed = ComputedSentences(clips=[PhotoSource.bundled("train")], tasks=dict.fromkeys(TASKS, 1.0), num_frames=5, size=(16, 16),
                               num_sentences=30, seed=4, prompt_style="detailed", prompt_dropout=0.3, num_clips={4: 1.0, 6: 1.0})
  lazy, keys = LazySentences(computed, "identity"), set()
  for index in range(30):
    plan, whole = lazy[index], computed[index]
    assert (plan.task, plan.context, plan.prompt, plan.roles) == (whole.task, whole.context, whole.prompt, whole.roles)
    assert all(np.array_equal(ref.read(), clip) for ref, clip in zip(plan.clips, whole.clips, strict=True))
    assert plan.prompt in lazy.prompts()
    keys |= {ref.key for ref in plan.clips}
  assert keys == {ref.key for ref in lazy.clips()} and len({s.prompt == "" for s in map(lazy.__getitem__, range(30))}) == 2
