"""Step caching: the schedule, sampling with it, and its table of ratios."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import give_prompts, random_pipeline, relative_error
from tests.test_sampling import held_out_sentences
from univid_jax.cli.step_caches import parse_step_cache
from univid_jax.config.boundary import override
from univid_jax.core.errors import UserError
from univid_jax.core.packed_row import PackedRow
from univid_jax.data.rows.packing import target_indices
from univid_jax.diffusion.guidance import Branch
from univid_jax.diffusion.solvers import Euler
from univid_jax.diffusion.step_cache import RatioMeasurement, StepCache
from univid_jax.inference import residuals
from univid_jax.inference.jobs import pack_single
from univid_jax.inference.plan import SamplingOptions, SamplingPlan
from univid_jax.inference.ratio_tables import TableKey, read_table, require_tables, write_table
from univid_jax.parallel.mesh import make_mesh

STEPS = 6


def one_device():
  return make_mesh({}, devices=jax.devices()[:1])


def always(num_steps):
  return np.ones(num_steps, bool)


@given(
  ratios=st.lists(st.floats(0.8, 1.2), min_size=1, max_size=40),
  threshold=st.floats(0, 0.5),
  max_skip=st.integers(1, 6),
  retention=st.floats(0, 1),
)
@settings(deadline=None)
def test_the_schedule(ratios, threshold, max_skip, retention):
  """Written out from the paper: what is skipped is within the threshold, and what is computed was out of it."""
  cache = StepCache(ratios=[ratios], threshold=threshold, max_skip=max_skip, retention=retention)
  computed = cache.computed_steps(0, [range(len(ratios))], always(len(ratios)))
  first = int(retention * len(ratios) + 0.5)
  assert computed[: max(first, 1)].all()
  last = max(first, 1) - 1
  for i in range(last + 1, len(ratios)):
    products = np.cumprod(ratios[last + 1 : i + 1])
    error = np.abs(1 - products).sum()
    if abs(error - threshold) > 1e-9:
      assert computed[i] == (not (error < threshold and len(products) <= max_skip)), i
    if computed[i]:
      last = i


def test_segments_and_gaps_start_over():
  """An expert, and a branch after a gap, has no residual to reuse; each expert has its own first fifth."""
  cache = StepCache(ratios=[[1.0] * 20], threshold=0.1, max_skip=100)
  computed = cache.computed_steps(0, [range(10), range(10, 20)], always(20))
  assert np.flatnonzero(computed).tolist() == [0, 1, 10, 11]
  active = always(20)
  active[[0, 1, 2, 3, 15]] = False
  computed = cache.computed_steps(0, [range(10), range(10, 20)], active)
  assert np.flatnonzero(computed & active).tolist() == [4, 10, 11, 16]


@pytest.mark.parametrize(
  "options, message",
  [
    ({"threshold": -0.1}, "threshold of the step cache must be at least 0, got -0.1"),
    ({"threshold": float("nan")}, "threshold of the step cache"),
    ({"max_skip": 0}, "at least 1 step in a row, got 0"),
    ({"retention": 1.5}, "retention of the step cache must be from 0 to 1, got 1.5"),
  ],
)
def test_invalid_settings_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    StepCache(ratios=[[1.0]], **options)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"guidance_range": (0.2, 0.8)}, "guidance_range needs guidance"),
    ({"guidance_range": (0.8, 0.2), "guidance_scale": 2.0}, "two noise levels from 0 to 1, ascending, got 0.8, 0.2"),
    ({"guidance_range": (0.2,), "guidance_scale": 2.0}, "two noise levels"),
  ],
)
def test_invalid_ranges_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    SamplingPlan.from_options(SamplingOptions(**options))


@pytest.mark.parametrize(
  "text, settings",
  [
    ("magcache", {}),
    ("magcache:0.24", {"threshold": 0.24}),
    ("magcache:0.24:3", {"threshold": 0.24, "max_skip": 3}),
    ("magcache:0.24:3:0.5", {"threshold": 0.24, "max_skip": 3, "retention": 0.5}),
  ],
)
def test_settings_on_the_command_line(text, settings):
  assert parse_step_cache(text) == StepCache(ratios=(), **settings)


def test_a_ratio_is_the_mean_over_targets():
  """Neither over what pads the list of target tokens nor over the context."""
  row = PackedRow(
    tokens=jnp.zeros((1, 4, 1)),
    positions=jnp.zeros((1, 4, 3), jnp.int32),
    segment_ids=jnp.array([[1, 1, 1, 0]]),
    target_mask=jnp.array([[False, True, True, False]]),
    targets=jnp.array([[1, 2, 4]]),
    text=jnp.zeros((1, 1, 1)),
    text_counts=jnp.ones((1, 1)),
  )
  now = jnp.array([[[3.0, 4.0], [6.0, 8.0], [60.0, 80.0]]])  # of magnitudes 5, 10 and, of padding, 100
  before = jnp.array([[[0.0, 1.0], [4.0, 0.0], [1.0, 0.0]]])
  assert float(residuals._magnitude_ratio(now, before, row)) == pytest.approx((5 / 1 + 10 / 4) / 2)


@pytest.fixture(scope="module")
def pipe(tiny_config):
  """With a cached context; tests/test_parity.py compares full attention with diffusers."""
  return give_prompts(random_pipeline(override(tiny_config, {"model.attention": "context_causal"}), one_device()))


@pytest.fixture(scope="module")
def contexts(tiny_config):
  """Sentences of different lengths."""
  chosen = {len(s.clips[-1]) + 10 * len(s.clips[0]): list(s.clips[:-1]) for s in held_out_sentences(tiny_config)}
  return list(chosen.values())[:3]


def sample(pipe, clips, **options):
  given = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "negative_prompt": "no", "seed": 3}
  return pipe.sample(clips, **given | options).latents


def measure(pipe, clips, **options):
  measurement = RatioMeasurement()
  latents = sample(pipe, clips, step_cache=measurement, **options)
  return measurement.table, latents


def test_a_single_guided_step(pipe, contexts):
  """Its ratio is 1, as where the negative prompt is not used; the table has one for each branch all the same."""
  steps = dict(num_inference_steps=4, guidance_scale=2.0, guidance_range=(0.99, 1.0))
  table, expected = measure(pipe, contexts[0], **steps)
  assert len(table) == 2 and set(table[1]) == {1.0}
  assert len(measure(pipe, contexts[0], **steps | {"guidance_range": (0.01, 0.02)})[0]) == 1
  cached = sample(pipe, contexts[0], step_cache=StepCache(ratios=table, threshold=0), **steps)
  assert relative_error(cached, expected) <= 1e-6


@pytest.mark.parametrize("attention", [pytest.param("full", marks=pytest.mark.long), "context_causal"])
def test_threshold_0_and_measuring_change_nothing(tiny_config, pipe, contexts, attention):
  if attention == "full":
    pipe = give_prompts(random_pipeline(tiny_config, one_device()))
  expected = sample(pipe, contexts[0])
  table, latents = measure(pipe, contexts[0])
  assert relative_error(latents, expected) <= 1e-6
  again = RatioMeasurement()
  for _ in range(2):
    sample(pipe, contexts[0], step_cache=again)
  assert again.table == table, "of the last sample"
  assert np.shape(table) == (2, STEPS) and [ratios[0] for ratios in table] == [1, 1] and np.std(table) > 1e-4
  nothing = sample(pipe, contexts[0], step_cache=StepCache(ratios=table, threshold=0))
  assert np.array_equal(nothing, expected), "to the bit"


def test_skipped_steps_reuse_the_residual(pipe, contexts):
  """As a loop over the model itself, with a step that only one branch skips."""
  table = [[1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 2.0, 1.0, 1.0, 1.0]]
  cache = StepCache(ratios=table, threshold=0.1, max_skip=2, retention=0.2)
  computed = [cache.computed_steps(n, [range(STEPS)], always(STEPS)).tolist() for n in range(2)]
  assert computed == [[True, False, False, True, False, False], [True, False, True, False, False, True]]
  noise = np.random.default_rng(0).normal(size=pipe.encode(contexts[0][-1]).shape).astype(np.float32)
  prompts = np.random.default_rng(1).normal(size=(2, 3, pipe.config.text_dim)).astype(np.float32)
  given = {"prompt_embeds": prompts[0], "negative_prompt_embeds": prompts[1], "latents": noise}
  ours = sample(pipe, contexts[0], step_cache=cache, **given)

  model = nnx.merge(pipe.experts.transformers[0].graph, pipe.experts.load(0))
  job = pipe.make_job(contexts[0], len(contexts[0][-1]), 0, noise)
  rows = [pack_single(pipe.make_features(job, prompt), context_mode=pipe.context_mode) for prompt in prompts]
  rows = [dataclasses.replace(row, targets=target_indices(row.target_mask)) for row in rows]

  @jax.jit
  def run(tokens, sigma, row, residual):
    kept = []

    def predict(*args):
      velocity, added = model.with_residual(*args, residual=residual)
      kept.append(added)
      return velocity

    return Branch(row).velocity(predict, tokens, sigma), kept[0]

  tokens, levels, kept = rows[0].tokens.copy(), [*pipe.plan(STEPS).sigmas, 0.0], [None, None]
  mask = rows[0].target_mask
  tokens[mask] = job.noise
  for i in range(STEPS):
    velocities = []
    for n, row in enumerate(rows):
      velocity, kept[n] = run(tokens, np.float32(levels[i]), row, None if computed[n][i] else kept[n])
      velocities.append(np.asarray(velocity))
    velocity = velocities[1] + 2.0 * (velocities[0] - velocities[1])
    tokens = tokens + velocity * (levels[i + 1] - levels[i])
  whole, residual = run(tokens, np.float32(0.5), rows[0], None)
  reused, _ = run(tokens, np.float32(0.5), rows[0], residual)
  assert relative_error(reused, whole) <= 1e-5, "of the same step, the residual stands for the blocks"
  assert relative_error(ours, job.finish(np.asarray(tokens)[mask], pipe.config.patch_size)) <= 1e-5
  assert relative_error(ours, sample(pipe, contexts[0], **given)) > 1e-4


def test_a_batch_of_packed_rows_equals_single_samples(pipe, contexts):
  cache = StepCache(ratios=measure(pipe, contexts[0])[0], threshold=10, max_skip=1)
  options = dict(num_inference_steps=STEPS, guidance_scale=2.0, negative_prompt="no", step_cache=cache)
  together = pipe.sample_batch(contexts * 2, seeds=range(2 * len(contexts)), **options)
  for seed, (clips, out) in enumerate(zip(contexts, together)):
    assert relative_error(out.latents, pipe.sample(clips, seed=seed, **options).latents) <= 1e-5


def test_guidance_range(pipe, contexts):
  """Steps outside have no negative branch; the whole range is the default, to the bit."""
  prompts = np.random.default_rng(1).normal(size=(2, 3, pipe.config.text_dim)).astype(np.float32)
  clips, given = contexts[0], {"prompt_embeds": prompts[0], "negative_prompt_embeds": prompts[1]}
  everything = sample(pipe, clips, **given)
  assert np.array_equal(sample(pipe, clips, guidance_range=(0, 1), **given), everything)
  levels = pipe.plan(STEPS).sigmas.tolist()
  nothing = sample(pipe, clips, guidance_range=(0, 0.01), **given)
  assert relative_error(nothing, sample(pipe, clips, guidance_scale=1.0, **given)) <= 1e-6
  some = sample(pipe, clips, guidance_range=(levels[3], levels[2]), **given)
  assert relative_error(some, everything) > 1e-6 and relative_error(some, nothing) > 1e-6
  table, _ = measure(pipe, clips, guidance_range=(levels[3], levels[2]), **given)
  assert np.flatnonzero(np.array(table[1]) != 1).tolist() == [3]


def test_a_solver_that_calls_the_model_twice_is_refused(pipe, contexts):
  class Twice(Euler):
    def step(self, predict, state, sigma, coefficients):
      return super().step(predict, super().step(predict, state, sigma, coefficients / 2), sigma, coefficients / 2)

  cache = StepCache(ratios=[[1.0] * STEPS] * 2, threshold=1)
  with pytest.raises(UserError, match="a step cache needs a solver that calls the model once per step"):
    sample(pipe, contexts[0], step_cache=cache, solver=Twice())
  with pytest.raises(UserError, match="ratios of 2 branches of 6 steps, but the sample needs 1 of 5"):
    sample(pipe, contexts[0], step_cache=cache, num_inference_steps=5)
  with pytest.raises(UserError, match="ratios of 1 branches of 6 steps, but the sample needs 2 of 6"):
    sample(pipe, contexts[0], step_cache=dataclasses.replace(cache, ratios=[[1.0] * STEPS]))


KEY = TableKey(
  weights={"transformer": "abc"},
  solver="euler",
  sigmas=[1.0, 0.5],
  guidance_scales=[2.0],
  guidance_range=[0.0, 1.0],
  attention="full",
  context_timestep="target",
)


def test_tables_are_found_by_everything_that_they_depend_on(tmp_path):
  with pytest.raises(UserError, match=r"there is no .*step_cache.json: run univid-calibrate"):
    require_tables(tmp_path)
  write_table(tmp_path, KEY, [[1.0, 1.5]])
  others = {
    "weights": {"transformer": "abd"},
    "solver": "unipc",
    "sigmas": [1.0, 0.6],
    "guidance_scales": [3.0],
    "guidance_range": [0.0, 0.5],
    "attention": "context_causal",
    "context_timestep": "zero",
  }
  assert set(others) == {field.name for field in dataclasses.fields(KEY)}
  for number, (name, value) in enumerate(others.items()):
    other = dataclasses.replace(KEY, **{name: value})
    with pytest.raises(UserError, match=r"the step cache needs ratios of 2 steps of .* by running univid-calibrate"):
      read_table(tmp_path, other)
    write_table(tmp_path, other, [[1.0, float(number)]])
    assert read_table(tmp_path, other) == [[1.0, number]]
  assert read_table(tmp_path, KEY) == [[1.0, 1.5]]
  write_table(tmp_path, KEY, [[1.0, 1.25], [1.0, 1.0]])
  assert read_table(tmp_path, KEY) == [[1.0, 1.25], [1.0, 1.0]], "replaced"
  require_tables(tmp_path)


@pytest.mark.parametrize(
  "text",
  ["{", "[]", '{"version": 2, "tables": []}', '{"tables": [{"key": {}, "ratios": []}]}', '{"version": 1, "tables": 3}'],
)
def test_damaged_tables_are_named(tmp_path, text):
  (tmp_path / "step_cache.json").write_text(text)
  with pytest.raises(UserError, match=r"step_cache.json is damaged: .*; remove it and calibrate again"):
    require_tables(tmp_path)
