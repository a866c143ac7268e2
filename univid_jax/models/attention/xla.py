"""Attention in plain XLA, block by block, so that memory grows linearly with the number of tokens.

The blocks and the running sums are those of FlashAttention (Dao et al. 2022).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from univid_jax.models.attention.intervals import all_keys, pad_tokens, to_mask
from univid_jax.models.attention.pieces import Piece, Ring, attend
from univid_jax.platform.current import Platform


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How much is computed at a time; 0 is all.

  Attributes:
    heads: per row; 0 is as many as `LARGEST` allows for the logits of a block.
    queries: per head.
    keys: per query. Blocks of keys that no query of the block attends to are skipped, unless all keys are one block.
    smallest: number of logits per head and row up to which one piece is faster than blocks.
  """

  heads: int
  queries: int
  keys: int
  smallest: int


# On a CPU the logits of one head (2 MB) stay in the cache from one product to the next, which takes half the time of
# all heads at once. Fewer queries than keys waste less where packed sentences meet. Short rows have short sentences:
# for a row of three with 256 tokens each, small blocks take a quarter of the time.
# Accelerators need large products, and their loops of data-dependent length wait for the host.
CPU_BLOCKS = Blocks(heads=1, queries=512, keys=1024, smallest=1 << 17)
CPU_SHORT_ROW, CPU_SHORT_BLOCKS = 2048, Blocks(heads=1, queries=256, keys=256, smallest=1 << 17)
OTHER_BLOCKS = Blocks(heads=0, queries=1024, keys=0, smallest=1 << 21)
# Maximum logits computed at a time, 2 GiB: all 12 heads of the 1.3B for 1,024 queries and up to 43,690 keys, or 4 heads
# for the 131,040 keys of four clips of 81 frames at 480p.
LARGEST = 1 << 29

Sums = TypeVar("Sums")

LOWEST = jnp.finfo(jnp.float32).min / 2  # the maximum over no logits; finite after a subtraction


