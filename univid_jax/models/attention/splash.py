"""Attention on TPUs: JAX's splash attention kernel, told which blocks of keys each block of queries attends to.

The only module that uses `jax.experimental.pallas.ops.tpu.splash_attention`. Its public constructors need masks when a
program is traced, whereas packed rows carry theirs as data, so the kernel is built here from a `MaskInfo` of traced
arrays. Its gradient kernel is called directly, piece by piece, with the log-sum-exps over all keys as an argument.
tests/test_attention.py and test_attention_pieces.py fail if an upgrade changes what this relies on.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from univid_jax.core.numbers import ceil_div, round_up
from univid_jax.models.attention.intervals import all_keys, pad_tokens
from univid_jax.models.attention.pieces import Piece, Ring, attend, clip_intervals, merge

# Tokens per block. Large blocks keep the matrix unit busy; these, and those of the gradient, stay within the 16 MiB of
# vector memory that a v5e's compiler gives a kernel by default.
BLOCK_Q = 512
BLOCK_KV = 1024
BLOCK_KV_COMPUTE = 512
# Keys per block in the gradient, which one kernel computes in five products instead of the seven of two kernels. It
# returns a separate gradient of the queries for each block of keys: smaller blocks leave more of them to sum, larger
# ones compute more masked pairs at the ends of sentences. docs/benchmarks/tpu.md has figures.
GRADIENT_BLOCK_KV = 2048
# Maximum calls of that kernel per row. Calls of one block each leave the sum to XLA, which by the TPU compiler's
# figures takes a fifth of the time of the sum in the kernel's own function; compiling each call takes about 1.5 s.
MAX_GRADIENT_CALLS = 40
# Blocks are multiples of the lanes of a TPU's registers.
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
  """Computes `api.attention`; no gradient flows to the bias.

  Takes any number of tokens: queries and keys are padded to whole blocks, and the padding is masked.

  Args:
    q, k, v, key_intervals, key_bias: see `api.attention`.
    ring: the devices that hold the other keys.
    interpret: run the kernel in Pallas' interpreter, on any device, for tests.
  """
  num_queries, num_keys = q.shape[1], k.shape[1]
  blocks = TokenBlocks.of(num_queries, num_keys)

  if key_intervals is None:
    key_intervals = all_keys(q.shape[0], num_queries, num_keys * (ring.size if ring else 1))
  q = q * q.shape[-1] ** -0.5
  if key_bias is not None:
    q, k = append_bias(q, k, key_bias)
  q, k, v = (
    pad_tokens(x, block).transpose(0, 2, 1, 3) for x, block in ((q, blocks.queries), (k, blocks.keys), (v, blocks.keys))
  )
  out = attend(SplashPieces(blocks, interpret), ring, q, k, v, pad_tokens(key_intervals, blocks.queries), None)
  return out.transpose(0, 2, 1, 3)[:, :num_queries]


@dataclasses.dataclass(frozen=True)
class TokenBlocks:
  """Tokens per block."""

  queries: int
  keys: int

  @classmethod
  def of(cls, num_queries: int, num_keys: int) -> "TokenBlocks":
    return cls(min(BLOCK_Q, round_up(num_queries, LANES)), min(BLOCK_KV, round_up(num_keys, LANES)))


@dataclasses.dataclass(frozen=True)
class SplashPieces:
  """The kernel as `pieces.attend` needs it, for any number of whole blocks of queries and keys.

  Attributes:
    blocks: block sizes of the kernel.
    interpret: see `splash_attention`.
  """

  blocks: TokenBlocks
  interpret: bool

  def output(
    self,
    q: Float[Array, "b h l k"],
    k: Float[Array, "b h n k"],
    v: Float[Array, "b h n c"],
    intervals: Int[Array, "b l 2"],
    bias: Float[Array, "b n"] | None,  # None: it is in the channels of queries and keys
  ) -> Float[Array, "b h l c"]:
    num_keys = k.shape[2]
    if num_keys > MAX_KEYS:
      return self.forward(q, k, v, intervals, bias)[0]

    def attend_row(q: Array, k: Array, v: Array, intervals: Array) -> Array:
      return cast(Array, self._kernel(intervals, 0, num_keys, with_lse=False)(q, k, v))  # otherwise a tuple

    return jnp.stack([attend_row(*row) for row in zip(q, k, v, intervals)])

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
      pieces = []
      for first, size in split_keys(k.shape[1], self.blocks.keys):
        part = slice(first, first + size)
        out, (lse,) = self._kernel(intervals, first, size)(q, k[:, part], v[:, part])
        pieces.append((out, lse[..., None]))
      return functools.reduce(merge, pieces)

    out, lse = _stack(attend_row(row) for row in zip(q, k, v, intervals))
    return out, lse

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
    def gradients_of_piece(first: int, size: int, block: int, q, k, v, intervals, out, lse, d_out):
      part, kernel = slice(first, first + size), self._kernel(intervals, first, size, block=block)
      saved = (q, k[:, part], v[:, part], None, None, out, lse[..., 0], None, kernel.dkv_mask_info)
      return splash._splash_attention_bwd(**kernel.kwargs, res=saved, do=d_out)[3:6]

    def gradients_of_row(row):
      pieces = split_gradient_keys(k.shape[2], self.blocks.keys)
      dq, dk, dv = zip(*(gradients_of_piece(*piece, *row) for piece in pieces))
      dq = functools.reduce(jnp.add, [part.astype(jnp.float32) for part in dq])
      return dq, jnp.concatenate(dk, axis=1), jnp.concatenate(dv, axis=1)

    dq, dk, dv = _stack(gradients_of_row(row) for row in zip(q, k, v, intervals, *merged, d_out))
    return dq.astype(q.dtype), dk, dv

  def _kernel(
    self, intervals: Int[Array, "l 2"], first: int, size: int, *, block: int = 0, with_lse: bool = True
  ) -> splash.SplashAttentionKernel:
    """Builds the kernel for `size` keys from `first` on, in blocks of `block` keys if given."""
    blocks = TokenBlocks(self.blocks.queries, block or self.blocks.keys)
    intervals = clip_intervals(intervals, first, size)
    return _build_kernel(intervals, blocks, size, with_lse=with_lse, interpret=self.interpret)


def split_keys(num_keys: int, block: int) -> list[tuple[int, int]]:
  """Returns (first key, length) of as few pieces as possible, of whole blocks and about equal size."""
  num_blocks = num_keys // block
  num_pieces = ceil_div(num_blocks, MAX_KEYS // block)
  bounds = [block * (num_blocks * i // num_pieces) for i in range(num_pieces + 1)]
  return [(first, last - first) for first, last in itertools.pairwise(bounds)]


def split_gradient_keys(num_keys: int, block: int) -> Iterator[tuple[int, int, int]]:
  """Yields (first key, length, block) of pieces for the gradient: in its own large blocks, the rest in given ones."""
  first = 0
  for size_of_block in (GRADIENT_BLOCK_KV, block):
    num_blocks = (num_keys - first) // size_of_block
    per_call = max(ceil_div(num_blocks, MAX_GRADIENT_CALLS), 1)
    for done in range(0, num_blocks, per_call):
      size = min(per_call, num_blocks - done) * size_of_block
      yield first, size, size_of_block
      first += size


def _stack(rows):
  """Stacks the arrays of each row."""
  return tuple(jnp.stack(x) for x in zip(*rows))


def _build_kernel(
  intervals: Int[Array, "l 2"], blocks: TokenBlocks, num_keys: int, *, with_lse: bool = True, interpret: bool
) -> splash.SplashAttentionKernel:
  """Builds the kernel for the intervals of one row; it maps (h, l, k), (h, n, k), (h, n, k) to (h, l, k).

  Args:
    intervals: of the queries, within the keys.
    blocks: of the kernel.
    num_keys: a multiple of the key block.
    with_lse: whether it also returns its log-sum-exps (h, l), in a tuple of one item.
    interpret: see `splash_attention`.
  """
  compute = BLOCK_KV_COMPUTE if blocks.keys % BLOCK_KV_COMPUTE == 0 else LANES
  visible = visible_blocks(intervals, blocks.queries, blocks.keys, num_keys // blocks.keys)
  start, end = intervals[:, 0], intervals[:, 1]
  encoded = jnp.where(end > start, (start << INDEX_BITS) | (end - 1), NO_KEYS)
  # Queries without keys attend to the first block, so that their output is finite.
  attended = visible.at[:, 0].set(visible[:, 0] | ~visible.any(axis=1))
  over_keys, over_queries = (
    MaskInfo(
      data_next=_next_visible(blocks_to_read, axis)[None],
      mask_next=None,
      block_mask=jnp.where(blocks_to_read, NO_STORED_MASK, 0)[None],
      partial_mask_blocks=None,
      q_sequence=encoded,  # pyright: ignore[reportArgumentType]  # annotated as np.ndarray, but arrays are traced too
    )
    for blocks_to_read, axis in ((attended, 1), (visible, 0))
  )
  return splash.SplashAttentionKernel(
    over_keys,
    None,
    over_queries,
    block_sizes=splash.BlockSizes(
      block_q=blocks.queries,
      block_kv=blocks.keys,
      block_kv_compute=compute,
      block_q_dkv=blocks.queries,
      block_kv_dkv=blocks.keys,
      block_kv_dkv_compute=compute,
      use_fused_bwd_kernel=True,
    ),
    is_mqa=False,
    save_residuals=with_lse,
    mask_value=splash.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=None,  # `pieces.attend` names what it keeps
    mask_function=_is_visible,
    interpret=interpret,
  )


def append_bias(
  q: Float[Array, "b l h k"], k: Float[Array, "b n h k"], bias: Float[Array, "b n"]
) -> tuple[Float[Array, "b l h k+2"], Float[Array, "b n h k+2"]]:
  """Adds two channels to queries and keys so that logits include the key bias; the kernel itself takes no bias.

  In them queries are 1, and a key holds its bias rounded to bfloat16 and the rounding error.
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
  """Returns which key blocks each query block sees: those that overlap the span of its intervals."""
  start, end = (intervals[:, side].reshape(-1, block_q) for side in (0, 1))
  is_token = end > start
  low = jnp.min(jnp.where(is_token, start, block_kv * num_kv_blocks), axis=1)
  high = jnp.max(jnp.where(is_token, end, 0), axis=1)
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
