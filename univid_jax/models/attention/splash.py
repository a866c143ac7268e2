"""Attention on TPUs: JAX's splash attention kernel, told which blocks of keys each block of queries attends to.

The only module that uses `jax.experimental.pallas.ops.tpu.splash_attention`. Its public constructors need masks when a
program is traced, whereas packed rows carry theirs as data, so the kernel is built here from a `MaskInfo` of traced
arrays. tests/test_attention.py fails if an upgrade changes what this relies on.
"""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from univid_jax.core.errors import UserError
from univid_jax.models.attention.xla import OUTPUT_NAME

# Tokens per block. Large blocks keep the matrix unit busy; with these a step, backward pass included, stays within the
# 16 MiB of vector memory that a v5e's compiler gives a kernel by default.
BLOCK_Q = 512
BLOCK_KV = 1024
BLOCK_KV_COMPUTE = 512
# Blocks are whole lanes of a TPU's registers.
LANES = 128
# The kernel gets an interval as one number: start and end in 16 bits each.
MAX_KEYS = 1 << 16
# The kernel's code for a block without a stored mask (0 skips a block, 1 reads a stored mask). Whatever the code, it
# evaluates `mask_function` in every block that it does not skip.
NO_STORED_MASK = 2


def splash_attention(
  q: Float[Array, "b l h k"],
  k: Float[Array, "b n h k"],
  v: Float[Array, "b n h k"],
  *,
  key_intervals: Int[Array | np.ndarray, "b l 2"] | None = None,
  key_bias: Float[Array, "b n"] | None = None,
  interpret: bool = False,
) -> Float[Array, "b l h k"]:
  """See `api.attention`; no gradient flows to the bias.

  Takes any number of tokens: queries and keys are padded to whole blocks, and the padding is masked.

  Args:
    interpret: run the kernel in Pallas' interpreter, on any device, to test it.

  Raises:
    UserError: there are too many keys.
  """
  num_queries, num_keys = q.shape[1], k.shape[1]
  if num_keys >= MAX_KEYS:
    raise UserError(f"splash attention takes fewer than {MAX_KEYS:,} keys, got {num_keys:,}: use the backend xla")
  block_q = min(BLOCK_Q, _round_up(num_queries, LANES))
  block_kv = min(BLOCK_KV, _round_up(num_keys, LANES))
  length_q, length_kv = _round_up(num_queries, block_q), _round_up(num_keys, block_kv)

  if key_intervals is None:
    key_intervals = jnp.broadcast_to(jnp.array([0, num_keys], jnp.int32), (q.shape[0], num_queries, 2))
  key_intervals = jnp.pad(key_intervals, ((0, 0), (0, length_q - num_queries), (0, 0)))
  q = q * q.shape[-1] ** -0.5
  if key_bias is not None:
    q, k = append_bias(q, k, key_bias)
  q, k, v = (
    jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
    for x, length in ((q, length_q), (k, length_kv), (v, length_kv))
  )

  def attend(q: Array, k: Array, v: Array, intervals: Array) -> Array:
    kernel = _build_kernel(intervals, block_q, block_kv, length_kv // block_kv, interpret=interpret)
    return cast(Array, kernel(q, k, v))  # with save_residuals it would be a tuple

  out = jnp.stack([attend(*row) for row in zip(q, k, v, key_intervals)])
  return out.transpose(0, 2, 1, 3)[:, :num_queries]


def _build_kernel(
  intervals: Int[Array, "l 2"], block_q: int, block_kv: int, num_kv_blocks: int, *, interpret: bool
) -> splash.SplashAttentionKernel:
  """Builds the kernel for the intervals of one row; it maps (h, l, k), (h, n, k), (h, n, k) to (h, l, k)."""
  compute = BLOCK_KV_COMPUTE if block_kv % BLOCK_KV_COMPUTE == 0 else LANES
  visible = visible_blocks(intervals, block_q, block_kv, num_kv_blocks)
  encoded = (intervals[:, 0] << 16) | intervals[:, 1]
  over_keys, over_queries = (
    MaskInfo(
      data_next=_next_visible(visible, axis)[None],
      mask_next=None,
      block_mask=jnp.where(visible, NO_STORED_MASK, 0)[None],
      partial_mask_blocks=None,
      q_sequence=encoded,  # pyright: ignore[reportArgumentType]  # annotated as np.ndarray, but arrays are traced too
    )
    for axis in (1, 0)
  )
  return splash.SplashAttentionKernel(
    over_keys,
    over_keys,
    over_queries,
    block_sizes=splash.BlockSizes(
      block_q=block_q,
      block_kv=block_kv,
      block_kv_compute=compute,
      block_q_dkv=block_q,
      block_kv_dkv=block_kv,
      block_kv_dkv_compute=compute,
      block_q_dq=block_q,
      block_kv_dq=block_kv,
    ),
    is_mqa=False,
    save_residuals=False,
    mask_value=splash.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=OUTPUT_NAME,
    mask_function=_is_visible,
    interpret=interpret,
  )


def append_bias(
  q: Float[Array, "b l h k"], k: Float[Array, "b n h k"], bias: Float[Array, "b n"]
) -> tuple[Float[Array, "b l h k+2"], Float[Array, "b n h k+2"]]:
  """Adds two channels to queries and keys that add the bias of a key to its logits; the kernel itself has no bias.

  In them a query is 1, and a key is its bias rounded to bfloat16 and the rounding error.
  """
  bias = jax.lax.stop_gradient(bias.astype(jnp.float32))
  high = jax.lax.reduce_precision(bias, exponent_bits=8, mantissa_bits=7)
  parts = jnp.stack([high, bias - high], axis=-1).astype(k.dtype)[:, :, None]
  return (
    jnp.concatenate([q, jnp.ones((*q.shape[:3], 2), q.dtype)], axis=-1),
    jnp.concatenate([k, jnp.broadcast_to(parts, (*k.shape[:3], 2))], axis=-1),
  )


def visible_blocks(
  intervals: Int[Array, "l 2"], block_q: int, block_kv: int, num_kv_blocks: int
) -> Bool[Array, "query_blocks key_blocks"]:
  """Returns which blocks of keys each block of queries attends to: those that overlap the span of its intervals.

  A block that contains padding alone attends to the first, so that its output is finite.
  """
  start, end = (intervals[:, side].reshape(-1, block_q) for side in (0, 1))
  is_token = end > start
  low = jnp.min(jnp.where(is_token, start, MAX_KEYS), axis=1)
  high = jnp.max(jnp.where(is_token, end, 0), axis=1)
  low, high = jnp.where(high > 0, low, 0), jnp.maximum(high, 1)
  first_key = jnp.arange(num_kv_blocks) * block_kv
  return (first_key < high[:, None]) & (first_key + block_kv > low[:, None])


def _next_visible(visible: Bool[Array, "query_blocks key_blocks"], axis: int) -> Int[Array, "query_blocks key_blocks"]:
  """Returns the block along an axis to prefetch at each step: the next visible one, or the last if none follows."""
  index = jax.lax.broadcasted_iota(jnp.int32, visible.shape, axis)
  following = jax.lax.cummin(jnp.where(visible, index, MAX_KEYS), axis=axis, reverse=True)
  previous = jax.lax.cummax(jnp.where(visible, index, 0), axis=axis)
  return jnp.where(following < MAX_KEYS, following, previous)


def _is_visible(interval: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
  """Returns whether a key is in an encoded interval."""
  return (key >= jax.lax.shift_right_logical(interval, 16)) & (key < (interval & (MAX_KEYS - 1)))


def _round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple
