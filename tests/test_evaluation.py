"""Scores are what they say."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from skimage.metrics import peak_signal_noise_ratio

from tests.helpers import relative_error
from univid_jax import build
from univid_jax.evaluation import METRICS, evaluate, held_out_sentences, matched, with_swapped_pairs
from univid_jax.metrics.figures import plot_loss, sentence_grid
from univid_jax.metrics.image import psnr
from univid_jax.parallel.mesh import make_mesh
from univid_jax.pipeline import Pipeline, inferred_length


def noisy_clips(seed=0):
  rng = np.random.default_rng(seed)
  return tuple(rng.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8) for _ in range(2))


def test_psnr():
  a, b = noisy_clips()
  assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-6)
  assert psnr(a, a) == 100
  assert psnr(np.zeros_like(a), np.full_like(a, 255)) == 0
  with pytest.raises(ValueError, match="different shapes"):
    psnr(a, b[:1])


def test_clips_are_matched_in_length():
  clip = np.arange(3)[:, None, None, None]
  assert matched(clip, 5).ravel().tolist() == [0, 1, 2, 2, 2] and matched(clip, 1).ravel().tolist() == [0]


@pytest.mark.parametrize("lengths, expected", [((5, 5, 5), 5), ((1, 1, 1), 1), ((1, 1, 5), 5), ((1, 5, 1), 5),
                                               ((1, 1, 1, 1, 5), 5), ((1, 9, 1, 9, 1), 9), ((5,), 5)])
def test_the_targets_length_is_inferred(lengths, expected):
  assert inferred_length(lengths) == expected


def test_swapped_pairs_come_from_another_task(tiny_config):
  sentences = held_out_sentences(tiny_config)
  assert {s.context for s in sentences} == {"I", "II", "III", "IV"}
  for sentence, swapped in zip(sentences, with_swapped_pairs(sentences, np.random.default_rng(0))):
    assert swapped.clips[-2:] == sentence.clips[-2:]
    assert [clip.shape for clip in swapped.clips] == [clip.shape for clip in sentence.clips]
    assert not np.array_equal(swapped.clips[0], sentence.clips[0])
    assert [len(clip) for clip in sentence.clips] != [1] * 4 or any(
        np.array_equal(swapped.clips[1], other.clips[1]) and other.task != sentence.task for other in sentences)
  with pytest.raises(ValueError, match="at least two tasks"):
    with_swapped_pairs([s for s in sentences if s.task == "invert"], np.random.default_rng(0))


def random_pipeline(config, mesh):
  graph, params = nnx.split(build.model(config), nnx.Param)
  return Pipeline(build.transformer_config(config), graph, nnx.to_pure_dict(params), encoders=build.encoders(config, mesh),
                  mesh=mesh, run=config)


def test_the_report_equals_a_recount(tiny_config):
  config = json.loads(tiny_config.to_json())
  pipeline = random_pipeline(config, make_mesh({"data": -1}))
  report, examples = evaluate(pipeline)
  assert report["seed"] == 0 and report["steps"] == 4
  assert set(report["by_task"]) == {task for task, weight in config["data"]["tasks"].items() if weight}
  assert set(report["by_context"]) == {"I", "II", "III", "IV"}
  assert report["overall"]["count"] == len(examples) == sum(m["count"] for m in report["by_task"].values())
  for key, values in report["by_task"].items():
    chosen = [e for e in examples if e.sentence.task == key]
    truth = [e.sentence.clips[-1] for e in chosen]
    assert values["psnr"] == pytest.approx(np.mean([psnr(e.painted, t) for e, t in zip(chosen, truth)]), abs=1e-3)
    copies = [psnr(matched(e.sentence.clips[2], len(t)), t) for e, t in zip(chosen, truth)]
    assert values["psnr_copy_b"] == pytest.approx(np.mean(copies), abs=1e-3)
    assert set(values) == {*METRICS, "count"}
  images = [e for e in examples if e.sentence.context == "II"]
  assert report["image"]["psnr"] == pytest.approx(np.mean([e.scores["psnr"] for e in images]), abs=1e-3)
  assert report["overall"]["psnr_codec"] > 30


def test_a_batch_equals_single_samples(tiny_config):
  """Packed into rows over eight devices or alone: the same picture for the same noise."""
  config = json.loads(tiny_config.to_json())
  pipeline = random_pipeline(config, make_mesh({"data": -1}))
  sentences = held_out_sentences(config)[:5]
  together = pipeline.sample_sentences(sentences, num_inference_steps=3, seed=7)
  alone = pipeline.sample_sentences(sentences[:1], num_inference_steps=3, seed=7)
  again = pipeline.sample_sentences(sentences, num_inference_steps=3, seed=7)
  assert all(np.array_equal(a, b) for a, b in zip(together, again))
  assert together[0].shape == alone[0].shape == sentences[0].clips[-1].shape
  encoded = pipeline.encode(sentences[0].clips[-1])
  noise = jax.random.normal(jax.random.key(0), encoded.shape)
  one = pipeline.sample(sentences[0].clips[:-1], num_inference_steps=3, latents=noise)
  two = pipeline.sample(sentences[0].clips[:-1], num_inference_steps=3, latents=noise)
  assert np.array_equal(one.frames, two.frames) and one.latents.shape == encoded.shape


@pytest.mark.parametrize("attention, solver, guidance_scale", [("full", "unipc", 1.0), ("context_causal", "euler", 1.5)])
def test_a_batch_of_four_equals_four(tiny_config, attention, solver, guidance_scale):
  """Sentences of several lengths, packed and spread over eight devices, against one at a time on one."""
  config = json.loads(tiny_config.to_json())
  config["model"]["attention"] = attention
  pipeline, single = (random_pipeline(config, mesh) for mesh in (make_mesh({"data": -1}), make_mesh({}, jax.devices()[:1])))
  chosen = {len(s.clips[-1]) + 10 * len(s.clips[0]): s for s in held_out_sentences(config)}
  contexts = [list(s.clips[:-1]) for s in chosen.values()]
  contexts = (contexts * 4)[:4]
  assert len(chosen) >= 3
  options = dict(num_inference_steps=3, solver=solver, guidance_scale=guidance_scale)
  together = pipeline.sample_batch(contexts, seeds=[5, 6, 7, 8], **options)
  for clips, seed, sample in zip(contexts, (5, 6, 7, 8), together):
    alone = single.sample(clips, seed=seed, **options)
    assert relative_error(sample.latents, alone.latents) <= 1e-5
  with pytest.raises(ValueError, match="4 sentences, 4 prompts and 2 seeds"):
    pipeline.sample_batch(contexts, seeds=[1, 2])


def test_one_step_of_sampling_is_one_velocity(tiny_config):
  config = json.loads(tiny_config.to_json())
  pipeline = random_pipeline(config, make_mesh({}, devices=jax.devices()[:1]))
  clips = next(s for s in held_out_sentences(config) if s.context == "III").clips
  context = [pipeline.encode(clip) for clip in clips[:-1]]
  noise = np.random.default_rng(0).normal(size=context[-1].shape).astype(np.float32)
  prompt = np.zeros((0, config["model"]["text_dim"]), np.float32)
  velocity = pipeline.predict_velocity(np.concatenate([*context, noise]), 1000.0, prompt)[-len(noise):]
  out = pipeline.sample(clips[:-1], num_inference_steps=1, latents=noise)
  assert np.abs(velocity).mean() > 0.1
  np.testing.assert_allclose(out.latents, noise - velocity, atol=1e-5)


def test_figures(tmp_path):
  plot_loss(tmp_path / "loss.png", [(1, 3.0), (2, 2.0), (3, 1.0)], [(3, 2.0)])
  image, video = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((5, 8, 8, 3), np.uint8)
  sentence_grid(tmp_path / "grid.png", [("task\ncontext IV", (image, video, image, video, video))])
  assert (tmp_path / "loss.png").stat().st_size > 1000 and (tmp_path / "grid.png").stat().st_size > 500
