"""Wan's diffusion transformer over packed rows: patches of clean and noised latents to velocities.

Ported from Wan2.1 and Wan2.2 (Apache-2.0).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from univid_jax.core.errors import UserError
from univid_jax.core.options import AttentionBackend, RematPolicy
from univid_jax.core.packed_row import PackedRow, put_tokens, take_tokens
from univid_jax.models.attention.cudnn import FORWARD_PRIMITIVE
from univid_jax.models.attention.pieces import OUTPUT_NAME
from univid_jax.models.dit_blocks import MLP, Block, Head, ImageEmbedding, KeysAndValues, KeyValueCache
from univid_jax.models.layers import PRODUCT_NAME, Linear, gelu_tanh
from univid_jax.models.rope import rotary_tables
from univid_jax.models.variants import DiTConfig
from univid_jax.parallel import host_memory

# Name of a block's input hidden states, for `jax.checkpoint` policies.
BLOCK_INPUT = "block_input"


def _save_attention(primitive: Any, *args: Any, **params: Any) -> bool:
  """Saves only the results of attention; a policy of `jax.checkpoint`."""
  return primitive.name == FORWARD_PRIMITIVE or _save_named(primitive, *args, **params)


_save_named = jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME)
_save_products = jax.checkpoint_policies.save_only_these_names(PRODUCT_NAME)

# What the backward pass of a block may keep of the forward pass; None keeps everything.
REMAT_POLICIES: Mapping[RematPolicy, Callable[..., bool] | None] = {
  RematPolicy.NONE: None,
  RematPolicy.DOTS: jax.checkpoint_policies.save_from_both_policies(_save_products, _save_attention),
  RematPolicy.ATTENTION: _save_attention,
  RematPolicy.FULL: jax.checkpoint_policies.nothing_saveable,
  RematPolicy.OFFLOAD: jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[BLOCK_INPUT],
    offload_src="device",
    offload_dst=host_memory.KIND,
  ),
}
# Policies that keep little memory of a block.
LEAN_POLICIES = (RematPolicy.ATTENTION, RematPolicy.FULL, RematPolicy.OFFLOAD)


def timestep_embedding(timesteps: Float[Array, "..."], dim: int) -> Float[Array, "... d"]:
  """Returns cosines, then sines, of timesteps (0 to 1000) at dim / 2 frequencies from 1 to 1 / 10000; float32."""
  frequencies = jnp.asarray(10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim // 2)), jnp.float32)
  angles = timesteps.astype(jnp.float32)[..., None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class DiT(nnx.Module):
  """Wan's transformer.

  Args:
    config: the shape.
    dtype: of activations and matrix products; modulation, norms, softmax and rotary positions are always float32.
    param_dtype: of the stored weights.
    remat: which parts of a block the backward pass recomputes.
    attention_backend: of self-attention.
    rngs: provides the stream `params`.
  """

  def __init__(
    self,
    config: DiTConfig,
    *,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    remat: RematPolicy = RematPolicy.NONE,
    attention_backend: AttentionBackend = AttentionBackend.AUTO,
    rngs: nnx.Rngs,
  ):
    self.config, self.dtype, self.remat = config, dtype, remat
    linear = functools.partial(Linear, param_dtype=param_dtype, rngs=rngs)
    mlp = functools.partial(MLP, param_dtype=param_dtype, rngs=rngs)
    self.patch_embedding = linear(config.patch_volume * config.in_dim, config.dim, dims=(None, "embed"), dtype=dtype)
    self.text_embedding = mlp(config.text_dim, config.dim, gelu_tanh, dtype=dtype)
    self.time_embedding = mlp(config.freq_dim, config.dim, jax.nn.silu, dtype=jnp.float32)
    self.time_projection = linear(config.dim, 6 * config.dim, dims=("embed", None), dtype=jnp.float32)
    if config.takes_image_features:
      self.img_emb = ImageEmbedding(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    block = functools.partial(Block, config, backend=attention_backend, dtype=dtype, param_dtype=param_dtype)
    self.blocks = nnx.vmap(lambda rngs: block(rngs=rngs))(rngs.split(config.num_layers))
    self.head = Head(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

  def __call__(
    self,
    tokens: Float[Array, "b l p"],
    timesteps: Float[Array, "b m"],
    row: PackedRow,
    cache: KeyValueCache | None = None,
  ) -> Float[Array, "b l p"]:
    """Predicts the velocity of each token.

    Args:
      tokens: the row's latents as input to the model: context clean, targets noised.
      timesteps: the table that `row.modulation_ids` index, 0 to 1000; (b, 1) if they are None.
      row: positions, intervals, text and I2V's conditions; `row.tokens` is not used.
      cache: from `encode_context`, if tokens and row hold only the targets (`row.target_queries()`).

    Returns:
      Velocities in the compute dtype, patches ordered like the tokens. If the row lists its targets, the velocities of
      other tokens are 0.

    Raises:
      UserError: the row lacks a condition or image features that the model takes, or has one that it does not take.
    """
    time, _, x, _ = self._run(tokens, timesteps, row, cache, keep=False)
    return self._predict(_take_targets(x, row), time, row)

  def with_residual(
    self,
    tokens: Float[Array, "b l p"],
    timesteps: Float[Array, "b m"],
    row: PackedRow,
    cache: KeyValueCache | None = None,
    *,
    residual: Float[Array, "b q d"] | None = None,
  ) -> tuple[Float[Array, "b l p"], Float[Array, "b q d"]]:
    """Predicts velocities with the residual of the blocks: what they add to the hidden states that the head reads.

    Args:
      tokens, timesteps, row, cache: see `__call__`.
      residual: that of another call, which replaces the blocks; None computes them.

    Returns:
      The velocities of a call, and the residual of the targets if the row lists them, else of all tokens, in the
      compute dtype.
    """
    if residual is None:
      time, start, x, _ = self._run(tokens, timesteps, row, cache, keep=False)
      x = _take_targets(x, row)
      return self._predict(x, time, row), x - _take_targets(start, row)
    start = self.patch_embedding(_take_targets(self._add_condition(tokens, row), row))
    return self._predict(start + residual, self._embed_time(timesteps), row), residual

  def _predict(self, x: Float[Array, "b q d"], time: Float[Array, "b m d"], row: PackedRow) -> Float[Array, "b l p"]:
    """Returns velocities from the last hidden states, which are the targets' if the row lists them."""
    if row.targets is None:
      return self.head(x, row, time)
    velocity = self.head(x, row.target_queries(), time)
    shape = (*row.target_mask.shape, velocity.shape[-1])
    return put_tokens(velocity, row.targets, into=jnp.zeros(shape, velocity.dtype))

  def _embed_time(self, timesteps: Float[Array, "b m"]) -> Float[Array, "b m d"]:
    return self.time_embedding(timestep_embedding(timesteps, self.config.freq_dim))

  def encode_context(self, row: PackedRow) -> KeyValueCache:
    """Computes the keys and values of the context, which do not depend on noise, in the compute dtype.

    Args:
      row: a context-causal row that lists its targets.

    Raises:
      ValueError: the row's context attends to its targets.
    """
    if not row.context_mode.causal or row.targets is None:
      raise ValueError("only the context of a row that is context-causal and lists its targets can be computed once")
    timesteps = jnp.zeros((len(row.tokens), 2 * row.num_slots))
    *_, keys_and_values = self._run(row.tokens, timesteps, row, None, keep=True)
    assert keys_and_values is not None
    return KeyValueCache(keys_and_values, row.targets)

  def _embed_conditions(
    self, timesteps: Float[Array, "b m"], row: PackedRow
  ) -> tuple[Float[Array, "b m d"], Float[Array, "b m 6 d"], Float[Array, "b n d"], Float[Array, "b i d"] | None]:
    """Returns what all blocks share: time and its modulation in float32, embedded prompts and embedded images."""
    time = self._embed_time(timesteps)
    modulation = self.time_projection(jax.nn.silu(time))
    modulation = modulation.reshape(*time.shape[:-1], 6, self.config.dim)
    image = None if row.image_features is None else self.img_emb(row.image_features)
    return time, modulation, self.text_embedding(row.text), image

  def _run(
    self,
    tokens: Float[Array, "b l p"],
    timesteps: Float[Array, "b m"],
    row: PackedRow,
    cache: KeyValueCache | None,
    *,
    keep: bool,
  ) -> tuple[Float[Array, "b m d"], Float[Array, "b l d"], Float[Array, "b l d"], KeysAndValues | None]:
    """Returns the time embedding, the first and last hidden states and, with `keep`, keys and values by layer."""
    tokens = self._add_condition(tokens, row)
    time, modulation, text, image = self._embed_conditions(timesteps, row)
    rope = rotary_tables(
      row.positions, self.config.head_dim, theta=self.config.rope_theta, scale=self.config.rope_scale
    )
    graph, layers = nnx.split(self.blocks)
    policy = REMAT_POLICIES[self.remat]

    def block(x, layer, **options):
      return nnx.merge(graph, host_memory.fetch(layer))(x, row, rope, modulation, text, image, **options)

    def apply_block(x, inputs):
      _, layer, cached = inputs
      x = checkpoint_name(x, BLOCK_INPUT)
      x, keys_and_values = block(x, layer, cache=None if cache is None else KeyValueCache(cached, cache.targets))
      return x, keys_and_values if keep else None

    def apply_block_or_last(x, inputs):
      index, layer, _ = inputs
      x = checkpoint_name(x, BLOCK_INPUT)
      forms = (lambda x, layer: block(x, layer)[0]), functools.partial(_apply_to_targets, block, row)
      forms = (jax.checkpoint(form, policy=policy) for form in forms)
      return jax.lax.cond(index < self.config.num_layers - 1, *forms, x, layer), None

    # The last block may compute only the targets. The loop then contains both forms of a block, and stores what the
    # backward pass needs of either for every layer, which is little only with lean policies.
    skips_context = row.targets is not None and not keep and self.remat in LEAN_POLICIES
    body = apply_block_or_last if skips_context else apply_block
    if self.remat != RematPolicy.NONE:
      body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    inputs = jnp.arange(self.config.num_layers), layers, None if cache is None else cache.keys_and_values
    start = self.patch_embedding(tokens)
    x, keys_and_values = jax.lax.scan(body, start, inputs)
    return time, start, x, keys_and_values

  def _add_condition(self, tokens: Float[Array, "b l p"], row: PackedRow) -> Float[Array, "b l _p"]:
    """Appends I2V's condition to the channels of the tokens, after checking that the row has what the model needs."""
    taken = {"condition": self.config.takes_condition, "image_features": self.config.takes_image_features}
    for name, is_taken in taken.items():
      if (getattr(row, name) is not None) != is_taken:
        raise UserError(f"{name} must {'' if is_taken else 'not '}be given to this {self.config.model_type} model")
    if row.condition is None:
      return tokens
    parts = [x.reshape(*x.shape[:2], self.config.patch_volume, -1) for x in (tokens, row.condition)]
    return jnp.concatenate(parts, axis=-1).reshape(*tokens.shape[:2], -1)


def _take_targets(x: Float[Array, "b l _d"], row: PackedRow) -> Float[Array, "b q _d"]:
  return x if row.targets is None else take_tokens(x, row.targets)


def _apply_to_targets(block: Callable[..., Any], row: PackedRow, x: Float[Array, "b l d"], layer: nnx.State) -> Array:
  """Applies a block to the targets of a row and leaves the hidden states of its context unchanged."""
  assert row.targets is not None
  targets, _ = block(x, layer, queries=row.target_queries())
  return put_tokens(targets, row.targets, into=x)
