"""Visual sentences: contexts, prompts, computed tasks and their natural clips."""

import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy
from PIL import Image

from univid_jax.config.boundary import from_config_dict, override
from univid_jax.config.presets import get_config, tiny
from univid_jax.core.contexts import Motion, make_sentence, video_pattern
from univid_jax.core.errors import UserError
from univid_jax.core.options import PromptStyle
from univid_jax.core.sentence import ClipRef, Role, Sentence, read_frames
from univid_jax.data.media.writer import write_clip
from univid_jax.data.prompts import prompt_for
from univid_jax.data.sources.base import draw
from univid_jax.data.sources.computed import ComputedSentences, LazySentences, computed_identity, open_computed
from univid_jax.data.sources.folder import FolderSource
from univid_jax.data.sources.open import open_data
from univid_jax.data.sources.photos import PhotoSource, moving_window
from univid_jax.data.tasks import TASKS, masks, restoration
from univid_jax.data.tasks.base import Task, check_draw, draw_nothing, from_unit, to_unit
from univid_jax.data.tasks.camera import camera_poses
from univid_jax.evaluation.sentences import plan_other_pairs, plan_sentences
from univid_jax.training.validation import select_sentences

CLIP = np.zeros((1, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
  "context, num_clips, lengths",
  [
    ("I", 4, "VVVV"),
    ("II", 6, "IIIIII"),
    ("III", 4, "IIVV"),
    ("III", 8, "IIIIIIVV"),
    ("IV", 4, "IVIV"),
    ("IV", 6, "IVIVIV"),
  ],
)
def test_patterns_of_images_and_videos(context, num_clips, lengths):
  assert video_pattern(context, num_clips) == tuple(letter == "V" for letter in lengths)


@pytest.mark.parametrize("context, num_clips", [("V", 4), ("I", 5), ("I", 2)])
def test_invalid_patterns(context, num_clips):
  with pytest.raises(UserError, match=r"unknown context|4, 6, 8"):
    video_pattern(context, num_clips)


def test_reversal_swaps_every_pair():
  a, a2, b, b2 = (np.full((1, 2, 2, 3), i, np.uint8) for i in range(4))
  sentence = make_sentence([(a, a2), (b, b2)], reverse=True)
  assert [clip[0, 0, 0, 0] for clip in sentence.clips] == [1, 0, 3, 2]
  assert sentence.roles == (Role.CONTEXT,) * 3 + (Role.TARGET,)


def test_a_sentence_needs_a_target_and_it_comes_last():
  with pytest.raises(ValueError, match="needs a target"):
    Sentence(clips=(CLIP,), roles=(Role.CONTEXT,))
  with pytest.raises(ValueError, match="targets must come last"):
    Sentence(clips=(CLIP, CLIP), roles=(Role.TARGET, Role.CONTEXT))


def test_prompts():
  assert prompt_for("depth map", PromptStyle.NULL) == ""
  assert "its corresponding depth map." in prompt_for("depth map", PromptStyle.DETAILED)
  assert "camera motion" in prompt_for("camera movement", PromptStyle.DETAILED)
  assert prompt_for("anything", PromptStyle.ROUGH).startswith("[clip1] and [clip2] form an editing pair.")
  with pytest.raises(UserError, match=r"config\.data\.prompt must be one of null, rough, detailed, got 'poetic'"):
    override(tiny(), {"data.prompt": "poetic"})


CASES = Path(__file__).parent / "cases" / "videos"


class TestTasks:
  @pytest.mark.parametrize("name", TASKS)
  @pytest.mark.parametrize("frames", [1, 5])
  def test_targets(self, name, frames):
    """They have the clip's shape and range, depend only on the parameters and the pair, and differ from the clip."""
    task = TASKS[name]
    if task.videos_only and frames == 1:
      pytest.skip("meaningless for images")
    clip = np.random.default_rng(0).uniform(size=(frames, 16, 24, 3)).astype(np.float32)
    params = task.draw(np.random.default_rng(1))
    out = task.apply(clip, **params)
    assert out.shape == clip.shape
    assert out.min() >= -1e-6 and out.max() <= 1 + 1e-6
    np.testing.assert_array_equal(out, task.apply(clip, **params))
    if frames > 1 or not task.animates:
      assert np.abs(out - clip).mean() > 0.01

  def test_camera_movement_starts_at_rest_and_makes_a_video_of_an_image(self):
    rng = np.random.default_rng(0)
    image = np.round(rng.uniform(size=(1, 16, 24, 3)) * 255).astype(np.float32) / 255
    video = TASKS["camera_movement"].apply(image, zoom=1.5, angle=20.0, shift=[1.0, -1.0], num_frames=5)
    assert video.shape == (5, 16, 24, 3)
    np.testing.assert_allclose(video[0], image[0], atol=0.5 / 255)
    steps = [np.abs(video[i] - image[0]).mean() for i in range(5)]
    assert steps[1] > 0.01 and steps[4] > steps[1]

  def test_camera_movement_stays_inside_the_frame(self):
    white = np.ones((1, 32, 18, 3), np.float32)
    for seed in range(50):
      params = TASKS["camera_movement"].draw(np.random.default_rng(seed))
      assert TASKS["camera_movement"].apply(white, **params, num_frames=5).min() == 1

  @pytest.mark.parametrize("size", [(32, 18), (18, 32), (16, 64), (24, 24)])
  @pytest.mark.parametrize("angle", [-15.0, 15.0])
  @pytest.mark.parametrize("shift", [(1.0, 1.0), (-1.0, 1.0)])
  def test_the_corners_of_the_view_are_inside_the_frame(self, size, angle, shift):
    height, width = size
    corners = np.array([[width, height], [-width, height], [width, -height], [-width, -height]]) / 2
    for log_zoom, radians, x, y in camera_poses(9, size, zoom=1.2, angle=angle, shift=shift):
      cos, sin = np.cos(radians), np.sin(radians)
      seen = corners @ np.array([[cos, -sin], [sin, cos]]) / np.exp(log_zoom) + [(0.5 + x) * width, (0.5 + y) * height]
      assert np.all(seen >= -1e-9) and np.all(seen <= np.array([width, height]) + 1e-9)

  def test_the_camera_moves_from_the_middle_by_a_share_of_what_the_zoom_allows(self):
    """Halfway the zoom is 2, the root of 4, which leaves a quarter of the frame on each side; half of that is used."""
    poses = camera_poses(3, (16, 24), zoom=4.0, angle=0.0, shift=(1.0, -0.4))
    np.testing.assert_allclose(
      poses, [[0, 0, 0, 0], [np.log(2), 0, 0.125, -0.05], [np.log(4), 0, 0.375, -0.15]], atol=1e-12
    )

  def test_what_moves_is_found_where_it_is_although_the_camera_pans(self):
    scene = scipy.ndimage.gaussian_filter(np.random.default_rng(0).uniform(0, 1, (40, 120)), 1)
    scene = 0.8 * (scene - scene.min()) / np.ptp(scene)
    grey, is_object = np.stack([scene[:, 20 + 4 * t :][:, :64] for t in range(5)]), np.zeros((5, 40, 64), bool)
    for t in range(5):
      is_object[t, 16:26, 10 + 9 * t :][:, :10] = True
    clip = np.where(is_object, 1, grey)[..., None].repeat(3, axis=-1).astype(np.float32)
    found = masks.moving_mask(clip, object_color=(1, 1, 1), background=(0, 0, 0))[..., 0] > 0.5
    shares = (found & is_object).sum(axis=(1, 2)) / (found | is_object).sum(axis=(1, 2))
    assert shares.min() > 0.5

  def test_resolution_is_reduced_along_both_sides(self):
    """By a factor of 3 columns of 3 pixels stay, and the lines of every 3 become even."""
    columns, lines = np.tile([0, 0, 0, 1, 1, 1], 8), np.tile([0, 0, 1], 4)
    for pattern, remains in ((np.tile(columns, (12, 1)), True), (np.tile(lines[:, None], (1, 48)), False)):
      clip = np.broadcast_to(pattern[None, ..., None], (1, 12, 48, 3)).astype(np.float32)
      assert (restoration.shrink(clip, factor=3).std() > 0.2) == remains

  def test_the_radius_of_a_blur_is_a_share_of_the_height(self):
    point = np.zeros((1, 32, 64, 3), np.float32)
    point[0, 16, 32] = 1
    spread = restoration.blur(point, radius=0.0625)[0, ..., 0]
    for axis, middle in ((0, 16), (1, 32)):
      weights = spread.sum(axis=1 - axis)
      assert np.sqrt(weights @ (np.arange(len(weights)) - middle) ** 2) == pytest.approx(2, rel=0.02)

  def test_mask_of_a_square_is_without_specks_and_holes(self):
    square = np.zeros((2, 32, 32), np.float32)
    square[:, 8:24, 8:24] = 1
    damaged = square.copy()
    damaged[0, 12:18, 12:18] = 0
    damaged[1, 3, 3] = 1
    mask = masks.color_mask(damaged, [1, 1, 1], [0, 0, 0])
    np.testing.assert_array_equal(mask, np.stack([square] * 3, axis=-1))
    assert not masks.color_mask(np.ones((1, 8, 8), np.float32), [1, 1, 1], [0, 0, 0]).any()

  def test_an_animating_task_is_not_reversible(self):
    with pytest.raises(ValueError, match="cannot be reversible"):
      Task(draw=draw_nothing, apply=lambda clip, num_frames: clip, motion=Motion.ANIMATES)

  @pytest.mark.parametrize(
    "apply, got",
    [
      (lambda clip: clip[:, ::2, ::2], "float32 (1, 8, 8, 3)"),
      (lambda clip: clip.mean(-1, keepdims=True), "float32 (1, 16, 16, 1)"),
      (lambda clip: clip[0], "float32 (16, 16, 3)"),
      (lambda clip: (clip * 255).astype(np.uint8), "uint8 (1, 16, 16, 3)"),
      (lambda clip: None, "NoneType"),
      (lambda clip: clip * np.nan, "values from nan to nan"),
      (lambda clip: np.where(clip > clip.mean(), np.inf, clip), "values from "),
      (lambda clip: clip * 0 + 255, "values from 255 to 255"),
      (lambda clip: clip * 0 - 1, "values from -1 to -1"),
    ],
  )
  @pytest.mark.parametrize("restores", [False, True])
  def test_what_a_task_of_ones_own_returns_is_checked(self, monkeypatch, apply, got, restores):
    monkeypatch.setitem(TASKS, "mine", Task(draw=draw_nothing, apply=apply, restores=restores))
    expected = "apply of the task mine must return a NumPy array of floats of shape (1, 16, 16, 3), in [0, 1], got "
    with pytest.raises(UserError, match=re.escape(expected + got)):
      computed(tasks={"mine": 1.0}, contexts={"II": 1.0})[0]

  @pytest.mark.parametrize("apply", [lambda clip: clip.astype(np.float64), lambda clip: 1.2 * clip - 0.1])
  def test_what_leaves_the_range_a_little_is_clipped(self, monkeypatch, apply):
    monkeypatch.setitem(TASKS, "mine", Task(draw=draw_nothing, apply=apply))
    clip, target = computed(tasks={"mine": 1.0}, contexts={"II": 1.0})[0].clips[:2]
    assert np.array_equal(target, from_unit(np.clip(apply(to_unit(clip)), 0, 1)))

  def test_an_animating_task_returns_the_frames_that_it_is_asked_for(self, monkeypatch):
    task = Task(draw=draw_nothing, apply=lambda clip, num_frames: clip, motion=Motion.ANIMATES, reversible=False)
    monkeypatch.setitem(TASKS, "mine", task)
    with pytest.raises(UserError, match=re.escape("of shape (5, 16, 16, 3), in [0, 1], got float32 (1, 16, 16, 3)")):
      computed(tasks={"mine": 1.0}, animating_contexts={"IV": 1.0})[0]

  @pytest.mark.parametrize(
    "params, error",
    [
      ({"strength": np.float32(0.5)}, "Object of type float32 is not JSON serializable"),
      ({"colors": np.ones(3)}, "Object of type ndarray is not JSON serializable"),
      (None, "it returns NoneType, not a mapping"),
    ],
  )
  def test_parameters_of_a_task_of_ones_own_are_json(self, monkeypatch, params, error):
    monkeypatch.setitem(TASKS, "mine", Task(draw=lambda rng: params, apply=lambda clip, **params: clip))
    with pytest.raises(UserError, match=f"draw of the task mine must return JSON values by name, .*: {error}"):
      computed(tasks={"mine": 1.0})[0]


def test_every_task_of_a_name_is_checked():
  """Also where it lies in memory where one lay that was right."""
  for _ in range(10):
    check_draw("mine", Task(draw=lambda rng: {"s": 0.5}, apply=lambda clip, s: clip))
    with pytest.raises(UserError, match="must return JSON values"):
      check_draw("mine", Task(draw=lambda rng: {"s": np.float32(0.5)}, apply=lambda clip, s: clip))


def computed(**options):
  defaults = dict(
    clips=[PhotoSource.bundled("train")],
    tasks=dict.fromkeys(TASKS, 1.0),
    num_frames=5,
    size=(16, 16),
    num_sentences=100,
    seed=3,
  )
  return ComputedSentences(**defaults | options)


class TestComputedSentences:
  def test_an_index_always_gives_the_same_sentence(self):
    first, again, other = computed()[7], computed()[7], computed(seed=4)[7]
    assert first.task == again.task and all(np.array_equal(a, b) for a, b in zip(first.clips, again.clips))
    assert not (first.task == other.task and all(np.array_equal(a, b) for a, b in zip(first.clips, other.clips)))

  def test_pairs_share_their_parameters_and_have_different_sources(self):
    source = computed(tasks={"duotone": 1.0}, contexts={"II": 1.0})
    for index in range(10):
      a, a2, b, b2 = source[index].clips
      assert not np.array_equal(a, b)
      # The colours of a duotone are on a line; those of both targets are on the same.
      colors = np.concatenate([a2.reshape(-1, 3), b2.reshape(-1, 3)]).astype(np.float64)
      variances = np.linalg.svd(colors - colors.mean(0), compute_uv=False)
      assert variances[1] < 0.02 * variances[0]

  def test_contexts_and_numbers_of_clips(self):
    sentence = computed(tasks={"camera_movement": 1.0}, animating_contexts={"IV": 1.0}, num_clips={6: 1.0})[0]
    assert [len(clip) for clip in sentence.clips] == [1, 5] * 3 and sentence.context == "IV"

  def test_sentences_with_videos_can_be_limited_to_fewer_clips(self):
    options = dict(tasks={"invert": 1.0, "camera_movement": 1.0}, num_clips={4: 1.0, 8: 1.0}, max_video_clips=6)
    source = computed(**options)
    plans = [source.plan(index) for index in range(60)]
    counts = {context: {p.num_clips for p in plans if p.context == context} for context in ("I", "II", "III")}
    assert counts == {"I": {4, 6}, "II": {4, 8}, "III": {4, 6}}
    assert all(len(source[index].clips) == plans[index].num_clips for index in range(4))

  def test_reversal(self):
    forward = computed(tasks={"greyscale": 1.0}, contexts={"II": 1.0})[0]
    backward = computed(tasks={"greyscale": 1.0}, contexts={"II": 1.0}, reverse_probability=1.0)[0]
    assert np.array_equal(forward.clips[0], backward.clips[1]) and np.array_equal(forward.clips[1], backward.clips[0])

  def test_unknown_tasks_and_invalid_weights(self):
    with pytest.raises(UserError, match="unknown task 'mowing'"):
      computed(tasks={"mowing": 1.0})
    for weights in ({}, {"a": 0.0}, {"a": -1.0, "b": 2.0}, {"a": np.nan}):
      with pytest.raises(UserError, match="weights"):
        draw(np.random.default_rng(0), weights)

  def test_draws_are_those_of_numpy(self):
    """The key, and what the generator draws next."""
    for seed in range(300):
      rng = np.random.default_rng(seed)
      weights = {f"key {i}": weight for i, weight in enumerate(rng.integers(0, 4, rng.integers(1, 20)) / 3)}
      weights["last"] = float(rng.random())
      ours, numpys = np.random.default_rng(seed), np.random.default_rng(seed)
      shares = np.array(list(weights.values()))
      for _ in range(20):
        assert draw(ours, weights) == list(weights)[numpys.choice(len(weights), p=shares / shares.sum())]
      assert ours.random() == numpys.random()

  def test_held_out_sentences_show_held_out_photographs(self):
    data = open_data(tiny())
    training, held_out = data.sources["computed"], data.held_out["computed"]
    assert len(held_out) == len(training) and held_out.seed != training.seed
    photos, held_out_photos = (source.clips[0].photos for source in (training, held_out))
    assert len(held_out_photos) == 3 and not any(photo in photos for photo in held_out_photos)
    assert not held_out.clips[0].jitter

  def test_sentences_do_not_depend_on_the_order_of_keys(self):
    """Flags sort the keys of a config."""
    as_written, sorted_keys = tiny(), from_config_dict(get_config("tiny"))
    assert list(as_written.data.tasks) != list(sorted_keys.data.tasks)
    sources = [open_computed(config, "train", seed=0) for config in (as_written, sorted_keys)]
    assert sources[0].task_names == sources[1].task_names
    for index in range(10):
      first, second = (source[index] for source in sources)
      assert all(np.array_equal(a, b) for a, b in zip(first.clips, second.clips))

  @pytest.mark.parametrize("task", ["denoising", "deraining"])
  @pytest.mark.parametrize("context", ["I", "II"])
  def test_examples_do_not_show_the_noise_of_the_query(self, task, context):
    """Subtracting what the example pair differs by does not restore B; within a video noise differs as well."""
    source = computed(reverse_probability=0.0)
    a, a2, b, b2 = (
      x.astype(np.float64) for x in source.sentence(np.random.default_rng(0), task=task, context=context).clips
    )
    error = np.square(b - b2).mean()
    assert np.square(b - (a - a2) - b2).mean() > error > 0
    assert context == "II" or np.square((b - b2)[1] - (b - b2)[0]).mean() > error / 2

  def test_pixels_belong_to_a_version(self):
    """If this fails, computed clips have other pixels: raise COMPUTING_VERSION, so that no stale latent is used."""
    expected = {
      "greyscale": (106.3, 9.9),
      "invert": (140.2, 10.0),
      "invert_brightness": (140.2, 10.0),
      "swap_channels": (114.8, 10.0),
      "duotone": (153.7, 6.1),
      "low_light": (34.6, 3.8),
      "scribble": (95.3, 6.8),
      "inpainting": (84.4, 6.6),
      "colorization": (114.8, 9.9),
      "super_resolution": (151.2, 2.8),
      "deblurring": (137.1, 10.2),
      "denoising": (114.0, 24.3),
      "deraining": (110.2, 16.8),
      "flip": (151.2, 3.9),
      "time_reversal": (114.8, 10.0),
      "salient_object": (63.9, 7.9),
      "moving_object": (66.8, 7.2),
      "camera_movement": (92.5, 6.5),
    }
    source = computed()
    for task, value in expected.items():
      sentences = [source.sentence(np.random.default_rng(seed), task=task, context="I") for seed in range(3)]
      clips = [np.stack(sentence.clips[-2:]).astype(float) for sentence in sentences]
      found = np.mean([clip[1].mean() for clip in clips]), np.mean([np.abs(np.diff(clip, axis=3)) for clip in clips])
      assert found == pytest.approx(value, abs=0.5), "B', and differences of neighbouring pixels in B and B'"
    assert set(expected) == set(TASKS)


@pytest.mark.parametrize("task, context", [("invert", "II"), ("camera_movement", "IV"), ("time_reversal", "I")])
def test_a_sentence_names_the_context_that_it_has(task, context):
  """Only animating tasks make a video of an image; of others, context IV was one of images under a wrong name."""
  weights = {"IV": 1.0}
  source = computed(tasks={task: 1.0}, contexts=weights, animating_contexts=weights)
  assert source.contexts_of(task) == {context: 1.0}
  pattern = [5 if is_video else 1 for is_video in video_pattern(context, 4)]
  for sentence in (source[0], source[1], source.sentence(np.random.default_rng(0), task=task, context="IV")):
    assert sentence.context == context
    assert [len(clip) for clip in sentence.clips] == pattern


class TestLazySentences:
  def test_they_are_the_same_sentences(self):
    """Task, context, prompt, keys and lengths are known before any clip is made."""
    contexts = {"I": 1.0, "II": 1.0, "III": 1.0, "IV": 1.0}
    whole = computed(
      num_sentences=30,
      prompt_style=PromptStyle.DETAILED,
      prompt_dropout=0.3,
      num_clips={4: 1.0, 6: 1.0},
      contexts=contexts,
      animating_contexts=contexts,
      reverse_probability=0.5,
    )
    lazy, keys, prompts = LazySentences(whole, "identity"), set(), set()
    for index in range(30):
      planned, made = lazy[index], whole[index]
      assert (planned.task, planned.context, planned.prompt) == (made.task, made.context, made.prompt)
      assert planned.roles == made.roles
      assert [ref.num_frames for ref in planned.clips] == [len(clip) for clip in made.clips]
      assert all(np.array_equal(ref.read(), clip) for ref, clip in zip(planned.clips, made.clips, strict=True))
      keys |= {ref.key for ref in planned.clips}
      prompts.add(planned.prompt == "")
    assert len(keys) == sum(len(lazy[index].clips) for index in range(30)) and prompts == {True, False}

  def test_dropping_prompts_changes_nothing_else(self):
    options = dict(tasks={"invert": 1.0}, contexts={"II": 1.0}, prompt_style=PromptStyle.DETAILED)
    whole, without = (computed(prompt_dropout=share, **options) for share in (0.0, 0.5))
    pairs = [(whole[index], without[index]) for index in range(6)]
    for one, other in pairs:
      assert (one.task, one.context) == (other.task, other.context) and other.prompt in ("", one.prompt)
      assert all(np.array_equal(a, b) for a, b in zip(one.clips, other.clips, strict=True))
    assert {other.prompt == "" for _, other in pairs} == {True, False}

  @pytest.mark.parametrize("reverse", [True, False])
  def test_parameters_are_those_of_a_target_that_was_computed(self, reverse):
    sentences = computed(tasks={"duotone": 1.0}, contexts={"II": 1.0}, reverse_probability=float(reverse))
    params = [sentences[index].params for index in range(3)]
    assert all((each is None) == reverse for each in params)

  def test_a_sentence_is_made_once(self, monkeypatch):
    made, make = [], ComputedSentences.__getitem__

    def counting(self, index):
      made.append(index)
      return make(self, index)

    monkeypatch.setattr(ComputedSentences, "__getitem__", counting)
    for clip in LazySentences(computed(), "identity")[3].clips:
      assert isinstance(clip, ClipRef) and clip.read().dtype == np.uint8
    assert made == [3]

  def test_the_identity_names_options_and_files(self, tmp_path):
    def identity(config):
      return computed_identity(config, open_computed(config, "train", seed=0))

    write_clip(tmp_path / "a.png", CLIP)
    base = {"data.folder": str(tmp_path)}
    changes = ({}, {"seed": 1}, {"data.height": 48}, {"data.tasks.flip": 1.0}, {"data.bundled": False})
    identities = [identity(override(tiny(), base | change)) for change in changes]
    write_clip(tmp_path / "b.png", CLIP)
    identities.append(identity(override(tiny(), base)))
    assert len(set(identities)) == len(identities)
    assert identity(override(tiny(), base | {"num_steps": 5})) == identities[-1]

  def test_the_identity_follows_the_functions_of_own_tasks(self, monkeypatch):
    """Also if a helper changes; those of the package follow `COMPUTING_VERSION`."""
    config = override(tiny(), {"data.tasks": {"brighten": 1.0, "camera_movement": 1.0, "flip": 0.0}})
    exponent = {"least": 0.4, "scale": 1.0}

    def register(**changes):
      own = dict(
        draw=lambda rng: {"gamma": float(rng.uniform(exponent["least"], 0.7))},
        apply=lambda clip, gamma, **_: clip ** (gamma * exponent["scale"]),
      )
      monkeypatch.setitem(TASKS, "brighten", Task(**own | changes))

    def identities():
      sentences = open_computed(config, "train", seed=0)
      planned = plan_sentences(config, {"computed": open_computed(config, "held_out", seed=0)})
      return computed_identity(config, sentences), repr(planned[0].identify())

    register()
    found = [identities()]
    register()
    assert identities() == found[0]
    for changes in ({"least": 0.5}, {"scale": 1.1}):
      exponent |= changes
      found.append(identities())
    register(varies=True, apply=lambda clip, gamma, pair: clip ** (gamma + pair / 10))
    found.append(identities())
    assert all(len(set(each)) == len(found) for each in zip(*found))
    register(varies=True, apply=lambda clip, gamma, pair: clip ** (gamma + pair / 10), prompt_name="brighter version")
    config = override(config, {"data.prompt": "detailed"})
    assert identities()[0] == found[-1][0] and identities()[1] != found[-1][1]
    config = override(config, {"data.tasks": {"flip": 1.0, "brighten": 0.0}})
    sentences = open_computed(config, "train", seed=0)
    assert not sentences.identify_own_tasks()

  @pytest.mark.parametrize(
    "apply, warning",
    [
      (lambda clip: clip[[8, 7, 6, 5, 4, 3, 2, 1, 0]], None),
      (lambda clip: clip * np.random.default_rng().random(), "as they are not deterministic: delete cached latents"),
      (lambda clip: clip[20], "as they fail on noise: IndexError"),
    ],
  )
  def test_functions_of_own_tasks_need_clips_of_the_config_and_may_fail_on_noise(
    self, monkeypatch, caplog, apply, warning
  ):
    monkeypatch.setitem(TASKS, "mine", Task(draw=lambda rng: {}, motion=Motion.NEEDED, apply=apply))
    config = override(tiny(), {"data.tasks": {"mine": 1.0}, "data.num_frames": 9})
    found = open_computed(config, "train", seed=0).identify_own_tasks()["mine"]
    assert (found == "", warning in caplog.text) == (True, True) if warning else (found and not caplog.text)

  @pytest.mark.parametrize(
    "key, value, matters",
    [
      ("seed", 1, True),
      ("data.height", 48, True),
      ("data.width", 48, True),
      ("data.num_frames", 9, True),
      ("data.max_video_clips", 4, True),
      ("data.fps", 8.0, True),
      ("data.reverse_probability", 0.25, True),
      ("data.bundled", False, True),
      ("data.jitter", False, True),
      ("data.tasks.flip", 1.5, True),
      ("data.contexts.I", 0.5, True),
      ("data.animating_contexts.IV", 0.75, True),
      ("data.num_clips.clips_6", 0.5, True),
      ("data.prompt", "detailed", False),
      ("data.prompt_dropout", 0.5, False),
      ("data.num_sentences", 7, False),
      ("data.held_out", 0.5, False),
      ("num_steps", 5, False),
    ],
  )
  def test_the_identity_names_what_determines_clips(self, key, value, matters):
    base = override(tiny(), {"data.folder": "clips"})
    changed = override(base, {key: value})
    assert changed != base
    sentences = mock.Mock(spec=ComputedSentences, identify_files=lambda: ["hash of a file"], identify_own_tasks=dict)
    assert (computed_identity(changed, sentences) != computed_identity(base, sentences)) == matters


class TestFolders:
  def test_the_log_says_what_sentences_are_made_of(self, tmp_path, caplog):
    """Bundled photographs join a folder, and are all that held-out sentences show: both surprise."""
    write_clip(tmp_path / "a.png", CLIP)
    caplog.set_level("INFO", "univid_jax")

    def report(changes):
      config = override(tiny(), changes)
      open_data(config).report(config.data)

    report({"data.folder": str(tmp_path)})
    assert "made from your 1 file and 11 bundled photographs (config.data.bundled=False leaves these" in caplog.text
    assert "held-out sentences show other bundled photographs, not the files of config.data.folder" in caplog.text
    caplog.clear()
    report({"data.folder": str(tmp_path), "data.bundled": False})
    assert "made from your 1 file\n" in caplog.text
    caplog.clear()
    report({"data.folder": str(tmp_path), "data.test_folder": str(tmp_path)})
    assert "held-out sentences show the files of config.data.test_folder" in caplog.text
    assert "other bundled" not in caplog.text
    caplog.clear()
    report({})
    assert "made from" not in caplog.text and "held-out" not in caplog.text

  @pytest.mark.parametrize("changes", [{}, {"data.bundled": False}])
  def test_held_out_sentences_show_the_files_of_a_test_folder(self, tmp_path, changes):
    """Those alone: in validation, in evaluation, and in the example pairs of another task."""
    for name, level in (("training", 50), ("test", 200)):
      write_clip(tmp_path / name / "a.png", np.full((1, 16, 16, 3), level, np.uint8))
    folders = {"data.folder": str(tmp_path / "training"), "data.test_folder": str(tmp_path / "test")}
    tasks = {f"data.tasks.{name}": 0.0 for name in ("swap_channels", "duotone")}
    config = override(tiny(), folders | tasks | changes | {"eval.sentences_per_case": 2, "validation.sentences": 3})
    data = open_data(config)
    planned = plan_sentences(config, data.held_out)
    others = [read() for read in plan_other_pairs(config, planned)]
    assert {sentence.task for sentence in others} == {"swap_channels"}
    for sentence in (*select_sentences(data, config), *(each.read() for each in planned), *others):
      assert all((read_frames(clip) == 200).all() for clip in sentence.clips[::2])

  def test_a_test_folder_is_for_computed_tasks(self):
    with pytest.raises(UserError, match=r"config\.data\.test_folder is for computed tasks, and there are none"):
      override(tiny(), {"data.test_folder": "mine", "data.pairs": "pairs"})

  def test_videos_and_photos(self, tmp_path):
    folder = tmp_path / "my clips ü"
    ramp = np.broadcast_to(np.arange(12, dtype=np.uint8)[:, None, None, None] * 20, (12, 48, 64, 3))
    write_clip(folder / "a video.mp4", ramp)
    write_clip(folder / "photo.png", ramp[:1])
    (folder / "notes.txt").write_text("not a clip")
    (folder / "._a video.mp4").write_bytes(b"left by a Mac")
    source = FolderSource.open(str(folder), side=24)
    assert [(clip.path.name, clip.num_frames) for clip in source.clips] == [("a video.mp4", 12), ("photo.png", 1)]
    video = source.clip(0, np.random.default_rng(0), num_frames=5, size=(16, 16))
    assert video.shape == (5, 16, 16, 3)
    assert np.all(np.diff(video.mean(axis=(1, 2, 3))) > 10)
    assert source.clip(1, np.random.default_rng(0), num_frames=5, size=(16, 16)).shape == (5, 16, 16, 3)
    assert len(FolderSource.open(str(folder), side=24, fps=8.0).clips) == 2
    assert FolderSource.open(str(folder), side=24, fps=8.0).clips[0].num_frames == 6

  def test_clips_reach_from_the_first_to_the_last_frame(self, tmp_path):
    levels = np.arange(0, 180, 30, dtype=np.uint8)
    np.save(tmp_path / "a.npy", np.broadcast_to(levels[:, None, None, None], (6, 16, 16, 3)))
    source = FolderSource.open(str(tmp_path), side=24)
    rng = np.random.default_rng(0)
    clips = [source.clip(0, rng, num_frames=5, size=(8, 8)) for _ in range(20)]
    assert {tuple(clip[:, 0, 0, 0].tolist()) for clip in clips} == {(0, 30, 60, 90, 120), (30, 60, 90, 120, 150)}

  def test_frames_are_kept_within_bounds(self, tmp_path, monkeypatch, caplog):
    """Kept or not, windows show the same."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3)).astype(np.uint8)
    write_clip(tmp_path / "a.mp4", noise)
    write_clip(tmp_path / "b.mp4", noise[::-1])
    windows = []
    for bound, kept in ((2**31, 2), (12 * 24 * 32 * 3, 1), (1000, 0)):
      monkeypatch.setattr("univid_jax.data.sources.folder.KEPT_BYTES", bound)
      caplog.clear()
      source = FolderSource.open(str(tmp_path), side=24)
      assert sum(clip.is_kept for clip in source.clips) == kept
      assert ("are kept in memory" in caplog.text) == (kept < 2)
      rng = np.random.default_rng(3)
      windows.append([source.clip(i % 2, rng, num_frames=5, size=(16, 16)) for i in range(6)])
    assert np.array_equal(windows[0], windows[1]) and np.array_equal(windows[0], windows[2])

  def test_texts_that_are_not_read_are_named(self, tmp_path, caplog):
    write_clip(tmp_path / "a.png", np.zeros((1, 16, 16, 3), np.uint8))
    (tmp_path / "README.txt").touch()
    FolderSource.open(str(tmp_path), side=24)
    assert not caplog.text
    (tmp_path / "a.txt").touch()
    FolderSource.open(str(tmp_path), side=24)
    assert f"{tmp_path}: 1 text file is not read, such as {tmp_path}/a.txt: prompts are made of the" in caplog.text

  def test_damaged_and_changed_files(self, tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
      write_clip(tmp_path / name, np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3)).astype(np.uint8))
    (tmp_path / "a.mp4").write_bytes(b"no video")
    shutil.copy(CASES / "corrupt.mp4", tmp_path / "b.mp4")
    source = FolderSource.open(str(tmp_path), side=24)
    assert [each.record for each in source.dropped] == ["a.mp4"]
    assert [each.record for each in source.find_damaged()] == ["b.mp4"]
    (tmp_path / "c.mp4").write_bytes((tmp_path / "c.mp4").read_bytes())
    with pytest.raises(UserError, match=r"c\.mp4 changed while it was in use"):
      source.clip(1, np.random.default_rng(0), num_frames=5, size=(16, 16))

  def test_folders_without_clips(self, tmp_path):
    (tmp_path / "notes.txt").write_text("not a clip")
    with pytest.raises(UserError, match="no images or videos in"):
      FolderSource.open(str(tmp_path), side=24)
    with pytest.raises(FileNotFoundError, match="no such folder"):
      FolderSource.open(str(tmp_path / "missing"), side=24)

  def test_windows_stay_inside_the_photograph(self):
    photo = Image.new("RGB", (61, 43))
    for seed in range(300):
      assert moving_window(photo, np.random.default_rng(seed), num_frames=5, size=(48, 80)).shape == (5, 48, 80, 3)

  def test_windows_on_a_grey_photograph_are_those_on_its_equal_channels(self):
    photo = PhotoSource.bundled("train").photos[2]
    one, three = (
      moving_window(each, np.random.default_rng(0), num_frames=3, size=(24, 24)) for each in (photo.convert("L"), photo)
    )
    np.testing.assert_array_equal(one, three)
