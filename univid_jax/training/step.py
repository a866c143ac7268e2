"""The training step: a pure function over sharded state."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from univid_jax.checkpoints.run_parts import make_flow, split_config
from univid_jax.config.schema import RunConfig
from univid_jax.core.packed_row import PackedRow
from univid_jax.core.protocols import TrainStep
from univid_jax.core.seeds import random_key
from univid_jax.diffusion.loss import NoiseLevels, draw_noise, has_sentence, sentence_losses
from univid_jax.models.lora import join, with_dropout_keys
from univid_jax.platform import cpu
from univid_jax.platform.current import Platform
from univid_jax.training.expert_schedule import ExpertSchedule
from univid_jax.training.guard import GuardState, global_norm
from univid_jax.training.state import Params, StateSpec, TrainState

Metrics = dict[str, Array]
Update = Callable[..., tuple[TrainState, Metrics]]


def make_train_step(
  config: RunConfig, spec: StateSpec, optimizers: Sequence[optax.GradientTransformation], mesh: Mesh
) -> TrainStep:
  """Returns the jitted step (state, frozen, batch) -> (state, metrics); the state passed in is donated.

  Noise depends only on the seed and the step. With two experts a step trains the one that `ExpertSchedule` selects; the
  other's state stays unchanged.

  Args:
    config: config of the run.
    spec: description of its state.
    optimizers: one for each transformer that is trained.
    mesh: the devices.
  """
  steps = [_make_step(part, spec, optimizer) for part, optimizer in zip(split_config(config), optimizers, strict=True)]
  replicated = NamedSharding(mesh, PartitionSpec())
  is_cpu = mesh.devices.flat[0].platform == Platform.CPU
  return jax.jit(
    steps[0] if len(steps) == 1 else _alternate(config, steps),
    donate_argnums=0,
    out_shardings=(spec.shardings, replicated),
    compiler_options=cpu.compiler_options(config.model.dtype) if is_cpu else None,
  )


def _make_step(config: RunConfig, spec: StateSpec, optimizer: optax.GradientTransformation) -> TrainStep:
  """Returns the step of a run that trains one transformer."""
  flow = make_flow(config)
  update = make_update(
    spec, optimizer, ema_decay=config.ema_decay, microbatches=config.rows.microbatches, dropout=config.lora.dropout > 0
  )

  def train_step(state: TrainState, frozen: Params, row: PackedRow) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(random_key(config.seed), state.step)
    noise, levels = draw_noise(key, row, flow)
    return update(state, frozen, row, noise, levels, jax.random.fold_in(key, 2))  # `draw_noise` uses 0 and 1

  return train_step


def _alternate(config: RunConfig, steps: Sequence[TrainStep]) -> TrainStep:
  """Returns the step of a run that trains both experts, given the step of each."""
  expert, schedule = config.model.expert, ExpertSchedule.from_config(config)

  def train_one(index: int) -> TrainStep:
    def train(state: TrainState, frozen: Params, row: PackedRow) -> tuple[TrainState, Metrics]:
      states = list(state.split(expert))
      states[index], metrics = steps[index](states[index], expert.split_tree(frozen)[index], row)
      joined = TrainState.join(expert, states)
      return dataclasses.replace(joined, step=state.step + 1), metrics

    return train

  def train_step(state: TrainState, frozen: Params, row: PackedRow) -> tuple[TrainState, Metrics]:
    return jax.lax.cond(schedule.trains_high(state.step), train_one(0), train_one(1), state, frozen, row)

  return train_step


def make_update(
  spec: StateSpec,
  optimizer: optax.GradientTransformation,
  *,
  ema_decay: float = 0.0,
  microbatches: int = 1,
  dropout: bool = False,
) -> Update:
  """Returns the pure function (state, frozen, row, noise, levels, dropout key) -> (state, metrics) of a step.

  The loss is the mean over all sentences of the batch, on all devices and in all microbatches, so neither packing nor
  accumulation changes the effect of a learning rate.
  """

  optimizer = optax.with_extra_args_support(optimizer)

  def loss_fn(
    params: Params,
    frozen: Params,
    batch: tuple[PackedRow, Float[Array, "b l p"], NoiseLevels],
    num_sentences: Float[Array, ""],
    key: PRNGKeyArray,
  ) -> Float[Array, ""]:
    row, noise, levels = batch
    model = nnx.merge(spec.training_graph, join(frozen, with_dropout_keys(params, key) if dropout else params))
    losses, _ = sentence_losses(model, row, noise, levels.sigmas)
    return jnp.sum(losses * levels.weights) / num_sentences

  def update(
    state: TrainState,
    frozen: Params,
    row: PackedRow,
    noise: Float[Array, "b l p"],
    levels: NoiseLevels,
    key: PRNGKeyArray,
  ) -> tuple[TrainState, Metrics]:
    num_sentences = jnp.maximum(jnp.sum(has_sentence(row)), 1)
    loss, grads = _accumulate_gradients(
      loss_fn, state.params, frozen, (row, noise, levels), num_sentences, key, microbatches=microbatches
    )
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params, loss=loss)
    # optax annotates the results as any tree; they have the structure of the parameters.
    params = cast(Params, optax.apply_updates(state.params, updates))
    ema = state.ema
    if ema is not None:
      decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
      ema = cast(Params, optax.incremental_update(params, ema, 1 - decay))
    metrics = {"loss": loss, "grad_norm": global_norm(grads), **_count(row)}
    if isinstance(opt_state, GuardState):
      ema = jax.tree.map(lambda old, new: jnp.where(opt_state.has_skipped, old, new), state.ema, ema)
      metrics |= {"skipped": opt_state.has_skipped, "skipped_in_a_row": opt_state.skipped_in_a_row}
    return TrainState(step=state.step + 1, params=params, ema=ema, opt_state=opt_state), metrics

  return update


def _accumulate_gradients(
  loss_fn: Callable[..., Float[Array, ""]],
  params: Params,
  frozen: Params,
  batch: Any,
  num_sentences: Float[Array, ""],
  key: PRNGKeyArray,
  *,
  microbatches: int,
) -> tuple[Float[Array, ""], Params]:
  """Returns the loss of a batch and its gradient, computed in one or several parts."""
  grad_fn = jax.value_and_grad(loss_fn)
  if microbatches == 1:
    return grad_fn(params, frozen, batch, num_sentences, key)
  # Every microbatch takes rows from every device.
  parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), batch)

  def accumulate(total: Any, part: Any) -> tuple[Any, None]:
    rows, part_key = part
    return jax.tree.map(jnp.add, total, grad_fn(params, frozen, rows, num_sentences, part_key)), None

  # Sums in float32, so that small bfloat16 parts are not lost.
  start = jnp.zeros(()), jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
  (loss, grads), _ = jax.lax.scan(accumulate, start, (parts, jax.random.split(key, microbatches)))
  return loss, jax.tree.map(lambda x, like: x.astype(like.dtype), grads, params)


def _count(row: PackedRow) -> Metrics:
  """Counts what a batch holds, for the log and for its number of operations; pairs of attention by row."""
  return {
    "sentences": jnp.sum(has_sentence(row)),
    "targets": jnp.sum(row.target_mask),
    "fill_rate": jnp.mean(row.segment_ids > 0),
    "attended": _count_pairs(row.key_intervals, row.tokens.shape[1], row),
    "attended_text": _count_pairs(row.text_intervals, row.text.shape[1], row),
  }


def _count_pairs(intervals: Array | None, num_keys: int, row: PackedRow) -> Float[Array, "b"]:
  """Counts, for each row, the pairs of a token and a key that it attends to."""
  if intervals is None:
    num_rows, num_tokens = row.segment_ids.shape
    return jnp.full(num_rows, num_tokens * num_keys, jnp.float32)
  return jnp.sum((intervals[..., 1] - intervals[..., 0]).astype(jnp.float32), axis=1)
