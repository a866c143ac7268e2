"""Attention in plain XLA, block by block, so that memory grows linearly with the number of tokens.

The blocks and the running sums are those of FlashAttention (Dao et al. 2022).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from univid_jax.platform.current import Platform


@dataclasses.dataclass(frozen=True)
class Blocks:
  """What is computed at a time; 0 is all.

  Attributes:
    heads: per row.
    queries: per head.
    keys: per query. Blocks of keys that no query of the block attends to are skipped, unless all keys are one block.
    smallest: number of logits per head and row up to which one piece is faster than blocks.
  """

  heads: int
  queries: int
  keys: int
  smallest: int


# On a CPU the logits of one head (2 MB) stay in the cache from one product to the next: half the time of all heads at
# once. Fewer queries than keys, so that less is wasted where packed sentences meet.
# Accelerators need large products, and their loops of data-dependent length wait for the host.
BLOCKS: Mapping[Platform, Blocks] = {Platform.CPU: Blocks(heads=1, queries=512, keys=1024, smallest=1 << 17)}
OTHER_BLOCKS = Blocks(heads=0, queries=1024, keys=0, smallest=1 << 21)

# Name of what the backward pass needs of the forward pass; a policy of `jax.checkpoint` that saves it avoids computing
# attention twice.
OUTPUT_NAME = "attention"

Sums = TypeVar("Sums")

LOWEST = jnp.finfo(jnp.float32).min / 2  # the maximum over no logits; finite after a subtraction


def xla_attention(
  q: Float[Array, "b l h k"],
  k: Float[Array, "b n h k"],
  v: Float[Array, "b n h k"],
  *,
  key_intervals: Int[Array | np.ndarray, "b l 2"] | None = None,
  key_bias: Float[Array, "b n"] | None = None,
  platform: Platform = Platform.CPU,
) -> Float[Array, "b l h k"]:
  """See `api.attention`; no gradient flows to the bias."""
  blocks = BLOCKS.get(platform, OTHER_BLOCKS)
  (rows, num_queries, num_heads, head_dim), num_keys = q.shape, k.shape[1]
  if key_bias is not None:
    key_bias = jax.lax.stop_gradient(key_bias)
  if num_queries * num_keys <= blocks.smallest:
    return _attend(q, k, v, key_intervals, key_bias)
  if key_intervals is None:
    key_intervals = jnp.broadcast_to(jnp.array([0, num_keys], jnp.int32), (rows, num_queries, 2))

  query_block, key_block = min(blocks.queries, num_queries), min(blocks.keys or num_keys, num_keys)
  num_groups = num_heads // blocks.heads if blocks.heads else 1

  def pad(x, block):
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))

  def group_heads(x, block):  # b l (groups h) k -> b groups h l k
    x = pad(x, block)
    return x.reshape(*x.shape[:2], num_groups, -1, head_dim).transpose(0, 2, 3, 1, 4)

  def attend_row(row):
    q, k, v, intervals, bias = row
    return jax.lax.map(lambda group: _blockwise(*group, intervals, bias, query_block, key_block), (q, k, v))

  out = jax.lax.map(
    attend_row,
    (
      group_heads(q, query_block),
      group_heads(k, key_block),
      group_heads(v, key_block),
      pad(key_intervals, query_block),
      None if key_bias is None else pad(key_bias, key_block),
    ),
  )
  return out.transpose(0, 3, 1, 2, 4).reshape(rows, -1, num_heads, head_dim)[:, :num_queries]


def _attend(
  q: Float[Array, "b l h k"],
  k: Float[Array, "b n h k"],
  v: Float[Array, "b n h k"],
  key_intervals: Int[Array | np.ndarray, "b l 2"] | None,
  key_bias: Float[Array, "b n"] | None,
) -> Float[Array, "b l h k"]:
  """Computes everything at once."""
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blockwise(
  q: Float[Array, "h l k"],
  k: Float[Array, "h n k"],
  v: Float[Array, "h n k"],
  intervals: Int[Array, "l 2"],
  bias: Float[Array, "n"] | None,
  query_block: int,
  key_block: int,
) -> Float[Array, "h l k"]:
  """Attends for some heads of one row; l and n are multiples of their blocks. A query without keys gets 0."""
  return _blockwise_forward(q, k, v, intervals, bias, query_block, key_block)[0]


def _blockwise_forward(q, k, v, intervals, bias, query_block: int, key_block: int):
  """Returns the output, and what `_blockwise_backward` needs."""

  def attend_queries(parts):
    q, intervals = parts

    def add_keys(index, sums):
      out, total, highest = sums
      k_block, v_block = _block(k, index, key_block), _block(v, index, key_block)
      logits = _logits("hlk,hnk->hln", q, k_block, index, intervals[:, :1], intervals[:, 1:], bias)
      new_highest = jnp.maximum(highest, jnp.max(logits, axis=-1, keepdims=True))
      weights, rescale = jnp.exp(logits - new_highest), jnp.exp(highest - new_highest)
      out = out * rescale + jnp.einsum(
        "hln,hnk->hlk", weights.astype(v.dtype), v_block, preferred_element_type=jnp.float32
      )
      return out, total * rescale + jnp.sum(weights, axis=-1, keepdims=True), new_highest

    start = jnp.zeros(q.shape, jnp.float32), jnp.zeros((*q.shape[:2], 1)), jnp.full((*q.shape[:2], 1), LOWEST)
    out, total, highest = _over_blocks(add_keys, start, intervals, k.shape[1], key_block)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return (out / total).astype(v.dtype), highest + jnp.log(total)

  out, normalizers = jax.lax.map(attend_queries, (_split(q, query_block), intervals.reshape(-1, query_block, 2)))
  out, normalizers = (checkpoint_name(_join(x), OUTPUT_NAME) for x in (out, normalizers))
  return out, (q, k, v, intervals, bias, out, normalizers)


def _blockwise_backward(query_block: int, key_block: int, saved, d_out):
  """Returns the gradients of all arguments but the sizes of blocks; none for intervals, zero for the bias."""
  q, k, v, intervals, bias, out, normalizers = saved
  inner = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)

  def add_queries(sums, parts):
    q, d_out, normalizers, inner, intervals = parts
    start, end = intervals[None, :, 0], intervals[None, :, 1]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def add_keys(index, sums):
      dk, dv, dq = sums
      k_block, v_block = _block(k, index, key_block), _block(v, index, key_block)
      # Keys before queries, so that two of the three products that follow need no transposition.
      logits = _logits("hlk,hnk->hnl", q, k_block, index, start, end, bias)
      weights = jnp.exp(logits - normalizers.transpose(0, 2, 1))
      d_logits = weights * (product("hnk,hlk->hnl", v_block, d_out) - inner.transpose(0, 2, 1))
      d_logits = (d_logits * q.shape[-1] ** -0.5).astype(q.dtype)
      dv = _add_block(dv, product("hnl,hlk->hnk", weights.astype(v.dtype), d_out), index)
      dk = _add_block(dk, product("hnl,hlk->hnk", d_logits, q), index)
      return dk, dv, dq + product("hnl,hnk->hlk", d_logits, k_block)

    dk, dv, dq = _over_blocks(add_keys, (*sums, jnp.zeros(q.shape, jnp.float32)), intervals, k.shape[1], key_block)
    return (dk, dv), dq.astype(q.dtype)

  parts = *(_split(x, query_block) for x in (q, d_out, normalizers, inner)), intervals.reshape(-1, query_block, 2)
  zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  (dk, dv), dq = jax.lax.scan(add_queries, zeros, parts)
  return _join(dq), dk.astype(k.dtype), dv.astype(v.dtype), None, None if bias is None else jnp.zeros_like(bias)


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _logits(product: str, q, k_block, index, start, end, bias):
  """Returns the logits of one block, (h, queries, keys) or (h, keys, queries), -inf for masked pairs.

  Args:
    product: the einsum of q and k_block that gives the order of the result.
    index: of the block of keys.
    start, end: of the queries' intervals: (queries, 1) for queries before keys, (1, queries) for keys before queries.
    bias: of all keys, or None.
  """
  size = k_block.shape[1]
  keys = index * size + jnp.arange(size).reshape((1, -1) if start.shape[1] == 1 else (-1, 1))
  logits = jnp.einsum(product, q * q.shape[-1] ** -0.5, k_block, preferred_element_type=jnp.float32)
  if bias is not None:
    logits = logits + jax.lax.dynamic_slice_in_dim(bias, index * size, size).reshape(keys.shape).astype(jnp.float32)
  return jnp.where((keys >= start) & (keys < end), logits, -jnp.inf)


def _over_blocks(
  body: Callable[[int | Array, Sums], Sums], sums: Sums, intervals: Int[Array, "l 2"], num_keys: int, key_block: int
) -> Sums:
  """Applies `body` to every block of keys that at least one of the queries attends to."""
  if num_keys == key_block:
    return body(0, sums)
  start, end = intervals[:, 0], intervals[:, 1]
  first = jnp.min(jnp.where(end > start, start, num_keys)) // key_block
  return jax.lax.fori_loop(first, -(-jnp.max(end) // key_block), body, sums)


def _block(x, index, size: int):
  return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def _add_block(x, block, index):
  size = block.shape[1]
  return jax.lax.dynamic_update_slice_in_dim(x, _block(x, index, size) + block, index * size, axis=1)


def _split(x: Float[Array, "h l k"], size: int) -> Float[Array, "blocks h size k"]:
  return jnp.moveaxis(x.reshape(x.shape[0], -1, size, x.shape[2]), 1, 0)


def _join(x: Float[Array, "blocks h size k"]) -> Float[Array, "h l k"]:
  return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, x.shape[3])
