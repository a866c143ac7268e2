"""Attention: one function, one kind of mask, several backends."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from univid_jax.attention.xla import xla_attention

BACKENDS = {"xla": xla_attention}


def attention(q: Float[Array, "b l h k"], k: Float[Array, "b n h k"], v: Float[Array, "b n h k"], *,
              key_intervals: Int[Array, "b l 2"] | None = None, key_bias: Float[Array, "b n"] | None = None,
              backend: str = "xla") -> Float[Array, "b l h k"]:
  """Softmax attention, scaled by head_dim^-1/2; softmax in float32, output in v's dtype.

  Args:
    q: queries.
    k: keys.
    v: values.
    key_intervals: the keys [start, end) that each query sees; None shows all. A query whose interval is empty (padding)
      gets some finite value that no real token ever sees.
    key_bias: added to the logits of a key for all queries; log(c) makes one key count as c equal ones.
    backend: a name of BACKENDS.

  Raises:
    ValueError: the backend is unknown.
  """
  if backend not in BACKENDS:
    raise ValueError(f"unknown attention backend {backend!r}; there are {', '.join(sorted(BACKENDS))}")
  return BACKENDS[backend](q, k, v, key_intervals=key_intervals, key_bias=key_bias)


def count_bias(counts: Float[Array, "b n"]) -> Float[Array, "b n"]:
  """The key bias that makes a key count `counts` times; keys that count 0 times are hidden."""
  return jnp.where(counts > 0, jnp.log(jnp.maximum(counts, 1e-30)), -1e30)
