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

from univid_jax.diffusion.flow import FlowMatching
from univid_jax.diffusion.loss import draw_noise, sentence_losses
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
    graph: the model without its parameters; `nnx.merge(spec.graph, params)` gives the model.
    create: makes the first state.
    abstract: shapes, dtypes and shardings of the state.
  """

  graph: nnx.GraphDef
  create: Callable[[], TrainState]
  abstract: TrainState

  @classmethod
  def of(cls, init: Callable[[], nnx.Module], optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool) -> "StateSpec":
    """The state of a model that is trained whole.

    Args:
      init: makes the model.
      optimizer: makes its own state.
      mesh: where all of it lives.
      ema: whether a running mean is kept.
    """
    def create():
      params = nnx.to_pure_dict(nnx.state(init(), nnx.Param))
      return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params),
                        ema=jax.tree.map(jnp.copy, params) if ema else None)

    model = nnx.eval_shape(init)
    shapes = jax.eval_shape(create)
    shardings = _state_shardings(shapes, parameter_shardings(model, mesh), optimizer, mesh)
    abstract = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings)
    return cls(graph=nnx.graphdef(model), create=jax.jit(create, out_shardings=shardings), abstract=abstract)

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


def make_train_step(spec: StateSpec, optimizer: optax.GradientTransformation, flow: FlowMatching, *, mesh: Mesh,
                    ema_decay: float, seed: int):
  """The jitted step (state, batch) -> (state, metrics); the state that goes in is given up.

  The loss is the mean over the sentences of the whole batch. Noise depends on the seed and the step alone.
  """
  def loss_fn(params, row: PackedRow, noise, sigmas):
    losses, present = sentence_losses(nnx.merge(spec.graph, params), row, noise, sigmas)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(present), 1), (losses, present)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(spec.shardings, NamedSharding(mesh, PartitionSpec())))
  def train_step(state: TrainState, row: PackedRow):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    noise, sigmas = draw_noise(key, row, flow)
    (loss, (_, present)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, row, noise, sigmas)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
      ema = jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, ema, params)
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree_utils.tree_norm(grads),
        "sentences": jnp.sum(present),
        "fill_rate": jnp.mean(row.segment_ids > 0),
    }
    return TrainState(step=state.step + 1, params=params, ema=ema, opt_state=opt_state), metrics

  return train_step
