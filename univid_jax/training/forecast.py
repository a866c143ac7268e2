"""How much memory a training step will take on each device, before any step runs, from the compiler's own figures."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univid_jax import build
from univid_jax.compilation import uncollected
from univid_jax.data.packing import IMAGE_FEATURES, RowShape, pack, sentence_features
from univid_jax.diffusion.solvers import euler, velocity_fn
from univid_jax.parallel.sharding import BATCH, TOKENS
from univid_jax.performance import chip_of
from univid_jax.training.optimizer import make_optimizer
from univid_jax.training.step import StateSpec, make_train_step
from univid_jax.types import TOKEN_FIELDS, PackedRow, Sentence, reference_roles
from univid_jax.weights.checkpoint import abstract_parameters

# What to change by name when it does not fit.
ADVICE = ("config.model.remat=full recomputes instead of storing; config.mesh.fsdp or tensor spread weights over more devices, "
          "config.mesh.context a row's tokens; a smaller config.lora.rank or config.rows.num_tokens takes less")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
  """Bytes on each device.

  Attributes:
    weights: parameters, trained and frozen, and their running mean.
    optimizer: its state.
    batch: the rows.
    activations: what the step needs beside.
    cache: keys and values of the context, in sampling with a context-causal model; a part of the activations.
    device: the device's kind.
    memory: what the device has, or None where that is not known.
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
    return self.weights + self.optimizer + self.batch + self.activations

  @property
  def fits(self) -> bool:
    return self.memory is None or self.total <= self.memory

  def __str__(self) -> str:
    parts = ", ".join(f"{name} {getattr(self, name) / 1e9:.2f}" for name in ("weights", "optimizer", "batch", "activations"))
    parts += f", of these the context's keys and values {self.cache / 1e9:.2f}" if self.cache else ""
    of = "" if self.memory is None else f" of {self.memory / 1e9:.1f}"
    return f"memory a device ({self.device}): {self.total / 1e9:.2f}{of} GB ({parts})"


def abstract_batch(config: Mapping[str, Any], mesh: Mesh) -> PackedRow:
  """A batch's shapes, dtypes and shardings."""
  dit, shape, rows = build.transformer_config(config), build.row_shape(config), build.rows_per_batch(config, mesh)
  length, text, slots = shape.num_tokens, shape.num_text_tokens, shape.num_slots
  specs = {
      "tokens": ((length, dit.patch_volume * dit.out_dim), jnp.float32),
      "text": ((text, dit.text_dim), jnp.float32),
      "text_counts": ((text,), jnp.float32),
      "target_mask": ((length,), jnp.bool_),
      **{name: ((length, *dims), jnp.int32) for name, dims in {"positions": (3,), "segment_ids": (), "key_intervals": (2,),
                                                                "text_intervals": (2,), "modulation_ids": ()}.items()},
      "targets": ((shape.num_targets,), jnp.int32),
      **dict.fromkeys(("task_ids", "context_ids"), ((slots,), jnp.int32)),
  }
  if dit.model_type == "i2v":
    specs["condition"] = ((length, dit.patch_volume * (dit.in_dim - dit.out_dim)), jnp.float32)
    specs["image_features"] = ((IMAGE_FEATURES * slots, dit.image_dim), jnp.float32)
    specs["image_intervals"] = ((length, 2), jnp.int32)
  fields = {name: jax.ShapeDtypeStruct((rows, *dims), dtype, sharding=NamedSharding(
      mesh, TOKENS if name in TOKEN_FIELDS else BATCH)) for name, (dims, dtype) in specs.items()}
  return PackedRow(**fields, context_causal=shape.context_causal)


# For a CPU. By default XLA orders a program for operations side by side; for a step the other order takes a tenth less memory
# and the same time (docs/benchmarks.md).
LESS_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@uncollected()
def compile_step(step: Callable[..., Any], spec: StateSpec, batch: PackedRow, mesh: Mesh) -> tuple[Callable[..., Any], Forecast]:
  """Compiles a training step without running it, and reads what it will take.

  Args:
    step: of `make_train_step`.
    spec: of the state.
    batch: shapes and shardings, see `abstract_batch`.
    mesh: the devices, which need not be here.

  Raises:
    ValueError: the compiler itself sees that it cannot fit.
  """
  device = mesh.devices.flat[0]
  try:
    with jax.set_mesh(mesh):
      lowered = step.lower(spec.abstract, spec.abstract_frozen, batch)
      # Not for several devices of one CPU, which wait for one another within the program: a test of eight was aborted once.
      compiled = lowered.compile(LESS_MEMORY if device.platform == "cpu" and mesh.size == 1 else None)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise ValueError(f"the training step does not fit ({str(error).splitlines()[0].rstrip('.')}); {ADVICE}") from error
  return compiled, Forecast(weights=bytes_per_device((spec.abstract.params, spec.abstract.ema, spec.abstract_frozen)),
                            optimizer=bytes_per_device(spec.abstract.opt_state), batch=bytes_per_device(batch),
                            activations=compiled.memory_analysis().temp_size_in_bytes, device=device.device_kind,
                            memory=device_memory(device))


