"""Attention: one function and one kind of mask, several backends, on one device or on a mesh."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from univid_jax.core.options import AttentionBackend
from univid_jax.models.attention import cudnn
from univid_jax.models.attention.cudnn import cudnn_attention
from univid_jax.models.attention.splash import splash_attention
from univid_jax.models.attention.xla import xla_attention
from univid_jax.parallel.mesh import SEQUENCE
from univid_jax.parallel.sharding import ROWS
from univid_jax.platform.current import Platform, current_platform

AttentionFn = Callable[..., Array]
BACKENDS: Mapping[AttentionBackend, AttentionFn] = {
  AttentionBackend.XLA: xla_attention,
  AttentionBackend.CUDNN: cudnn_attention,
  AttentionBackend.SPLASH: splash_attention,
}


def attention(
  q: Float[Array, "b l h k"],
  k: Float[Array, "b n h k"],
  v: Float[Array, "b n h k"],
  *,
  key_intervals: Int[Array | np.ndarray, "b l 2"] | None = None,
  key_bias: Float[Array, "b n"] | None = None,
  backend: AttentionBackend = AttentionBackend.XLA,
) -> Float[Array, "b l h k"]:
  """Softmax attention, scaled by head_dim^-1/2; softmax in float32, output in v's dtype.

  Under a mesh (`jax.set_mesh`) rows are sharded over data and fsdp, heads over tensor and queries over the sequence
  axis, each if it divides. If there are as many keys as queries (self-attention), keys are sharded likewise, and on the
  sequence axis either heads and tokens swap places (Ulysses, if the heads divide) or the keys are gathered.

  Args:
    q: queries.
    k: keys.
    v: values.
    key_intervals: [start, end) of the keys that each query attends to; None is all. The output of a query with an empty
      interval (padding) is finite but undefined.
    key_bias: added to the logits of a key for all queries; log(c) makes one key count as c equal ones.
    backend: the implementation; AUTO chooses the platform's fastest that supports the call.

  Raises:
    UserError: the backend does not support the call.
  """
  platform = current_platform()
  if backend == AttentionBackend.AUTO:
    backend = best_backend(platform, q.dtype, q.shape[-1], has_bias=key_bias is not None)
  run = BACKENDS[AttentionBackend(backend)]
  if backend == AttentionBackend.SPLASH:
    run = functools.partial(run, interpret=platform != Platform.TPU)
  elif backend == AttentionBackend.XLA:
    run = functools.partial(run, platform=platform)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size > 1:
    run = _shard(run, mesh, q.shape, num_keys=k.shape[1])
  return run(q, k, v, key_intervals=key_intervals, key_bias=key_bias)


def best_backend(platform: Platform, dtype, head_dim: int, *, has_bias: bool = False) -> AttentionBackend:
  """Returns the backend that AUTO chooses."""
  if platform == Platform.TPU:
    return AttentionBackend.SPLASH
  if platform == Platform.GPU and not has_bias and cudnn.supports(dtype, head_dim):
    return AttentionBackend.CUDNN
  return AttentionBackend.XLA


def count_bias(counts: Float[Array | np.ndarray, "b n"]) -> Float[Array, "b n"]:
  """Returns the key bias that makes a key count `counts` times; keys that count 0 times are hidden."""
  return jnp.where(counts > 0, jnp.log(jnp.maximum(counts, 1e-30)), -1e30)


def _shard(run: AttentionFn, mesh: AbstractMesh, q_shape: tuple[int, ...], *, num_keys: int) -> AttentionFn:
  """Wraps a backend to run on each device's shard of rows, heads and queries."""
  size = mesh.shape
  num_rows, num_queries, num_heads, _ = q_shape
  rows = ROWS if num_rows % int(np.prod([size[axis] for axis in ROWS])) == 0 else None
  heads = "tensor" if num_heads % size["tensor"] == 0 else None
  sequence = SEQUENCE if size[SEQUENCE] > 1 and num_queries % size[SEQUENCE] == 0 else None
  shards_keys = sequence is not None and num_keys == num_queries
  local_heads = num_heads // (size["tensor"] if heads else 1)
  swaps_heads = shards_keys and local_heads % size[SEQUENCE] == 0

  def run_local(q, k, v, key_intervals, key_bias):
    if swaps_heads:
      q, k, v = (jax.lax.all_to_all(x, SEQUENCE, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    elif shards_keys:
      k, v = (jax.lax.all_gather(x, SEQUENCE, axis=1, tiled=True) for x in (k, v))
    out = run(q, k, v, key_intervals=key_intervals, key_bias=key_bias)
    return jax.lax.all_to_all(out, SEQUENCE, split_axis=1, concat_axis=2, tiled=True) if swaps_heads else out

  q_spec = PartitionSpec(rows, sequence, heads)
  kv_spec = PartitionSpec(rows, sequence if shards_keys else None, heads)
  interval_spec = PartitionSpec(rows, None if swaps_heads else sequence)
  sharded = jax.shard_map(
    run_local,
    in_specs=(q_spec, kv_spec, kv_spec, interval_spec, PartitionSpec(rows)),
    out_specs=q_spec,
    check_vma=False,
  )
  return lambda q, k, v, *, key_intervals, key_bias: sharded(q, k, v, key_intervals, key_bias)
