"""Compiles programs for devices that need not be present, and reads the memory that they take."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from univid_jax.checkpoints.run_parts import context_mode
from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import UserError, first_line
from univid_jax.core.packed_row import PackedRow
from univid_jax.core.protocols import TrainStep
from univid_jax.core.sentence import Sentence, reference_roles
from univid_jax.data.rows.packing import RowShape, pack
from univid_jax.data.rows.tokens import IMAGE_FEATURES, Features, sentence_features
from univid_jax.models.variants import DiTConfig
from univid_jax.parallel.mesh import row_shards
from univid_jax.parallel.sharding import BATCH, TOKENS, bytes_per_device, check_tokens, is_per_token
from univid_jax.platform.chips import find_chip
from univid_jax.training.state import StateSpec

ADVICE = (
  "config.model.remat=full recomputes instead of storing; config.mesh.fsdp or tensor shard weights over more devices, "
  "config.mesh.context the tokens of a row; in a new run, smaller config.lora.rank or config.rows.num_tokens take less"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
  """Bytes on each device, and in host memory per device.

  Attributes:
    weights: parameters, trained and frozen, and the moving average.
    optimizer: state of the optimizer.
    batch: the rows; for the autoencoder, frames and latents.
    activations: everything else that the program needs at its peak.
    cache: keys and values of the context, when sampling with a context-causal model.
    host: arrays in host memory (`base.offload`, `model.remat=offload`); not part of the total.
    device: kind of the device.
    memory: capacity of the device; None if unknown.
    note: what is whole or sharded on the devices; "" where the mesh says it.
  """

  weights: int
  optimizer: int = 0
  batch: int
  activations: int
  device: str
  memory: int | None
  cache: int = 0
  host: int = 0
  note: str = ""

  @property
  def total(self) -> int:
    return self.weights + self.optimizer + self.batch + self.activations + self.cache

  @property
  def fits(self) -> bool:
    return self.memory is None or self.total <= self.memory

  def __str__(self) -> str:
    names = ("weights", *(name for name in ("optimizer", "batch", "activations", "cache") if getattr(self, name)))
    parts = ", ".join(f"{name} {getattr(self, name) / 1e9:.2f}" for name in names)
    capacity = "" if self.memory is None else f" of {self.memory / 1e9:.1f}"
    host = f"; in the host's memory for each device: {self.host / 1e9:.2f} GB" if self.host else ""
    note = f"; {self.note}" if self.note else ""
    return f"memory per device ({self.device}): {self.total / 1e9:.2f}{capacity} GB ({parts}){host}{note}"


class DoesNotFitError(UserError):
  """The compiler refuses a program because the devices have too little memory.

  Attributes:
    temporaries: bytes that the program needs besides its inputs; None if the compiler does not say.
  """

  def __init__(self, reason: str, advice: str):
    super().__init__(f"this does not fit ({reason}); {advice}")
    needed = re.search(r"\((\d+\.\d+)G\)", reason)
    self.temporaries = float(needed[1]) * 2**30 if needed else None


def compile_step(step: Any, spec: StateSpec, batch: PackedRow, mesh: Mesh) -> tuple[TrainStep, Forecast]:
  """Compiles a training step without running it, and reads the memory that it needs.

  Args:
    step: result of `make_train_step`.
    spec: description of the state.
    batch: shapes and shardings, see `abstract_batch`.
    mesh: the devices, which may be only described.

  Raises:
    DoesNotFitError: the compiler itself finds that it cannot fit.
  """
  with jax.set_mesh(mesh):
    compiled = compile_program(step.lower(spec.abstract, spec.abstract_frozen, batch), ADVICE)
  abstract = spec.abstract
  weights = abstract.params, abstract.ema, spec.abstract_frozen
  return compiled, Forecast(
    weights=bytes_per_device(weights),
    optimizer=bytes_per_device(abstract.opt_state),
    batch=bytes_per_device(batch),
    host=bytes_per_device(weights, on_host=True) + compiled.memory_analysis().host_temp_size_in_bytes,
    **describe_program(compiled, mesh),
  )


def compile_program(lowered: Any, advice: str) -> Any:
  """Compiles a program; raises DoesNotFitError if the compiler itself finds that it cannot fit."""
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    reason = first_line(error).rstrip(".")
    raise DoesNotFitError(reason, advice) from error


def describe_program(compiled: Any, mesh: Mesh) -> dict[str, Any]:
  """Returns the fields of a `Forecast` that follow from a program and its devices."""
  device = mesh.devices.flat[0]
  return {
    "activations": compiled.memory_analysis().temp_size_in_bytes,
    "device": device.device_kind,
    "memory": device_memory(device),
  }


def device_memory(device: Any) -> int | None:
  """Returns the bytes that a device has for JAX; None if unknown."""
  chip = find_chip(device)
  if chip is not None and device.platform == "tpu":
    return int(chip.memory)
  try:
    return (device.memory_stats() or {}).get("bytes_limit")
  except jax.errors.JaxRuntimeError:  # the device is only a description
    return None


def abstract_batch(config: RunConfig, shape: DiTConfig, mesh: Mesh) -> PackedRow:
  """Returns the shapes, dtypes and shardings of a batch."""
  row = pack(
    [placeholder_features(shape, shape.patch_size, num_clips=1)],
    RowShape.from_config(config.rows, context_mode(config)),
  )
  rows = config.rows.batch_size(row_shards(mesh))
  check_tokens(row.tokens.shape[1], mesh)

  def describe(path: Any, x: np.ndarray) -> jax.ShapeDtypeStruct:
    spec = TOKENS if is_per_token(path) else BATCH
    return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree_util.tree_map_with_path(describe, row)


def placeholder_features(shape: DiTConfig, latents: tuple[int, int, int], *, num_clips: int) -> Features:
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
