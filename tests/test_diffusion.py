"""Objective and sampler equal the reference's."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

from tests.helpers import channels_last, dit_config, golden, load_dit, relative_error
from univid_jax.core.options import Objective
from univid_jax.core.sentence import Role, Sentence, reference_roles
from univid_jax.data.rows.packing import RowShape, pack, select_target_tokens
from univid_jax.data.rows.tokens import patchify, sentence_features, unpatchify
from univid_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS, FlowMatching
from univid_jax.diffusion.guidance import Branch, guide
from univid_jax.diffusion.loss import draw_noise, sentence_losses
from univid_jax.diffusion.solvers import Euler, UniPC

PATCH = (1, 2, 2)


def features_of(clips, context):
  sentence = Sentence(clips=tuple(clips), roles=reference_roles(len(clips)))
  return sentence_features(sentence, patch_size=PATCH, prompt_embedding=context, text_len=512)


def single_row(features):
  shape = RowShape(num_tokens=len(features.tokens), num_text_tokens=len(features.text), num_slots=1)
  return jax.tree.map(jnp.asarray, pack([features], shape))


class TestSchedule:
  io = golden("flow_match")[1]

  def test_training(self):
    sigmas = FlowMatching(shift=5.0).training_sigmas()
    assert relative_error(sigmas, self.io["train_sigmas"]) <= 1e-6
    assert relative_error(NUM_TRAIN_TIMESTEPS * sigmas, self.io["train_timesteps"]) <= 1e-6

  @pytest.mark.parametrize("steps", [5, 50])
  @pytest.mark.parametrize("shift", [3, 5])
  def test_inference(self, steps, shift):
    sigmas = Euler().sigmas(FlowMatching(shift=float(shift)), steps)
    assert relative_error(sigmas, self.io[f"infer{steps}_shift{shift}_sigmas"]) <= 1e-6

  def test_no_steps(self):
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
      Euler().sigmas(FlowMatching(), 0)

  @pytest.mark.parametrize("stratified", [False, True])
  def test_times_are_uniform(self, stratified):
    flow = FlowMatching(stratified=stratified)
    ids = jax.vmap(lambda key: flow.sample_timestep_ids(key, (8, 2)))(jax.random.split(jax.random.key(0), 2000))
    counts = np.bincount(np.asarray(ids).ravel() // 100, minlength=10)
    assert counts.sum() == 32_000 and np.all(np.abs(counts / 3200 - 1) < 0.1)
    if stratified:
      assert np.all(np.diff(np.sort(np.asarray(ids).reshape(2000, 16), axis=1), axis=1) >= 60)

  def test_a_range_has_its_lower_end_alone(self):
    """Of 1, 0.999, ..., 0.001."""
    flow = FlowMatching(shift=1.0, noise_range=(0.25, 0.5))
    found = flow.training_sigmas()[flow._ids_in_range()]
    np.testing.assert_allclose(found, np.arange(499, 249, -1) / 1000, rtol=1e-6)
    assert flow.range_probability == 0.25

  def test_bell_weights_are_those_of_diffsynth(self):
    """A Gaussian around 500 with a standard deviation of 500, moved to a minimum of 0 and scaled to a mean of 1."""
    weights = FlowMatching(shift=1.0).bell_weights()
    timesteps = np.arange(1000, 0, -1)
    bell = np.exp(-(((timesteps - 500) / 500) ** 2) / 2) - np.exp(-1 / 2)
    np.testing.assert_allclose(weights, bell / bell.mean(), rtol=1e-4, atol=1e-6)

  def test_stratified_timesteps_are_equally_frequent(self):
    """Also the first and the last of a range, and in an order that is drawn."""
    flow = FlowMatching(stratified=True)
    levels = flow.training_sigmas()
    flow = dataclasses.replace(flow, noise_range=(float(levels[103]), float(levels[99])))
    ids = np.asarray(flow.sample_timestep_ids(jax.random.key(0), (1000,)))
    found, counts = np.unique(ids, return_counts=True)
    assert found.tolist() == [100, 101, 102, 103] and np.abs(counts - 250).max() <= 1
    assert np.count_nonzero(np.diff(ids)) > 600

  @pytest.mark.parametrize("num_tokens, shift", [(100, 3.0), (400, 6.0), (25, 1.5)])
  def test_levels_shift_with_the_root_of_the_tokens(self, num_tokens, shift):
    """By as much as the side of a frame, relative to the reference; the times before the shift are 0.001 to 1."""
    flow = FlowMatching(shift=3.0, stratified=True, objective=Objective.RESOLUTION_SHIFT, reference_tokens=100)
    sigmas, weights = flow.sample(jax.random.key(0), jnp.full(1000, num_tokens, jnp.float32))
    assert (np.asarray(weights) == 1).all()
    sigmas = np.sort(np.asarray(sigmas, np.float64))
    times = 1000 * sigmas / (shift - (shift - 1) * sigmas)
    np.testing.assert_allclose(times, np.arange(1, 1001), atol=1.01)
    np.testing.assert_allclose(times, times.round(), atol=0.01)
    assert times.round().min() >= 1

  @pytest.mark.parametrize("objective", [Objective.UNIVID, Objective.LOGIT_NORMAL])
  @pytest.mark.parametrize("low, high", [(0.0, 0.875), (0.875, math.inf), (0.5, 0.875)])
  def test_the_probability_of_a_range_is_its_share_of_all_draws(self, objective, low, high):
    flow = FlowMatching(shift=3.0, objective=objective)
    sigmas = np.asarray(flow.sample(jax.random.key(0), jnp.ones(20_000))[0])
    share = np.mean((low <= sigmas) & (sigmas < high))
    assert dataclasses.replace(flow, noise_range=(low, high)).range_probability == pytest.approx(share, abs=0.015)

  @pytest.mark.parametrize("noise_range", [(0.0, math.inf), (0.0, 0.875), (0.875, math.inf)])
  def test_logit_normal_levels_are_stratified(self, noise_range):
    """Every sixteenth of the distribution has one of 16 levels, of those in the range; each level has all of it."""
    flow = FlowMatching(shift=3.0, stratified=True, objective=Objective.LOGIT_NORMAL, noise_range=noise_range)
    draw = jax.vmap(lambda key: flow.sample(key, jnp.ones((8, 2)))[0])
    sigmas = np.asarray(draw(jax.random.split(jax.random.key(0), 500)), np.float64).reshape(500, 16)
    assert sigmas.min() >= noise_range[0] and sigmas.max() <= min(noise_range[1], 1)
    quantiles = scipy.stats.norm.cdf(scipy.special.logit(sigmas / (3 - 2 * sigmas)))
    low, high = scipy.stats.norm.cdf([flow._logit(each) for each in noise_range])
    u = (quantiles - low) / (high - low)
    np.testing.assert_allclose(np.diff(np.sort(u, axis=1), axis=1), 1 / 16, atol=1e-3)
    assert np.all(np.abs(np.histogram(u[:, 0], 5, (0, 1))[0] / 100 - 1) < 0.4)


def test_sampling_equals_the_reference():
  info, io, weights = golden("sampling_video")
  model = load_dit(
    dit_config(info["dit"]), {k.removeprefix("dit."): v for k, v in weights.items() if k.startswith("dit.")}
  )
  clips = [channels_last(io[f"latent{i}"]) for i in range(3)]
  noise = channels_last(io["noise"])
  row = single_row(features_of([*clips, np.zeros_like(noise)], io["context"]))
  start = np.zeros(row.tokens.shape, np.float32)
  start[0, row.target_mask[0]] = patchify(noise, PATCH)
  solver, flow = Euler(), FlowMatching(shift=info["sigma_shift"])
  for packed in (row, dataclasses.replace(row, key_intervals=None, text_intervals=None, modulation_ids=None)):
    tokens = solve(solver, guide(model, Branch.create(model, packed)), start, solver.sigmas(flow, info["steps"]))
    latents = unpatchify(select_target_tokens(tokens, row, (0, 1)), noise.shape[:3], PATCH)
    assert relative_error(latents, channels_last(io["latent3"])) <= 1e-4


def solve(solver, predict, noise, sigmas):
  """Takes all steps of a solver."""
  step, state = jax.jit(functools.partial(solver.step, predict)), solver.init(jnp.asarray(noise))
  for sigma, coefficients in zip(sigmas, solver.coefficients(sigmas), strict=True):
    state = step(state, sigma, coefficients)
  return np.asarray(solver.tokens(state))


def test_guidance():
  """Velocities 10 with the prompt and 1 with the negative prompt, extrapolated by a scale of 3."""
  row = single_row(features_of([np.zeros((1, 4, 4, 16))] * 2, np.zeros((0, 8))))
  other = dataclasses.replace(row, text=np.ones_like(row.text))

  def model(tokens, timesteps, given):
    return jnp.full(tokens.shape, jnp.where(jnp.any(given.text != 0), 1.0, 10.0))

  tokens, sigma = jnp.zeros(row.tokens.shape), jnp.float32(1.0)
  positive, negative = Branch(row), Branch(other)
  assert np.all(guide(model, positive)(tokens, sigma) == 10)
  assert np.all(guide(model, positive, negative=negative, guidance_scale=3.0)(tokens, sigma) == 1 + 3 * (10 - 1))


class TestLoss:
  def golden_row(self, info, io, step):
    latents, lengths = channels_last(io[f"step{step}.latents"]), info["clip_latent_frames"]
    clips = np.split(latents, np.cumsum(lengths)[:-1])
    row = single_row(features_of(clips, io[f"step{step}.context"]))
    noise = np.zeros(row.tokens.shape, np.float32)
    noise[0, row.target_mask[0]] = patchify(channels_last(io[f"step{step}.noise"]), PATCH)
    return row, noise, jnp.asarray(io[f"step{step}.timestep"] / NUM_TRAIN_TIMESTEPS)[None]

  def model(self, info, weights):
    return load_dit(
      dit_config(info["dit"]), {k.removeprefix("base."): v for k, v in weights.items() if k.startswith("base.")}
    )

  def test_first_loss_equals_the_reference(self):
    """With the reference's LoRA before its first step merged into the base."""
    info, io, weights = golden("training")
    merged = dict(weights)
    for name in (name for name in weights if name.startswith("lora_init") and ".lora_A." in name):
      layer = name.removeprefix("lora_init.").partition(".lora_A.")[0]
      merged[f"base.{layer}.weight"] = (
        weights[f"base.{layer}.weight"] + weights[name.replace("lora_A", "lora_B")] @ weights[name]
      )
    losses, present = jax.jit(functools.partial(sentence_losses, self.model(info, merged)))(
      *self.golden_row(info, io, 0)
    )
    assert present.tolist() == [[1.0]]
    assert abs(float(losses[0, 0]) / io["losses"][0] - 1) <= 1e-5

  def test_losses_do_not_depend_on_packing_and_order(self):
    info, _, weights = golden("training")
    losses_of = jax.jit(functools.partial(sentence_losses, self.model(info, weights)))
    rng = np.random.default_rng(0)
    lengths = [(2, 2, 2, 2), (1, 1, 1, 1), (1, 1, 2, 2)]
    sentences = [
      features_of([rng.normal(size=(n, 4, 6, 16)) for n in clips], rng.normal(size=(4, 32))) for clips in lengths
    ]
    sigmas = np.array([0.9, 0.3, 0.6], np.float32)
    noises = [rng.normal(size=f.tokens.shape).astype(np.float32) for f in sentences]
    alone = [
      float(losses_of(single_row(f), noise[None], jnp.full((1, 1), sigma))[0][0, 0])
      for f, noise, sigma in zip(sentences, noises, sigmas)
    ]
    order = [2, 0, 1]
    row = pack([sentences[i] for i in order], RowShape(num_tokens=120, num_text_tokens=20, num_slots=4))
    noise = np.zeros_like(row.tokens)
    for place, i in enumerate(order):
      noise[0, row.segment_ids[0] == place + 1] = noises[i]
    losses, present = losses_of(row, noise, jnp.asarray([[*sigmas[order], 0.5]]))
    assert present.tolist() == [[1, 1, 1, 0]] and losses[0, 3] == 0
    np.testing.assert_allclose(losses[0, :3], np.array(alone)[order], rtol=1e-5)

  def test_only_targets_are_noised_and_counted(self):
    clips = [np.ones((1, 2, 2, 16)), 2 * np.ones((1, 2, 2, 16))]
    row = single_row(features_of(clips, np.zeros((0, 8))))
    seen = []

    def model(tokens, timesteps, row):
      seen.append((tokens, timesteps))
      return jnp.where(row.target_mask[..., None], 0.0, jnp.nan)

    noise = jnp.full(row.tokens.shape, 5.0)
    losses, _ = sentence_losses(model, dataclasses.replace(row, modulation_ids=None), noise, jnp.full((1, 1), 0.25))
    tokens, timesteps = seen[0]
    np.testing.assert_allclose(tokens[0, :, 0], [1, 0.75 * 2 + 0.25 * 5])
    np.testing.assert_allclose(timesteps, [[250.0]])
    assert float(losses[0, 0]) == pytest.approx((5 - 2) ** 2)

  def test_noise_is_standard_normal_and_levels_are_on_the_grid(self):
    row = single_row(features_of([np.zeros((8, 16, 16, 16))] * 2, np.zeros((0, 8))))
    noise, levels = draw_noise(jax.random.key(0), row, FlowMatching())
    sigmas = levels.sigmas
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
    assert np.isin(np.asarray(sigmas), FlowMatching().training_sigmas()).all()


