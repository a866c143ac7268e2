"""Training runs: resumed bit-exactly, stopped cleanly, validated."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import textwrap
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import commands
from tests.commands import finish, free_port, run_command, run_here, start_command, start_python
from tests.helpers import compile_plain_step, parameters
from univid_jax.checkpoints import run_parts
from univid_jax.checkpoints.checksums import find_damage, read_names
from univid_jax.checkpoints.lora.formats import write_lora
from univid_jax.checkpoints.lora.kinds import LoRALayer
from univid_jax.checkpoints.lora.reading import read_lora
from univid_jax.checkpoints.lora.weights import LoRAWeights
from univid_jax.checkpoints.run import Checkpointer, RunRecord, read_run, require_run, write_run
from univid_jax.checkpoints.run_parts import create_model, open_encoders, transformer_config
from univid_jax.checkpoints.saved import SavedCheckpoints
from univid_jax.checkpoints.trained import find_step
from univid_jax.checkpoints.usage import Usage
from univid_jax.config.boundary import differences, override
from univid_jax.config.presets import get_config, tiny, wan_1_3b
from univid_jax.config.schema import LoRAConfig, OptimizerConfig
from univid_jax.core import lock
from univid_jax.core.errors import DivergedError, Interrupted, UserError
from univid_jax.core.lock import Lock
from univid_jax.core.options import Attention, ContextTimestep, LearningRateSchedule, OptimizerName, TrainedExpert
from univid_jax.core.packed_row import UNIVID_CONTEXT, PackedRow
from univid_jax.core.sentence import Role, Sentence
from univid_jax.data.features import FeatureMaker
from univid_jax.data.fingerprint import write_fingerprint
from univid_jax.data.media.writer import write_clip
from univid_jax.data.rows.packing import RowShape, join_rows, pack, pack_rows
from univid_jax.data.rows.tokens import sentence_features
from univid_jax.data.sources.open import open_data
from univid_jax.diffusion.loss import NoiseLevels, has_sentence, sentence_losses
from univid_jax.inference.load import load_pipeline
from univid_jax.parallel.mesh import make_mesh
from univid_jax.parallel.sharding import shard_batch
from univid_jax.platform.current import Platform
from univid_jax.runtime.supervisor import StopSignal, Supervisor
from univid_jax.training import hooks, loop, metrics_writer, setup, validation
from univid_jax.training import step as train_step
from univid_jax.training.expert_schedule import ExpertSchedule
from univid_jax.training.goodput import Goodput
from univid_jax.training.guard import GuardState, skip_bad_steps
from univid_jax.training.learning_rates import LearningRates, schedule_factor
from univid_jax.training.loop import open_loader, restore_or_create_state, train
from univid_jax.training.memory import abstract_batch
from univid_jax.training.metrics_writer import MetricsWriter
from univid_jax.training.optimizer import make_optimizer, make_schedule
from univid_jax.training.same_run import check_same_data, check_same_run
from univid_jax.training.setup import set_up_run
from univid_jax.training.state import StateSpec, TrainState, describe_training
from univid_jax.training.step import make_train_step
from univid_jax.training.validation import Validation, select_sentences


def test_schedules():
  def make(schedule):
    return make_schedule(OptimizerConfig(warmup_steps=10, decay_fraction=0.5, schedule=schedule), 100)

  linear = make(LearningRateSchedule.LINEAR)
  np.testing.assert_allclose(
    [linear(0), linear(5), linear(10), linear(50), linear(75), linear(100)], [0, 0.5, 1, 1, 0.5, 0]
  )
  overlapping = make_schedule(OptimizerConfig(warmup_steps=20, decay_fraction=0.9), 100)
  np.testing.assert_allclose([overlapping(20), overlapping(60), overlapping(100)], [1, 0.5, 0])
  assert float(make(LearningRateSchedule.CONSTANT)(99)) == 1
  assert float(make(LearningRateSchedule.COSINE)(55)) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", LearningRateSchedule)
@pytest.mark.parametrize("warmup, decay", [(0, 0.5), (10, 0.0), (20, 0.9), (50, 1.0)])
def test_rates_on_the_host_are_those_of_the_devices(schedule, warmup, decay):
  config = OptimizerConfig(warmup_steps=warmup, decay_fraction=decay, schedule=schedule)
  on_devices = jax.vmap(make_schedule(config, 40))(jnp.arange(45))
  np.testing.assert_allclose([schedule_factor(config, 40, count) for count in range(45)], on_devices, atol=1e-6)


class TestLearningRates:
  CONFIG = OptimizerConfig(learning_rate=0.1, warmup_steps=0, decay_fraction=1.0)

  @staticmethod
  def state(opt_state=None):
    return TrainState(step=jnp.zeros((), jnp.int32), params={}, ema=None, opt_state=opt_state)

  def test_the_rate_is_that_of_the_step_taken(self):
    rates = LearningRates(self.CONFIG, 10, TrainedExpert.ONLY, None)
    assert [rates.of_last_step(step, self.state()) for step in (1, 6, 10)] == pytest.approx([0.1, 0.05, 0.01])

  def test_skipped_steps_do_not_count(self):
    rates, count = LearningRates(self.CONFIG, 10, TrainedExpert.ONLY, None), jnp.zeros((), jnp.int32)
    states = [self.state(GuardState({}, jnp.zeros(64), count + used, count)) for used in (0, 1, 3)]
    assert [rates.of_last_step(6, state) for state in states] == [None, pytest.approx(0.1), pytest.approx(0.08)]

  def test_each_expert_has_its_own_schedule(self):
    rates = LearningRates(self.CONFIG, 1000, TrainedExpert.BOTH, ExpertSchedule(500))
    state = self.state({"high": {}, "low": {}})
    assert [rates.of_last_step(step, state) for step in (1, 2, 999, 1000)] == pytest.approx([0.1, 0.1, 2e-4, 2e-4])

  @pytest.mark.parametrize("rank, expected", [(0, 0.1), (2, 0.2)])
  def test_adapters_have_the_other_rate_of_muon(self, rank, expected):
    optimizer = dataclasses.replace(self.CONFIG, name="muon", adam_learning_rate=0.2)
    config = dataclasses.replace(tiny(), optimizer=optimizer, lora=LoRAConfig(rank=rank), num_steps=10)
    assert LearningRates.from_config(config).of_last_step(1, self.state()) == pytest.approx(expected)

  def test_another_number_of_steps_moves_the_schedule(self):
    rates = LearningRates(OptimizerConfig(learning_rate=0.01), 3200, TrainedExpert.ONLY, None)
    line = rates.describe_change(1600, 1600, self.state())
    assert line and "for 3200 steps now, not 1600: it was 1.25e-05 and is 0.01 from step 1601 on" in line
    assert rates.describe_change(3200, 1600, self.state()) is None
    assert rates.describe_change(1600, 0, self.state()) is None
    constant = dataclasses.replace(rates.optimizer, schedule=LearningRateSchedule.CONSTANT)
    assert dataclasses.replace(rates, optimizer=constant).describe_change(1600, 1600, self.state()) is None


def test_muon_updates_only_matrices_of_blocks(tiny_config):
  optimizer = make_optimizer(tiny_config.optimizer, 10)
  params = nnx.to_pure_dict(nnx.state(nnx.jit(lambda: create_model(tiny_config))(), nnx.Param))
  grads = jax.tree.map(jnp.ones_like, params)
  state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
  for _ in range(2):  # the learning rate of the first step is 0
    updates, state = update(grads, state, params)
  # Muon's update of a constant gradient has rank one and a spectral norm of about the rate.
  update = np.asarray(updates["blocks"]["self_attn"]["q"]["kernel"][0])
  singular = np.linalg.svd(update, compute_uv=False)
  assert singular[1] < 0.05 * singular[0]
  assert np.all(np.asarray(updates["head"]["head"]["kernel"]) < 0)


@pytest.mark.parametrize("name", OptimizerName)
def test_moments_of_bfloat16_decay(tiny_config, name):
  """After gradients have become smaller, steps are as large as in float32; a bfloat16 moment would not decay."""
  config = dataclasses.replace(tiny_config.optimizer, name=name, warmup_steps=0, clip_norm=0.0)
  steps = []
  for dtype in (jnp.float32, jnp.bfloat16):
    optimizer = make_optimizer(config, 10_000)
    params = {"head": {"kernel": jnp.ones((4, 4), dtype)}}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(state))
    for size in (1.0,) * 200 + (0.1,) * 800:
      updates, state = update(jax.tree.map(lambda x, size=size: jnp.full_like(x, size), params), state, params)
    steps.append(float(updates["head"]["kernel"][0, 0]))
  assert steps[1] == pytest.approx(steps[0], rel=0.01)


def test_muon_takes_the_epsilon_of_the_config(tiny_config):
  params = {"head": {"kernel": jnp.ones((4, 4))}}
  steps = []
  for eps in (1e-8, 1.0):
    optimizer = make_optimizer(dataclasses.replace(tiny_config.optimizer, eps=eps, warmup_steps=0), 10)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    steps.append(float(updates["head"]["kernel"][0, 0]))
  assert abs(steps[1]) < 0.6 * abs(steps[0])


def adam(gradients, *, b1, b2, eps, clip_norm, nesterov):
  """Yields what Kingma and Ba (2015), or NAdam (Dozat 2016), divide and multiply by the rate, in each step."""
  first, second = np.zeros_like(gradients[0]), np.zeros_like(gradients[0])
  for t, gradient in enumerate(gradients, start=1):
    gradient = gradient * min(1, clip_norm / np.linalg.norm(gradient))
    first, second = b1 * first + (1 - b1) * gradient, b2 * second + (1 - b2) * gradient**2
    mean = first / (1 - b1**t)
    if nesterov:
      mean = b1 * first / (1 - b1 ** (t + 1)) + (1 - b1) * gradient / (1 - b1**t)
    yield mean / (np.sqrt(second / (1 - b2**t)) + eps)


@pytest.mark.parametrize("name", OptimizerName)
def test_steps_are_those_of_the_literature(name):
  """AdamW's, and beside Muon NAdam's at a rate of its own, without decay; the first gradient has a norm of 5."""
  constants = dict(b1=0.8, b2=0.6, eps=0.05, clip_norm=1.0)
  config = OptimizerConfig(
    name=name,
    learning_rate=0.1,
    adam_learning_rate=0.01,
    weight_decay=0.5,
    warmup_steps=0,
    schedule=LearningRateSchedule.CONSTANT,
    **constants,
  )
  is_muon = name == OptimizerName.MUON
  rate, decay = (0.01, 0.0) if is_muon else (0.1, 0.5)
  optimizer = make_optimizer(config, 10)
  params = {"bias": jnp.array([2.0, -1.0])}
  state, expected = optimizer.init(params), np.array([2.0, -1.0])
  gradients = [np.array(each) for each in ([3.0, 4.0], [0.1, -0.2], [-0.3, 0.2])]
  for gradient, step in zip(gradients, adam(gradients, nesterov=is_muon, **constants), strict=True):
    updates, state = optimizer.update({"bias": jnp.asarray(gradient, jnp.float32)}, state, params)
    params = optax.apply_updates(params, updates)
    expected = expected - rate * (step + decay * expected)
    np.testing.assert_allclose(params["bias"], expected, rtol=1e-5)


@pytest.fixture
def update_of(monkeypatch):
  """Returns a function that makes `make_update` of an optimizer for a loss and a gradient that are given."""

  def make(optimizer, *, loss, gradient, **options):
    monkeypatch.setattr(train_step, "_accumulate_gradients", lambda *_, **__: (jnp.float32(loss), gradient))
    monkeypatch.setattr(train_step, "has_sentence", lambda row: jnp.ones((1, 1)))
    monkeypatch.setattr(train_step, "_count", lambda row: {})
    update = train_step.make_update(mock.Mock(spec=StateSpec), optimizer, **options)
    return lambda state: update(
      state, {}, mock.Mock(spec=PackedRow), jnp.zeros((1, 1, 1)), mock.Mock(spec=NoiseLevels), jax.random.key(0)
    )[0]

  return make


@pytest.mark.parametrize("step, decay", [(0, 1 / 10), (8, 9 / 18), (890, 0.99), (10**6, 0.99)])
def test_the_average_warms_up(update_of, step, decay):
  """Its decay is min(decay, (1 + t) / (10 + t)), as in TensorFlow's ExponentialMovingAverage."""
  optimizer = optax.sgd(1.0)
  update = update_of(optimizer, loss=1.0, gradient={"w": jnp.float32(-1.0)}, ema_decay=0.99)
  params = {"w": jnp.float32(3.0)}
  state = TrainState(step=jnp.int32(step), params=params, ema={"w": jnp.float32(1.0)}, opt_state=optimizer.init(params))
  found = update(state)
  assert float(found.params["w"]) == 4 and int(found.step) == step + 1
  assert float(found.ema["w"]) == pytest.approx(decay * 1 + (1 - decay) * 4, rel=1e-5)


