"""Sampling: batches equal single samples, on one device or eight, and one step is one velocity."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import CAUSAL, give_prompts, random_pipeline, relative_error
from univid_jax.config.boundary import override
from univid_jax.core.errors import UserError
from univid_jax.core.sentence import Sentence, reference_roles
from univid_jax.data.rows.packing import bucket_size, target_indices
from univid_jax.data.rows.tokens import sentence_features
from univid_jax.data.sources.open import open_data
from univid_jax.evaluation.sentences import plan_sentences
from univid_jax.inference.jobs import infer_length, pack_jobs, pack_single
from univid_jax.inference.sampler import PackedJobs, extrapolate
from univid_jax.parallel.mesh import make_mesh


def held_out_sentences(config):
  return [planned.read() for planned in plan_sentences(config, open_data(config).held_out)]


@pytest.mark.parametrize(
  "lengths, expected",
  [
    ((5, 5, 5), 5),
    ((1, 1, 1), 1),
    ((1, 1, 5), 5),
    ((1, 5, 1), 5),
    ((1, 1, 1, 1, 5), 5),
    ((1, 9, 1, 9, 1), 9),
    ((1, 9, 9, 9, 5), 5),
    ((9, 9, 1, 9, 1), 9),
    ((5,), 5),
  ],
)
def test_target_length_is_inferred(lengths, expected):
  assert infer_length(lengths) == expected


def test_rows_of_a_batch_hold_several_sentences_and_the_longer_of_both_prompts():
  """Beside one of 40 tokens and one of 8 there are three of 8 in a row; a prompt has one more token for its padding."""

  def features(num_frames, prompt_length):
    clip, embedding = np.zeros((num_frames, 2, 2, 3), np.float32), np.zeros((prompt_length, 5), np.float32)
    sentence = Sentence(clips=(clip, clip), roles=reference_roles(2))
    return sentence_features(sentence, patch_size=(1, 2, 2), prompt_embedding=embedding, text_len=512)

  lengths = (20, 4, 4, 4, 4)
  positive, negative = ([features(length, text) for length in lengths] for text in (0, 20))
  noises = [np.zeros((length, 12), np.float32) for length in lengths]
  for others in (None, negative):
    packed = pack_jobs(positive, others, noises, context_mode=CAUSAL)
    assert packed.row.tokens.shape[:2] == (2, 48)
    assert np.array_equal(packed.row.targets, target_indices(packed.row.target_mask, 32)), "a bucket of at most 24"
    assert sorted(packed.row.segment_ids.max(1)) == [2, 3]
    if others:
      assert packed.negative is not None and packed.negative.text.shape == packed.row.text.shape
      assert (packed.negative.text_counts > 0).sum() == 5 * 21


def test_batch_equals_single_samples(tiny_config):
  """A batch is reproducible, and so is a single sample from given noise."""
  pipeline = random_pipeline(tiny_config, make_mesh({"data": -1}))
  contexts = [sentence.clips[:-1] for sentence in held_out_sentences(tiny_config)[:5]]
  truth = held_out_sentences(tiny_config)[0].clips[-1]
  options = dict(num_inference_steps=3)
  together = pipeline.sample_batch(contexts, seeds=range(7, 12), **options)
  alone = pipeline.sample_batch(contexts[:1], seeds=[7], **options)
  again = pipeline.sample_batch(contexts, seeds=range(7, 12), **options)
  assert all(np.array_equal(a.frames, b.frames) for a, b in zip(together, again))
  assert together[0].frames.shape == alone[0].frames.shape == truth.shape
  encoded = pipeline.encode(truth)
  noise = jax.random.normal(jax.random.key(0), encoded.shape)
  one = pipeline.sample(contexts[0], latents=noise, **options)
  two = pipeline.sample(contexts[0], latents=noise, **options)
  assert np.array_equal(one.frames, two.frames) and one.latents.shape == encoded.shape


@pytest.mark.long
@pytest.mark.parametrize(
  "attention, solver, guidance_scale", [("full", "unipc", 1.0), ("context_causal", "euler", 1.5)]
)
def test_batch_over_eight_devices_equals_one_at_a_time(tiny_config, attention, solver, guidance_scale):
  """Four sentences of different lengths, packed and sharded."""
  config = override(tiny_config, {"model.attention": attention})
  pipeline, single = (
    random_pipeline(config, mesh) for mesh in (make_mesh({"data": -1}), make_mesh({}, jax.devices()[:1]))
  )
  chosen = {len(s.clips[-1]) + 10 * len(s.clips[0]): s for s in held_out_sentences(config)}
  contexts = [list(s.clips[:-1]) for s in chosen.values()]
  contexts = (contexts * 4)[:4]
  assert len(chosen) >= 3
  pipeline, single = give_prompts(pipeline), give_prompts(single)
  options = dict(num_inference_steps=3, solver=solver, guidance_scale=guidance_scale, negative_prompt="no")
  together = pipeline.sample_batch(contexts, seeds=[5, 6, 7, 8], **options)
  for clips, seed, sample in zip(contexts, (5, 6, 7, 8), together):
    alone = single.sample(clips, seed=seed, **options)
    assert relative_error(sample.latents, alone.latents) <= 1e-5
  with pytest.raises(ValueError, match="4 sentences, 4 prompts and 2 seeds"):
    pipeline.sample_batch(contexts, seeds=[1, 2])
  with pytest.raises(UserError, match="there is no option stepss"):
    pipeline.sample_batch(contexts, stepss=3)


@given(count=st.integers(1, 10**6))
@settings(deadline=None)
def test_buckets(count):
  size = bucket_size(count)
  assert count <= size <= max(count * 17 / 16, count + 15) and bucket_size(size) == size and size % 16 == 0
  assert len({bucket_size(n) for n in range(1024, 2048)}) == 17
  assert bucket_size(75_600) == 74 * 1024


@pytest.mark.parametrize("attention", [pytest.param("full", marks=pytest.mark.long), "context_causal"])
def test_a_second_call_in_a_bucket_compiles_nothing(tiny_config, attention):
  """Padding changes nothing but rounding, and sentences of similar length share the programs."""
  pipeline = random_pipeline(
    override(tiny_config, {"model.attention": attention}), make_mesh({}, devices=jax.devices()[:1])
  )
  rng = np.random.default_rng(0)
  image, longer, long = (rng.integers(0, 256, (t, 16, 16, 3)).astype(np.uint8) for t in (1, 5, 9))
  pipeline = give_prompts(pipeline)
  options = dict(num_inference_steps=2, guidance_scale=2.0, negative_prompt="no")
  pipeline.sample([image, longer, longer], **options)  # 5 latent frames for 8 or fewer tokens each
  programs = [pipeline.sampler.prepare, *pipeline.sampler._steps.values()]
  count = [program._cache_size() for program in programs]
  pipeline.sample([longer, longer, image], num_frames=5, seed=1, **options)
  assert [program._cache_size() for program in programs] == count
  out = pipeline.sample([image, image, long], **options)
  job = pipeline.make_job([image, image, long], None, 0)
  features = [pipeline.make_features(job, pipeline.embed(text)) for text in ("", options.pop("negative_prompt"))]
  rows = [pack_single(each, context_mode=pipeline.context_mode) for each in features]
  rows = [dataclasses.replace(row, targets=target_indices(row.target_mask)) for row in rows]
  packed = PackedJobs(*rows, [(0, 1)], [job.noise])
  (tokens,) = pipeline.sampler.sample(pipeline.experts, packed, pipeline.plan(**options))
  expected = job.finish(tokens, pipeline.config.patch_size)
  assert relative_error(out.latents, expected) <= 1e-5


def test_one_step_is_one_velocity(tiny_config):
  pipeline = random_pipeline(tiny_config, make_mesh({}, devices=jax.devices()[:1]))
  clips = next(s for s in held_out_sentences(tiny_config) if s.context == "III").clips
  context = [pipeline.encode(clip) for clip in clips[:-1]]
  noise = np.random.default_rng(0).normal(size=context[-1].shape).astype(np.float32)
  prompt = np.zeros((0, tiny_config.model.text_dim), np.float32)
  velocity = pipeline.predict_velocity(np.concatenate([*context, noise]), 1000.0, prompt)[-len(noise) :]
  out = pipeline.sample(clips[:-1], num_inference_steps=1, latents=noise)
  assert np.abs(velocity).mean() > 0.1
  np.testing.assert_allclose(out.latents, noise - velocity, atol=1e-5)


def test_an_estimate_is_where_the_velocity_leads():
  """From 1 at noise level 0.8 with the velocity 2: 0.2 at the level 0.4, and -0.6 at 0."""
  before, after = np.full((1, 2, 3), 1.0), np.full((1, 2, 3), 0.2)
  np.testing.assert_allclose(extrapolate(before, after, np.array([0.8, 0.4])), -0.6)
  np.testing.assert_array_equal(extrapolate(before, after, np.array([0.8])), after)
