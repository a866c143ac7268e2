"""Computations that XLA compiles to slow programs on TPUs, in forms that it compiles well.

Figures are the TPU compiler's, for a LoRA step of the 1.3B on one v5e chip, 37,504 tokens (docs/benchmarks/tpu.md).
Benchmark: `python -m benchmarks.scaling --presets=wan_1_3b --topologies=v5e:1x1 --contexts=1`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def swap_pairs(x: Float[Array, "b l h k"]) -> Float[Array, "b l h k"]:
  """Swaps channels 2i and 2i + 1 by a product with zeros and ones, exact in x's dtype.

  Channels are lanes of a TPU's registers, which only the matrix unit can permute; a reshape or gather copies x several
  times. Together with splash attention for the prompt it reduced the cycles from 9.46 to 7.78 billion.
  """
  exchange = np.eye(x.shape[-1], dtype=x.dtype)[np.arange(x.shape[-1]) ^ 1]
  return jnp.einsum("blhk,kn->blhn", x, exchange, precision=jax.lax.Precision.HIGHEST)


def materialize(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """Returns x behind a barrier, so that XLA computes the sum x once, in the layout of heads, for all its readers.

  Otherwise each reader of a Linear's output plus its adapter's (a norm reads it twice) computes the sum again: 7.18
  instead of 6.70 billion cycles (jax 0.10.2). Without an adapter it does not pay everywhere.
  """
  return jax.lax.optimization_barrier(x)


def repeat(x: Float[Array, "..."], times: Sequence[int]) -> Float[Array, "..."]:
  """Repeats values along each dim by a sum over windows of x spread out between zeros, exact in x's dtype.

  `jnp.repeat` goes through dims of size 2 next to the channels, which registers pad to 8: an upsampling of the
  autoencoder with its convolution (4 frames, 240 x 416 to 480 x 832, 192 to 96 channels) takes 60 instead of 46 million
  cycles, the repetition alone (2 frames, 88 x 160, 1024 channels, added to an array) 31 instead of 6.
  """
  padding = [(count - 1, count - 1) for count in times]
  zero = np.zeros((), x.dtype)  # a constant at trace time: JAX differentiates window sums only
  return jax.lax.reduce_window(x, zero, jax.lax.add, times, (1,) * x.ndim, padding, base_dilation=times)
