"""Attention on NVIDIA GPUs: cuDNN's fused kernel, through JAX."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from univid_jax.core.errors import UserError
from univid_jax.models.attention.intervals import to_mask

# Limits of the kernel.
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
MAX_HEAD_DIM = 128
# Mask entries per device above which AUTO falls back to plain XLA. In 16 bits these are 4 GiB: a row of 46,340 tokens.
# The 131,040 tokens of four clips of 81 frames at 480p would take 34 GB.
MAX_MASK = 1 << 31

# JAX's name of the kernel's primitive, by which a `jax.checkpoint` policy saves its outputs (the only ones that the
# backward pass needs). tests/test_attention.py fails if an upgrade changes it.
FORWARD_PRIMITIVE = "dot_product_attention_fwd_wrapper"


def supports(dtype: DTypeLike, head_dim: int) -> bool:
  return jnp.dtype(dtype) in DTYPES and head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0


def cudnn_attention(
  q: Float[Array, "b l h k"],
  k: Float[Array, "b n h k"],
  v: Float[Array, "b n h k"],
  *,
  key_intervals: Int[Array | np.ndarray, "b l 2"] | None = None,
  key_bias: Float[Array, "b n"] | None = None,
) -> Float[Array, "b l h k"]:
  """Computes `api.attention`. The kernel has no intervals: they become a mask of b x l x n, and no blocks are skipped.

  Rows of training and sampling always have intervals, if only because their lengths are rounded up; without them memory
  is linear in tokens. With them the backward pass also holds a bias and its gradient, as large as the mask. JAX's
  public interface has no other way to express packed sentences: it takes one length per row, counted from its start.
  Nor does it return the gradient for a part of the keys, so on a mesh the keys of a ring are gathered.

  Raises:
    UserError: the kernel does not support the dtype or head size.
  """
  if not supports(q.dtype, q.shape[-1]):
    raise UserError(
      f"cuDNN attention takes bfloat16 or float16 and a head size of at most {MAX_HEAD_DIM}, a multiple of 8; got "
      f"{q.dtype} and {q.shape[-1]}: use the backend xla"
    )
  bias = None if key_bias is None else key_bias[:, None, None, :].astype(q.dtype)
  mask = None if key_intervals is None else to_mask(key_intervals, k.shape[1])
  return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, implementation="cudnn")