@pytest.mark.parametrize("loss, average", [(1.0, 0.5 * 1 + 0.5 * 4), (np.nan, 1.0)])
def test_a_skipped_step_leaves_the_average(update_of, loss, average):
  optimizer = skip_bad_steps(optax.sgd(1.0), skip_norm=0.0)
  update = update_of(optimizer, loss=loss, gradient={"w": jnp.float32(-1.0)}, ema_decay=0.99)
  params = {"w": jnp.float32(3.0)}
  state = TrainState(step=jnp.int32(8), params=params, ema={"w": jnp.float32(1.0)}, opt_state=optimizer.init(params))
  assert float(update(state).ema["w"]) == pytest.approx(average)


def test_every_part_of_a_batch_has_its_own_dropout():
  def loss(params, frozen, batch, num_sentences, key):
    return jnp.sum(params["w"] * batch) * jax.random.uniform(key)

  arguments = {"w": jnp.zeros(4)}, {}, jnp.eye(4), jnp.float32(4), jax.random.key(0)
  _, gradient = train_step._accumulate_gradients(loss, *arguments, microbatches=4)
  assert len(set(gradient["w"].tolist())) == 4


def test_noise_depends_on_the_seed_and_the_step(tiny_config, monkeypatch):
  keys = []
  monkeypatch.setattr(train_step, "draw_noise", lambda key, row, flow: keys.append(key) or (None, None))
  monkeypatch.setattr(train_step, "make_update", lambda *_, **__: lambda state, *_: (state, {}))
  for seed in (0, 1):
    take_step = train_step._make_step(override(tiny_config, {"seed": seed}), mock.Mock(spec=StateSpec), optax.sgd(1.0))
    for step in (0, 1, 2, 0, 1, 2):
      take_step(mock.Mock(spec=TrainState, step=jnp.int32(step)), {}, mock.Mock(spec=PackedRow))
  found = [tuple(jax.random.key_data(key).tolist()) for key in keys]
  assert found[:3] == found[3:6] and found[6:9] == found[9:] and len(set(found)) == 6


def test_dropout_does_not_depend_on_the_noise_levels(tiny_config, monkeypatch):
  """Nor on the noise: their keys are those of `draw_noise`."""
  keys = []

  def update(state, frozen, row, noise, levels, dropout):
    keys.extend((noise, dropout))
    return state, {}

  monkeypatch.setattr(train_step, "draw_noise", lambda key, row, flow: (key, None))
  monkeypatch.setattr(train_step, "make_update", lambda *_, **options: update)
  take_step = train_step._make_step(tiny_config, mock.Mock(spec=StateSpec), optax.sgd(1.0))
  take_step(mock.Mock(spec=TrainState, step=jnp.int32(3)), {}, mock.Mock(spec=PackedRow))
  key, dropout = keys
  used = [jax.random.key_data(each).tolist() for each in (key, *jax.random.split(key), jax.random.fold_in(key, 0))]
  assert jax.random.key_data(dropout).tolist() not in used


