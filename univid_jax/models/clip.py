"""The CLIP image encoder (ViT-H/14) for the first frame of I2V models. Ported from Wan2.1 (Apache-2.0)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from univid_jax.models.attention.api import attention
from univid_jax.models.layers import LayerNorm, Linear, param


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig:
  """Shape of the encoder; the defaults are those of XLM-RoBERTa-Large-ViT-Huge-14."""

  image_size: int = 224
  patch_size: int = 14
  dim: int = 1280
  mlp_ratio: int = 4
  num_heads: int = 16
  num_layers: int = 32
  eps: float = 1e-5

  @property
  def num_tokens(self) -> int:
    """One class token and one token per patch."""
    return 1 + (self.image_size // self.patch_size) ** 2


class Block(nnx.Module):
  """Pre-norm attention and feed-forward."""

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
    q, k, v = (
      part.reshape(*x.shape[:2], self.num_heads, -1) for part in jnp.split(self.to_qkv(self.norm1(x)), 3, axis=-1)
    )
    x = x + self.proj(attention(q, k, v).reshape(x.shape))
    return x + self.down(jax.nn.gelu(self.up(self.norm2(x)), approximate=False))


class CLIPVision(nnx.Module):
  """Maps images to features of all patches after the second to last block, as Wan2.1's I2V uses them.

  The last block and the layers after it are not part of the model, since their outputs are unused.

  Args:
    config: the shape.
    dtype: of activations and matrix products.
    param_dtype: of the stored weights.
    rngs: provides the stream `params`.
  """

  def __init__(self, config: CLIPConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
    self.config, self.dtype = config, dtype
    small = jax.nn.initializers.normal(config.dim**-0.5)
    self.patch_embedding = Linear(
      3 * config.patch_size**2,
      config.dim,
      dims=(None, "embed"),
      use_bias=False,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    self.cls_embedding = param(rngs, small, (config.dim,), param_dtype, ("embed",))
    self.pos_embedding = param(rngs, small, (config.num_tokens, config.dim), param_dtype, (None, "embed"))
    self.pre_norm = LayerNorm(config.dim, eps=config.eps, param_dtype=param_dtype, rngs=rngs)
    block = functools.partial(Block, config, dtype=dtype, param_dtype=param_dtype)
    self.blocks = nnx.vmap(lambda rngs: block(rngs=rngs))(rngs.split(config.num_layers - 1))

  def __call__(self, images: Float[Array, "b y x 3"]) -> Float[Array, "b l d"]:
    """Returns features (b, 1 + patches, dim) of images from `preprocess`."""
    side = self.config.patch_size
    patches = rearrange(images, "b (y py) (x px) c -> b (y x) (py px c)", py=side, px=side)
    x = self.patch_embedding(patches)
    cls = jnp.broadcast_to(self.cls_embedding[...].astype(self.dtype), (x.shape[0], 1, x.shape[2]))
    x = self.pre_norm(jnp.concatenate([cls, x], axis=1) + self.pos_embedding[...].astype(self.dtype))
    graph, layers = nnx.split(self.blocks)
    x, _ = jax.lax.scan(lambda x, layer: (nnx.merge(graph, layer)(x), None), x, layers)
    return x


# Mean and standard deviation of the colours of CLIP's training data.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(frame: Float[np.ndarray, "H W 3"], size: int) -> Float[np.ndarray, "side side 3"]:
  """Resizes a frame in [-1, 1] to a square, ignoring the aspect ratio as Wan2.1 does, and normalises its colours."""
  height, width = (_cubic_weights(length, size) for length in frame.shape[:2])
  resized = np.einsum("yH,HWc,xW->yxc", height, frame.astype(np.float32), width, optimize=True)
  return ((resized * 0.5 + 0.5 - np.array(MEAN)) / np.array(STD)).astype(np.float32)


def _cubic_weights(length: int, size: int) -> Float[np.ndarray, "size length"]:
  """Returns the weights of PyTorch's bicubic interpolation along one side.

  Cubic convolution with a = -0.75, half-pixel centres, repeated edges and no antialiasing; Pillow and JAX use a = -0.5
  and antialiasing.
  """
  a = -0.75
  half = np.float32(0.5)  # float32 rounds as PyTorch does
  place = np.float32(length / size) * (np.arange(size, dtype=np.float32) + half) - half
  first = np.floor(place).astype(int) - 1
  weights = np.zeros((size, length))
  for tap in range(4):
    x = np.abs(place - (first + tap))
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    np.add.at(weights, (np.arange(size), np.clip(first + tap, 0, length - 1)), np.where(x <= 1, near, far))
  return weights.astype(np.float32)
