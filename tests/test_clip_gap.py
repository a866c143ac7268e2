"""Gaps in time between the clips of a sentence: positions, what travels with a model, training and sampling."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers import random_pipeline
from univid_jax.checkpoints.usage import Usage, merge_usages
from univid_jax.config.boundary import override
from univid_jax.core.errors import UserError
from univid_jax.core.sentence import Sentence, reference_roles
from univid_jax.data.rows.tokens import sentence_features
from univid_jax.parallel.mesh import make_mesh
from univid_jax.training.setup import set_up_run


def positions(clip_gap, lengths=(1, 2, 1, 2), width=4, **options):
  """Returns (t, y, x) of the tokens of clips, two latents high."""
  clips = tuple(np.zeros((length, 2, width, 3), np.float32) for length in lengths)
  sentence = Sentence(clips=clips, roles=reference_roles(len(clips)))
  prompt = np.zeros((1, 8))
  options |= {"patch_size": (1, 2, 2), "prompt_embedding": prompt, "text_len": 4, "clip_gap": clip_gap}
  features = sentence_features(sentence, **options)
  return features.positions


class TestPositions:
  @pytest.mark.parametrize("gap, times", [(0, [0, 1, 2, 3, 4, 5]), (3, [0, 4, 5, 9, 13, 14])])
  def test_time_jumps_between_clips_alone(self, gap, times):
    expected = [(t, 0, x) for t in times for x in (0, 1)]
    assert positions(gap).tolist() == [list(position) for position in expected]

  def test_no_gap_parts_a_first_frame_from_its_clip(self):
    assert positions(3, (1, 1, 2, 1, 2), has_first_frame=True)[::2, 0].tolist() == [0, 4, 8, 9, 13, 14, 15]

  def test_a_sample_goes_on_from_its_first_frame(self, tiny_config):
    config = override(tiny_config, {"model.clip_gap": 3})
    pipeline = random_pipeline(config, make_mesh({}, devices=jax.devices()[:1]))
    clips = [np.zeros((5, 16, 16, 3), np.uint8)] * 3
    times = []
    for first_frame in (None, clips[0][0]):
      features = pipeline.make_features(pipeline.make_job(clips, 5, 0, first_frame=first_frame), pipeline.embed(""))
      times.append(sorted(set(features.positions[features.target_mask][:, 0].tolist())))
    assert times == [[15, 16], [16]]

  def test_positions_must_exist(self):
    assert positions(339, lengths=(1, 1, 1, 4))[-1, 0] == 1023
    message = "a sentence of 4 clips with config.model.clip_gap = 340 is too long: it takes 1027 latent frames"
    with pytest.raises(UserError, match=message):
      positions(340, lengths=(1, 1, 1, 4))

  def test_positions_must_exist_without_gaps_too(self):
    assert positions(0, lengths=(256,) * 4)[-1, 0] == 1023
    with pytest.raises(UserError, match="a sentence of 4 clips is too long: it takes 1025 latent frames"):
      positions(0, lengths=(256, 256, 256, 257))
    with pytest.raises(UserError, match="a frame of 1 x 1025 tokens is too large: the model has positions for 1024"):
      positions(0, lengths=(1,), width=2050)

  @pytest.mark.parametrize("gap", [-1, 1024])
  def test_invalid(self, tiny_config, gap):
    with pytest.raises(UserError, match=f"config.model.clip_gap must be from 0 to 1023, got {gap}"):
      override(tiny_config, {"model.clip_gap": gap})


class TestUsage:
  def test_files_carry_it(self, tiny_config):
    usage = Usage.from_config(override(tiny_config, {"model.clip_gap": 7}))
    metadata = {"software": "univid_jax 1", **usage.to_metadata()}
    read = Usage.from_metadata(metadata, source="a")
    assert read is not None and read.clip_gap == usage.clip_gap == 7
    del metadata["clip_gap"]  # as in files of earlier versions
    read = Usage.from_metadata(metadata, source="a")
    assert read is not None and read.clip_gap == 0
    with pytest.raises(UserError, match="the header of a has clip_gap = '-1': it must be from 0 to 1023"):
      Usage.from_metadata(metadata | {"clip_gap": "-1"}, source="a")

  def test_the_first_of_several_decides(self):
    usage, notes = merge_usages([("a", Usage(clip_gap=4)), ("b", Usage())])
    assert usage is not None and usage.clip_gap == 4
    assert notes == ["a was trained with clip_gap 4, which is used, and b with 0"]


class TestModels:
  def test_training_and_its_pipeline_use_it(self, tiny_config, tmp_path):
    config = override(tiny_config, {"model.clip_gap": 5})
    run = set_up_run(config, str(tmp_path))
    sentence = run.data.sources["computed"][0]
    times = sorted(set(run.features(sentence).positions[:, 0].tolist()))
    pipeline = random_pipeline(config, make_mesh({"data": -1}))
    assert np.diff(times).max() == 6 and pipeline.usage.clip_gap == 5

  def test_samples_depend_on_it(self, tiny_config):
    mesh = make_mesh({"data": -1})
    clips = [np.full((1, 16, 16, 3), shade, np.uint8) for shade in (0, 90, 200)]
    samples = []
    for gap in (0, 5):
      config = override(tiny_config, {"model.clip_gap": gap})
      pipeline = random_pipeline(config, mesh)
      samples.append(pipeline.sample(clips, num_inference_steps=1).latents)
      same_weights = dataclasses.replace(pipeline.usage, clip_gap=0)
      assert same_weights == Usage.from_config(tiny_config)
    assert not np.array_equal(*samples)
    with pytest.raises(
      UserError, match="trained with clip_gap = 5, and latents do not say where clips begin: use sample"
    ):
      pipeline.predict_velocity(samples[0], 500.0, np.zeros((1, 8)))
