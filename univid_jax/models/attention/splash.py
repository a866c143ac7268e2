"""Attention on TPUs: JAX's splash attention kernel, told which blocks of keys each block of queries attends to.

The only module that uses `jax.experimental.pallas.ops.tpu.splash_attention`. Its public constructors need masks when a
program is traced, whereas packed rows carry theirs as data, so the kernel is built here from a `MaskInfo` of traced
arrays. Keys in pieces need its gradient with the normalizers over all pieces, which the function behind its gradient
takes. tests/test_attention.py fails if an upgrade changes what this relies on.
"""

import dataclasses
import functools
import itertools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from univid_jax.models.attention.pieces import OUTPUT_NAME, Piece, Ring, attend, clip_intervals, merge

# Tokens per block. Large blocks keep the matrix unit busy; with these a step, backward pass included, stays within the
# 16 MiB of vector memory that a v5e's compiler gives a kernel by default.
BLOCK_Q = 512
BLOCK_KV = 1024
BLOCK_KV_COMPUTE = 512
# Blocks are whole lanes of a TPU's registers.
LANES = 128
# The kernel gets an interval as one number, first and last key in 16 bits each; more keys are attended to in pieces.
INDEX_BITS = 16
MAX_KEYS = 1 << INDEX_BITS
NO_KEYS = 1 << INDEX_BITS  # from key 1 to key 0
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
  ring: Ring | None = None,
  interpret: bool = False,
) -> Float[Array, "b l h k"]:
  """See `api.attention`; no gradient flows to the bias.

  Takes any number of tokens: queries and keys are padded to whole blocks, and the padding is masked.

  Args:
    q, k, v, key_intervals, key_bias: see `api.attention`.
    ring: of devices that hold the other keys.
    interpret: run the kernel in Pallas' interpreter, on any device, to test it.
  """
  num_queries, num_keys = q.shape[1], k.shape[1]
  blocks = Blocks.of(num_queries, num_keys)
  length_q, length_kv = _round_up(num_queries, blocks.queries), _round_up(num_keys, blocks.keys)

  if key_intervals is None:
    all_keys = num_keys * (ring.size if ring else 1)
    key_intervals = jnp.broadcast_to(jnp.array([0, all_keys], jnp.int32), (q.shape[0], num_queries, 2))
  key_intervals = jnp.pad(key_intervals, ((0, 0), (0, length_q - num_queries), (0, 0)))
  q = q * q.shape[-1] ** -0.5
  if key_bias is not None:
    q, k = append_bias(q, k, key_bias)
  q, k, v = (
    jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
    for x, length in ((q, length_q), (k, length_kv), (v, length_kv))
  )
  if ring is None and length_kv <= MAX_KEYS:  # the kernel's own gradient

    def attend_row(q: Array, k: Array, v: Array, intervals: Array) -> Array:
      kernel = _build_kernel(intervals, blocks, length_kv, name=OUTPUT_NAME, interpret=interpret)
      return cast(Array, kernel(q, k, v))  # with save_residuals it would be a tuple

    out = jnp.stack([attend_row(*row) for row in zip(q, k, v, key_intervals)])
  else:
    out = attend(SplashPieces(blocks, MAX_KEYS, interpret), ring, q, k, v, key_intervals, None)
  return out.transpose(0, 2, 1, 3)[:, :num_queries]


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Tokens per block."""

  queries: int
  keys: int

  @classmethod
  def of(cls, num_queries: int, num_keys: int) -> "Blocks":
    return cls(min(BLOCK_Q, _round_up(num_queries, LANES)), min(BLOCK_KV, _round_up(num_keys, LANES)))


@dataclasses.dataclass(frozen=True)
class SplashPieces:
  """The kernel as `pieces.attend` needs it, for whole blocks of queries and keys, as many as there are.

  Attributes:
    blocks: of the kernel.
    max_keys: that it attends to at a time.
    interpret: see `splash_attention`.
  """

  blocks: Blocks
  max_keys: int
  interpret: bool

  def forward(
    self,
    q: Float[Array, "b h l k"],
    k: Float[Array, "b h n k"],
    v: Float[Array, "b h n c"],
    intervals: Int[Array, "b l 2"],
    bias: Float[Array, "b n"] | None,  # None: it is in the channels of queries and keys
  ) -> Piece:
    def attend_row(row) -> Piece:
      q, k, v, intervals = row
      pieces = [
        self._kernel(clip_intervals(intervals, first, size), size, save_residuals=True)(
          q, k[:, first : first + size], v[:, first : first + size]
        )
        for first, size in self._split(k.shape[1])
      ]
      return functools.reduce(merge, [(out, normalizers[..., None]) for out, (normalizers,) in pieces])

    out, normalizers = _stack(attend_row(row) for row in zip(q, k, v, intervals))
    return out, normalizers

  def backward(
    self,
    q: Float[Array, "b h l k"],
    k: Float[Array, "b h n k"],
    v: Float[Array, "b h n c"],
    intervals: Int[Array, "b l 2"],
    bias: Float[Array, "b n"] | None,  # None: it is in the channels of queries and keys
    merged: Piece,
    d_out: Float[Array, "b h l c"],
  ) -> tuple[Float[Array, "b h l k"], Float[Array, "b h n k"], Float[Array, "b h n c"]]:
    def gradients_of_piece(first: int, size: int, q, k, v, intervals, out, normalizers, d_out):
      kernel = self._kernel(clip_intervals(intervals, first, size), size)
      part = slice(first, first + size)
      saved = (q, k[:, part], v[:, part], None, None, out, normalizers[..., 0])
      saved = (*saved, kernel.dq_mask_info, kernel.dkv_mask_info)
      return splash._splash_attention_bwd(**kernel.kwargs, res=saved, do=d_out)[3:6]

    def gradients_of_row(row):
      parts = [gradients_of_piece(*piece, *row) for piece in self._split(k.shape[2])]
      dq, dk, dv = zip(*parts)
      dq = functools.reduce(jnp.add, [part.astype(jnp.float32) for part in dq])
      return dq, jnp.concatenate(dk, axis=1), jnp.concatenate(dv, axis=1)

    dq, dk, dv = _stack(gradients_of_row(row) for row in zip(q, k, v, intervals, *merged, d_out))
    return dq.astype(q.dtype), dk, dv

  def _kernel(self, intervals: Int[Array, "l 2"], num_keys: int, *, save_residuals: bool = False):
    return _build_kernel(intervals, self.blocks, num_keys, save_residuals=save_residuals, interpret=self.interpret)

  def _split(self, num_keys: int) -> list[tuple[int, int]]:
    """Returns first key and length of as few pieces as possible, of about equal size."""
    num_blocks = num_keys // self.blocks.keys
    num_pieces = -(-num_blocks // (self.max_keys // self.blocks.keys))
    bounds = [self.blocks.keys * (num_blocks * i // num_pieces) for i in range(num_pieces + 1)]
    return [(first, last - first) for first, last in itertools.pairwise(bounds)]


def _stack(rows):
  """Stacks the arrays of each row."""
  return tuple(jnp.stack(x) for x in zip(*rows))


def _build_kernel(
  intervals: Int[Array, "l 2"],
  blocks: Blocks,
  num_keys: int,
  *,
  name: str | None = None,
  save_residuals: bool = False,
  interpret: bool,
) -> splash.SplashAttentionKernel:
  """Builds the kernel for the intervals of one row; it maps (h, l, k), (h, n, k), (h, n, k) to (h, l, k).

  Args:
    intervals: of the queries, within the keys.
    blocks: of the kernel.
    num_keys: whole blocks.
    name: of what its gradient keeps, see `pieces.OUTPUT_NAME`.
    save_residuals: whether it also returns its normalizers; it then has no gradient.
    interpret: see `splash_attention`.
  """
  compute = BLOCK_KV_COMPUTE if blocks.keys % BLOCK_KV_COMPUTE == 0 else LANES
  visible = visible_blocks(intervals, blocks.queries, blocks.keys, num_keys // blocks.keys)
  start, end = intervals[:, 0], intervals[:, 1]
  encoded = jnp.where(end > start, (start << INDEX_BITS) | (end - 1), NO_KEYS)
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
      block_q=blocks.queries,
      block_kv=blocks.keys,
      block_kv_compute=compute,
      block_q_dkv=blocks.queries,
      block_kv_dkv=blocks.keys,
      block_kv_dkv_compute=compute,
      block_q_dq=blocks.queries,
      block_kv_dq=blocks.keys,
    ),
    is_mqa=False,
    save_residuals=save_residuals,
    mask_value=splash.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=name,
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
  low = jnp.min(jnp.where(is_token, start, block_kv * num_kv_blocks), axis=1)
  high = jnp.max(jnp.where(is_token, end, 0), axis=1)
  low, high = jnp.where(high > 0, low, 0), jnp.maximum(high, 1)
  first_key = jnp.arange(num_kv_blocks) * block_kv
  return (first_key < high[:, None]) & (first_key + block_kv > low[:, None])


def _next_visible(visible: Bool[Array, "query_blocks key_blocks"], axis: int) -> Int[Array, "query_blocks key_blocks"]:
  """Returns the block along an axis to prefetch at each step: the next visible one, or the last if none follows."""
  index = jax.lax.broadcasted_iota(jnp.int32, visible.shape, axis)
  following = jax.lax.cummin(jnp.where(visible, index, visible.shape[axis]), axis=axis, reverse=True)
  previous = jax.lax.cummax(jnp.where(visible, index, 0), axis=axis)
  return jnp.where(following < visible.shape[axis], following, previous)


def _is_visible(interval: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
  """Returns whether a key is in an encoded interval."""
  return (key >= jax.lax.shift_right_logical(interval, INDEX_BITS)) & (key <= (interval & ((1 << INDEX_BITS) - 1)))


def _round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple
