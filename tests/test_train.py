"""Training: sharded alike, resumed to the bit, stopped with care."""

import dataclasses
import json
import resource
import signal
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests import commands
from tests.commands import run_command, start_command
from univid_jax import build
from univid_jax.data.loader import make_loader
from univid_jax.data.packing import pack, pack_rows
from univid_jax.data.video import write_clip
from univid_jax.diffusion.loss import draw_noise, sentence_losses
from univid_jax.parallel.mesh import make_mesh, mesh_shape
from univid_jax.parallel.sharding import parameter_shardings, shard_batch
from univid_jax.pipeline import load_pipeline
from univid_jax.training.checkpoint import Checkpointer
from univid_jax.training.forecast import bytes_per_device, forecast, forecast_sampling
from univid_jax.training.loop import train
from univid_jax.training.optimizer import make_optimizer, make_schedule
from univid_jax.training.restore import checkpoint_step
from univid_jax.training.step import StateSpec, make_update
from univid_jax.training.validation import Validation, validation_sentences
from univid_jax.weights.lora import read_lora


def one_gradient(config, mesh, row, microbatches=1):
  """Loss, gradients and the state spec of a step on a mesh; plain gradient descent at rate 1 shows the gradient."""
  optimizer = optax.sgd(1.0)
  spec = StateSpec.of(lambda: build.model(config), optimizer, mesh, ema=False, lora=config.lora.rank > 0)
  state, frozen = spec.create(), spec.create_frozen()
  before = jax.device_get(state.params)
  noise, levels = draw_noise(jax.random.key(3), row, build.flow(config))
  update = jax.jit(make_update(spec, optimizer, microbatches=microbatches), out_shardings=(spec.shardings, None))
  with jax.set_mesh(mesh):
    state, metrics = update(state, frozen, shard_batch(row, mesh), noise, levels, jax.random.key(0))
  grads = jax.tree.map(lambda a, b: a - np.asarray(b), before, jax.device_get(state.params))
  promised = spec.abstract.params, spec.abstract_frozen
  for leaf, abstract in zip(jax.tree.leaves((state.params, frozen)), jax.tree.leaves(promised)):
    assert leaf.addressable_shards[0].data.nbytes == np.prod(abstract.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return float(metrics["loss"]), np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)]), spec


@dataclasses.dataclass(frozen=True)
class TorusChip:
  """What JAX asks of a TPU to place it in a mesh."""

  id: int
  coords: tuple[int, int, int]
  slice_index: int = 0
  core_on_chip: int = 0
  process_index: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v6 lite"


class TestMeshes:
  """Every mesh gives the loss and the gradients of one device, for packed rows of images and videos."""

  # One mesh that mixes axes runs always, the other with `-m long`, those of one axis with `-m slow`.
  MESHES = ({"data": 2, "fsdp": 2, "context": 2}, pytest.param({"tensor": 4, "context": 2}, marks=pytest.mark.long),
            *(pytest.param({axis: 8}, marks=pytest.mark.slow) for axis in ("data", "fsdp", "context")))

  def row(self, config):
    loader = make_loader([build.sentences(config, "train", seed=0)], build.feature_maker(config, build.encoders(config, None)),
                         row_shape=build.row_shape(config), rows_per_batch=8, seed=0, num_packing_bins=8)
    row = next(loader)
    loader.close()
    assert row.segment_ids.max() > 1
    return row

  def configure(self, config, lora):
    config.lora.rank = 2 if lora else 0
    config.model.look_back = ()
    return config

  @pytest.fixture(scope="class")
  def single(self):
    return {}

  @pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.long)], ids=["full", "lora"])
  @pytest.mark.parametrize("sizes", MESHES, ids=str)
  def test_agrees_with_one_device(self, tiny_config, single, sizes, lora):
    config = self.configure(tiny_config, lora)
    row = self.row(config)
    if lora not in single:
      single[lora] = one_gradient(config, make_mesh({}, devices=jax.devices()[:1]), row)
    loss, grads, _ = single[lora]
    other_loss, other, spec = one_gradient(config, make_mesh(sizes), row)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert np.linalg.norm(other - grads) / np.linalg.norm(grads) <= 1e-5 and np.linalg.norm(grads) > 0.01
    shards = np.prod([sizes.get(axis, 1) for axis in ("fsdp", "context", "tensor")])
    kernel = (spec.abstract_frozen if lora else spec.abstract.params)["blocks"]["ffn"]["up"]["kernel"]
    assert np.prod(kernel.sharding.shard_shape(kernel.shape)) * shards == kernel.size

  def test_microbatches_change_nothing(self, tiny_config):
    config = self.configure(tiny_config, False)
    row, mesh = self.row(config), make_mesh({"data": 2}, devices=jax.devices()[:2])
    (loss, grads, _), (other_loss, other, _) = (one_gradient(config, mesh, row, microbatches=n) for n in (1, 4))
    assert other_loss == pytest.approx(loss, rel=1e-5) and np.linalg.norm(other - grads) / np.linalg.norm(grads) <= 1e-5

  def test_moments_lie_like_their_parameters(self, tiny_config):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    spec = StateSpec.of(lambda: build.model(tiny_config), make_optimizer(tiny_config.optimizer, 4), mesh, ema=True)
    kernel = spec.abstract.params["blocks"]["ffn"]["up"]["kernel"]
    moments = [x for x in jax.tree.leaves(spec.abstract.opt_state) if x.shape == kernel.shape]
    assert moments and all(x.sharding.shard_shape(x.shape) == kernel.sharding.shard_shape(kernel.shape) for x in moments)

  def test_axes_that_share_a_row_of_chips(self):
    torus = [TorusChip(4 * y + x, (x, y, 0)) for y in range(4) for x in range(4)]
    assert dict(make_mesh({"data": -1, "fsdp": 8}, torus).shape) == {"data": 2, "fsdp": 8, "tensor": 1, "context": 1}
    with pytest.raises(ValueError, match="several TPU slices"):
      make_mesh({"data": 32}, [*torus, *(dataclasses.replace(chip, slice_index=1) for chip in torus)])

  def test_rows_that_do_not_divide(self, tiny_config):
    row = self.row(tiny_config)
    odd = jax.tree.map(lambda x: x[:, :47] if x.shape[1] == 48 else x, row)
    with pytest.raises(ValueError, match="rows of 47 tokens do not divide over context = 8"):
      shard_batch(odd, make_mesh({"context": 8}))
    tiny_config.rows.per_batch = 6
    with pytest.raises(ValueError, match="per_batch = 6 does not divide over data x fsdp = 8"):
      build.rows_per_batch(tiny_config, make_mesh({"data": 8}))


def test_parameters_lie_where_their_names_say(tiny_config):
  mesh = make_mesh({"fsdp": 4, "tensor": 2})
  shardings = parameter_shardings(nnx.eval_shape(lambda: build.model(tiny_config)), mesh)
  block = shardings["blocks"]
  assert block["self_attn"]["q"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
  assert block["self_attn"]["o"]["kernel"].spec == PartitionSpec(None, "tensor", "fsdp")
  assert block["ffn"]["down"]["bias"].spec == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize("sizes, count, shape", [({"data": -1}, 8, (8, 1, 1, 1)), ({"data": -1, "tensor": 4}, 8, (2, 1, 4, 1))])
def test_mesh_fills_up(sizes, count, shape):
  assert mesh_shape(sizes, count) == shape


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "fsdp": -1}, {"tensor": 0}, {"data": -1, "tensor": 3}])
def test_meshes_that_do_not_divide(sizes):
  with pytest.raises(ValueError, match="mesh"):
    mesh_shape(sizes, 8)


def test_schedules():
  options = {"warmup_steps": 10, "decay_fraction": 0.5}
  linear = make_schedule(options | {"schedule": "linear"}, 100)
  np.testing.assert_allclose([linear(0), linear(5), linear(10), linear(50), linear(75), linear(100)], [0, 0.5, 1, 1, 0.5, 0])
  assert float(make_schedule(options | {"schedule": "constant"}, 100)(99)) == 1
  assert float(make_schedule(options | {"schedule": "cosine"}, 100)(55)) == pytest.approx(0.5)
  with pytest.raises(ValueError, match="unknown schedule 'spiral'"):
    make_schedule(options | {"schedule": "spiral"}, 100)


def test_muon_touches_matrices_of_blocks_alone(tiny_config):
  optimizer = make_optimizer(tiny_config.optimizer, 10)
  params = nnx.to_pure_dict(nnx.state(nnx.jit(lambda: build.model(tiny_config))(), nnx.Param))
  grads = jax.tree.map(jnp.ones_like, params)
  state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
  for _ in range(2):  # the first step of a warm-up has rate 0
    updates, state = update(grads, state, params)
  # Muon's update of a constant gradient has rank one and a spectral norm of about the rate.
  update = np.asarray(updates["blocks"]["self_attn"]["q"]["kernel"][0])
  singular = np.linalg.svd(update, compute_uv=False)
  assert singular[1] < 0.05 * singular[0]
  assert np.all(np.asarray(updates["head"]["head"]["kernel"]) < 0)