def test_reference_roles():
  assert reference_roles(4) == (Role.CONTEXT, Role.CONTEXT, Role.CONTEXT, Role.TARGET)


@pytest.mark.parametrize("steps, shift", [(1, 3.0), (2, 5.0), (3, 1.0), (3, 5.0), (9, 1.0), (12, 3.0)])
def test_unipc_equals_diffusers(steps, shift):
  """On a velocity that depends on place and timestep, against UniPCMultistepScheduler with flow sigmas."""
  torch = pytest.importorskip("torch", reason="needs the extra `parity`")
  diffusers = pytest.importorskip("diffusers", reason="needs the extra `parity`")
  rng = np.random.default_rng(0)
  noise, weights = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(4, 4)).astype(np.float32) / 2

  def velocity(x, sigma, module):
    return module.tanh(x @ module.asarray(weights)) * (1 + sigma) + x * sigma

  scheduler = diffusers.UniPCMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
  )
  scheduler.set_timesteps(steps)
  x = torch.from_numpy(noise)
  for timestep in scheduler.timesteps:
    x = scheduler.step(velocity(x, float(timestep) / 1000, torch), timestep, x, return_dict=False)[0]
  solver = UniPC()
  sigmas = solver.sigmas(FlowMatching(shift=shift), steps)
  np.testing.assert_allclose(sigmas, scheduler.sigmas[:-1], rtol=1e-5)
  ours = solve(solver, lambda x, sigma: velocity(x, sigma, jnp), noise[None], sigmas)[0]
  assert relative_error(ours, x.numpy()) <= 2e-5