def xla_attention(
  q: Float[Array, "b l h k"],
  k: Float[Array, "b n h k"],
  v: Float[Array, "b n h k"],
  *,
  key_intervals: Int[Array | np.ndarray, "b l 2"] | None = None,
  key_bias: Float[Array, "b n"] | None = None,
  ring: Ring | None = None,
  platform: Platform = Platform.CPU,
) -> Float[Array, "b l h k"]:
  """Computes `api.attention`; no gradient flows to the bias.

  Args:
    q, k, v, key_intervals, key_bias: see `api.attention`.
    ring: the devices that hold the other keys.
    platform: selects the blocks.
  """
  (rows, num_queries, num_heads, head_dim), num_keys = q.shape, k.shape[1]
  blocks = choose_blocks(platform, max(num_queries, num_keys))
  if key_bias is not None:
    key_bias = jax.lax.stop_gradient(key_bias)
  if num_queries * num_keys <= blocks.smallest and ring is None:
    return _attend_at_once(q, k, v, key_intervals, key_bias)
  if key_intervals is None:
    key_intervals = all_keys(rows, num_queries, num_keys * (ring.size if ring else 1))

  query_block, key_block = min(blocks.queries, num_queries), min(blocks.keys or num_keys, num_keys)
  together = blocks.heads or max(LARGEST // (query_block * key_block), 1)
  num_groups = next(n for n in range(1, num_heads + 1) if num_heads % n == 0 and num_heads // n <= together)

  def group_heads(x, block):  # b l (groups h) k -> b groups h l k
    x = pad_tokens(x, block)
    return x.reshape(*x.shape[:2], num_groups, -1, head_dim).transpose(0, 2, 3, 1, 4)

  out = attend(
    XlaPieces(query_block, key_block),
    ring,
    group_heads(q, query_block),
    group_heads(k, key_block),
    group_heads(v, key_block),
    pad_tokens(key_intervals, query_block),
    pad_tokens(key_bias, key_block),
  )
  return out.transpose(0, 3, 1, 2, 4).reshape(rows, -1, num_heads, head_dim)[:, :num_queries]


def choose_blocks(platform: Platform, num_tokens: int) -> Blocks:
  """Returns the blocks for a row with this many queries or keys, whichever is more."""
  if platform != Platform.CPU:
    return OTHER_BLOCKS
  return CPU_SHORT_BLOCKS if num_tokens <= CPU_SHORT_ROW else CPU_BLOCKS


def _attend_at_once(
  q: Float[Array, "b l h k"],
  k: Float[Array, "b n h k"],
  v: Float[Array, "b n h k"],
  key_intervals: Int[Array | np.ndarray, "b l 2"] | None,
  key_bias: Float[Array, "b n"] | None,
) -> Float[Array, "b l h k"]:
  """Computes attention in one piece, without blocks."""
  # Heads before tokens: on a CPU a third faster than leaving the order to the compiler.
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
  logits = jnp.einsum("bhlk,bhnk->bhln", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
  if key_bias is not None:
    logits = logits + key_bias[:, None, None, :].astype(jnp.float32)
  if key_intervals is not None:
    logits = jnp.where(to_mask(key_intervals, k.shape[2]), logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum("bhln,bhnk->bhlk", weights, v).transpose(0, 2, 1, 3)


@dataclasses.dataclass(frozen=True)
class XlaPieces:
  """Blockwise attention as `pieces.attend` needs it, by row and group of heads; attributes are tokens per block."""

  queries: int
  keys: int

  def output(
    self, q: Array, k: Array, v: Array, intervals: Int[Array, "b l 2"], bias: Float[Array, "b n"] | None
  ) -> Array:
    return self.forward(q, k, v, intervals, bias)[0]

  def forward(
    self,
    q: Float[Array, "b groups h l k"],
    k: Float[Array, "b groups h n k"],
    v: Float[Array, "b groups h n k"],
    intervals: Int[Array, "b l 2"],
    bias: Float[Array, "b n"] | None,
  ) -> Piece:
    return self._map(_attend_row, (q, k, v), intervals, bias)

  def backward(
    self,
    q: Float[Array, "b groups h l k"],
    k: Float[Array, "b groups h n k"],
    v: Float[Array, "b groups h n k"],
    intervals: Int[Array, "b l 2"],
    bias: Float[Array, "b n"] | None,
    merged: Piece,
    d_out: Float[Array, "b groups h l k"],
  ) -> tuple[Float[Array, "b groups h l k"], Float[Array, "b groups h n k"], Float[Array, "b groups h n k"]]:
    return self._map(_row_gradients, (q, k, v, *merged, d_out), intervals, bias)

  def _map(self, function, heads, intervals: Int[Array, "b l 2"], bias: Float[Array, "b n"] | None):
    """Applies a function to each group of heads of each row."""

    def apply_to_row(row):
      groups, intervals, bias = row
      return jax.lax.map(lambda group: function(*group, intervals, bias, self), groups)

    return jax.lax.map(apply_to_row, (heads, intervals, bias))


def _attend_row(
  q: Float[Array, "h l k"],
  k: Float[Array, "h n k"],
  v: Float[Array, "h n k"],
  intervals: Int[Array, "l 2"],
  bias: Float[Array, "n"] | None,
  blocks: XlaPieces,
) -> Piece:
  """Attends for some heads of one row; l and n are multiples of their blocks. A query without keys gets 0."""

  def attend_queries(parts):
    q, intervals = parts

    def add_keys(index, sums):
      out, total, highest = sums
      k_block, v_block = _block(k, index, blocks.keys), _block(v, index, blocks.keys)
      logits = _logits("hlk,hnk->hln", q, k_block, index, intervals[:, :1], intervals[:, 1:], bias)
      new_highest = jnp.maximum(highest, jnp.max(logits, axis=-1, keepdims=True))
      weights, rescale = jnp.exp(logits - new_highest), jnp.exp(highest - new_highest)
      out = out * rescale + jnp.einsum(
        "hln,hnk->hlk", weights.astype(v.dtype), v_block, preferred_element_type=jnp.float32
      )
      return out, total * rescale + jnp.sum(weights, axis=-1, keepdims=True), new_highest

    start = jnp.zeros(q.shape, jnp.float32), jnp.zeros((*q.shape[:2], 1)), jnp.full((*q.shape[:2], 1), LOWEST)
    out, total, highest = _over_blocks(add_keys, start, intervals, k.shape[1], blocks.keys)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return (out / total).astype(v.dtype), highest + jnp.log(total)

  parts = _split(q, blocks.queries), intervals.reshape(-1, blocks.queries, 2)
  out, lse = jax.lax.map(attend_queries, parts)
  return _join(out), _join(lse)


def _row_gradients(
  q: Float[Array, "h l k"],
  k: Float[Array, "h n k"],
  v: Float[Array, "h n k"],
  out: Float[Array, "h l k"],
  lse: Float[Array, "h l 1"],
  d_out: Float[Array, "h l k"],
  intervals: Int[Array, "l 2"],
  bias: Float[Array, "n"] | None,
  blocks: XlaPieces,
) -> tuple[Float[Array, "h l k"], Float[Array, "h n k"], Float[Array, "h n k"]]:
  """Returns the gradients of q, k and v, given the output and log-sum-exps over these and any other keys."""
  inner = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)

  def add_queries(sums, parts):
    q, d_out, lse, inner, intervals = parts
    start, end = intervals[None, :, 0], intervals[None, :, 1]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def add_keys(index, sums):
      dk, dv, dq = sums
      k_block, v_block = _block(k, index, blocks.keys), _block(v, index, blocks.keys)
      # Keys before queries, so that two of the three products that follow need no transposition.
      logits = _logits("hlk,hnk->hnl", q, k_block, index, start, end, bias)
      weights = jnp.exp(logits - lse.transpose(0, 2, 1))
      d_logits = weights * (product("hnk,hlk->hnl", v_block, d_out) - inner.transpose(0, 2, 1))
      d_logits = (d_logits * q.shape[-1] ** -0.5).astype(q.dtype)
      dv = _add_block(dv, product("hnl,hlk->hnk", weights.astype(v.dtype), d_out), index)
      dk = _add_block(dk, product("hnl,hlk->hnk", d_logits, q), index)
      return dk, dv, dq + product("hnl,hnk->hlk", d_logits, k_block)

    dk, dv, dq = _over_blocks(add_keys, (*sums, jnp.zeros(q.shape, jnp.float32)), intervals, k.shape[1], blocks.keys)
    return (dk, dv), dq.astype(q.dtype)

  parts = *(_split(x, blocks.queries) for x in (q, d_out, lse, inner)), intervals.reshape(-1, blocks.queries, 2)
  zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  (dk, dv), dq = jax.lax.scan(add_queries, zeros, parts)
  return _join(dq), dk.astype(k.dtype), dv.astype(v.dtype)


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
