"""Attention: one function and one kind of mask, several backends, on one device or on a mesh."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from univid_jax.core.options import AttentionBackend
from univid_jax.models.attention import cudnn
from univid_jax.models.attention.cudnn import cudnn_attention
from univid_jax.models.attention.sharded import AttentionFn, rows_per_device, shard_attention
from univid_jax.models.attention.splash import splash_attention
from univid_jax.models.attention.xla import xla_attention
from univid_jax.platform.current import Platform, current_platform

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

  Under a mesh (`jax.set_mesh`) rows are sharded over data and fsdp and heads over tensor, where they divide evenly, and
  queries over the sequence axis, padded to divide. If there are at least as many keys as queries (self-attention), keys
  are sharded likewise: on the sequence axis an all-to-all exchanges heads for tokens (Ulysses) within groups of as many
  devices as the heads divide over, and keys and values travel between the groups (ring attention), or are gathered for
  cuDNN.

  Args:
    q: queries.
    k: keys.
    v: values.
    key_intervals: [start, end) of the keys that each query attends to; None is all. The output of a query with an empty
      interval (padding) is finite but undefined.
    key_bias: added to a key's logits for all queries; log(c) makes one key count as c equal ones.
    backend: the implementation; AUTO chooses the platform's fastest that supports the call.

  Raises:
    UserError: the backend does not support the call.
  """
  platform = current_platform()
  if backend == AttentionBackend.AUTO:
    backend = best_backend(
      platform,
      q.dtype,
      q.shape[-1],
      has_bias=key_bias is not None,
      mask_size=0 if key_intervals is None else rows_per_device(len(q)) * q.shape[1] * k.shape[1],
    )
  run = BACKENDS[AttentionBackend(backend)]
  if backend == AttentionBackend.SPLASH:
    run = functools.partial(run, interpret=platform != Platform.TPU)
  elif backend == AttentionBackend.XLA:
    run = functools.partial(run, platform=platform)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size > 1 and AxisType.Manual not in mesh.axis_types:  # within `jax.shard_map` the arrays are already local
    run = shard_attention(run, mesh, takes_ring=backend != AttentionBackend.CUDNN)
  return run(q, k, v, key_intervals=key_intervals, key_bias=key_bias)


def best_backend(
  platform: Platform, dtype, head_dim: int, *, has_bias: bool = False, mask_size: int = 0
) -> AttentionBackend:
  """Returns the backend that AUTO chooses.

  Args:
    platform: the platform to run on.
    dtype: of queries and keys.
    head_dim: channels per head.
    has_bias: whether there is a key bias.
    mask_size: rows x queries x keys on a device if the queries have intervals, else 0.
  """
  if platform == Platform.TPU:
    return AttentionBackend.SPLASH
  fits = cudnn.supports(dtype, head_dim) and mask_size <= cudnn.MAX_MASK
  if platform == Platform.GPU and not has_bias and fits:
    return AttentionBackend.CUDNN
  return AttentionBackend.XLA


def count_bias(counts: Float[Array | np.ndarray, "b n"]) -> Float[Array, "b n"]:
  """Returns the key bias that makes a key count `counts` times; keys that count 0 times are hidden."""
  return jnp.where(counts > 0, jnp.log(jnp.maximum(counts, 1e-30)), -1e30)
