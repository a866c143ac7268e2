"""How many rows are sampled together: as many as keep the devices busy and fit in their memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from univid_jax.core.numbers import ceil_div
from univid_jax.core.packed_row import PackedRow
from univid_jax.inference.plan import SamplingPlan
from univid_jax.parallel.mesh import row_shards
from univid_jax.parallel.sharding import bytes_per_device, shard_batch
from univid_jax.platform.machine_memory import available_memory

if TYPE_CHECKING:
  from univid_jax.inference.pipeline import Pipeline

# Tokens that are computed together on a device: more make it no faster.
MAX_TOKENS = 2**15

# Share of the free memory that rows may take; the rest is for the codec.
MEMORY_SHARE = 0.8


def choose_batch_size(pipeline: "Pipeline", rows: Sequence[PackedRow], plan: SamplingPlan, *, count: int) -> int:
  """Returns the number of rows to sample together.

  Args:
    pipeline: the model.
    rows: one row with the prompt and, with guidance, the same one with the negative prompt.
    plan: what each step does.
    count: how many rows there are.

  Returns:
    A multiple of the shards of rows. Batches of this size are equally full, up to one row.
  """
  shards = row_shards(pipeline.mesh)
  most = max(1, MAX_TOKENS // rows[0].tokens.shape[1]) * shards
  size = spread(count, most, shards)
  free = free_memory(pipeline.mesh.devices.flat[0])
  while free is not None and size > shards and step_memory(pipeline, rows, plan, size) > MEMORY_SHARE * free:
    size = spread(count, max(shards, size // 2), shards)
  return size


def spread(count: int, most: int, shards: int) -> int:
  """Returns the size of equal batches, each at most `most` and a multiple of `shards`."""
  batches = ceil_div(count, max(most // shards * shards, shards))
  return ceil_div(count, batches * shards) * shards


def step_memory(pipeline: "Pipeline", rows: Sequence[PackedRow], plan: SamplingPlan, size: int) -> int:
  """Returns the bytes on each device that a step needs besides the weights, by the compiler's figures."""
  mesh, experts = pipeline.mesh, pipeline.experts
  graph, params = experts.transformers[0].graph, experts.load(0)
  batch = jax.tree.map(lambda x: np.repeat(x, size, axis=0), rows)
  with jax.set_mesh(mesh):
    placed = shard_batch(batch, mesh)
    branches = [jax.eval_shape(lambda params, row: pipeline.sampler.prepare(graph, params, row), params, row)
                for row in placed]  # fmt: skip
    noise = jax.ShapeDtypeStruct(placed[0].tokens.shape, jnp.float32, sharding=placed[0].tokens.sharding)
    state = jax.eval_shape(plan.solver.init, noise)
    weights = jax.ShapeDtypeStruct(plan.solver.coefficients(plan.sigmas).shape[1:], jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    step: Any = pipeline.sampler.step(plan.solver)
    pair = (branches[0], branches[1] if len(branches) > 1 else None)
    memory = step.lower(graph, params, pair, state, scalar, weights, scalar).compile().memory_analysis()
  return memory.temp_size_in_bytes + max(0, memory.argument_size_in_bytes - bytes_per_device(params))


def free_memory(device: Any) -> int | None:
  """Returns the bytes that a device has left; of CPU devices their share of the machine's. None if unknown."""
  if device.platform == "cpu":
    available = available_memory()
    return None if available is None else available // jax.local_device_count("cpu")
  stats = device.memory_stats() or {}
  return stats["bytes_limit"] - stats["bytes_in_use"] if {"bytes_limit", "bytes_in_use"} <= stats.keys() else None