def test_new_weights_are_not_the_noise_of_sampling():
  """Noise is drawn from the key of the seed: validation's from the run's, that of a sample from its own."""
  kernel = nnx.jit(lambda: create_model(tiny()))().patch_embedding.kernel[...]
  assert not np.allclose(kernel, jax.nn.initializers.orthogonal()(jax.random.key(tiny().seed), kernel.shape))


def test_new_weights_depend_on_the_seed_and_adapters_not_on_the_key_of_the_model(tiny_config, monkeypatch):
  """Weights and adapters drawn from one key would be correlated."""
  monkeypatch.setattr(run_parts, "DiT", lambda *_, rngs, **__: keys.append(rngs.params.key[...]) or mock.MagicMock())
  monkeypatch.setattr(run_parts, "attach", lambda *_, rngs: keys.append(rngs.params.key[...]))
  monkeypatch.setattr(run_parts, "quantize_linears", lambda *_: None)
  keys: list[jax.Array] = []
  for seed in (5, 2**40 + 5, 7):
    create_model(override(tiny_config, {"seed": seed, "lora.rank": 2, "model.look_back": ()}))
  assert len(keys) == 6 and len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 6


@pytest.mark.parametrize("num_tokens, backend", [(37_504, "cudnn"), (131_040, "xla")])
def test_the_log_names_the_backend_that_attends(monkeypatch, num_tokens, backend):
  monkeypatch.setattr(loop, "current_platform", lambda: Platform.GPU)
  config = override(wan_1_3b(), {"rows.num_tokens": num_tokens})
  run = mock.Mock(config=config, mesh=make_mesh({}, jax.devices()[:1]), shape=transformer_config(config))
  assert loop.attention_backend(run) == backend


@pytest.mark.long
def test_a_whole_model_in_bfloat16(tiny_config, tmp_path):
  """With an average, which small steps move, in two parts, with the weights of `look_back`; it is loaded as trained."""
  changes = {"model.param_dtype": "bfloat16", "ema_decay": 0.999, "rows.per_batch": 16, "rows.microbatches": 2}
  config = override(tiny_config, {**changes, "num_steps": 3, "validation.every_steps": 0})
  result = train(config, str(tmp_path))
  state = read_state(tmp_path)
  moved = jax.tree.leaves(jax.tree.map(lambda x, like: jnp.any(x != like), state.ema, state.params))
  assert {x.dtype for x in jax.tree.leaves(state.ema)} == {jnp.dtype(jnp.float32)} and any(moved)
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
  weights = [pipeline.experts.transformers[0].params for pipeline in (result.pipeline, load_pipeline(str(tmp_path)))]
  assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool(jnp.all(x == y)), *weights))


