"""Attention on NVIDIA GPUs: cuDNN's fused kernel, as JAX ships it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# What the kernel takes.
DTYPES = (jnp.bfloat16, jnp.float16)
MAX_HEAD_DIM = 128


def serves(dtype, head_dim: int) -> bool:
  return dtype in DTYPES and head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0


def cudnn_attention(q: Float[Array, "b l h k"], k: Float[Array, "b n h k"], v: Float[Array, "b n h k"], *,
                    key_intervals: Int[Array, "b l 2"] | None = None,
                    key_bias: Float[Array, "b n"] | None = None) -> Float[Array, "b l h k"]:
  """See `api.attention`. The kernel knows no intervals: it gets them as a mask of b x l x n, which it cannot skip by.

  Raises:
    ValueError: the dtype or head_dim is none that it takes.
  """
  if not serves(q.dtype, q.shape[-1]):
    raise ValueError(f"cuDNN attention takes bfloat16 or float16 and heads of at most {MAX_HEAD_DIM}, a multiple of 8; got "
                     f"{q.dtype} and {q.shape[-1]}: use the backend xla")
  bias = None if key_bias is None else key_bias[:, None, None, :].astype(q.dtype)
  mask = None
  if key_intervals is not None:
    keys = jnp.arange(k.shape[1])
    start, end = key_intervals[..., 0, None], key_intervals[..., 1, None]
    mask = ((keys >= start) & (keys < end))[:, None]
  return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, implementation="cudnn")
