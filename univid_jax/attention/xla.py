"""Attention in plain XLA, in chunks of queries, so that memory grows with the tokens and not with their square."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Below this many logits a head and row, one piece is faster than several; above, 1,024 queries a chunk were the best of
# 256 to 4,096 for forward and gradient together on a CPU.
MAX_LOGITS_UNCHUNKED = 1 << 21
QUERIES_PER_CHUNK = 1024


def xla_attention(q: Float[Array, "b l h k"], k: Float[Array, "b n h k"], v: Float[Array, "b n h k"], *,
                  key_intervals: Int[Array, "b l 2"] | None = None,
                  key_bias: Float[Array, "b n"] | None = None) -> Float[Array, "b l h k"]:
  """See `api.attention`."""
  num_queries, num_keys = q.shape[1], k.shape[1]
  if num_queries * num_keys <= MAX_LOGITS_UNCHUNKED:
    return _attend(q, k, v, key_intervals, key_bias)

  num_chunks = -(-num_queries // QUERIES_PER_CHUNK)
  padding = num_chunks * QUERIES_PER_CHUNK - num_queries

  def split(x):
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, QUERIES_PER_CHUNK, *x.shape[2:]), 1, 0)

  def body(chunk):
    chunk_q, chunk_intervals = chunk
    return _attend(chunk_q, k, v, chunk_intervals, key_bias)

  out = jax.lax.map(jax.checkpoint(body), (split(q), None if key_intervals is None else split(key_intervals)))
  return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :num_queries]


def _attend(q, k, v, key_intervals, key_bias):
  # Heads before tokens: on a CPU a third faster than leaving the order to the compiler.
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
  logits = jnp.einsum("bhlk,bhnk->bhln", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
  if key_bias is not None:
    logits = logits + key_bias[:, None, None, :].astype(jnp.float32)
  if key_intervals is not None:
    keys = jnp.arange(k.shape[2])
    start, end = key_intervals[..., 0, None], key_intervals[..., 1, None]
    logits = jnp.where(((keys >= start) & (keys < end))[:, None], logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum("bhln,bhnk->bhlk", weights, v).transpose(0, 2, 1, 3)
