"""The CLIP image tower (ViT-H/14) that gives I2V models their view of the first frame. Ported from Wan2.1 (Apache-2.0)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from univid_jax.attention.api import attention
from univid_jax.models.layers import LayerNorm, Linear, param


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig:
  """Shape of the tower; the defaults are those of XLM-RoBERTa-Large-ViT-Huge-14."""

  image_size: int = 224
  patch_size: int = 14
  dim: int = 1280
  mlp_ratio: int = 4
  num_heads: int = 16
  num_layers: int = 32
  eps: float = 1e-5

  @property
  def num_tokens(self) -> int:
    """The class token and one for each patch."""
    return 1 + (self.image_size // self.patch_size) ** 2


class Block(nnx.Module):
  """Attention and two layers, each after a norm."""

  def __init__(self, config: CLIPConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    linear = functools.partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    norm = functools.partial(LayerNorm, config.dim, eps=config.eps, param_dtype=param_dtype, rngs=rngs)
    self.num_heads = config.num_heads
    self.norm1, self.norm2 = norm(), norm()
    self.to_qkv = linear(config.dim, 3 * config.dim, dims=("embed", "heads"))
    self.proj = linear(config.dim, config.dim, dims=("heads", "embed"))
    self.up = linear(config.dim, config.mlp_ratio * config.dim, dims=("embed", "mlp"))
    self.down = linear(config.mlp_ratio * config.dim, config.dim, dims=("mlp", "embed"))

  def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    q, k, v = (part.reshape(*x.shape[:2], self.num_heads, -1) for part in jnp.split(self.to_qkv(self.norm1(x)), 3, axis=-1))
    x = x + self.proj(attention(q, k, v).reshape(x.shape))
    return x + self.down(jax.nn.gelu(self.up(self.norm2(x)), approximate=False))


class CLIPVision(nnx.Module):
  """Images to features of all patches after all blocks but the last, as Wan2.1's I2V reads them.

  The last block and what follows it are not used, and so are not part of the model.
  """

  def __init__(self, config: CLIPConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
    self.config, self.dtype = config, dtype
    small = jax.nn.initializers.normal(config.dim**-0.5)
    self.patch_embedding = Linear(3 * config.patch_size**2, config.dim, dims=(None, "embed"), use_bias=False, dtype=dtype,
                                  param_dtype=param_dtype, rngs=rngs)
    self.cls_embedding = param(rngs, small, (config.dim,), param_dtype, ("embed",))
    self.pos_embedding = param(rngs, small, (config.num_tokens, config.dim), param_dtype, (None, "embed"))
    self.pre_norm = LayerNorm(config.dim, eps=config.eps, param_dtype=param_dtype, rngs=rngs)
    block = functools.partial(Block, config, dtype=dtype, param_dtype=param_dtype)
    self.blocks = nnx.vmap(lambda rngs: block(rngs=rngs))(rngs.split(config.num_layers - 1))

  def __call__(self, images: Float[Array, "b y x 3"]) -> Float[Array, "b l d"]:
    """Features (b, 1 + patches, dim) of normalised images of the tower's size."""
    p = self.config.patch_size
    patches = rearrange(images, "b (y p) (x q) c -> b (y x) (p q c)", p=p, q=p)
    x = self.patch_embedding(patches)
    cls = jnp.broadcast_to(self.cls_embedding[...].astype(self.dtype), (x.shape[0], 1, x.shape[2]))
    x = self.pre_norm(jnp.concatenate([cls, x], axis=1) + self.pos_embedding[...].astype(self.dtype))
    graph, layers = nnx.split(self.blocks)
    x, _ = jax.lax.scan(lambda x, layer: (nnx.merge(graph, layer)(x), None), x, layers)
    return x

