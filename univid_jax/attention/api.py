"""Attention: one function, one kind of mask, several backends, on one device or on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from univid_jax.attention import cudnn
from univid_jax.attention.cudnn import cudnn_attention
from univid_jax.attention.splash import splash_attention
from univid_jax.attention.xla import xla_attention
from univid_jax.parallel.sharding import ROWS

BACKENDS = {"xla": xla_attention, "cudnn": cudnn_attention, "splash": splash_attention}


def attention(q: Float[Array, "b l h k"], k: Float[Array, "b n h k"], v: Float[Array, "b n h k"], *,
              key_intervals: Int[Array, "b l 2"] | None = None, key_bias: Float[Array, "b n"] | None = None,
              backend: str = "xla") -> Float[Array, "b l h k"]:
  """Softmax attention, scaled by head_dim^-1/2; softmax in float32, output in v's dtype.

  Under a mesh (`jax.set_mesh`) rows spread over data and fsdp, heads over tensor and queries over context, each where it
  divides. Where the keys are as many as the queries (self-attention) they are spread likewise, and over context either heads
  change places with tokens (Ulysses, where they divide) or the keys are gathered.

  Args:
    q: queries.
    k: keys.
    v: values.
    key_intervals: the keys [start, end) that each query sees; None shows all. A query whose interval is empty (padding)
      gets some finite value that no real token ever sees.
    key_bias: added to the logits of a key for all queries; log(c) makes one key count as c equal ones.
    backend: a name of BACKENDS, or "auto" for the platform's fastest that can serve the call.

  Raises:
    ValueError: the backend is unknown or cannot serve the call.
  """
  mesh = jax.sharding.get_abstract_mesh()
  platform = mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()
  if backend == "auto":
    backend = best_backend(platform, q.dtype, q.shape[-1], has_bias=key_bias is not None)
  if backend not in BACKENDS:
    raise ValueError(f"unknown attention backend {backend!r}; there are auto, {', '.join(sorted(BACKENDS))}")
  run = BACKENDS[backend]
  if backend == "splash":
    run = functools.partial(run, interpret=platform != "tpu")
  elif backend == "xla":
    run = functools.partial(run, platform=platform)
  if mesh.size > 1:
    run = _on_mesh(run, mesh, q.shape, num_keys=k.shape[1])
  return run(q, k, v, key_intervals=key_intervals, key_bias=key_bias)


def best_backend(platform: str, dtype, head_dim: int, *, has_bias: bool = False) -> str:
  """What "auto" means."""
  if platform == "tpu":
    return "splash"
  if platform in ("gpu", "cuda") and not has_bias and cudnn.serves(dtype, head_dim):
    return "cudnn"
  return "xla"


def count_bias(counts: Float[Array, "b n"]) -> Float[Array, "b n"]:
  """The key bias that makes a key count `counts` times; keys that count 0 times are hidden."""
  return jnp.where(counts > 0, jnp.log(jnp.maximum(counts, 1e-30)), -1e30)


def _on_mesh(run, mesh: AbstractMesh, shape: tuple[int, ...], *, num_keys: int):
  """A backend on each device's share of rows, heads and queries."""
  size, num_rows = mesh.shape, shape[0]
  rows = ROWS if num_rows % int(np.prod([size[axis] for axis in ROWS])) == 0 else None
  heads = "tensor" if shape[2] % size["tensor"] == 0 else None
  queries = "context" if shape[1] % size["context"] == 0 and size["context"] > 1 else None
  local_heads = shape[2] // (size["tensor"] if heads else 1)
  shares_keys = queries and num_keys == shape[1]
  swaps = shares_keys and local_heads % size["context"] == 0

  def local(q, k, v, key_intervals, key_bias):
    if swaps:
      q, k, v = (jax.lax.all_to_all(x, "context", split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    elif shares_keys:
      k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
    out = run(q, k, v, key_intervals=key_intervals, key_bias=key_bias)
    return jax.lax.all_to_all(out, "context", split_axis=1, concat_axis=2, tiled=True) if swaps else out

  q_spec = PartitionSpec(rows, queries, heads)
  kv_spec = PartitionSpec(rows, queries if shares_keys else None, heads)
  sharded = jax.shard_map(local, out_specs=q_spec, check_vma=False, in_specs=(
      q_spec, kv_spec, kv_spec, PartitionSpec(rows, None if swaps else queries), PartitionSpec(rows)))
  return lambda q, k, v, *, key_intervals, key_bias: sharded(q, k, v, key_intervals, key_bias)