# The same small run from the command line.
SMALL = (*commands.SMALL, "--config.log_every=1", "--config.eval.sentences_per_case=1", "--config.eval.num_inference_steps=2")


def weights(workdir, config):
  optimizer = make_optimizer(config.optimizer, config.num_steps)
  mesh = make_mesh({}, devices=jax.devices()[:1])
  spec = StateSpec.of(lambda: build.model(config), optimizer, mesh, ema=True)
  checkpointer = Checkpointer(str(workdir))
  loader = make_loader([build.sentences(config, "train", seed=0)], build.feature_maker(config, build.encoders(config, mesh)),
                       row_shape=build.row_shape(config), rows_per_batch=8, seed=0)
  state = checkpointer.restore(spec.abstract, loader)
  checkpointer.close()
  loader.close()
  return state


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_time_and_run_again_it_ends_the_same(tmp_path, kills):
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
  assert [row["step"] for row in lines(tmp_path / "killed")] == list(range(1, 21))
  assert [row["loss"] for row in lines(tmp_path / "killed")] == [row["loss"] for row in lines(tmp_path / "straight")]
  reports = [json.loads((tmp_path / name / "eval.json").read_text()) for name in ("straight", "killed")]
  assert reports[0] == reports[1]

  from configs.video_tasks import get_config
  config = get_config()
  config.update(json.loads((tmp_path / "straight" / "config.json").read_text()) | {"eval": config.eval}, )
  for a, b in zip(jax.tree.leaves(weights(tmp_path / "straight", config)), jax.tree.leaves(weights(tmp_path / "killed", config))):
    np.testing.assert_array_equal(a, b)

  complete = run_command("univid_jax.train", *SMALL, *steps, f"--workdir={tmp_path / 'killed'}")
  assert complete.returncode == 0 and "is complete (20 steps)" in complete.stdout


@pytest.mark.long
def test_a_disk_that_is_full_during_a_save(tmp_path):
  """Files may not grow past 16 KB: one line, the checkpoint from before is whole, and with room again it goes on."""
  arguments = ["univid_jax.train", *SMALL, "--config.validation.every_steps=0", "--config.eval.sentences_per_case=0",
               f"--workdir={tmp_path}"]
  assert run_command(*arguments, "--config.num_steps=2").returncode == 0
  limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))  # noqa: E731
  full = run_command(*arguments, "--config.num_steps=4", preexec_fn=limit)
  last = full.stderr.strip().splitlines()[-1]
  assert full.returncode == 1 and last.startswith("error: ") and "step 2 is the last" in last, full.stderr
  again = run_command(*arguments, "--config.num_steps=4")
  assert again.returncode == 0 and "at step 2 of 4" in again.stdout, again.stderr
  assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.long
def test_a_clip_that_vanishes_during_the_training(tmp_path):
  """One line that names it; the last checkpoint is whole, and with the clip back the run goes on."""
  for number, name in enumerate("abc"):
    (tmp_path / "pairs" / "task" / name).mkdir(parents=True)
    for part in ("source", "target"):
      write_clip(tmp_path / "pairs" / "task" / name / f"{part}.png", np.full((1, 16, 16, 3), 50 * number, np.uint8))
  arguments = [*SMALL, f"--config.data.pairs={tmp_path / 'pairs'}", "--config.data.bundled=False", "--config.data.contexts.I=0.0",
               "--config.data.contexts.III=0.0", "--config.validation.every_steps=0", "--config.eval.sentences_per_case=0",
               "--config.checkpoint.every_steps=5", f"--workdir={tmp_path / 'run'}"]
  process = start_command("univid_jax.train", *arguments, "--config.num_steps=100000")
  while process.poll() is None and not ((tmp_path / "run" / "metrics.jsonl").exists() and lines_complete(tmp_path / "run") >= 12):
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
  assert again.returncode == 0 and f"at step {step} of {step + 1}" in again.stdout, again.stderr


def test_a_signal_saves_and_says_how_to_go_on(tmp_path):
  process = start_command("univid_jax.train", *SMALL, "--config.num_steps=100000", f"--workdir={tmp_path}")
  while process.poll() is None and not ((tmp_path / "metrics.jsonl").exists() and lines_complete(tmp_path) >= 2):
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 1
  message = stderr.strip().splitlines()[-1]
  assert message.startswith("error: stopped by SIGTERM at step") and message.endswith("run the same command to go on")
  checkpointer = Checkpointer(str(tmp_path))
  assert checkpointer.latest_step == int(message.split("step ")[1].split()[0])
  checkpointer.close()


def lines_complete(workdir):
  return (workdir / "metrics.jsonl").read_text().count("\n")