def device_memory(device: jax.Device) -> int | None:
  """Bytes that a device has for JAX, or None where that is not known."""
  chip = chip_of(device)
  if chip is not None and device.platform == "tpu":
    return int(chip.memory)
  try:
    return (device.memory_stats() or {}).get("bytes_limit")
  except jax.errors.JaxRuntimeError:  # a device that is not here
    return None


def forecast(config: Mapping[str, Any], mesh: Mesh) -> Forecast:
  """What the training of a config takes on each device of a mesh."""
  return forecast_with_program(config, mesh)[0]


def forecast_with_program(config: Mapping[str, Any], mesh: Mesh) -> tuple[Forecast, Any]:
  """The same, and the compiled step.

  Raises:
    ValueError: the compiler itself sees that it cannot fit.
  """
  optimizer = make_optimizer(config["optimizer"], config["num_steps"])
  spec = StateSpec.of(lambda: build.model(config), optimizer, mesh, ema=config["ema_decay"] > 0,
                      lora=build.lora_config(config) is not None)
  step = make_train_step(spec, optimizer, build.flow(config), mesh=mesh, ema_decay=config["ema_decay"], seed=0,
                         microbatches=config["rows"]["microbatches"], dropout=config["lora"]["dropout"] > 0)
  program, memory = compile_step(step, spec, abstract_batch(config, mesh), mesh)
  return memory, program


def forecast_sampling(config: Mapping[str, Any], mesh: Mesh) -> Forecast:
  """What sampling one sentence of context I takes on each device of a mesh, without the codec and the encoders."""
  dit, data = build.transformer_config(config), config["data"]
  stride = 8 if config["init_from"] or config["model"]["variant"] else config["codec"]["spatial_stride"]
  shape = (1 + (data["num_frames"] - 1) // 4, data["height"] // stride, data["width"] // stride, dit.out_dim)
  total = 4 * shape[0]
  conditions = {} if dit.model_type == "t2v" else {
      "condition": np.zeros((total, *shape[1:3], dit.in_dim - dit.out_dim), np.float32),
      "image_features": np.zeros((IMAGE_FEATURES, dit.image_dim), np.float32)}
  features = sentence_features(Sentence(clips=(np.zeros(shape, np.float32),) * 4, roles=reference_roles(4)),
                               patch_size=dit.patch_size, prompt_embedding=np.zeros((0, dit.text_dim)), text_len=dit.text_len,
                               **conditions)
  causal = build.row_shape(config).context_causal
  row = pack([features], RowShape(num_tokens=len(features["tokens"]), num_targets=len(features["targets"]), num_text_tokens=1,
                                  num_slots=1, context_causal=causal))
  if not causal:
    row = dataclasses.replace(row, key_intervals=None, text_intervals=None, image_intervals=None, modulation_ids=None)
  module = nnx.eval_shape(lambda: build.model(config, adapters=False))
  graph, params = nnx.graphdef(module), abstract_parameters(module, mesh)

  def sample(params, row):
    predict = velocity_fn(nnx.merge(graph, params), row)
    return euler(predict, row, row.tokens, build.flow(config).inference_sigmas(2))

  whole = NamedSharding(mesh, PartitionSpec())
  row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), row)
  with jax.set_mesh(mesh):
    compiled = jax.jit(sample).lower(params, row).compile()
  device, dtype = mesh.devices.flat[0], jnp.dtype(config["model"]["dtype"])
  return Forecast(weights=bytes_per_device(params), optimizer=0, batch=bytes_per_device(row), device=device.device_kind,
                  activations=compiled.memory_analysis().temp_size_in_bytes, memory=device_memory(device),
                  cache=2 * dit.num_layers * row.tokens.shape[1] * dit.dim * dtype.itemsize if causal else 0)


def bytes_per_device(tree: Any) -> int:
  """What arrays, here or only described, take on each device."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
