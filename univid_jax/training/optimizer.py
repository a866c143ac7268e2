"""Optimizers and schedules from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from univid_jax.config.schema import OptimizerConfig
from univid_jax.core.options import LearningRateSchedule, OnBadStep, OptimizerName
from univid_jax.training.guard import skip_bad_steps


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Returns the learning rate as a factor of its peak, from 0 to 1."""
  warmup = config.warmup_steps
  if config.schedule == LearningRateSchedule.CONSTANT:
    decay = optax.constant_schedule(1.0)
  elif config.schedule == LearningRateSchedule.COSINE:
    decay = optax.cosine_decay_schedule(1.0, max(num_steps - warmup, 1))
  else:
    after_warmup = max(num_steps - warmup, 1)
    length = min(max(int(num_steps * config.decay_fraction), 1), after_warmup)
    decay = optax.linear_schedule(1.0, 0.0, length, transition_begin=after_warmup - length)
  return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), decay], [warmup]) if warmup else decay


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
  """Returns the optimizer of a config: AdamW, or Muon on some matrices and NAdam on everything else.

  It computes in float32. With `OnBadStep.SKIP` its `update` also takes the loss, see `guard`.
  """
  schedule = make_schedule(config, num_steps)

  def scale(peak: float) -> optax.Schedule:
    return lambda step: peak * schedule(step)

  if config.name == OptimizerName.ADAMW:
    update = optax.adamw(
      scale(config.learning_rate), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
    )
  else:
    update = contrib.muon(
      scale(config.learning_rate),
      eps=config.eps,
      weight_decay=config.weight_decay,
      adam_b1=config.b1,
      adam_b2=config.b2,
      adam_learning_rate=scale(config.adam_learning_rate),
      muon_weight_dimension_numbers=select_muon_matrices,
    )
  update = optax.chain(optax.clip_by_global_norm(config.clip_norm), update) if config.clip_norm else update
  update = _in_float32(update)
  return skip_bad_steps(update, skip_norm=config.skip_norm) if config.on_bad_step == OnBadStep.SKIP else update


def _in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Makes an optimizer compute, and keep its state, in float32, whatever the dtype of the parameters.

  In bfloat16 a second moment would never decay, since 0.999 times it rounds to itself.
  """

  def convert(tree: Any) -> Any:
    return optax.tree_utils.tree_cast(tree, jnp.float32)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    return optimizer.update(convert(updates), state, convert(params))

  return optax.GradientTransformation(lambda params: optimizer.init(convert(params)), update)


def select_muon_matrices(params: optax.Params) -> Any:
  """Selects the parameters for Muon: the stacked (layers, in, out) matrices of self-attention and feed-forward."""

  def select(path: Any, value: Any) -> contrib.MuonDimensionNumbers | None:
    names = [key.key for key in path]
    chosen = value.ndim == 3 and "kernel" in names and ("self_attn" in names or "ffn" in names)
    return contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if chosen else None

  return jax.tree_util.tree_map_with_path(select, params)