def test_another_config_in_the_same_workdir_is_refused(tiny_config, tmp_path):
  train(tiny_config, str(tmp_path))
  tiny_config.seed = 1
  with pytest.raises(ValueError, match="holds a run with seed = 0, not 1"):
    train(tiny_config, str(tmp_path))


def test_what_is_written(tiny_config, tmp_path):
  result = train(tiny_config, str(tmp_path), traces=str(tmp_path / "traces"))
  assert result.steps_taken == 4 and len(list((tmp_path / "traces").iterdir())) == 1
  assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4]
  assert all(0 < row["fill_rate"] <= 1 and row["sentences"] >= 8 and np.isfinite(row["loss"]) for row in lines(tmp_path))
  assert (tmp_path / "loss.png").stat().st_size > 1000 and any((tmp_path / "tensorboard").iterdir())
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4"]


def test_a_second_start_goes_on_from_the_kept_step(tiny_config, tmp_path, monkeypatch):
  """The same losses to the bit, without tracing the step."""
  traces = str(tmp_path / "traces")
  train(tiny_config, str(tmp_path / "first"), traces=traces)
  monkeypatch.setattr("univid_jax.training.step.sentence_losses", None)  # what a trace would call
  train(tiny_config, str(tmp_path / "second"), traces=traces)
  first, second = ([row["loss"] for row in lines(tmp_path / name)] for name in ("first", "second"))
  assert first == second and len(second) == 4


class TestValidation:
  def measured(self, config, sizes, tmp_path):
    mesh = make_mesh(sizes, jax.devices()[:int(np.prod(list(sizes.values())))])
    spec = StateSpec.of(lambda: build.model(config), optax.sgd(1.0), mesh, ema=False)
    data, encoders = build.data_sources(config, str(tmp_path)), build.encoders(config, mesh)
    sentences, held_out = validation_sentences(data, 12)
    assert held_out and len(sentences) == 12
    make_features = build.feature_maker(config, encoders, task_names=data.task_names)
    params = spec.create().params
    return Validation(config, spec, sentences, make_features, mesh)(params, {}), (spec, params, sentences, make_features)

  @pytest.mark.long
  def test_any_mesh_and_packing_give_the_mean_over_sentences(self, tiny_config, tmp_path):
    tiny_config.model.look_back = ()
    tiny_config.validation.sigmas = (0.7,)
    found, (spec, params, sentences, make_features) = self.measured(tiny_config, {"data": 1}, tmp_path)
    other, _ = self.measured(tiny_config, {"data": 4, "context": 2}, tmp_path)
    assert other.keys() == found.keys() and all(other[name] == pytest.approx(found[name], rel=1e-5) for name in found)
    tasks = [sentence.task for sentence in sentences]
    weighted = sum(found[f"val_loss/task_{task}"] for task in tasks) / len(tasks)
    assert found["val_loss"] == found["val_loss/sigma_0.7"] == pytest.approx(weighted, rel=1e-5)
    # By hand: each sentence in a row of its own, with the noise that it had in the packed rows.
    rows, places = pack_rows([make_features(sentence) for sentence in sentences], build.row_shape(tiny_config))
    noise = np.asarray(jax.random.normal(jax.random.key(tiny_config.seed), rows.tokens.shape))
    model, losses = nnx.merge(spec.graph, params), []
    for sentence, (index, segment) in zip(sentences, places):
      alone = pack([make_features(sentence)], build.row_shape(tiny_config))
      own = np.zeros_like(alone.tokens)
      own[0, alone.segment_ids[0] == 1] = noise[index, rows.segment_ids[index] == segment]
      losses.append(sentence_losses(model, alone, own, jnp.full((1, alone.num_slots), 0.7))[0].sum())
    assert found["val_loss"] == pytest.approx(float(np.mean(losses)), rel=1e-5)

  @pytest.mark.long
  def test_the_best_checkpoint_is_kept(self, tiny_config, tmp_path):
    tiny_config.update({"num_steps": 5})
    tiny_config.checkpoint.update({"every_steps": 1, "keep": 1})
    tiny_config.validation.update({"every_steps": 1, "sentences": 4, "previews": 1})
    tiny_config.optimizer.update({"learning_rate": 0.2, "adam_learning_rate": 0.2, "schedule": "constant", "warmup_steps": 0})
    result = train(tiny_config, str(tmp_path))
    losses = {row["step"]: row["val_loss"] for row in lines(tmp_path)}
    best = min(losses, key=losses.get)
    assert checkpoint_step(tmp_path, "best") == best and checkpoint_step(tmp_path) == 5
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {best, 5}
    assert len(list((tmp_path / "previews").glob("*.png"))) == 5
    latest, chosen = (load_pipeline(str(tmp_path), step=step).params for step in (None, "best"))
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), latest, result.pipeline.params)
    assert all(jax.tree.leaves(same))
    kernels = [params["head"]["head"]["kernel"] for params in (latest, chosen)]
    assert np.array_equal(*kernels) == (best == 5)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 77"):
      checkpoint_step(tmp_path, 77)


