"""Wan2.1's diffusion transformer over packed rows: patches of clean and noised latents in, velocity out.

Ported from Wan2.1 (Apache-2.0). Names follow the original's modules, so that weights and LoRA files map one to one.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from univid_jax.attention.api import attention, count_bias
from univid_jax.attention.xla import OUTPUT_NAME
from univid_jax.models.layers import LayerNorm, Linear, RMSNorm, gelu_tanh, normalize, param
from univid_jax.models.rope import rotary_tables, rotate
from univid_jax.types import PackedRow, put_tokens, take_tokens

REMAT_POLICIES = {
    "none": None,
    "attention": jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
  """Shape of a Wan2.1 transformer; the names and defaults are those of its config.json."""

  dim: int
  ffn_dim: int
  num_heads: int
  num_layers: int
  model_type: str = "t2v"
  in_dim: int = 16
  out_dim: int = 16
  freq_dim: int = 256
  text_dim: int = 4096
  text_len: int = 512
  patch_size: tuple[int, int, int] = (1, 2, 2)
  image_dim: int = 1280
  eps: float = 1e-6
  rope_theta: float = 10000.0
  rope_scale: float = 1.0

  def __post_init__(self):
    if self.model_type not in ("t2v", "i2v"):
      raise ValueError(f"model_type {self.model_type!r} is not supported: only t2v and i2v of Wan2.1 are")
    if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
      raise ValueError(f"dim {self.dim} does not split into {self.num_heads} heads of an even size")

  @property
  def head_dim(self) -> int:
    return self.dim // self.num_heads

  @property
  def patch_volume(self) -> int:
    return int(np.prod(self.patch_size))

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> "DiTConfig":
    """Reads the config.json of an official release (or this project's own).

    Raises:
      ValueError: the variant is one that this port does not do (FLF2V, VACE, Wan2.2, ...), named in the message.
    """
    class_name, model_type = values.get("_class_name", "WanModel"), values.get("model_type", "t2v")
    if class_name != "WanModel" or model_type not in ("t2v", "i2v"):
      raise ValueError(f"{class_name} with model_type {model_type!r} is not supported: only t2v and i2v of Wan2.1 are")
    in_dim, out_dim = values.get("in_dim", 16), values.get("out_dim", 16)
    expected = 2 * out_dim + 4 if model_type == "i2v" else out_dim
    if in_dim != expected:
      raise ValueError(f"a Wan2.1 {model_type} model with out_dim {out_dim} has in_dim {expected}, this one {in_dim}: "
                       "it is another variant (Wan2.2, Fun or the like), which is not supported")
    names = {field.name for field in dataclasses.fields(cls)}
    chosen = {name: value for name, value in values.items() if name in names}
    return cls(**{**chosen, "patch_size": tuple(values.get("patch_size", (1, 2, 2)))})


_T2V_14B = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
PRESETS: Mapping[str, DiTConfig] = {
    "wan2.1-t2v-1.3b": DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan2.1-t2v-14b": DiTConfig(**_T2V_14B),
    "wan2.1-i2v-14b-480p": DiTConfig(**_T2V_14B, model_type="i2v", in_dim=36),
    "wan2.1-i2v-14b-720p": DiTConfig(**_T2V_14B, model_type="i2v", in_dim=36),
}


def timestep_embedding(timesteps: Float[Array, "..."], dim: int) -> Float[Array, "... dim"]:
  """Cosines, then sines, of the timestep (0 to 1000) at dim / 2 frequencies from 1 down to 1 / 10000; float32."""
  frequencies = jnp.asarray(10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim // 2)), jnp.float32)
  angles = timesteps.astype(jnp.float32)[..., None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


KeysAndValues = tuple[Float[Array, "b l h k"], Float[Array, "b l h k"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What a context-causal row's targets need of its context: keys and values, computed once.

  Attributes:
    keys_and_values: of all tokens of the row, in each layer (n_layers, b, l, h, k), or in one.
    targets: the places of the targets' tokens in the row; l where a row has fewer than others.
  """

  keys_and_values: KeysAndValues
  targets: Int[Array, "b q"]

  def filled(self, *keys_and_values: Float[Array, "b q h k"]) -> KeysAndValues:
    """The whole row's keys and values, with those of the targets as they are now."""
    return tuple(put_tokens(now, self.targets, into=kept) for kept, now in zip(self.keys_and_values, keys_and_values))


def spread(table: Float[Array, "b m d"], row: PackedRow) -> Float[Array, "b l|1 d"]:
  """Gives each token its entry of a table by modulation slot; one entry for all is left to broadcasting.

  A product with one-hot rows is exact at the highest precision and, unlike a gather, has no scatter as its gradient.
  """
  if row.modulation_ids is None:
    return table
  one_hot = jax.nn.one_hot(row.modulation_ids, table.shape[1], dtype=table.dtype)
  return jnp.einsum("blm,bmd->bld", one_hot, table, precision=jax.lax.Precision.HIGHEST)


def split_heads(x: Float[Array, "b l d"], num_heads: int) -> Float[Array, "b l h k"]:
  """The channels of each head apart.

  Behind a barrier: a TPU's compiler would otherwise bring all that x is a sum of (a Linear's product and its adapter's) into the
  layout of heads one by one, which took 5 % of a step's time outside of attention.
  """
  return jax.lax.optimization_barrier(x).reshape(*x.shape[:2], num_heads, -1)


class SelfAttention(nnx.Module):
  """Attention among the tokens of a sentence, with normalised queries and keys and rotary positions."""

  def __init__(self, config: DiTConfig, *, backend: str, dtype, param_dtype, rngs: nnx.Rngs):
    self.num_heads, self.backend = config.num_heads, backend
    linear = functools.partial(Linear, config.dim, config.dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    norm = functools.partial(RMSNorm, config.dim, dims=("heads",), eps=config.eps, param_dtype=param_dtype, rngs=rngs)
    self.q, self.k, self.v = (linear(dims=("embed", "heads")) for _ in range(3))
    self.o = linear(dims=("heads", "embed"))
    self.norm_q, self.norm_k = norm(), norm()

  def __call__(self, x: Float[Array, "b l d"], row: PackedRow, rope, *, context: Context | None = None,
               queries: PackedRow | None = None) -> tuple[Float[Array, "b l|q d"], KeysAndValues]:
    """See `Block`."""
    k = rotate(split_heads(self.norm_k(self.k(x)), self.num_heads), *rope)
    v = split_heads(self.v(x), self.num_heads)
    if context is not None:
      k, v = context.filled(k, v)
    if queries is not None:
      x, *rope = (take_tokens(value, row.targets) for value in (x, *rope))
      row = queries
    q = rotate(split_heads(self.norm_q(self.q(x)), self.num_heads), *rope)
    y = attention(q, k, v, key_intervals=row.key_intervals, backend=self.backend)
    return self.o(y.reshape(x.shape)), (k, v)


class CrossAttention(nnx.Module):
  """Attention from tokens to the prompt of their sentence and, in I2V, to the features of its first image."""

  def __init__(self, config: DiTConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    self.num_heads = config.num_heads
    linear = functools.partial(Linear, config.dim, config.dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    norm = functools.partial(RMSNorm, config.dim, dims=("heads",), eps=config.eps, param_dtype=param_dtype, rngs=rngs)
    self.q, self.k, self.v = (linear(dims=("embed", "heads")) for _ in range(3))
    self.o = linear(dims=("heads", "embed"))
    self.norm_q, self.norm_k = norm(), norm()
    if config.model_type == "i2v":
      self.k_img, self.v_img = (linear(dims=("embed", "heads")) for _ in range(2))
      self.norm_k_img = norm()

  def __call__(self, x: Float[Array, "b l d"], row: PackedRow, text: Float[Array, "b n d"],
               image: Float[Array, "b i d"] | None) -> Float[Array, "b l d"]:
    heads = functools.partial(split_heads, num_heads=self.num_heads)
    q = heads(self.norm_q(self.q(x)))
    y = attention(q, heads(self.norm_k(self.k(text))), heads(self.v(text)), key_intervals=row.text_intervals,
                  key_bias=count_bias(row.text_counts), backend="auto")
    if image is not None:
      y = y + attention(q, heads(self.norm_k_img(self.k_img(image))), heads(self.v_img(image)),
                        key_intervals=row.image_intervals, backend="auto")
    return self.o(y.reshape(x.shape))


class FeedForward(nnx.Module):
  """Two layers with the tanh form of GELU between."""

  def __init__(self, config: DiTConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    linear = functools.partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.up = linear(config.dim, config.ffn_dim, dims=("embed", "mlp"))
    self.down = linear(config.ffn_dim, config.dim, dims=("mlp", "embed"))

  def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    return self.down(gelu_tanh(self.up(x)))


class Block(nnx.Module):
  """Self-attention, cross-attention and feed-forward, the first and the last modulated by the timestep."""

  def __init__(self, config: DiTConfig, *, backend: str, dtype, param_dtype, rngs: nnx.Rngs):
    kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.eps = config.eps
    self.self_attn = SelfAttention(config, backend=backend, **kwargs)
    self.norm3 = LayerNorm(config.dim, eps=config.eps, param_dtype=param_dtype, rngs=rngs)
    self.cross_attn = CrossAttention(config, **kwargs)
    self.ffn = FeedForward(config, **kwargs)
    self.modulation = param(rngs, jax.nn.initializers.normal(config.dim**-0.5), (6, config.dim), param_dtype, (None, "embed"))

  def __call__(self, x: Float[Array, "b l d"], row: PackedRow, rope, time: Float[Array, "b m 6 d"],
               text: Float[Array, "b n d"], image: Float[Array, "b i d"] | None, *, context: Context | None = None,
               queries: PackedRow | None = None) -> tuple[Float[Array, "b l|q d"], KeysAndValues]:
    """Gives the hidden states that follow, and the keys and values on the way.

    Args:
      x: hidden states.
      row: which sentence they are of.
      rope: of `rotary_tables`.
      time: modulation by slot.
      text: embedded prompts.
      image: embedded images (I2V).
      context: known keys and values, where x are the targets of their row.
      queries: the row's targets, where no more is wanted: other tokens are keys and values only.
    """
    table = self.modulation[...].astype(jnp.float32) + time
    shift, scale = (spread(table[:, :, i], row) for i in range(2))
    y, keys_and_values = self.self_attn(modulate(x, shift, scale, self.eps), row, rope, context=context, queries=queries)
    if queries is not None:
      x, row = take_tokens(x, row.targets), queries
    gate, mlp_shift, mlp_scale, mlp_gate = (spread(table[:, :, i], row) for i in range(2, 6))
    x = gated_sum(x, y, gate)
    x = x + self.cross_attn(self.norm3(x), row, text, image)
    y = self.ffn(modulate(x, mlp_shift, mlp_scale, self.eps))
    return gated_sum(x, y, mlp_gate), keys_and_values


def modulate(x, shift, scale, eps: float):
  """Normalised x, scaled and shifted in float32, in x's dtype."""
  return (normalize(x, eps) * (1 + scale) + shift).astype(x.dtype)


def gated_sum(x, y, gate):
  """x + gate y, in float32, in x's dtype."""
  return (x.astype(jnp.float32) + y.astype(jnp.float32) * gate).astype(x.dtype)


class MLP(nnx.Module):
  """Linear, activation, Linear: the embeddings of text and of time."""

  def __init__(self, in_dim: int, dim: int, activation, *, dtype, param_dtype, rngs: nnx.Rngs):
    self.activation = activation
    self.up = Linear(in_dim, dim, dims=(None, "embed"), dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.down = Linear(dim, dim, dims=("embed", None), dtype=dtype, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, x):
    return self.down(self.activation(self.up(x)))


class ImageEmbedding(nnx.Module):
  """Brings CLIP's features to the width of the transformer (I2V): norm, two layers with exact GELU, norm."""

  def __init__(self, config: DiTConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    linear = functools.partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.norm_in = LayerNorm(config.image_dim, eps=1e-5, param_dtype=param_dtype, rngs=rngs)
    self.up = linear(config.image_dim, config.image_dim, dims=(None, None))
    self.down = linear(config.image_dim, config.dim, dims=(None, "embed"))
    self.norm_out = LayerNorm(config.dim, eps=1e-5, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, features: Float[Array, "b i e"]) -> Float[Array, "b i d"]:
    return self.norm_out(self.down(jax.nn.gelu(self.up(self.norm_in(features)), approximate=False)))


class Head(nnx.Module):
  """From the last hidden states to velocities of patches, modulated by the timestep."""

  def __init__(self, config: DiTConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    self.eps = config.eps
    self.head = Linear(config.dim, config.patch_volume * config.out_dim, dims=("embed", None), dtype=dtype,
                       param_dtype=param_dtype, rngs=rngs)
    self.modulation = param(rngs, jax.nn.initializers.normal(config.dim**-0.5), (2, config.dim), param_dtype, (None, "embed"))

  def __call__(self, x: Float[Array, "b l d"], row: PackedRow, time: Float[Array, "b m d"]) -> Float[Array, "b l p"]:
    table = self.modulation[...].astype(jnp.float32) + time[:, :, None]
    return self.head(modulate(x, spread(table[:, :, 0], row), spread(table[:, :, 1], row), self.eps))


class DiT(nnx.Module):
  """Wan2.1's transformer.

  Args:
    config: the shape.
    dtype: of activations and products; modulation, norms, softmax and rotary positions are float32 whatever it is.
    param_dtype: of the stored weights.
    remat: what the backward pass keeps of a block: "none" (recompute nothing), "dots" (keep the results of weight
      products), "attention" (keep what attention gave, recompute all else) or "full" (recompute all).
    attention_backend: of self-attention: a name of `attention.api.BACKENDS`, or "auto".
    rngs: the stream `params`.
  """

  def __init__(self, config: DiTConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, remat: str = "none",
               attention_backend: str = "auto", rngs: nnx.Rngs):
    if remat not in REMAT_POLICIES:
      raise ValueError(f"unknown remat policy {remat!r}; there are {', '.join(REMAT_POLICIES)}")
    self.config, self.dtype, self.remat = config, dtype, remat
    kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    float32 = dict(kwargs, dtype=jnp.float32)
    self.patch_embedding = Linear(config.patch_volume * config.in_dim, config.dim, dims=(None, "embed"), **kwargs)
    self.text_embedding = MLP(config.text_dim, config.dim, gelu_tanh, **kwargs)
    self.time_embedding = MLP(config.freq_dim, config.dim, jax.nn.silu, **float32)
    self.time_projection = Linear(config.dim, 6 * config.dim, dims=("embed", None), **float32)
    if config.model_type == "i2v":
      self.img_emb = ImageEmbedding(config, **kwargs)
    block = functools.partial(Block, config, backend=attention_backend, dtype=dtype, param_dtype=param_dtype)
    self.blocks = nnx.vmap(lambda rngs: block(rngs=rngs))(rngs.split(config.num_layers))
    self.head = Head(config, **dict(kwargs))

  def __call__(self, tokens: Float[Array, "b l p"], timesteps: Float[Array, "b m"], row: PackedRow,
               context: Context | None = None) -> Float[Array, "b l p"]:
    """Predicts the velocity of each token.

    Args:
      tokens: the row's latents as the model shall see them: context clean, targets noised.
      timesteps: the table that `row.modulation_ids` point into, 0 to 1000; (b, 1) where they are None.
      row: positions, intervals, text and I2V's conditions; its own tokens are not used.
      context: of `encode_context`, where tokens and row are those of its targets alone.

    Returns:
      The velocity, in the compute dtype, patches ordered like the tokens; where the row says where its targets are, theirs
      alone, and 0 elsewhere.

    Raises:
      ValueError: an I2V model without condition and image features, or a T2V model with them.
    """
    time, x, _ = self._run(tokens, timesteps, row, context, keep=False)
    if row.targets is None:
      return self.head(x, row, time)
    velocity = self.head(take_tokens(x, row.targets), row.of_targets(), time)
    return put_tokens(velocity, row.targets, into=jnp.zeros((*x.shape[:2], velocity.shape[-1]), velocity.dtype))

  def encode_context(self, row: PackedRow) -> Context:
    """Keys and values of the context, which do not depend on noise; in the compute dtype.

    Args:
      row: context-causal, with the places of its targets.

    Raises:
      ValueError: the row's context sees its targets.
    """
    if not row.context_causal:
      raise ValueError("only the context of a model trained with attention = context_causal can be computed once")
    slots = 2 * row.num_slots
    _, _, keys_and_values = self._run(row.tokens, jnp.zeros((len(row.tokens), slots)), row, None, keep=True)
    return Context(keys_and_values, row.targets)

  def _run(self, tokens, timesteps, row: PackedRow, context: Context | None, *, keep: bool):
    """Time (b, m, d), the last hidden states and, if they are to be kept, keys and values by layer."""
    given = row.condition is not None, row.image_features is not None
    if given != (self.config.model_type == "i2v",) * 2:
      raise ValueError(f"a {self.config.model_type} model takes rows with condition and image_features "
                       f"{'both' if self.config.model_type == 'i2v' else 'neither'}, got {given}")
    if row.condition is not None:
      volume = self.config.patch_volume
      parts = [x.reshape(*x.shape[:2], volume, -1) for x in (tokens, row.condition)]
      tokens = jnp.concatenate(parts, axis=-1).reshape(*tokens.shape[:2], -1)

    time, modulation, text, image = self.embed_conditions(timesteps, row)
    rope = rotary_tables(row.positions, self.config.head_dim, theta=self.config.rope_theta, scale=self.config.rope_scale)
    graph, layers = nnx.split(self.blocks)
    policy = REMAT_POLICIES[self.remat]
    # Both forms of a block stand in the loop, and what either's backward pass keeps is kept for both: little with these.
    queries = row.of_targets() if row.targets is not None and not keep and self.remat in ("full", "attention") else None

    def block(x, layer, **options):
      return nnx.merge(graph, layer)(x, row, rope, modulation, text, image, **options)

    def apply_block(x, inputs):
      index, layer, kept = inputs
      if queries is not None:
        def whole(x, layer):
          return block(x, layer)[0]

        def last(x, layer):
          return put_tokens(block(x, layer, queries=queries)[0], row.targets, into=x)

        return jax.lax.cond(index < self.config.num_layers - 1,
                            *(jax.checkpoint(form, policy=policy) for form in (whole, last)), x, layer), None
      known = None if kept is None else Context(kept, context.targets)
      x, keys_and_values = block(x, layer, context=known)
      return x, keys_and_values if keep else None

    if self.remat != "none":
      apply_block = jax.checkpoint(apply_block, policy=policy, prevent_cse=False)
    x, kept = jax.lax.scan(apply_block, self.patch_embedding(tokens), (
        jnp.arange(self.config.num_layers), layers, None if context is None else context.keys_and_values))
    return time, x, kept

  def embed_conditions(self, timesteps, row: PackedRow):
    """What all blocks share: time (b, m, d) and modulation (b, m, 6, d) in float32, text (b, n, d), image (b, i, d)."""
    time = self.time_embedding(timestep_embedding(timesteps, self.config.freq_dim))
    modulation = self.time_projection(jax.nn.silu(time))
    modulation = modulation.reshape(*time.shape[:-1], 6, self.config.dim)
    image = None if row.image_features is None else self.img_emb(row.image_features)
    return time, modulation, self.text_embedding(row.text), image
