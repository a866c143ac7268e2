"""The parts of Wan's diffusion transformer: attention, feed-forward, blocks, embeddings and the output head.

Ported from Wan2.1 and Wan2.2 (Apache-2.0). Attributes are named like the original's modules, so that weights and LoRA
files map one to one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from univid_jax.core.options import AttentionBackend
from univid_jax.core.packed_row import PackedRow, put_tokens, take_tokens
from univid_jax.models.attention.api import attention, count_bias
from univid_jax.models.layers import LayerNorm, Linear, RMSNorm, gelu_tanh, normalize, param
from univid_jax.models.rope import RotaryTables, rotate
from univid_jax.models.variants import DiTConfig
from univid_jax.platform import tpu
from univid_jax.platform.current import Platform, current_platform

KeysAndValues = tuple[Float[Array, "*layers b keys h k"], Float[Array, "*layers b keys h k"]]


@no_type_check  # of fields at run time: leaves of a pytree can be anything
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueCache:
  """Keys and values of a context-causal row's context, computed once for all sampling steps.

  Attributes:
    keys_and_values: those of all tokens of the row, in every layer (n_layers, b, l, h, k) or in one.
    targets: indices of the target tokens in the row, padded with l.
  """

  keys_and_values: KeysAndValues
  targets: Int[Array, "b q"]

  def append(self, keys: Float[Array, "b q h k"], values: Float[Array, "b q h k"]) -> KeysAndValues:
    """Returns the keys and values of the whole row, with the given ones for its targets."""
    cached_keys, cached_values = self.keys_and_values
    return put_tokens(keys, self.targets, into=cached_keys), put_tokens(values, self.targets, into=cached_values)


@jax.named_scope("modulation")
def spread_slots(table: Float[Array, "b m d"], row: PackedRow) -> Float[Array, "b l d"]:
  """Gives each token its entry of a table by modulation slot; a table with one entry is left to broadcasting (l = 1).

  A product with one-hot vectors is exact at the highest precision and, unlike a gather, has no scatter as its gradient.
  """
  if row.modulation_ids is None:
    return table
  one_hot = jax.nn.one_hot(row.modulation_ids, table.shape[1], dtype=table.dtype)
  return jnp.einsum("blm,bmd->bld", one_hot, table, precision=jax.lax.Precision.HIGHEST)


def project_to_heads(
  linear: Linear, x: Float[Array, "b l d"], num_heads: int, norm: RMSNorm | None = None
) -> Float[Array, "b l h k"]:
  """Applies a Linear, splits its output into heads, and applies a norm over the channels of all heads."""
  y = linear.to_heads(x, num_heads)
  if linear.lora is not None and current_platform() == Platform.TPU:
    y = tpu.materialize(y)
  return y if norm is None else norm(y, num_dims=2)


class SelfAttention(nnx.Module):
  """Attention among the tokens of a sentence, with normalised queries and keys and rotary positions."""

  def __init__(self, config: DiTConfig, *, backend: AttentionBackend, dtype, param_dtype, rngs: nnx.Rngs):
    self.num_heads, self.backend = config.num_heads, backend
    linear = functools.partial(Linear, config.dim, config.dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    norm = functools.partial(RMSNorm, config.dim, dims=("heads",), eps=config.eps, param_dtype=param_dtype, rngs=rngs)
    self.q, self.k, self.v = (linear(dims=("embed", "heads")) for _ in range(3))
    self.o = linear(dims=("heads", "embed"))
    self.norm_q, self.norm_k = norm(), norm()

  @jax.named_scope("self_attention")
  def __call__(
    self,
    x: Float[Array, "b l d"],
    row: PackedRow,
    rope: RotaryTables,
    *,
    cache: KeyValueCache | None = None,
    queries: PackedRow | None = None,
  ) -> tuple[Float[Array, "b q d"], KeysAndValues]:
    """Returns the output and the keys and values; arguments as in `Block`."""
    k = rotate(project_to_heads(self.k, x, self.num_heads, self.norm_k), *rope)
    v = project_to_heads(self.v, x, self.num_heads)
    if cache is not None:
      k, v = cache.append(k, v)
    if queries is not None:
      assert row.targets is not None
      x, cos, sin = (take_tokens(value, row.targets) for value in (x, *rope))
      row, rope = queries, (cos, sin)
    q = rotate(project_to_heads(self.q, x, self.num_heads, self.norm_q), *rope)
    y = attention(q, k, v, key_intervals=row.key_intervals, backend=self.backend)
    return self.o.from_heads(y), (k, v)


class CrossAttention(nnx.Module):
  """Attention from tokens to the prompt of their sentence and, in Wan2.1's I2V, to the features of its first frame."""

  def __init__(self, config: DiTConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    self.num_heads = config.num_heads
    linear = functools.partial(Linear, config.dim, config.dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    norm = functools.partial(RMSNorm, config.dim, dims=("heads",), eps=config.eps, param_dtype=param_dtype, rngs=rngs)
    self.q, self.k, self.v = (linear(dims=("embed", "heads")) for _ in range(3))
    self.o = linear(dims=("heads", "embed"))
    self.norm_q, self.norm_k = norm(), norm()
    if config.takes_image_features:
      self.k_img, self.v_img = (linear(dims=("embed", "heads")) for _ in range(2))
      self.norm_k_img = norm()

  @jax.named_scope("cross_attention")
  def __call__(
    self, x: Float[Array, "b l d"], row: PackedRow, text: Float[Array, "b n d"], image: Float[Array, "b i d"] | None
  ) -> Float[Array, "b l d"]:
    project = functools.partial(project_to_heads, num_heads=self.num_heads)
    q = project(self.q, x, norm=self.norm_q)
    y = attention(
      q,
      project(self.k, text, norm=self.norm_k),
      project(self.v, text),
      key_intervals=row.text_intervals,
      key_bias=count_bias(row.text_counts),
      backend=AttentionBackend.AUTO,
    )
    if image is not None:
      y = y + attention(
        q,
        project(self.k_img, image, norm=self.norm_k_img),
        project(self.v_img, image),
        key_intervals=row.image_intervals,
        backend=AttentionBackend.AUTO,
      )
    return self.o.from_heads(y)


class FeedForward(nnx.Module):
  """Linear, tanh GELU, Linear."""

  def __init__(self, config: DiTConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    linear = functools.partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.up = linear(config.dim, config.ffn_dim, dims=("embed", "mlp"))
    self.down = linear(config.ffn_dim, config.dim, dims=("mlp", "embed"))

  @jax.named_scope("feed_forward")
  def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    return self.down(gelu_tanh(self.up(x)))


class Block(nnx.Module):
  """Self-attention, cross-attention and feed-forward; the first and the last are modulated by the timestep."""

  def __init__(self, config: DiTConfig, *, backend: AttentionBackend, dtype, param_dtype, rngs: nnx.Rngs):
    self.eps = config.eps
    self.self_attn = SelfAttention(config, backend=backend, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.norm3 = LayerNorm(config.dim, eps=config.eps, param_dtype=param_dtype, rngs=rngs)
    self.cross_attn = CrossAttention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.ffn = FeedForward(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.modulation = param(
      rngs, jax.nn.initializers.normal(config.dim**-0.5), (6, config.dim), param_dtype, (None, "embed")
    )

  def __call__(
    self,
    x: Float[Array, "b l d"],
    row: PackedRow,
    rope: RotaryTables,
    time: Float[Array, "b m 6 d"],
    text: Float[Array, "b n d"],
    image: Float[Array, "b i d"] | None,
    *,
    cache: KeyValueCache | None = None,
    queries: PackedRow | None = None,
  ) -> tuple[Float[Array, "b q d"], KeysAndValues]:
    """Returns the next hidden states, and the keys and values of self-attention.

    Args:
      x: hidden states of the row's tokens.
      row: intervals and modulation slots.
      rope: from `rotary_tables`.
      time: modulation by slot.
      text: embedded prompts.
      image: embedded image features (I2V).
      cache: keys and values of the context, if `row` holds only the targets.
      queries: `row.target_queries()` to compute the next hidden states of the targets only; the other tokens then serve
        as keys and values.
    """
    table = self.modulation[...].astype(jnp.float32) + time
    shift, scale = (spread_slots(table[:, :, i], row) for i in range(2))
    y, keys_and_values = self.self_attn(modulate(x, shift, scale, self.eps), row, rope, cache=cache, queries=queries)
    if queries is not None:
      assert row.targets is not None
      x, row = take_tokens(x, row.targets), queries
    gate, mlp_shift, mlp_scale, mlp_gate = (spread_slots(table[:, :, i], row) for i in range(2, 6))
    x = add_gated(x, y, gate)
    x = x + self.cross_attn(self.norm3(x), row, text, image)
    y = self.ffn(modulate(x, mlp_shift, mlp_scale, self.eps))
    return add_gated(x, y, mlp_gate), keys_and_values


@jax.named_scope("modulation")
def modulate(
  x: Float[Array, "b l d"], shift: Float[Array, "b #l d"], scale: Float[Array, "b #l d"], eps: float
) -> Float[Array, "b l d"]:
  """Normalises x, scales and shifts it, in float32; returns x's dtype."""
  return (normalize(x, eps) * (1 + scale) + shift).astype(x.dtype)


@jax.named_scope("modulation")
def add_gated(
  x: Float[Array, "b l d"], y: Float[Array, "b l d"], gate: Float[Array, "b #l d"]
) -> Float[Array, "b l d"]:
  """Returns x + gate * y, computed in float32, in x's dtype."""
  return (x.astype(jnp.float32) + y.astype(jnp.float32) * gate).astype(x.dtype)


class MLP(nnx.Module):
  """Linear, activation, Linear: the embeddings of prompts and timesteps."""

  def __init__(
    self, in_dim: int, dim: int, activation: Callable[[Array], Array], *, dtype, param_dtype, rngs: nnx.Rngs
  ):
    self.activation = activation
    self.up = Linear(in_dim, dim, dims=(None, "embed"), dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.down = Linear(dim, dim, dims=("embed", None), dtype=dtype, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... d"]:
    return self.down(self.activation(self.up(x)))


class ImageEmbedding(nnx.Module):
  """Projects CLIP features to the transformer's width (I2V): norm, Linear, exact GELU, Linear, norm."""

  def __init__(self, config: DiTConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    linear = functools.partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.norm_in = LayerNorm(config.image_dim, eps=1e-5, param_dtype=param_dtype, rngs=rngs)
    self.up = linear(config.image_dim, config.image_dim, dims=(None, None))
    self.down = linear(config.image_dim, config.dim, dims=(None, "embed"))
    self.norm_out = LayerNorm(config.dim, eps=1e-5, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, features: Float[Array, "b i e"]) -> Float[Array, "b i d"]:
    return self.norm_out(self.down(jax.nn.gelu(self.up(self.norm_in(features)), approximate=False)))


class Head(nnx.Module):
  """Maps hidden states to velocities of patches, modulated by the timestep."""

  def __init__(self, config: DiTConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    self.eps = config.eps
    self.head = Linear(
      config.dim,
      config.patch_volume * config.out_dim,
      dims=("embed", None),
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    self.modulation = param(
      rngs, jax.nn.initializers.normal(config.dim**-0.5), (2, config.dim), param_dtype, (None, "embed")
    )

  def __call__(self, x: Float[Array, "b l d"], row: PackedRow, time: Float[Array, "b m d"]) -> Float[Array, "b l p"]:
    table = self.modulation[...].astype(jnp.float32) + time[:, :, None]
    return self.head(modulate(x, spread_slots(table[:, :, 0], row), spread_slots(table[:, :, 1], row), self.eps))