def test_a_loss_that_is_not_finite_ends_the_run(tiny_config, tmp_path):
  tiny_config.optimizer.update({"name": "adamw", "learning_rate": 1e30, "clip_norm": 0.0, "warmup_steps": 0})
  with pytest.raises(FloatingPointError, match="the loss is not finite"):
    train(tiny_config, str(tmp_path))


@pytest.mark.long
def test_two_processes_train_as_one(tmp_path):
  """Two real processes with four devices each, and one with eight: the same losses and the same LoRA, resumed too."""
  arguments = ["univid_jax.train", *SMALL, "--config.lora.rank=2", "--config.rows.streams=2",
               "--config.eval.sentences_per_case=0", "--config.mesh.data=2", "--config.mesh.fsdp=4",
               "--config.optimizer.name=adamw"]
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  for steps in (2, 3):
    both = [start_command(*arguments, f"--workdir={tmp_path / 'two'}", f"--config.num_steps={steps}",
                          f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}", devices=4)
            for i in range(2)]
    for process in both:
      _, error = process.communicate(timeout=300)
      assert process.returncode == 0, error
  one = run_command(*arguments, f"--workdir={tmp_path / 'one'}", "--config.num_steps=3", devices=8)
  assert one.returncode == 0, one.stderr
  two_losses, one_losses = ([line["loss"] for line in lines(tmp_path / name)] for name in ("two", "one"))
  assert len(one_losses) == 3
  np.testing.assert_allclose(two_losses, one_losses, rtol=1e-6)
  two_lora, one_lora = (read_lora(tmp_path / name / "lora.safetensors") for name in ("two", "one"))
  for name, layer in one_lora.layers.items():
    np.testing.assert_allclose(two_lora.layers[name].up, layer.up, atol=1e-6)


class TestForecast:
  def test_more_elements_than_an_int32_counts(self):
    """As a kernel of the 14B's feed-forward layers has, stacked over its layers."""
    mesh = make_mesh({}, devices=jax.devices()[:1])
    kernel = jax.ShapeDtypeStruct((40, 5120, 13824), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    assert bytes_per_device({"kernel": kernel}) == 5_662_310_400

  def test_sampling_counts_the_cache(self, tiny_config):
    """Keys and values of a sentence of context I, in every layer."""
    mesh = make_mesh({}, devices=jax.devices()[:1])
    assert forecast_sampling(tiny_config, mesh).cache == 0
    tiny_config.model.attention = "context_causal"
    found = forecast_sampling(tiny_config, mesh)
    tokens = 4 * 2 * (16 // 8) ** 2
    assert found.cache == 2 * 2 * tokens * 32 * 4 and "keys and values" in str(found)
    assert found.activations >= found.cache and found.optimizer == 0 and found.weights > 0

  @pytest.mark.long
  def test_parts(self, tiny_config):
    """Weights and moments are what their shapes say; sharding divides them."""
    tiny_config.optimizer.name = "adamw"
    one, eight = (forecast(tiny_config, make_mesh(sizes, devices=jax.devices()[:count]))
                  for sizes, count in (({}, 1), ({"fsdp": 8}, 8)))
    model = nnx.eval_shape(lambda: build.model(tiny_config))
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert one.weights == 2 * size  # with their running mean
    assert 2 * size <= one.optimizer <= 2 * size + 64 and one.activations > 0
    assert eight.weights < 0.4 * one.weights and eight.optimizer < 0.4 * one.optimizer
    assert "memory a device (cpu)" in str(one) and one.fits

  @pytest.mark.slow
  @pytest.mark.parametrize("preset, topology, sizes", [("wan_1_3b", "v5e:2x4", {"data": 1, "fsdp": 8})])
  def test_for_tpus_that_are_not_here(self, preset, topology, sizes):
    pytest.importorskip("libtpu")
    done = run_command("univid_jax.forecast", f"--config=configs/video_tasks.py:{preset}", f"--topology={topology}",
                       *(f"--config.mesh.{axis}={size}" for axis, size in sizes.items()))
    assert done.returncode == 0 and "memory a device (TPU v5 lite)" in done.stdout, done.stderr