@pytest.mark.parametrize("parts", [1, 8])
def test_parts_of_a_batch_are_summed_in_float32(parts):
  rows = 1 + jax.random.uniform(jax.random.key(0), (512,)).astype(jnp.bfloat16)

  def loss(params, frozen, batch, num_sentences, key):
    return jnp.sum(params["w"] * batch) / num_sentences

  arguments = {"w": jnp.bfloat16(1)}, {}, rows, jnp.float32(len(rows)), jax.random.key(0)
  _, gradient = train_step._accumulate_gradients(loss, *arguments, microbatches=512 // parts)
  assert gradient["w"].dtype == jnp.bfloat16
  assert float(gradient["w"]) == pytest.approx(float(jnp.mean(rows.astype(jnp.float32))), rel=2**-8)


def test_parts_of_a_batch_have_the_loss_and_the_gradient_of_the_whole(monkeypatch):
  """Each row counts by the number of its sentences, of which parts have more and less."""
  rng = np.random.default_rng(0)
  clips = tuple(rng.normal(size=(2, 1, 2, 2, 3)).astype(np.float32))
  features = sentence_features(
    Sentence(clips=clips, roles=(Role.CONTEXT, Role.TARGET)),
    patch_size=(1, 2, 2),
    text_len=4,
    prompt_embedding=np.zeros((1, 5), np.float32),
  )
  shape = RowShape(num_tokens=8, num_text_tokens=8, num_slots=4)
  row = jax.tree.map(jnp.asarray, join_rows([pack([features] * count, shape) for count in (1, 4, 2, 3)]))

  def losses(model, row, noise, sigmas):
    return model["w"] * noise.mean((1, 2))[:, None] * has_sentence(row), None

  monkeypatch.setattr(train_step, "nnx", mock.Mock(merge=lambda graph, params: params))
  monkeypatch.setattr(train_step, "sentence_losses", losses)
  optimizer, params = optax.sgd(1.0), {"w": jnp.float32(3.0)}
  state = TrainState(step=jnp.int32(0), params=params, ema=None, opt_state=optimizer.init(params))
  noise = jnp.asarray(rng.normal(size=row.tokens.shape).astype(np.float32))
  levels = NoiseLevels(sigmas=jnp.ones((4, 4)), weights=jnp.asarray(rng.uniform(1, 2, (4, 4)), jnp.float32))
  found = []
  for parts in (1, 2, 4):
    update = train_step.make_update(mock.Mock(spec=StateSpec, training_graph=None), optimizer, microbatches=parts)
    moved, metrics = jax.jit(update)(state, {}, row, noise, levels, jax.random.key(0))
    found.append([float(metrics["loss"]), float(moved.params["w"])])
  used = np.asarray(levels.weights) * np.asarray(has_sentence(row)) * np.asarray(noise).mean((1, 2))[:, None]
  np.testing.assert_allclose(found, [[3 * used.sum() / 10, 3 - used.sum() / 10]] * 3, rtol=1e-5)


# A small run from the command line.
SMALL = (
  *commands.SMALL,
  "--config.log_every=1",
  "--config.eval.sentences_per_case=1",
  "--config.eval.num_inference_steps=2",
)


def read_state(workdir):
  """Restores the latest training state of a run."""
  run = set_up_run(read_run(workdir).config, str(workdir))
  loader, checkpointer = open_loader(run), Checkpointer(str(workdir))
  state = restore_or_create_state(run, checkpointer, loader)
  checkpointer.close()
  loader.close()
  return state


def read_metrics(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_exactly(tmp_path, kills):
  steps = ["--config.num_steps=20", "--config.checkpoint.every_steps=3"]
  straight = run_command("univid_jax.train", *SMALL, *steps, f"--workdir={tmp_path / 'straight'}")
  assert straight.returncode == 0, straight.stderr
  rng = np.random.default_rng()
  for reached in sorted(rng.choice(range(2, 19), kills, replace=False)):
    process = start_command("univid_jax.train", *SMALL, *steps, f"--workdir={tmp_path / 'killed'}")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= reached):
      time.sleep(0.01)
    time.sleep(float(rng.uniform(0, 0.1)))
    process.send_signal(signal.SIGKILL)
    process.communicate()
  again = run_command("univid_jax.train", *SMALL, *steps, f"--workdir={tmp_path / 'killed'}")
  assert again.returncode == 0, again.stderr
  assert [row["step"] for row in read_metrics(tmp_path / "killed")] == list(range(1, 21))
  assert [row["loss"] for row in read_metrics(tmp_path / "killed")] == [
    row["loss"] for row in read_metrics(tmp_path / "straight")
  ]
  reports = [json.loads((tmp_path / name / "eval.json").read_text()) for name in ("straight", "killed")]
  assert reports[0] == reports[1]

  states = [read_state(tmp_path / name) for name in ("straight", "killed")]
  for a, b in zip(*map(jax.tree.leaves, states), strict=True):
    np.testing.assert_array_equal(a, b)

  complete = run_command("univid_jax.train", *SMALL, *steps, f"--workdir={tmp_path / 'killed'}")
  assert complete.returncode == 0 and "is complete (20 steps)" in complete.stderr + complete.stdout


@pytest.mark.long
def test_a_full_disk_during_a_save(tmp_path):
  """Files may not grow past 16 KB: one line, the previous checkpoint is intact, and with room again the run resumes."""
  arguments = [
    "univid_jax.train",
    *SMALL,
    "--config.validation.every_steps=0",
    "--config.eval.sentences_per_case=0",
    f"--workdir={tmp_path}",
  ]
  assert run_command(*arguments, "--config.num_steps=2").returncode == 0
  script = textwrap.dedent("""
    import resource, runpy
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))
    runpy.run_module("univid_jax.train", run_name="__main__")
  """)
  full = finish(start_python("-c", script, *arguments[1:], "--config.num_steps=4"))
  last = full.stderr.strip().splitlines()[-1]
  assert full.returncode == 1 and last.startswith("error: ") and "the last one is that of step 2" in last, full.stderr
  assert last.endswith(": File too large") and "Traceback" not in full.stderr and full.stderr.count("rror: ") == 1
  again = run_command(*arguments, "--config.num_steps=4")
  assert again.returncode == 0 and "at step 2 of 4" in again.stderr, again.stderr
  assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.long
def test_a_clip_deleted_during_training_is_named(tmp_path):
  """One line names it; the last checkpoint is intact, and with the clip back the run resumes."""
  for number, name in enumerate("abc"):
    (tmp_path / "pairs" / "task" / name).mkdir(parents=True)
    for part in ("source", "target"):
      write_clip(tmp_path / "pairs" / "task" / name / f"{part}.png", np.full((1, 16, 16, 3), 50 * number, np.uint8))
  arguments = [
    *SMALL,
    f"--config.data.pairs={tmp_path / 'pairs'}",
    "--config.data.bundled=False",
    "--config.data.contexts.I=0.0",
    "--config.data.contexts.III=0.0",
    "--config.validation.every_steps=0",
    "--config.eval.sentences_per_case=0",
    "--config.checkpoint.every_steps=5",
    f"--workdir={tmp_path / 'run'}",
  ]
  process = start_command("univid_jax.train", *arguments, "--config.num_steps=100000")
  while process.poll() is None and not (
    (tmp_path / "run" / "metrics.jsonl").exists() and count_metrics(tmp_path / "run") >= 12
  ):
    time.sleep(0.05)
  clip, away = tmp_path / "pairs" / "task" / "b" / "target.png", tmp_path / "away.png"
  clip.rename(away)
  _, error = process.communicate(timeout=60)
  last = error.strip().splitlines()[-1]
  assert process.returncode == 1 and last.startswith("error: ") and str(clip) in last, error
  away.rename(clip)
  checkpointer = Checkpointer(str(tmp_path / "run"))
  step = checkpointer.latest_step
  checkpointer.close()
  assert step >= 10 and step % 5 == 0
  again = run_command("univid_jax.train", *arguments, f"--config.num_steps={step + 1}")
  assert again.returncode == 0 and f"at step {step} of {step + 1}" in again.stderr, again.stderr


def assert_stopped(workdir, code, stderr):
  """Checks that a command was stopped by SIGTERM, and that the step that it names is saved."""
  assert code == 75
  message = stderr.strip().splitlines()[-1]
  assert "stopped by SIGTERM at step" in message and message.endswith("rerun the same command to resume")
  checkpointer = Checkpointer(str(workdir))
  assert checkpointer.latest_step == int(message.split("step ")[1].split()[0])
  checkpointer.close()


def test_sigterm_saves_and_exits_with_75(tmp_path, monkeypatch, capfd):
  write = MetricsWriter.write

  def write_and_stop(self, step, summary):
    write(self, step, summary)
    if step == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(loop, "compile_train_step", compile_plain_step)
  monkeypatch.setattr(MetricsWriter, "write", write_and_stop)
  arguments = "--config.num_steps=9", "--config.validation.every_steps=0", f"--workdir={tmp_path}"
  assert_stopped(tmp_path, run_here("univid_jax.train", *SMALL, *arguments), capfd.readouterr().err)


@pytest.mark.long
def test_a_process_that_gets_sigterm_saves_and_exits_with_75(tmp_path):
  process = start_command("univid_jax.train", *SMALL, "--config.num_steps=100000", f"--workdir={tmp_path}")
  while process.poll() is None and not ((tmp_path / "metrics.jsonl").exists() and count_metrics(tmp_path) >= 2):
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate(timeout=60)
  assert_stopped(tmp_path, process.returncode, stderr)


def count_metrics(workdir):
  return (workdir / "metrics.jsonl").read_text().count("\n")


@pytest.fixture(scope="module")
def tiny_run(tiny_config, tmp_path_factory):
  """(Folder, result) of a complete run."""
  workdir = tmp_path_factory.mktemp("tiny") / "run"
  return workdir, train(tiny_config, str(workdir))


def test_loras_have_to_agree_with_the_run_that_they_are_added_to(tiny_run, tmp_path, caplog):
  layer = LoRALayer(np.zeros((2, 32), np.float32), np.zeros((32, 2), np.float32), 2.0)

  def load(**usage):
    metadata = {"software": "univid_jax 1", **Usage(**usage).to_metadata()}
    lora = LoRAWeights({"blocks.0.self_attn.q.weight": layer}, "jax", metadata)
    write_lora(tmp_path / "lora.safetensors", lora, "comfyui")
    return load_pipeline(str(tiny_run[0]), lora=str(tmp_path / "lora.safetensors"))

  with pytest.raises(UserError, match=r"the run was trained with attention full and .*: choose one"):
    load(attention=Attention.CONTEXT_CAUSAL, context_timestep=ContextTimestep.ZERO)
  assert load(shift=3.5, context_timestep=ContextTimestep.TARGET).usage.shift == 5.0
  assert "the run was trained with shift 5.0, which is used, and" in caplog.text


def test_another_config_in_the_same_workdir_is_refused(tiny_config, tiny_run, tmp_path):
  """And changes nothing there, also not what the run remembers of its data, or it could not be resumed."""
  workdir, data = tiny_run[0], tmp_path / "data"
  before = {path: path.read_bytes() for path in workdir.glob("*.json")}
  write_clip(data / "edges" / "a" / "source.png", np.zeros((1, 16, 16, 3), np.uint8))
  write_clip(data / "edges" / "a" / "target.png", np.zeros((1, 16, 16, 3), np.uint8))
  for changes, message in (({"seed": 1}, "seed = 0, not 1"), ({"data.pairs": str(data)}, "data.pairs = ")):
    with pytest.raises(UserError, match=f"is a run with {message}"):
      train(override(tiny_config, changes), str(workdir))
  assert {path: path.read_bytes() for path in workdir.glob("*.json")} == before and workdir / "data.json" in before


@pytest.mark.parametrize(
  "config, workdir, options, message",
  [
    (None, "run", {}, "config must be a RunConfig, got NoneType: univid_jax.config.presets has some, such as tiny()"),
    ({}, "run", {}, "config must be a RunConfig, got dict"),
    ("tiny", "run", {}, "config must be a RunConfig, got str"),
    (get_config("tiny"), "run", {}, "got ConfigDict: .* univid_jax.config.boundary.from_config_dict makes one"),
    (tiny(), "", {}, "workdir must name a folder or a bucket, got ''"),
    (tiny(), None, {}, "workdir must name a folder or a bucket, got None"),
    (
      *(tiny(), "run", {"on_damaged_checkpoint": "foo"}),
      "on_damaged_checkpoint must be one of fallback, stop, got 'foo'",
    ),
    (tiny(), "run", {"profile_steps": "x"}, "profile_steps must be a whole number of at least 0, got 'x'"),
    (tiny(), "run", {"profile_steps": -1}, "profile_steps must be a whole number of at least 0, got -1"),
    (tiny(), "run", {"verify_weights": "no"}, "verify_weights must be True or False, got 'no'"),
    (tiny(), "run", {"data": {}}, "data must be a DataSources, got dict: open_data .* returns those of a config"),
  ],
)
def test_wrong_arguments_change_nothing(tmp_path, monkeypatch, config, workdir, options, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=message):
    train(config, workdir, **options)
  assert not list(tmp_path.iterdir())


def test_fewer_heads_than_distances_say_what_to_set(tiny_config):
  config = override(tiny_config, {"model.num_heads": 2})
  with pytest.raises(UserError, match=r"set config\.model\.look_back to 2 distances or fewer, or to \(\)"):
    describe_training(config, make_mesh(config.mesh))
  fewer = override(config, {"model.look_back": ()})
  assert describe_training(fewer, make_mesh(config.mesh))


@pytest.mark.parametrize("changes", [{}, {"optimizer.name": "muon", "optimizer.on_bad_step": "skip"}])
def test_a_step_promotes_no_dtypes(tiny_config, changes):
  """But for optax: so it can be part of a program with jax_numpy_dtype_promotion = strict."""
  config = override(tiny_config, {"num_steps": 60, **changes})
  mesh = make_mesh(config.mesh)
  optimizers, spec = describe_training(config, mesh)
  step_fn = make_train_step(config, spec, optimizers, mesh)
  batch = abstract_batch(config, transformer_config(config), mesh)
  with jax.numpy_dtype_promotion("strict"), jax.set_mesh(mesh):
    state, metrics = jax.eval_shape(step_fn, spec.abstract, {}, batch)
  assert metrics["loss"].dtype == jnp.float32 and state.step.dtype == jnp.int32


@pytest.mark.parametrize(
  "key, value",
  [
    ("model.remat", "dots"),
    ("model.attention_backend", "xla"),
    ("mesh.fsdp", -1),
    ("data.allow_dropped", True),
    ("data.allow_changed", True),
    ("num_steps", 99),
  ],
)
def test_what_messages_advise_is_not_refused_in_a_run_that_has_begun(tiny_config, key, value):
  changed = override(tiny_config, {"mesh.data": 1, key: value})
  assert key in [name for name, _, _ in differences(tiny_config, changed)]
  check_same_run("run", RunRecord(tiny_config, ("",), ""), RunRecord(changed, ("",), ""))  # raises nothing


class TestMovedFiles:
  """What a run reads may lie elsewhere when it is resumed, if its contents are known to be the same."""

  @pytest.mark.parametrize("key", ["data.pairs", "data.arc.path"])
  def test_data(self, tiny_config, tmp_path, key):
    before, after = (RunRecord(override(tiny_config, {key: path}), ("",), "") for path in ("old", "/new/place"))
    with pytest.raises(UserError, match=f"is a run with {key} = 'old', not '/new/place'"):
      check_same_run(str(tmp_path), before, after)
    write_fingerprint(tmp_path, {"pairs": {"num_records": 1, "checksum": "x", "records": {}}})
    check_same_run(str(tmp_path), before, after)
    with pytest.raises(UserError, match=f"is a run with {key} = '', not '/new/place'"):
      check_same_run(str(tmp_path), RunRecord(tiny_config, ("",), ""), after)

  @pytest.mark.parametrize("part", ["", "vae", "configs", "tokenizer", "text_encoder is stored in"])
  def test_a_base(self, tiny_config, part):
    """A copy at another place is the same base; one that differs in any part is not."""
    contents = {"transformer": "abc", "vae": "def", "configs": "0", "tokenizer": "1"}
    before, after = (
      RunRecord(override(tiny_config, {"lora.rank": 2, "init_from": path}), ("abc",), "", base_contents=each)
      for path, each in (("old", contents), ("/new/place", contents | ({part: "other"} if part else {})))
    )
    with pytest.raises(UserError, match="is a run with init_from = ") if part else contextlib.nullcontext():
      check_same_run("run", before, after)

  def test_a_base_whose_contents_were_not_recorded_stays_in_place(self, tiny_config, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to("base")
    config = override(tiny_config, {"lora.rank": 2, "init_from": str(tmp_path / "base")})
    for name, is_same in (("link", True), ("base/../base/", True), ("copy", False)):
      again = override(config, {"init_from": f"{tmp_path}/{name}"})
      with contextlib.nullcontext() if is_same else pytest.raises(UserError, match="is a run with init_from = "):
        check_same_run(str(tmp_path), RunRecord(config, ("abc",), ""), RunRecord(again, ("abc",), ""))
    small, folder = (override(config, {"init_from": name}) for name in ("small", "./small"))
    with pytest.raises(UserError, match=r"is a run with init_from = 'small', not '\./small'"):
      check_same_run(str(tmp_path), RunRecord(small, ("abc",), ""), RunRecord(folder, ("abc",), ""))

  @pytest.mark.long
  def test_a_run_goes_on_with_moved_data(self, tiny_config, tmp_path):
    TestChangedData().write(tmp_path / "data")
    contexts = {f"data.contexts.{name}": float(name == "II") for name in ("I", "II", "III", "IV")}
    changes = {"data.held_out": 0.0, "eval.sentences_per_case": 0, "num_steps": 2, **contexts}
    config = override(tiny_config, changes | {"data.pairs": str(tmp_path / "data")})
    train(config, str(tmp_path / "run"))
    (tmp_path / "data").rename(tmp_path / "moved")
    again = override(config, {"data.pairs": str(tmp_path / "moved"), "num_steps": 3})
    assert train(again, str(tmp_path / "run")).steps_taken == 1


class TestChangedData:
  def write(self, folder, names=("a", "b", "c"), shade=0):
    for name in names:
      write_clip(folder / "edges" / name / "source.png", np.full((1, 16, 16, 3), 50, np.uint8))
      write_clip(folder / "edges" / name / "target.png", np.full((1, 16, 16, 3), shade, np.uint8))

  @pytest.mark.long
  def test_a_run_is_not_resumed_on_other_data(self, tiny_config, tmp_path, caplog):
    data, workdir = tmp_path / "data", str(tmp_path / "run")
    self.write(data)
    contexts = {f"data.contexts.{name}": float(name == "II") for name in ("I", "II", "III", "IV")}
    changes = {"data.pairs": str(data), "data.held_out": 0.0, "eval.sentences_per_case": 0, "num_steps": 2, **contexts}
    config = override(tiny_config, changes)
    caplog.set_level("INFO")
    train(config, workdir)
    more = override(config, {"num_steps": 3})
    self.write(data, names=("b",), shade=9)
    with pytest.raises(UserError, match=r"changed since the run started: pairs had 3 .* and has 3; changed: edges/b"):
      train(more, workdir)
    self.write(data, names=("d",))
    message = "pairs had 3 records and has 4; added: edges/d; changed: edges/b"
    (tmp_path / "other").mkdir()
    for damaged in (b"{", b"[]", b'{"pairs": {}}', b"[" * 10_000):
      (tmp_path / "other" / "data.json").write_bytes(damaged)
      with pytest.raises(UserError, match=r"data.json is damaged, .* restore it, or delete it"):
        check_same_data(str(tmp_path / "other"), open_data(more), more)
    allowed = override(more, {"data.allow_changed": True})
    assert train(allowed, workdir).steps_taken == 1 and message in caplog.text
    assert "the learning rate is scheduled for 3 steps now, not 2" in caplog.text
    assert "seconds if it is cached, else half a minute to several minutes" in caplog.text
    assert train(override(more, {"num_steps": 4}), workdir).steps_taken == 1, "it is the run's data now"


class TestDistillationOfPreviews:
  """It is read before data is opened, with the verification of the command."""

  def test_a_wrong_path_fails_at_the_start(self, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "open_data", lambda config: pytest.fail("the data is opened first"))
    config = override(tiny_config, {"validation.accelerate": str(tmp_path / "none:lightx2v")})
    with pytest.raises(FileNotFoundError, match=r"^config\.validation\.accelerate: no such file: .*none$"):
      set_up_run(config, str(tmp_path / "run"))
    with pytest.raises(pytest.fail.Exception):  # without validation nothing is read
      set_up_run(override(config, {"validation.every_steps": 0}), str(tmp_path / "run"))

  @pytest.mark.parametrize("verify", [True, False])
  def test_verification(self, tiny_config, tmp_path, monkeypatch, verify):
    read = mock.Mock(side_effect=InterruptedError)
    monkeypatch.setattr(setup, "read_distillation", read)
    with pytest.raises(InterruptedError):
      set_up_run(override(tiny_config, {"validation.accelerate": "a,b"}), str(tmp_path), verify_weights=verify)
    read.assert_called_once_with(("a", "b"), verify=verify)


def test_what_is_written(tiny_config, tiny_run):
  workdir, result = tiny_run
  assert result.steps_taken == 4
  assert [row["step"] for row in read_metrics(workdir)] == [1, 2, 3, 4]
  assert all(
    0 < row["fill_rate"] <= 1 and 0 < row["balance"] <= 1 and row["sentences"] >= 8 and np.isfinite(row["loss"])
    for row in read_metrics(workdir)
  )
  optimizer = tiny_config.optimizer
  rates = [optimizer.learning_rate * schedule_factor(optimizer, 4, count) for count in range(4)]
  assert [row["learning_rate"] for row in read_metrics(workdir)] == rates
  assert (workdir / "loss.png").stat().st_size > 1000 and any((workdir / "tensorboard").iterdir())
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4"]


class TestValidation:
  def measured(self, config, sizes, tmp_path):
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    spec = StateSpec.for_model(lambda: create_model(config), optax.sgd(1.0), mesh, ema=False)
    data, encoders = open_data(config), open_encoders(config, mesh)
    sentences = select_sentences(data, override(config, {"validation.sentences": 12}))
    assert data.held_out and len(sentences) == 12
    make_features = FeatureMaker(encoders, shape=transformer_config(config), task_names=data.task_names)
    params = spec.create().params
    return Validation(config, spec, sentences, make_features, mesh)(params, {}), (
      spec,
      params,
      sentences,
      make_features,
    )

  @pytest.mark.long
  def test_any_mesh_and_packing_give_the_mean_over_sentences(self, tiny_config, tmp_path):
    tiny_config = override(tiny_config, {"model.look_back": (), "validation.sigmas": (0.7,)})
    found, (spec, params, sentences, make_features) = self.measured(tiny_config, {"data": 1}, tmp_path)
    other, _ = self.measured(tiny_config, {"data": 4, "context": 2}, tmp_path)
    assert other.keys() == found.keys() and all(other[name] == pytest.approx(found[name], rel=1e-5) for name in found)
    tasks = [sentence.task for sentence in sentences]
    weighted = sum(found[f"val_loss/task_{task}"] for task in tasks) / len(tasks)
    assert found["val_loss"] == found["val_loss/sigma_0.7"] == pytest.approx(weighted, rel=1e-5)
    # By hand: each sentence in a row of its own, with its noise in the packed rows.
    rows, places = pack_rows(
      [make_features(sentence) for sentence in sentences], RowShape.from_config(tiny_config.rows, UNIVID_CONTEXT)
    )
    noise = np.asarray(jax.random.normal(jax.random.key(tiny_config.seed), rows.tokens.shape))
    model, losses = nnx.merge(spec.graph, params), []
    for sentence, (index, segment) in zip(sentences, places):
      alone = pack([make_features(sentence)], RowShape.from_config(tiny_config.rows, UNIVID_CONTEXT))
      own = np.zeros_like(alone.tokens)
      own[0, alone.segment_ids[0] == 1] = noise[index, rows.segment_ids[index] == segment]
      alone, own = jax.tree.map(jnp.asarray, (alone, own))
      losses.append(sentence_losses(model, alone, own, jnp.full((1, alone.num_slots), 0.7))[0].sum())
    assert found["val_loss"] == pytest.approx(float(np.mean(losses)), rel=1e-5)

  def test_microbatches_bound_what_is_computed_at_once(self, tiny_config, tmp_path):
    """And change nothing else."""
    config = override(tiny_config, {"rows.per_batch": 4, "validation.sigmas": (0.7,), "model.look_back": ()})
    sizes, losses = [], []
    for microbatches in (1, 4):
      part = override(config, {"rows.microbatches": microbatches})
      with mock.patch.object(validation, "shard_batch", side_effect=shard_batch) as shard:
        losses.append(self.measured(part, {"data": 1}, tmp_path)[0])
      sizes.append({len(call.args[0][1]) for call in shard.call_args_list})
    assert sizes == [{4}, {1}] and losses[1] == pytest.approx(losses[0], rel=1e-5)

  def test_encoding_its_sentences_is_not_part_of_the_first_step(self, tiny_config, monkeypatch):
    monkeypatch.setattr(hooks, "Validation", mock.Mock(spec=Validation))
    run, summarize = mock.Mock(config=tiny_config, validation=[]), mock.Mock(spec=hooks.Summarize)
    hooks.Validate(run, summarize, mock.Mock(spec=Supervisor), mock.Mock(spec=Goodput))
    summarize.restart_clock.assert_called_once_with()

  def test_held_out_sentences_that_fit_no_row_are_left_out(self, tiny_config, tmp_path, caplog):
    """As those to train on are, if that is allowed; else the message names the record and the key."""
    write_clip(tmp_path / "a.png", np.zeros((1, 16, 16, 3), np.uint8))
    context, target = {"path": "a.png"}, {"path": "a.png", "role": "target"}
    # Three of twelve are held out: the lines 3, 7 and 11.
    lengths = {line: 60 if line in (3, 7) else 1 for line in range(1, 13)}
    lines = [json.dumps({"clips": [context] * count + [target]}) for count in lengths.values()]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    changes = {"data.manifest": str(tmp_path / "m.jsonl"), "data.bundled": False, "data.held_out": 0.25}
    config = override(tiny_config, changes | {"validation.every_steps": 2, "validation.sentences": 6})
    message = (
      r"^2 listed records .* first is .*m\.jsonl line 3: .* tokens, but a row holds only config\.rows\.num_tokens = 48"
    )
    with pytest.raises(UserError, match=message):
      set_up_run(config, str(tmp_path / "refused"))
    assert sum(message.startswith("dropped: ") for message in caplog.messages) == 2  # named, though it is an error
    caplog.clear()
    config = override(config, {"data.allow_dropped": True})
    run = set_up_run(config, str(tmp_path / "run"))
    assert len(run.validation) == 2 and all("line 11" in sentence.record for sentence in run.validation)
    dropped = [message for message in caplog.messages if message.startswith("dropped: ")]
    assert len(dropped) == 2 and "line 3" in dropped[0] and "line 7" in dropped[1]
    assert Validation(config, run.spec, run.validation, run.features, run.mesh)
    alone = override(config, {"validation.sentences": 2})  # the lines 3 and 7
    with pytest.raises(UserError, match="none of the 2 sentences to validate on can be used; the log names them"):
      set_up_run(alone, str(tmp_path / "none"))

  @pytest.mark.long
  def test_what_a_stop_has_left_out_is_made_up_for(self, tiny_config, tmp_path):
    """A run that is stopped after a step that validates saves its state at once, and validates when it is resumed."""
    config = override(tiny_config, {"num_steps": 4, "validation.every_steps": 2, "validation.sentences": 4})
    straight = train(config, str(tmp_path / "straight"))
    signals = iter([None, StopSignal("SIGTERM")])
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(
        Supervisor, "should_stop", lambda self: setattr(self, "stop_signal", next(signals)) or bool(self.stop_signal)
      )
      with pytest.raises(Interrupted, match="at step 2 of 4, state saved"):
        train(config, str(tmp_path / "stopped"))
    assert "val_loss" not in read_metrics(tmp_path / "stopped")[-1]
    train(config, str(tmp_path / "stopped"))
    rows = [
      {name: row[name] for name in ("step", "loss", "val_loss") if name in row}
      for row in read_metrics(tmp_path / "straight")
    ]
    again = [
      {name: row.get(name) for name in expected}
      for row, expected in zip(read_metrics(tmp_path / "stopped"), rows, strict=True)
    ]
    assert again == rows and "val_loss" in rows[1] and straight.steps_taken == 4

  @pytest.mark.long
  def test_the_best_checkpoint_is_kept(self, tiny_config, tmp_path):
    config = override(
      tiny_config,
      {
        "num_steps": 5,
        "checkpoint.every_steps": 1,
        "checkpoint.keep": 1,
        "validation.every_steps": 1,
        "validation.sentences": 4,
        "validation.previews": 1,
        "optimizer.learning_rate": 0.2,
        "optimizer.adam_learning_rate": 0.2,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
      },
    )
    result = train(config, str(tmp_path))
    losses = {row["step"]: row["val_loss"] for row in read_metrics(tmp_path)}
    best = min(losses, key=losses.get)
    assert find_step(tmp_path, "best") == best and find_step(tmp_path, None) == 5
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {best, 5}
    assert len(list((tmp_path / "previews").glob("*.png"))) == 5
    latest, chosen = (parameters(load_pipeline(str(tmp_path), step=step)) for step in (None, "best"))
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), latest, parameters(result.pipeline))
    assert all(jax.tree.leaves(same))
    kernels = [params["head"]["head"]["kernel"] for params in (latest, chosen)]
    assert np.array_equal(*kernels) == (best == 5)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 77"):
      find_step(tmp_path, 77)


