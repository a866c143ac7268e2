"""The training step: a pure function over sharded state."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from univid_jax.compilation import uncollected
from univid_jax.diffusion.flow import FlowMatching
from univid_jax.diffusion.loss import NoiseLevels, draw_noise, has_sentence, sentence_losses
from univid_jax.models.lora import LoRAParam, join, with_dropout_keys
from univid_jax.parallel.sharding import parameter_shardings
from univid_jax.types import PackedRow

Params = Mapping[str, Any]  # nested dicts of arrays, by the names of a model's modules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """All that changes from step to step.

  Attributes:
    step: steps taken.
    params: what is trained.
    ema: its running mean, or None.
    opt_state: the optimizer's.
  """

  step: Int[Array, ""]
  params: Params
  ema: Params | None
  opt_state: Any

  @property
  def model_params(self) -> Params:
    """What to sample with: the running mean where there is one."""
    return self.params if self.ema is None else self.ema


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateSpec:
  """A training state before it exists: what to make, how it looks and where it lies.

  Attributes:
    graph: the model without its parameters; `nnx.merge(spec.graph, join(frozen, params))` gives the model.
    create: makes the first state; random, or from the parameters that are to be trained on.
    create_frozen: makes random parameters of what is not trained; {} where all is.
    abstract: shapes, dtypes and shardings of the state.
    abstract_frozen: those of what is not trained.
  """

  graph: nnx.GraphDef
  create: Callable[..., TrainState]
  create_frozen: Callable[[], Params]
  abstract: TrainState
  abstract_frozen: Params

  @classmethod
  @uncollected()
  def of(cls, init: Callable[[], nnx.Module], optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool,
         lora: bool = False) -> "StateSpec":
    """The state of a model that is trained whole, or whose adapters are.

    Args:
      init: makes the model.
      optimizer: makes its own state.
      mesh: where all of it lives.
      ema: whether a running mean is kept.
      lora: whether adapters alone are trained.
    """
    kind = LoRAParam if lora else nnx.Param

    def create(params=None):
      params = nnx.to_pure_dict(nnx.state(init(), kind)) if params is None else params
      return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params),
                        ema=jax.tree.map(jnp.copy, params) if ema else None)

    def create_frozen():
      return frozen_of(init())

    def frozen_of(model):
      return nnx.to_pure_dict(nnx.state(model, nnx.Param)) if lora else {}

    model = nnx.eval_shape(init)
    shapes = jax.eval_shape(create, nnx.to_pure_dict(nnx.state(model, kind)))
    shardings = _state_shardings(shapes, parameter_shardings(model, mesh, kind), optimizer, mesh)
    frozen_shardings = parameter_shardings(model, mesh) if lora else {}

    def placed(x, sharding):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return cls(graph=nnx.graphdef(model), create=jax.jit(create, out_shardings=shardings),
               create_frozen=jax.jit(create_frozen, out_shardings=frozen_shardings),
               abstract=jax.tree.map(placed, shapes, shardings),
               abstract_frozen=jax.tree.map(placed, frozen_of(model), frozen_shardings))

  @property
  def shardings(self) -> TrainState:
    return jax.tree.map(lambda x: x.sharding, self.abstract)


def _state_shardings(shapes: TrainState, params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Moments lie like their parameters, scalars on every device."""
  whole = NamedSharding(mesh, PartitionSpec())

  def of_moment(moment, sharding):
    return moment if isinstance(moment, optax.MaskedNode) else sharding

  opt_state = optax.tree_utils.tree_map_params(optimizer, of_moment, shapes.opt_state, params,
                                               transform_non_params=lambda _: whole,
                                               is_leaf=lambda x: isinstance(x, optax.MaskedNode))
  return TrainState(step=whole, params=params, ema=None if shapes.ema is None else params, opt_state=opt_state)


def make_update(spec: StateSpec, optimizer: optax.GradientTransformation, *, ema_decay: float = 0.0, microbatches: int = 1,
                dropout: bool = False):
  """The pure function (state, frozen, row, noise, levels, dropout key) -> (state, metrics) behind the step.

  The loss is the mean over all sentences of the batch, on all devices and in all microbatches, so neither packing nor
  accumulation changes what a learning rate means.
  """
  def loss_fn(params, frozen, batch, num_sentences, key):
    row, noise, levels = batch
    model = nnx.merge(spec.graph, join(frozen, with_dropout_keys(params, key) if dropout else params))
    losses, _ = sentence_losses(model, row, noise, levels.sigmas)
    return jnp.sum(losses * levels.weights) / num_sentences

  def update(state: TrainState, frozen: Params, row: PackedRow, noise, levels: NoiseLevels, key):
    num_sentences = jnp.maximum(jnp.sum(has_sentence(row)), 1)
    grad_fn = jax.value_and_grad(loss_fn)
    if microbatches == 1:
      loss, grads = grad_fn(state.params, frozen, (row, noise, levels), num_sentences, key)
    else:
      # Every microbatch takes rows from every device.
      parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), (row, noise, levels))

      def accumulate(total, part):
        batch, part_key = part
        return jax.tree.map(jnp.add, total, grad_fn(state.params, frozen, batch, num_sentences, part_key)), None

      start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
      (loss, grads), _ = jax.lax.scan(accumulate, start, (parts, jax.random.split(key, microbatches)))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
      ema = jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, ema, params)
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree_utils.tree_norm(grads),
        "sentences": jnp.sum(has_sentence(row)),
        "targets": jnp.sum(row.target_mask),
        "fill_rate": jnp.mean(row.segment_ids > 0),
        "attended": _pairs(row.key_intervals, row.tokens.shape[1], row),
        "attended_text": _pairs(row.text_intervals, row.text.shape[1], row),
    }
    return TrainState(step=state.step + 1, params=params, ema=ema, opt_state=opt_state), metrics

  return update


def _pairs(intervals, num_keys: int, row: PackedRow):
  """How many keys all tokens of the batch see together."""
  if intervals is None:
    return jnp.float32(row.segment_ids.size * num_keys)
  return jnp.sum((intervals[..., 1] - intervals[..., 0]).astype(jnp.float32))


def make_train_step(spec: StateSpec, optimizer: optax.GradientTransformation, flow: FlowMatching, *, mesh: Mesh,
                    ema_decay: float, seed: int, microbatches: int = 1, dropout: bool = False):
  """The jitted step (state, frozen, batch) -> (state, metrics); the state that goes in is given up.

  Noise depends on the seed and the step alone.
  """
  update = make_update(spec, optimizer, ema_decay=ema_decay, microbatches=microbatches, dropout=dropout)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(spec.shardings, NamedSharding(mesh, PartitionSpec())))
  def train_step(state: TrainState, frozen: Params, row: PackedRow):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    noise, levels = draw_noise(key, row, flow)
    return update(state, frozen, row, noise, levels, jax.random.fold_in(key, 1))

  return train_step
