"""The training state: everything that changes from step to step, and how it is created and sharded."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from univid_jax.checkpoints.run_parts import create_model
from univid_jax.config.schema import RunConfig
from univid_jax.core.options import RematPolicy, TrainedExpert
from univid_jax.models.lora import LoRAParam, remove_dropout
from univid_jax.models.offload import describe_in_words, offload_blocks
from univid_jax.parallel.host_memory import require_host_memory
from univid_jax.parallel.sharding import parameter_shardings
from univid_jax.training.expert_schedule import ExpertSchedule
from univid_jax.training.optimizer import make_optimizer

Params = Mapping[str, Any]  # nested dicts of arrays, under the names of a model's modules


@jax.jit
def _is_finite(tree: Any) -> Array:
  return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))


@no_type_check  # of fields at run time: as a pytree it also holds shardings and shapes
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """Everything that a step updates; with two experts, all but `step` is by name, see `TrainedExpert.join_trees`.

  Attributes:
    step: number of steps taken.
    params: trained parameters.
    ema: their exponential moving average, in float32, since bfloat16 would lose steps of a thousandth; None without
      one.
    opt_state: state of the optimizer.
  """

  step: Int[Array, ""]
  params: Params
  ema: Params | None
  opt_state: Any

  @property
  def model_params(self) -> Params:
    """The parameters for sampling: the moving average if there is one, in the parameters' dtype."""
    return (
      self.params if self.ema is None else jax.tree.map(lambda x, like: x.astype(like.dtype), self.ema, self.params)
    )

  @property
  def model_item(self) -> Params:
    """The model item of a checkpoint: the moving average if there is one, else the parameters."""
    return self.params if self.ema is None else self.ema

  def is_finite(self) -> bool:
    """Returns whether all parameters, and their average, are finite; waits for the devices."""
    return bool(_is_finite((self.params, self.ema)))

  @property
  def training_items(self) -> dict[str, Any]:
    """The other items of a checkpoint, besides `model_item`."""
    items = {"step": self.step, "opt_state": self.opt_state}
    return items if self.ema is None else items | {"params": self.params}

  @classmethod
  def from_items(cls, model: Params, training: Mapping[str, Any], *, ema: bool) -> "TrainState":
    """Returns the state of `model_item` and `training_items`; their inverse."""
    params = training["params"] if ema else model
    return cls(step=training["step"], params=params, ema=model if ema else None, opt_state=training["opt_state"])

  def split(self, expert: TrainedExpert) -> "tuple[TrainState, ...]":
    """Returns the state of each expert."""
    emas = [None] * len(expert.parts) if self.ema is None else expert.split_tree(self.ema)
    parts = zip(expert.split_tree(self.params), emas, expert.split_tree(self.opt_state), strict=True)
    return tuple(TrainState(step=self.step, params=params, ema=ema, opt_state=state) for params, ema, state in parts)

  @classmethod
  def join(cls, expert: TrainedExpert, states: "Sequence[TrainState]") -> "TrainState":
    """Returns one state from those of each expert; the inverse of `split`."""
    first = states[0]
    return cls(
      step=first.step,
      params=expert.join_trees([each.params for each in states]),
      ema=None if first.ema is None else expert.join_trees([each.ema for each in states]),
      opt_state=expert.join_trees([each.opt_state for each in states]),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateSpec:
  """Description of a training state, before it exists.

  Attributes:
    graph: the model without parameters; `nnx.merge(spec.graph, join(frozen, params))` is the model.
    training_graph: the same with dropout, whose keys each step replaces, see `with_dropout_keys`.
    create: creates the first state, from random parameters or from those given.
    abstract: shapes, dtypes and shardings of the state.
    abstract_frozen: the same for the frozen parameters; {} if everything is trained.
  """

  graph: nnx.GraphDef
  training_graph: nnx.GraphDef
  create: Callable[..., TrainState]
  abstract: TrainState
  abstract_frozen: Params

  @classmethod
  def for_model(
    cls,
    init: Callable[[], nnx.Module],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    ema: bool,
    lora: bool = False,
    offload: bool = False,
  ) -> "StateSpec":
    """Describes the state of a model of which everything, or only its adapters, is trained.

    Args:
      init: creates the model.
      optimizer: creates its own state.
      mesh: the devices.
      ema: whether to keep a moving average.
      lora: whether only adapters are trained.
      offload: whether frozen blocks are in host memory.
    """
    kind = LoRAParam if lora else nnx.Param

    def create(params: Params | None = None) -> TrainState:
      params = nnx.to_pure_dict(nnx.state(init(), kind)) if params is None else params
      average = jax.tree.map(lambda x: jnp.copy(x).astype(jnp.float32), params) if ema else None
      return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), ema=average)

    model = nnx.eval_shape(init)
    shapes = jax.eval_shape(create, nnx.to_pure_dict(nnx.state(model, kind)))
    shardings = _state_shardings(shapes, parameter_shardings(model, mesh, kind), optimizer, mesh)
    frozen = nnx.to_pure_dict(nnx.state(model, nnx.Param)) if lora else {}

    def place(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    abstract_frozen = jax.tree.map(place, frozen, parameter_shardings(model, mesh) if lora else {})
    training_graph = nnx.graphdef(model)
    remove_dropout(model)
    return cls(
      graph=nnx.graphdef(model),
      training_graph=training_graph,
      create=jax.jit(create, out_shardings=shardings),
      abstract=jax.tree.map(place, shapes, shardings),
      abstract_frozen=describe_in_words(offload_blocks(abstract_frozen)) if offload else abstract_frozen,
    )

  @property
  def shardings(self) -> TrainState:
    return jax.tree.map(lambda x: x.sharding, self.abstract)

  @classmethod
  def join(cls, expert: TrainedExpert, specs: "Sequence[StateSpec]") -> "StateSpec":
    """Describes the state of both experts, which have the same shape."""
    abstract = TrainState.join(expert, [spec.abstract for spec in specs])

    def create() -> TrainState:
      return TrainState.join(expert, [spec.create() for spec in specs])

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    frozen = expert.join_trees([spec.abstract_frozen for spec in specs])
    return dataclasses.replace(
      specs[0], create=jax.jit(create, out_shardings=shardings), abstract=abstract, abstract_frozen=frozen
    )


def describe_training(config: RunConfig, mesh: Mesh) -> tuple[list[optax.GradientTransformation], StateSpec]:
  """Returns the optimizer of each transformer that a run trains, and the description of the run's state."""
  expert, counts = config.model.expert, (config.num_steps,)
  if expert == TrainedExpert.BOTH:
    counts = ExpertSchedule.from_config(config).count_steps(config.num_steps)
  optimizers = [make_optimizer(config.optimizer, count) for count in counts]
  if config.base.offload:
    require_host_memory(mesh, "config.base.offload")
  if config.model.remat == RematPolicy.OFFLOAD:
    require_host_memory(mesh, "config.model.remat = offload")
  specs = [
    StateSpec.for_model(
      lambda: create_model(config),
      optimizer,
      mesh,
      ema=config.ema_decay > 0,
      lora=config.lora.enabled,
      offload=config.base.offload,
    )
    for optimizer in optimizers
  ]
  return optimizers, specs[0] if len(specs) == 1 else StateSpec.join(expert, specs)


def _state_shardings(
  shapes: TrainState, params: Params, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """Returns shardings that shard moments like their parameters and replicate scalars."""
  replicated = NamedSharding(mesh, PartitionSpec())

  def shard_moment(moment: Any, sharding: NamedSharding) -> Any:
    return moment if isinstance(moment, optax.MaskedNode) else sharding

  opt_state = optax.tree_utils.tree_map_params(
    optimizer,
    shard_moment,
    shapes.opt_state,
    params,
    transform_non_params=lambda _: replicated,
    is_leaf=lambda x: isinstance(x, optax.MaskedNode),
  )
  fields: dict[str, Any] = {"step": replicated, "params": params, "opt_state": opt_state}
  return TrainState(**fields, ema=None if shapes.ema is None else params)