class TestMetrics:
  """metrics.jsonl has each step once, in order, whatever the run before left there."""

  @pytest.fixture(autouse=True)
  def without_plots(self, monkeypatch):
    monkeypatch.setattr(metrics_writer, "plot_loss", lambda path, *_: path.touch())
    monkeypatch.setattr(MetricsWriter, "_board", mock.Mock())

  def resume(self, tmp_path, content, start, steps):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    writer = MetricsWriter(tmp_path, start_step=start)
    for step in steps:
      writer.write(step, {"loss": float(step)})
    writer.close()
    return read_metrics(tmp_path)

  @given(st.data())
  @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
  def test_after_a_kill_at_any_byte(self, tmp_path, data):
    """A run was killed while it wrote a line, and resumes from any checkpoint before."""
    lines = [json.dumps({"step": step, "loss": float(step), "fill_rate": 0.5}) + "\n" for step in range(1, 9)]
    content = "".join(lines).encode()
    content = content[: data.draw(st.integers(len(lines[0]), len(content)))]
    start = data.draw(st.integers(0, content.count(b"\n")))
    rows = self.resume(tmp_path, content, start, range(start + 1, 10))
    assert [(row["step"], row["loss"]) for row in rows] == [(step, step) for step in range(1, 10)]

  @pytest.mark.parametrize(
    "damage", [b"\0\0\0\n", b"{}\n", b"[1]\n", b'{"step": "2"}\n', b"\xff\n", b'{"step": 1}\n', b"\n"]
  )
  def test_after_damage(self, tmp_path, damage):
    rows = self.resume(tmp_path, b'{"step": 1, "loss": 1.0}\n' + damage + b'{"step": 2, "loss": 2.0}\n{"st', 2, [3])
    assert [row["step"] for row in rows] == [1, 2, 3]

  def test_an_error_keeps_its_text(self, tmp_path):
    """That of a bucket may have no number; a write to a full disk names no file, so the workdir is named."""
    writer = MetricsWriter(tmp_path, start_step=0)
    for error, message in (
      (OSError("quota exceeded: gs://b/run"), "^quota exceeded: gs://b/run$"),
      (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), f"No space left on device: '{tmp_path}'"),
      (OSError(errno.EIO, os.strerror(errno.EIO), "/x/events"), "Input/output error: '/x/events'"),
    ):
      writer._board.write.side_effect = error
      with pytest.raises(OSError, match=message):
        writer.write(1, {"loss": 1.0})

  def test_a_kill_while_it_is_trimmed_loses_nothing(self, tmp_path, monkeypatch):
    """The lines after the checkpoint are dropped in a new file that replaces the old one."""
    lines = b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
      MetricsWriter(tmp_path, start_step=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines


def read_events(path):
  """Returns the events in a file of TensorBoard's: each between its length with a checksum, and another checksum."""
  from tensorboardX.proto import event_pb2

  data, events = path.read_bytes(), []
  while data:
    length = int.from_bytes(data[:8], "little")
    events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
    data = data[16 + length :]
  return events


def test_tensorboard_shows_each_step_once(tmp_path, monkeypatch):
  """A resumed run begins its file with the start of a session, from whose step on viewers drop earlier files."""
  monkeypatch.setattr(metrics_writer, "plot_loss", lambda path, *_: path.touch())
  folder, shown = tmp_path / "tensorboard", {}
  for number, (start, steps) in enumerate(((0, (1, 2, 3)), (1, (2,)))):
    writer = MetricsWriter(tmp_path, start_step=start)
    for step in steps:
      writer.write(step, {"loss": step + number / 2, "mfu": 0.5})
    writer.add(steps[-1], {"val_loss": 0.25})
    writer.close()
    [path] = folder.glob("events.out.tfevents.*")
    version, session, *events = read_events(path.rename(folder / f"run_{number}"))
    assert version.file_version == "brain.Event:2"
    assert (session.session_log.status, session.step) == (session.session_log.START, start + 1)
    shown = {key: value for key, value in shown.items() if key[1] < session.step}
    for event in events:
      [value] = event.summary.value
      assert (value.tag, event.step) not in shown and abs(event.wall_time - time.time()) < 60
      shown[value.tag, event.step] = value.simple_value
  assert shown == {**{("loss", 1): 1.0, ("loss", 2): 2.5, ("mfu", 1): 0.5, ("mfu", 2): 0.5}, ("val_loss", 2): 0.25}


@pytest.mark.long
def test_a_signal_during_validation_saves_at_once(tiny_config, tmp_path, monkeypatch):
  """Validation may take longer than a preempted machine has; the resumed run makes up for it."""
  config = override(tiny_config, {"validation.every_steps": 2, "validation.sentences": 4, "validation.previews": 0})
  sums, calls = Validation.__call__, []

  def interrupted(self, *args, progress, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    calls.append(len(calls))
    return sums(self, *args, progress=progress, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(Validation, "__call__", interrupted)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM at step 2 of 4, state saved; rerun") as stopped:
      train(config, str(tmp_path))
  assert stopped.value.exit_code == 75 and calls == [0] and find_step(tmp_path, None) == 2
  assert train(config, str(tmp_path)).steps_taken == 2
  assert [("val_loss" in row, row["step"]) for row in read_metrics(tmp_path)] == [
    (False, 1),
    (True, 2),
    (False, 3),
    (True, 4),
  ]


@pytest.mark.long
def test_a_validation_that_is_made_up_for_counts(tiny_config, tmp_path, monkeypatch):
  """Also that of the last step, after which nothing is saved any more: it can be the best, and is not repeated."""
  changes = {"num_steps": 2, "validation.every_steps": 2, "validation.sentences": 4, "validation.previews": 0}
  config, measure, calls = override(tiny_config, changes), Validation.__call__, []

  def validate(self, *args, progress, **kwargs):
    if not calls:
      os.kill(os.getpid(), signal.SIGTERM)
    calls.append(len(calls))
    return measure(self, *args, progress=progress, **kwargs)

  monkeypatch.setattr(Validation, "__call__", validate)
  with pytest.raises(Interrupted, match="at step 2 of 2, state saved"):
    train(config, str(tmp_path))
  with pytest.raises(FileNotFoundError, match="no finished checkpoint with a validation loss"):
    find_step(tmp_path, "best")
  assert train(config, str(tmp_path)).steps_taken == 0 and calls == [0, 1]
  assert find_step(tmp_path, "best") == 2
  folder = tmp_path / "checkpoints" / "2"
  assert SavedCheckpoints(tmp_path).val_loss(2) == read_metrics(tmp_path)[-1]["val_loss"]
  assert "metrics/metrics" in read_names(folder) and not find_damage(folder)
  assert train(config, str(tmp_path)).steps_taken == 0 and calls == [0, 1]


def test_a_workdir_that_is_in_use_is_refused(tiny_config, tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "PATIENCE", 0.1)
  other = Lock(tmp_path)
  other.acquire()
  with pytest.raises(UserError, match="is in use by process"):
    train(tiny_config, str(tmp_path))
  other.release()


@pytest.mark.parametrize("init_from", ["", "small"])
def test_prompts_of_tasks_need_a_text_encoder(tmp_path, init_from):
  config = override(tiny(), {"data.prompt": "detailed", "init_from": init_from})
  with pytest.raises(UserError, match=r"config\.data\.prompt = detailed needs a text encoder, and .* has none"):
    train(config, str(tmp_path))


def test_a_run_remembers_that_its_clips_have_one_size(tiny_run):
  record = require_run(str(tiny_run[0]))
  assert not record.adapts_clips
  write_run(tiny_run[0].parent / "again", record)
  assert require_run(str(tiny_run[0].parent / "again")) == record


@pytest.mark.parametrize(
  "changes, what",
  [
    ({"optimizer.weight_decay": 1e30, "validation.every_steps": 0}, "parameters"),
    ({"validation.every_steps": 1, "validation.previews": 1}, "validation loss"),
  ],
)
def test_an_update_that_diverges_is_not_saved(tiny_config, tmp_path, changes, what):
  """Loss and gradient are of the parameters before it; those after it are not finite, or useless."""
  diverging = {"num_steps": 1, "optimizer.name": "adamw", "optimizer.learning_rate": 1e30, "optimizer.warmup_steps": 0}
  with pytest.raises(DivergedError, match=f"the {what} (is|are) not finite after step 1"):
    train(override(tiny_config, diverging | changes), str(tmp_path))
  assert not (tmp_path / "checkpoints" / "1").exists()


def test_the_backend_of_gpus_is_refused_elsewhere_and_not_needed_to_load(tiny_config, tiny_run, tmp_path):
  with pytest.raises(UserError, match=r"attention_backend = cudnn needs an NVIDIA GPU, and JAX runs on a CPU here"):
    train(override(tiny_config, {"model.attention_backend": "cudnn"}), str(tmp_path / "run"))
  shutil.copytree(tiny_run[0], tmp_path / "copy")
  config = json.loads((tmp_path / "copy" / "config.json").read_text())
  config["model"]["attention_backend"] = "cudnn"
  (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
  graph = load_pipeline(str(tmp_path / "copy")).experts.transformers[0].graph
  assert "cudnn" not in repr(graph).lower()


@pytest.mark.parametrize("what", ["loss", "gradient", "parameters"])
def test_what_is_not_finite_ends_the_run(tiny_config, tmp_path, monkeypatch, what):
  """And does not replace the checkpoint before it."""

  def compile_diverging_step(run):
    step_fn = compile_plain_step(run)

    def diverge(state, *arguments):
      state, metrics = step_fn(state, *arguments)
      if int(state.step) == 4 and what == "parameters":
        state = dataclasses.replace(state, params=jax.tree.map(lambda x: x * jnp.nan, state.params))
      elif int(state.step) == 4:
        name = {"loss": "loss", "gradient": "grad_norm"}[what]
        metrics = metrics | {name: metrics[name] * jnp.nan}
      return state, metrics

    return diverge

  monkeypatch.setattr(loop, "compile_train_step", compile_diverging_step)
  with pytest.raises(DivergedError, match=f"the {what} (is|are) not finite"):
    train(override(tiny_config, {"checkpoint.every_steps": 2, "validation.every_steps": 0}), str(tmp_path))
  checkpointer = Checkpointer(str(tmp_path))
  assert checkpointer.latest_step == 2
  checkpointer.close()


@pytest.mark.long
def test_two_processes_equal_one(tmp_path):
  """Two processes with four devices each and one with eight: the same losses and LoRA, also when one resumes two."""
  arguments = [
    "univid_jax.train",
    *SMALL,
    "--config.lora.rank=2",
    "--config.eval.sentences_per_case=0",
    "--config.mesh.data=2",
    "--config.mesh.fsdp=4",
  ]
  port = free_port()
  for steps in (2, 3):
    both = [
      start_command(
        *arguments,
        f"--workdir={tmp_path / 'two'}",
        f"--config.num_steps={steps}",
        f"--coordinator=127.0.0.1:{port}",
        "--num_processes=2",
        f"--process_id={i}",
        devices=4,
      )
      for i in range(2)
    ]
    for process in both:
      _, error = process.communicate(timeout=300)
      assert process.returncode == 0, error
  both = run_command(*arguments, f"--workdir={tmp_path / 'two'}", "--config.num_steps=4", devices=8)
  assert both.returncode == 0 and "at step 3 of 4" in both.stderr, both.stderr
  streams = "--config.rows.streams=2"  # as many as the two processes had
  one = run_command(*arguments, streams, f"--workdir={tmp_path / 'one'}", "--config.num_steps=4", devices=8)
  assert one.returncode == 0, one.stderr
  two_losses, one_losses = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("two", "one"))
  assert len(one_losses) == 4
  np.testing.assert_allclose(two_losses, one_losses, rtol=1e-6)
  two_lora, one_lora = (read_lora(tmp_path / name / "lora.safetensors") for name in ("two", "one"))
  for name, layer in one_lora.changes.items():
    np.testing.assert_allclose(two_lora.changes[name].up, layer.up, atol=1e-6)


def test_losses_of_tasks_and_contexts_have_their_names():
  """Entry 0 is of sentences without a task or context; what has no sentence has no loss."""
  validation = object.__new__(Validation)
  validation._mesh, validation._tasks, validation._expert = make_mesh({"data": 8}), ("a", "b"), TrainedExpert.ONLY
  validation._sigmas, validation._batches = [[0.5]], [()]
  sums = [np.array(values) for values in ([1.0, 2, 9], [0.0, 3, 4, 0, 5], [1.0, 1, 3], [0.0, 1, 2, 0, 2])]
  validation._sum_losses = lambda *_: sums
  metrics = validation({}, {})
  assert metrics["val_loss"] == metrics["val_loss/sigma_0.5"] == pytest.approx(12 / 5)
  names = {"task_a": 2, "task_b": 3, "context_I": 3, "context_II": 2, "context_IV": 2.5}
  assert {name: value for name, value in metrics.items() if "_" in name.partition("/")[2] and "sigma" not in name} == {
    f"val_loss/{name}": value for name, value in names.items()
  }
