"""The UMT5 encoder for Wan2.1's prompts. Ported from Wan2.1 (Apache-2.0)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from univid_jax.models.layers import Linear, RMSNorm, gelu_tanh, param

MAX_DISTANCE = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class UMT5Config:
  """Shape of the encoder; the defaults are UMT5-XXL's."""

  vocab_size: int = 256384
  dim: int = 4096
  attention_dim: int = 4096
  ffn_dim: int = 10240
  num_heads: int = 64
  num_layers: int = 24
  num_buckets: int = 32
  eps: float = 1e-6


def relative_buckets(length: int, num_buckets: int) -> np.ndarray:
  """Returns the bucket of each (query, key) distance, (length, length).

  There is one bucket per distance up to num_buckets / 4, then a logarithmic scale up to MAX_DISTANCE; keys after the
  query have their own buckets.
  """
  distance = np.arange(length)[None] - np.arange(length)[:, None]
  half = num_buckets // 2
  exact = half // 2
  size = np.abs(distance)
  # In float32 like the original, so that distances on the edge of a bucket are rounded to the same side.
  ratio = np.log(np.maximum(size, 1).astype(np.float32) / exact) / np.float32(np.log(MAX_DISTANCE / exact))
  far = np.minimum(exact + (ratio * (half - exact)).astype(np.int64), half - 1)
  return half * (distance > 0) + np.where(size < exact, size, far)


class Block(nnx.Module):
  """Self-attention with a bias by relative position, then a gated feed-forward."""

  def __init__(self, config: UMT5Config, *, dtype, param_dtype, rngs: nnx.Rngs):
    linear = functools.partial(
      Linear,
      use_bias=False,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
      kernel_init=jax.nn.initializers.normal(0.02),
    )
    norm = functools.partial(RMSNorm, config.dim, eps=config.eps, param_dtype=param_dtype, rngs=rngs)
    self.num_heads = config.num_heads
    self.norm1, self.norm2 = norm(), norm()
    # T5 does not scale logits by head_dim^-1/2, so they are large: queries and keys are float32.
    self.q, self.k = (
      linear(config.dim, config.attention_dim, dims=("embed", "heads"), dtype=jnp.float32) for _ in range(2)
    )
    self.v = linear(config.dim, config.attention_dim, dims=("embed", "heads"))
    self.o = linear(config.attention_dim, config.dim, dims=("heads", "embed"))
    self.gate, self.fc1 = (linear(config.dim, config.ffn_dim, dims=("embed", "mlp")) for _ in range(2))
    self.fc2 = linear(config.ffn_dim, config.dim, dims=("mlp", "embed"))
    self.position = param(
      rngs, jax.nn.initializers.normal(0.02), (config.num_buckets, config.num_heads), param_dtype, (None, "heads")
    )

  def __call__(
    self, x: Float[Array, "b l d"], buckets: Int[Array, "l l"], mask: Bool[Array, "b l"]
  ) -> Float[Array, "b l d"]:
    y = self.norm1(x)
    q, k, v = (linear.to_heads(y, self.num_heads) for linear in (self.q, self.k, self.v))
    logits = jnp.einsum("blhk,bnhk->bhln", q, k, preferred_element_type=jnp.float32)
    logits = logits + jnp.moveaxis(self.position[...].astype(jnp.float32)[buckets], -1, 0)
    logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    x = x + self.o.from_heads(jnp.einsum("bhln,bnhk->blhk", weights, v))
    y = self.norm2(x)
    return x + self.fc2(self.fc1(y) * gelu_tanh(self.gate(y)))


class UMT5Encoder(nnx.Module):
  """Maps token ids to prompt embeddings.

  Args:
    config: the shape.
    dtype: of activations and matrix products; norms and softmax are float32.
    param_dtype: of the stored weights.
    rngs: provides the stream `params`.
  """

  def __init__(self, config: UMT5Config, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
    self.config, self.dtype = config, dtype
    self.token_embedding = param(
      rngs, jax.nn.initializers.normal(1.0), (config.vocab_size, config.dim), param_dtype, ("vocab", "embed")
    )
    block = functools.partial(Block, config, dtype=dtype, param_dtype=param_dtype)
    self.blocks = nnx.vmap(lambda rngs: block(rngs=rngs))(rngs.split(config.num_layers))
    self.norm = RMSNorm(config.dim, eps=config.eps, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Float[Array, "b l d"]:
    """Embeds prompts; the output at masked positions is undefined.

    Args:
      ids: tokens, padded.
      mask: True for tokens, False for padding.
    """
    buckets = jnp.asarray(relative_buckets(ids.shape[1], self.config.num_buckets))
    graph, layers = nnx.split(self.blocks)

    def apply_block(x, layer):
      return nnx.merge(graph, layer)(x, buckets, mask.astype(bool)), None

    # The residual stream is float32: it grows with depth, and bfloat16 would round away what later layers add.
    x, _ = jax.lax.scan(apply_block, self.token_embedding[...][ids].astype(jnp.float32), layers)
    return self.norm(x).astype(self.dtype)
