"""Bad steps: skipped, counted, and decided the same after a resume."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import parameters
from univid_jax.config.boundary import override
from univid_jax.core.errors import DivergedError, UserError
from univid_jax.training import guard
from univid_jax.training.guard import MIN_NORMS, WINDOW, global_norm, skip_bad_steps
from univid_jax.training.loop import train


def run(gradients, losses=None, *, skip_norm=0.0, split=None):
  """Returns the parameter after each step, and the last state; `split` stores and restores the state there."""
  optimizer = skip_bad_steps(optax.sgd(1.0, momentum=0.5), skip_norm=skip_norm)
  update = jax.jit(optimizer.update)
  params: Any = {"w": jnp.zeros(2)}
  state: Any = optimizer.init(params)
  path = []
  for number, gradient in enumerate(gradients):
    if number == split:
      state = jax.tree.map(jnp.asarray, jax.device_get(state))
    loss = jnp.float32(1.0 if losses is None else losses[number])
    updates, state = update({"w": jnp.full(2, gradient, jnp.float32)}, state, params, loss=loss)
    params = optax.apply_updates(params, updates)
    path.append(float(params["w"][0]))
  return path, state


class TestGuard:
  @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
  def test_steps_that_are_not_finite_change_nothing(self, bad):
    good, expected = run([1.0, 2.0])
    path, state = run([1.0, bad, 2.0])
    assert path == [good[0], good[0], good[1]] and int(state.skipped_in_a_row) == 0
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert run([1.0, 2.0], [1.0, bad])[0] == [good[0], good[0]]

  def test_large_norms_are_skipped_once_the_median_is_known(self):
    steps = [1.0] * (MIN_NORMS - 1) + [100.0] + [1.0, 2.9, 3.1, 1.0]
    path, state = run(steps, skip_norm=3.0)
    skipped = [i for i in range(1, len(path)) if path[i] == path[i - 1]]
    assert skipped == [MIN_NORMS + 2] and int(state.num_used) == len(steps) - 1
    assert run(steps, skip_norm=0.0)[0] != path

  @pytest.mark.parametrize("before", [MIN_NORMS - 1, MIN_NORMS])
  def test_how_many_norms_make_a_median(self, before):
    path, _ = run([1.0] * before + [100.0], skip_norm=3.0)
    assert (path[-1] == path[-2]) == (before == MIN_NORMS)

  @pytest.mark.parametrize("later, is_bad", [(WINDOW // 2 - 1, True), (WINDOW // 2 + 1, False)])
  def test_the_median_is_that_of_the_whole_window(self, later, is_bad):
    """A norm of 3.5 is more than 2.5 times the median if that is 1, and less if it is 1.9."""
    path, _ = run([1.0] * WINDOW + [1.9] * later + [3.5], skip_norm=2.5)
    assert (path[-1] == path[-2]) == is_bad

  def test_the_window_moves_on(self):
    path, _ = run([1.0] * WINDOW + [1.9] * WINDOW + [3.5], skip_norm=2.0)
    assert path[-1] != path[-2]

  def test_a_restored_state_decides_the_same(self):
    steps = [*np.linspace(1, 2, 20), 9.0, 1.0, np.nan, 8.0, 1.5]
    expected = run(steps, skip_norm=3.0)
    for split in (5, 20, 21, 24):
      path, state = run(steps, skip_norm=3.0, split=split)
      assert path == expected[0]
      jax.tree.map(np.testing.assert_array_equal, state, expected[1])


def test_skip_norm_needs_skip(tiny_config):
  for value, on_bad_step, expected in (
    (3.0, "stop", "0 unless"),
    (0.5, "skip", "0, or above 1"),
    (-1.0, "skip", "0, or"),
  ):
    with pytest.raises(UserError, match=f"optimizer.skip_norm must be {expected}"):
      override(tiny_config, {"optimizer.skip_norm": value, "optimizer.on_bad_step": on_bad_step})


@pytest.mark.long
def test_a_run_skips_counts_and_resumes(tiny_config, tmp_path, monkeypatch):
  """Every step after the first few has a norm above a median times 1 + 1e-6, or not: some are skipped."""
  monkeypatch.setattr(guard, "MIN_NORMS", 1)
  values = {"optimizer.on_bad_step": "skip", "optimizer.skip_norm": 1.000001, "num_steps": 6, "log_every": 1}
  values |= {"validation.every_steps": 0, "checkpoint.every_steps": 1, "optimizer.warmup_steps": 0}
  config = override(tiny_config, values)
  for steps in (3, 6):
    resumed = train(override(config, {"num_steps": steps}), str(tmp_path / "resumed")).pipeline
  whole = train(config, str(tmp_path / "whole")).pipeline
  jax.tree.map(np.testing.assert_array_equal, parameters(resumed), parameters(whole))
  lines = [
    [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    for name in ("resumed", "whole")
  ]
  counts = [[(line["step"], line["skipped"], line.get("loss")) for line in each] for each in lines]
  assert counts[0] == counts[1] and 0 < sum(skipped for _, skipped, _ in counts[0]) < 6
  assert all((loss is None) == (skipped == 1) for _, skipped, loss in counts[0])


@pytest.mark.long
def test_a_diverged_run_stops(tiny_config, tmp_path, monkeypatch):
  monkeypatch.setattr("univid_jax.training.hooks.MAX_SKIPPED_IN_A_ROW", 2)
  values = {"optimizer.on_bad_step": "skip", "optimizer.learning_rate": 1e38, "optimizer.adam_learning_rate": 1e38}
  values |= {"optimizer.warmup_steps": 0, "optimizer.clip_norm": 0.0, "num_steps": 5, "validation.every_steps": 0}
  with pytest.raises(DivergedError, match="2 steps in a row were skipped by step"):
    train(override(tiny_config, values), str(tmp_path))


def test_norms_of_bfloat16_are_those_of_float32():
  """In bfloat16 the sum of the squares of 400 such arrays stops growing at two thirds."""
  tree = [jnp.ones(1000, jnp.bfloat16)] * 400
  np.testing.assert_allclose(global_norm(tree), 400_000**0.5, rtol=1e-6)
