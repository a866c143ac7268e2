"""The training step: a pure function over sharded state."""

import dataclasses
import functools
from collections.abc import Callable
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
  params: nnx.State
  ema: nnx.State | None
  opt_state: Any


def make_state(init: Callable[[], nnx.Module], optimizer: optax.GradientTransformation, mesh: Mesh, *,
               ema: bool) -> tuple[nnx.GraphDef, TrainState, TrainState]:
  """Creates a model's first state, each array straight in its shards.

  Args:
    init: makes the model.
    optimizer: makes its state.
    mesh: where it lives.
    ema: whether a running mean is kept.

  Returns:
    The model's graph, the state, and the state's shardings.
  """
  def create():
    params = nnx.state(init(), nnx.Param)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params),
                      ema=jax.tree.map(jnp.copy, params) if ema else None)

  graph = nnx.graphdef(nnx.eval_shape(init))
  shardings = state_shardings(jax.eval_shape(create), optimizer, mesh)
  with mesh:
    return graph, jax.jit(create, out_shardings=shardings)(), shardings


def state_shardings(abstract: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """Shardings of a state: moments lie like their parameters, scalars on every device."""
  params = parameter_shardings(abstract.params, mesh)
  whole = NamedSharding(mesh, PartitionSpec())

  def of_moment(moment, sharding):
    return moment if isinstance(moment, optax.MaskedNode) else sharding

  opt_state = optax.tree_utils.tree_map_params(optimizer, of_moment, abstract.opt_state, params,
                                               transform_non_params=lambda _: whole,
                                               is_leaf=lambda x: isinstance(x, optax.MaskedNode))
  return TrainState(step=whole, params=params, ema=None if abstract.ema is None else params, opt_state=opt_state)


def make_train_step(graph: nnx.GraphDef, optimizer: optax.GradientTransformation, flow: FlowMatching, *, mesh: Mesh,
                    shardings: TrainState, ema_decay: float, seed: int):
  """The jitted step (state, batch) -> (state, metrics); the state that goes in is given up.

  The loss is the mean over the sentences of the whole batch. Noise depends on the seed and the step alone.
  """
  def loss_fn(params, row: PackedRow, noise, sigmas):
    losses, present = sentence_losses(nnx.merge(graph, params), row, noise, sigmas)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(present), 1), (losses, present)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))
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
