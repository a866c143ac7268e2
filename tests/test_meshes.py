"""Sharding: every mesh computes the loss and the gradients of one device."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from univid_jax.checkpoints.run_parts import context_mode, create_model, open_encoders, transformer_config
from univid_jax.config.boundary import override
from univid_jax.core.errors import UserError
from univid_jax.data.features import FeatureMaker
from univid_jax.data.rows.balancing import BatchLayout
from univid_jax.data.rows.loader import make_loader
from univid_jax.data.rows.loader_options import LoaderOptions
from univid_jax.data.rows.packing import RowShape
from univid_jax.data.sources.computed import open_computed
from univid_jax.diffusion.flow import FlowMatching
from univid_jax.diffusion.loss import draw_noise
from univid_jax.parallel.mesh import make_mesh, mesh_shape, row_shards
from univid_jax.parallel.sharding import parameter_shardings, shard_batch
from univid_jax.planning.forecasts import compile_training
from univid_jax.training.optimizer import make_optimizer
from univid_jax.training.state import StateSpec
from univid_jax.training.step import make_update


def one_gradient(config, mesh, row, microbatches=1):
  """Returns loss, gradients and state spec of a step on a mesh; gradient descent at rate 1 exposes the gradient."""
  optimizer = optax.sgd(1.0)
  spec = StateSpec.for_model(lambda: create_model(config), optimizer, mesh, ema=False, lora=config.lora.enabled)
  init = jax.jit(lambda: nnx.to_pure_dict(nnx.state(create_model(config), nnx.Param)))
  base = init() if config.lora.enabled else {}
  state, frozen = (
    spec.create(),
    jax.tree.map(lambda x, spec: jax.device_put(x, spec.sharding), base, spec.abstract_frozen),
  )
  before = jax.device_get(state.params)
  noise, levels = draw_noise(jax.random.key(3), row, FlowMatching.from_config(config.flow))
  update = jax.jit(make_update(spec, optimizer, microbatches=microbatches), out_shardings=(spec.shardings, None))
  with jax.set_mesh(mesh):
    state, metrics = update(state, frozen, shard_batch(row, mesh), noise, levels, jax.random.key(0))
  grads = jax.tree.map(lambda a, b: a - np.asarray(b), before, jax.device_get(state.params))
  promised = spec.abstract.params, spec.abstract_frozen
  for leaf, abstract in zip(jax.tree.leaves((state.params, frozen)), jax.tree.leaves(promised)):
    assert (
      leaf.addressable_shards[0].data.nbytes == np.prod(abstract.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    )
  return float(metrics["loss"]), np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)]), spec


def packed_batch(config):
  """Returns a batch of eight rows of computed sentences."""
  source = open_computed(config, "train", seed=0)
  encoders = open_encoders(config, make_mesh({}, devices=jax.devices()[:1]))
  features = FeatureMaker(encoders, shape=transformer_config(config), task_names=source.task_names)
  loader = make_loader(
    [source],
    features,
    row_shape=RowShape.from_config(config.rows, context_mode(config)),
    layout=BatchLayout(num_rows=8),
    seed=0,
    options=LoaderOptions(num_packing_bins=8),
  )
  row = next(loader)
  loader.close()
  assert row.segment_ids.max() > 1
  return row


@dataclasses.dataclass(frozen=True)
class TorusChip:
  """What JAX needs to know of a TPU to place it in a mesh."""

  id: int
  coords: tuple[int, int, int]
  slice_index: int = 0
  core_on_chip: int = 0
  process_index: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v6 lite"


@pytest.fixture(scope="module")
def single(tiny_config):
  """Returns the row, and the loss and gradients of one device, of full training or of a LoRA."""

  @functools.cache
  def find(lora):
    config = TestMeshes.configure(tiny_config, lora)
    row = packed_batch(config)
    return row, *one_gradient(config, make_mesh({}, devices=jax.devices()[:1]), row)[:2]

  return find


class TestMeshes:
  """Every mesh computes the loss and the gradients of one device, for packed rows of images and videos."""

  # One mesh that mixes axes always runs, the other with `-m long`, meshes of one axis with `-m slow`.
  MESHES = (
    {"data": 2, "fsdp": 2, "context": 2},
    pytest.param({"tensor": 4, "context": 2}, marks=pytest.mark.long),
    *(pytest.param({axis: 8}, marks=pytest.mark.slow) for axis in ("data", "fsdp", "context")),
  )

  @staticmethod
  def configure(config, lora):
    """Context tokens have the target's timestep in one of the two kinds of training, 0 in the other."""
    timestep = "zero" if lora else "target"
    return override(config, {"lora.rank": 2 if lora else 0, "model.look_back": (), "model.context_timestep": timestep})

  @pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.long)], ids=["full", "lora"])
  @pytest.mark.parametrize("sizes", MESHES, ids=str)
  def test_equals_one_device(self, tiny_config, single, sizes, lora):
    config = self.configure(tiny_config, lora)
    row, loss, grads = single(lora)
    other_loss, other, spec = one_gradient(config, make_mesh(sizes), row)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert np.linalg.norm(other - grads) / np.linalg.norm(grads) <= 1e-5 and np.linalg.norm(grads) > 0.01
    shards = np.prod([sizes.get(axis, 1) for axis in ("fsdp", "context", "tensor")])
    kernel = (spec.abstract_frozen if lora else spec.abstract.params)["blocks"]["ffn"]["up"]["kernel"]
    assert np.prod(kernel.sharding.shard_shape(kernel.shape)) * shards == kernel.size

  @pytest.mark.long
  def test_microbatches_give_the_same_gradients(self, tiny_config, single):
    row, loss, grads = single(False)
    mesh = make_mesh(self.MESHES[0])  # whose state is compiled already
    other_loss, other, _ = one_gradient(self.configure(tiny_config, False), mesh, row, microbatches=2)
    assert other_loss == pytest.approx(loss, rel=1e-5) and np.linalg.norm(other - grads) / np.linalg.norm(grads) <= 1e-5

  def test_moments_are_sharded_like_their_parameters(self, tiny_config):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    spec = StateSpec.for_model(
      lambda: create_model(tiny_config), make_optimizer(tiny_config.optimizer, 4), mesh, ema=True
    )
    kernel = spec.abstract.params["blocks"]["ffn"]["up"]["kernel"]
    moments = [x for x in jax.tree.leaves(spec.abstract.opt_state) if x.shape == kernel.shape]
    assert moments and all(
      x.sharding.shard_shape(x.shape) == kernel.sharding.shard_shape(kernel.shape) for x in moments
    )

  def test_axes_may_share_a_physical_axis(self):
    torus = [TorusChip(4 * y + x, (x, y, 0)) for y in range(4) for x in range(4)]
    assert dict(make_mesh({"data": -1, "fsdp": 8}, torus).shape) == {"data": 2, "fsdp": 8, "tensor": 1, "context": 1}
    with pytest.raises(ValueError, match="within one TPU slice"):
      make_mesh({"data": 32}, [*torus, *(dataclasses.replace(chip, slice_index=1) for chip in torus)])

  def test_indivisible_rows_are_refused(self, tiny_config):
    row = packed_batch(tiny_config)
    odd = jax.tree.map(lambda x: x[:, :47] if x.shape[1] == 48 else x, row)
    with pytest.raises(ValueError, match=r"rows of 47 tokens do not divide over config\.mesh\.context = 8"):
      shard_batch(odd, make_mesh({"context": 8}))
    rows = override(tiny_config, {"rows.per_batch": 6}).rows
    with pytest.raises(UserError, match="per_batch = 6 does not divide over data x fsdp = 8"):
      rows.batch_size(row_shards(make_mesh({"data": 8})))


@pytest.mark.long
def test_no_device_holds_the_hidden_states_of_a_whole_row(tiny_config):
  """In the compiled step: neither between blocks, stored for the backward pass, nor when targets leave the context."""
  changes = {"model.num_layers": 3, "model.dim": 48, "model.num_heads": 4, "model.ffn_dim": 112, "model.remat": "full"}
  rows = {"rows.num_tokens": 480, "rows.per_batch": 2, "lora.rank": 2}
  mesh = make_mesh({"data": 2, "context": 4})
  program, _ = compile_training(override(tiny_config, changes | rows), mesh)
  shapes = {tuple(map(int, text.split(","))) for text in re.findall(r"\[([\d,]+),48\]", program.as_text())}
  assert (3, 1, 120) in shapes and max(map(math.prod, shapes)) < 480, shapes


def test_parameters_are_sharded_by_dim_name(tiny_config):
  mesh = make_mesh({"fsdp": 4, "tensor": 2})
  shardings = parameter_shardings(nnx.eval_shape(lambda: create_model(tiny_config)), mesh)
  block = shardings["blocks"]
  assert block["self_attn"]["q"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
  assert block["self_attn"]["o"]["kernel"].spec == PartitionSpec(None, "tensor", "fsdp")
  assert block["ffn"]["down"]["bias"].spec == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
  "sizes, count, shape", [({"data": -1}, 8, (8, 1, 1, 1)), ({"data": -1, "tensor": 4}, 8, (2, 1, 4, 1))]
)
def test_minus_one_takes_the_devices_that_are_left(sizes, count, shape):
  assert mesh_shape(sizes, count) == shape


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "fsdp": -1}, {"tensor": 0}, {"data": -1, "tensor": 3}])
def test_indivisible_meshes_are_refused(sizes):
  with pytest.raises(ValueError, match="mesh"):
    mesh_shape(sizes, 8)
