"""Forecasts the memory of training and sampling on each device, before a step runs, from the compiler's own figures."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univid_jax.checkpoints.model import check_rows, codec_shape, context_mode, create_model, transformer_config
from univid_jax.checkpoints.pretrained import abstract_parameters
from univid_jax.config.schema import RunConfig
from univid_jax.core.dims import latent_shape
from univid_jax.core.errors import UserError
from univid_jax.core.options import TrainedExpert
from univid_jax.core.packed_row import TOKEN_FIELDS, PackedRow
from univid_jax.core.protocols import TrainStep
from univid_jax.core.sentence import Sentence, reference_roles
from univid_jax.data.packing import RowShape, pack
from univid_jax.data.tokens import IMAGE_FEATURES, Features, sentence_features
from univid_jax.diffusion.guidance import Branch
from univid_jax.diffusion.solvers import Euler
from univid_jax.inference.jobs import pack_single
from univid_jax.inference.sampler import Sampler
from univid_jax.models.variants import DiTConfig
from univid_jax.parallel.mesh import row_shards
from univid_jax.parallel.sharding import BATCH, TOKENS, bytes_per_device
from univid_jax.platform.chips import find_chip
from univid_jax.training.state import StateSpec, describe_training
from univid_jax.training.step import make_train_step

ADVICE = (
  "config.model.remat=full recomputes instead of storing; config.mesh.fsdp or tensor shard weights over more devices, "
  "config.mesh.context the tokens of a row; in a new run, smaller config.lora.rank or config.rows.num_tokens take less"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
  """Bytes on each device.

  Attributes:
    weights: parameters, trained and frozen, and their moving average.
    optimizer: its state.
    batch: the rows.
    activations: what else the program needs at its peak.
    cache: keys and values of the context, when sampling with a context-causal model.
    device: kind of the device.
    memory: capacity of the device; None if unknown.
  """

  weights: int
  optimizer: int
  batch: int
  activations: int
  device: str
  memory: int | None
  cache: int = 0

  @property
  def total(self) -> int:
    return self.weights + self.optimizer + self.batch + self.activations + self.cache

  @property
  def fits(self) -> bool:
    return self.memory is None or self.total <= self.memory

  def __str__(self) -> str:
    names = ("weights", "optimizer", "batch", "activations", *(["cache"] if self.cache else []))
    parts = ", ".join(f"{name} {getattr(self, name) / 1e9:.2f}" for name in names)
    capacity = "" if self.memory is None else f" of {self.memory / 1e9:.1f}"
    return f"memory per device ({self.device}): {self.total / 1e9:.2f}{capacity} GB ({parts})"


def forecast(config: RunConfig, mesh: Mesh) -> Forecast:
  """Forecasts the training of a config on each device of a mesh.

  Raises:
    UserError: the compiler itself sees that it cannot fit.
  """
  return forecast_with_program(config, mesh)[0]


def forecast_with_program(config: RunConfig, mesh: Mesh) -> tuple[Forecast, Any]:
  """Forecasts training, and returns the compiled step as well."""
  optimizers, spec = describe_training(config, mesh)
  step = make_train_step(config, spec, optimizers, mesh)
  program, memory = compile_step(step, spec, abstract_batch(config, transformer_config(config), mesh), mesh)
  return memory, program


def compile_step(step: Any, spec: StateSpec, batch: PackedRow, mesh: Mesh) -> tuple[TrainStep, Forecast]:
  """Compiles a training step without running it, and reads the memory that it needs.

  Args:
    step: of `make_train_step`.
    spec: of the state.
    batch: shapes and shardings, see `abstract_batch`.
    mesh: the devices, which may be a description of devices elsewhere.

  Raises:
    UserError: the compiler itself sees that it cannot fit.
  """
  device = mesh.devices.flat[0]
  try:
    with jax.set_mesh(mesh):
      compiled = step.lower(spec.abstract, spec.abstract_frozen, batch).compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    reason = str(error).splitlines()[0].rstrip(".")
    raise UserError(f"the training step does not fit ({reason}); {ADVICE}") from error
  abstract = spec.abstract
  return compiled, Forecast(
    weights=bytes_per_device((abstract.params, abstract.ema, spec.abstract_frozen)),
    optimizer=bytes_per_device(abstract.opt_state),
    batch=bytes_per_device(batch),
    activations=compiled.memory_analysis().temp_size_in_bytes,
    device=device.device_kind,
    memory=device_memory(device),
  )


def abstract_batch(config: RunConfig, shape: DiTConfig, mesh: Mesh) -> PackedRow:
  """Returns the shapes, dtypes and shardings of a batch."""
  row = pack(
    [_placeholder_features(shape, shape.patch_size, num_clips=1)], RowShape.of(config.rows, context_mode(config))
  )
  rows = config.rows.batch_size(row_shards(mesh))

  def describe(path: Any, x: np.ndarray) -> jax.ShapeDtypeStruct:
    spec = TOKENS if path[-1].name in TOKEN_FIELDS else BATCH
    return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree_util.tree_map_with_path(describe, row)


def forecast_sampling(config: RunConfig, mesh: Mesh) -> Forecast:
  """Forecasts sampling one sentence of context I on each device, without codec and encoders.

  Of a model with two experts, both are on the devices.
  """
  check_rows(config)
  shape, data = transformer_config(config), config.data
  codec = codec_shape(config)
  latents = latent_shape(
    (data.num_frames, data.height, data.width),
    temporal_stride=codec.temporal_stride,
    spatial_stride=codec.spatial_stride,
  )
  features = _placeholder_features(shape, latents, num_clips=4)
  row = pack_single(features, context_mode=context_mode(config), with_targets=True)
  num_experts = 1 if config.model.expert == TrainedExpert.ONLY else 2
  module = nnx.eval_shape(lambda: create_model(config, adapters=False))
  graph, params = nnx.graphdef(module), abstract_parameters(module, mesh)
  replicated = NamedSharding(mesh, PartitionSpec())

  def place(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)

  row = jax.tree.map(place, row)
  with jax.set_mesh(mesh):
    branch = jax.eval_shape(lambda params, row: Branch.create(nnx.merge(graph, params), row), params, row)
    branch = dataclasses.replace(branch, row=row, cache=jax.tree.map(place, branch.cache))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    coefficients = jax.ShapeDtypeStruct((1,), jnp.float32)
    step: Any = Sampler(mesh).step(Euler())
    compiled = step.lower(graph, params, (branch, None), row.tokens, scalar, coefficients, scalar).compile()
  device = mesh.devices.flat[0]
  return Forecast(
    weights=num_experts * bytes_per_device(params),
    optimizer=0,
    batch=bytes_per_device(row),
    activations=compiled.memory_analysis().temp_size_in_bytes,
    cache=bytes_per_device(branch.cache.keys_and_values if branch.cache else None),
    device=device.device_kind,
    memory=device_memory(device),
  )


def _placeholder_features(shape: DiTConfig, latents: tuple[int, int, int], *, num_clips: int) -> Features:
  """Returns the features of a sentence of zeros with the null prompt; each clip has (t, y, x) latents."""
  t, y, x = latents
  clips = (np.zeros((t, y, x, shape.out_dim), np.float32),) * num_clips
  condition = image_features = None
  if shape.takes_condition:
    condition = np.zeros((num_clips * t, y, x, shape.in_dim - shape.out_dim), np.float32)
  if shape.takes_image_features:
    image_features = np.zeros((IMAGE_FEATURES, shape.image_dim), np.float32)
  return sentence_features(
    Sentence(clips=clips, roles=reference_roles(num_clips)),
    patch_size=shape.patch_size,
    prompt_embedding=np.zeros((0, shape.text_dim)),
    text_len=shape.text_len,
    condition=condition,
    image_features=image_features,
  )


def device_memory(device: Any) -> int | None:
  """Returns the bytes that a device has for JAX; None if unknown."""
  chip = find_chip(device)
  if chip is not None and device.platform == "tpu":
    return int(chip.memory)
  try:
    return (device.memory_stats() or {}).get("bytes_limit")
  except jax.errors.JaxRuntimeError:  # the device is only described
    return None
