"""Attention on TPUs: JAX's Pallas kernel (splash attention), told which blocks of keys each block of queries sees."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from univid_jax.attention.xla import OUTPUT_NAME

# Tokens of a block. Large blocks keep the matrix unit busy; with these all of a step, backward too, stays within the 16 MiB of
# vector memory that a v5e's compiler gives a kernel by default.
BLOCK_Q = 512
BLOCK_KV = 1024
BLOCK_KV_COMPUTE = 512
# Blocks are whole lanes of a TPU's registers.
LANES = 128
# An interval is one number to the kernel: start and end in 16 bits each.
MAX_KEYS = 1 << 16


def splash_attention(q: Float[Array, "b l h k"], k: Float[Array, "b n h k"], v: Float[Array, "b n h k"], *,
                     key_intervals: Int[Array, "b l 2"] | None = None,
                     key_bias: Float[Array, "b n"] | None = None, interpret: bool = False) -> Float[Array, "b l h k"]:
  """See `api.attention`; no gradient flows to the bias.

  Any number of tokens: both sides are filled up to whole blocks, and the filling is hidden.

  Args:
    interpret: run the kernel step by step on any device, to test it.

  Raises:
    ValueError: there are too many keys.
  """
  # Not at the top: importing it takes a tenth of a second, of which other platforms have nothing.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

  num_queries, num_keys = q.shape[1], k.shape[1]
  if num_keys >= MAX_KEYS:
    raise ValueError(f"splash attention takes fewer than {MAX_KEYS:,} keys, got {num_keys:,}")
  block_q, block_kv = (min(block, _up(n, LANES)) for block, n in ((BLOCK_Q, num_queries), (BLOCK_KV, num_keys)))
  compute = BLOCK_KV_COMPUTE if block_kv % BLOCK_KV_COMPUTE == 0 else LANES
  blocks = splash.BlockSizes(block_q=block_q, block_kv=block_kv, block_kv_compute=compute, block_q_dkv=block_q,
                             block_kv_dkv=block_kv, block_kv_dkv_compute=compute, block_q_dq=block_q, block_kv_dq=block_kv)
  length_q, length_kv = _up(num_queries, block_q), _up(num_keys, block_kv)

  if key_intervals is None:
    key_intervals = jnp.broadcast_to(jnp.array([0, num_keys], jnp.int32), (q.shape[0], num_queries, 2))
  key_intervals = jnp.pad(key_intervals, ((0, 0), (0, length_q - num_queries), (0, 0)))
  q = q * q.shape[-1] ** -0.5
  if key_bias is not None:
    q, k = carrying_bias(q, k, key_bias)
  q, k, v = (jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
             for x, length in ((q, length_q), (k, length_kv), (v, length_kv)))

  def attend(q, k, v, intervals):
    runs = running_blocks(intervals, block_q, block_kv, length_kv // block_kv)
    encoded = (intervals[:, 0] << 16) | intervals[:, 1]
    over_keys, over_queries = (MaskInfo(data_next=_next_running(runs, axis)[None], mask_next=None,
                                        block_mask=jnp.where(runs, 2, 0)[None], partial_mask_blocks=None, q_sequence=encoded)
                               for axis in (1, 0))
    kernel = splash.SplashAttentionKernel(
        over_keys, over_keys, over_queries, block_sizes=blocks, is_mqa=False, save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None, residual_checkpoint_name=OUTPUT_NAME,
        mask_function=_within, interpret=interpret)
    return kernel(q, k, v)

  out = jnp.stack([attend(*row) for row in zip(q, k, v, key_intervals)])
  return out.transpose(0, 2, 1, 3)[:, :num_queries]


def carrying_bias(q: Float[Array, "b l h k"], k: Float[Array, "b n h k"], bias: Float[Array, "b n"]
                  ) -> tuple[Float[Array, "b l h k+2"], Float[Array, "b n h k+2"]]:
  """Queries and keys whose products have a key's bias in them, since the kernel itself knows none.

  Two more dims: a query is 1 there, and a key its bias as a bfloat16 and what that leaves out.
  """
  bias = jax.lax.stop_gradient(bias.astype(jnp.float32))
  high = jax.lax.reduce_precision(bias, exponent_bits=8, mantissa_bits=7)
  parts = jnp.stack([high, bias - high], axis=-1).astype(k.dtype)[:, :, None]
  return (jnp.concatenate([q, jnp.ones((*q.shape[:3], 2), q.dtype)], axis=-1),
          jnp.concatenate([k, jnp.broadcast_to(parts, (*k.shape[:3], 2))], axis=-1))


def running_blocks(intervals: Int[Array, "l 2"], block_q: int, block_kv: int, num_kv_blocks: int) -> Bool[Array, "i j"]:
  """Which blocks of keys a block of queries has to look at: those that touch the span of its intervals.

  A block of padding alone looks at the first, so that its values are finite.
  """
  start, end = (intervals[:, side].reshape(-1, block_q) for side in (0, 1))
  seen = end > start
  low = jnp.min(jnp.where(seen, start, MAX_KEYS), axis=1)
  high = jnp.max(jnp.where(seen, end, 0), axis=1)
  low, high = jnp.where(high > 0, low, 0), jnp.maximum(high, 1)
  first_key = jnp.arange(num_kv_blocks) * block_kv
  return (first_key < high[:, None]) & (first_key + block_kv > low[:, None])


def _next_running(runs: Bool[Array, "i j"], axis: int) -> Int[Array, "i j"]:
  """The block along an axis to fetch at each place: itself or the next one that runs; after the last, still the last."""
  index = jax.lax.broadcasted_iota(jnp.int32, runs.shape, axis)
  following = jax.lax.cummin(jnp.where(runs, index, MAX_KEYS), axis=axis, reverse=True)
  previous = jax.lax.cummax(jnp.where(runs, index, 0), axis=axis)
  return jnp.where(following < MAX_KEYS, following, previous)


def _within(interval: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
  """Whether a key lies in an encoded interval."""
  return (key >= jax.lax.shift_right_logical(interval, 16)) & (key < (interval & (MAX_KEYS - 1)))


def _up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple
