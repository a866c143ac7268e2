"""Layers that the models share. Parameters name their dims; `parallel.sharding` maps the names to mesh axes."""

from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from univid_jax.core.options import Quantize
from univid_jax.models.quantized import QuantizedKernel, dequantize, multiply, multiply_quantized, quantize

# Name of the products of Linears, for `jax.checkpoint` policies, which do not recognise all of them: those with
# quantised kernels, and those in bfloat16 on CPUs, have custom gradients.
PRODUCT_NAME = "product"

Initializer = jax.nn.initializers.Initializer

xavier = jax.nn.initializers.xavier_uniform()
zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


def param(rngs: nnx.Rngs, init: Initializer, shape: Sequence[int], dtype, dims: Sequence[str | None]) -> nnx.Param:
  """Creates a parameter with named dims; `nnx.vmap` prepends an unnamed layer axis."""
  if len(shape) != len(dims):
    raise ValueError(f"a parameter of shape {tuple(shape)} needs {len(shape)} dim names, got {tuple(dims)}")
  return nnx.Param(init(_next_key(rngs.params), tuple(shape), dtype), dims=tuple(dims))


def _next_key(stream: nnx.RngStream) -> Array:
  """Returns what `stream()` would, without comparing shardings, for which JAX explains a traced count's origin."""
  key = jax.random.fold_in(stream.key.get_value(), stream.count.get_value())
  stream.count.set_value(stream.count.get_value() + 1)
  return key


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """Computes GELU's tanh approximation with the logistic function, which is equal and cheaper."""
  return x * jax.nn.sigmoid(2 * (2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3))


class Linear(nnx.Module):
  """x W + b, with W (in_dim, out_dim), plus the output of an adapter if one is attached.

  Attributes:
    kernel: W; if quantised (see `quantize_linears`), it is dequantised in every call.
    lora: None, or what maps x and W to an output: `models.lora.LoRA` in training, `models.changes.Changes` of files.
  """

  lora: Callable[[Array, Array], Array] | None

  def __init__(
    self,
    in_dim: int,
    out_dim: int,
    *,
    dims: Sequence[str | None],
    use_bias: bool = True,
    kernel_init: Initializer = xavier,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.dtype = dtype
    self.kernel = param(rngs, kernel_init, (in_dim, out_dim), param_dtype, dims)
    self.bias = param(rngs, zeros, (out_dim,), param_dtype, dims[1:]) if use_bias else None
    self.lora = nnx.data(None)

  def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
    return self._apply(x, x.shape[-1:], self.kernel.shape[-1:])

  def to_heads(self, x: Float[Array, "... i"], num_heads: int) -> Float[Array, "... h k"]:
    """Returns the output with its channels split into heads.

    The product takes a kernel whose outputs are already split into heads: XLA on TPUs then writes the layout that
    attention reads, whereas splitting the result copies it (docs/benchmarks/tpu.md has figures). An adapter's output is
    split afterwards.
    """
    return self._apply(x, x.shape[-1:], (num_heads, self.kernel.shape[-1] // num_heads))

  def from_heads(self, x: Float[Array, "... h k"]) -> Float[Array, "... o"]:
    """Returns the output for an input that is split into heads, likewise; an adapter gets the heads joined."""
    return self._apply(x, x.shape[-2:], self.kernel.shape[-1:])

  def _apply(
    self, x: Float[Array, "..."], in_shape: tuple[int, ...], out_shape: tuple[int, ...]
  ) -> Float[Array, "..."]:
    """Maps (..., *in_shape) to (..., *out_shape)."""
    x = x.astype(self.dtype)
    kernel = self.kernel[...]
    if isinstance(kernel, QuantizedKernel):
      y = cast(Array, multiply_quantized(x, kernel, in_shape, out_shape))
    else:
      y = multiply(x, kernel, in_shape, out_shape)
    y = checkpoint_name(y, PRODUCT_NAME)
    if self.bias is not None:
      y = y + self.bias[...].astype(self.dtype).reshape(out_shape)
    if self.lora is None:
      return y
    flat = x.reshape(*x.shape[: x.ndim - len(in_shape)], kernel.shape[0])
    return y + self.lora(flat, dequantize(kernel)).reshape(y.shape)


def quantize_linears(module: nnx.Module, method: Quantize) -> None:
  """Quantises the kernels of all Linears in a module, abstract or not; `Quantize.NONE` leaves them as they are."""
  for _, linear in nnx.iter_modules(module):
    if isinstance(linear, Linear) and method != Quantize.NONE:
      linear.kernel = nnx.Param(quantize(linear.kernel[...], method), **linear.kernel.get_metadata())


class RMSNorm(nnx.Module):
  """x / rms(x) times a scale, over the channels, in float32."""

  def __init__(
    self, dim: int, *, dims: Sequence[str | None] = (None,), eps: float = 1e-6, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    self.eps = eps
    self.scale = param(rngs, ones, (dim,), param_dtype, dims)

  @jax.named_scope("norm")
  def __call__(self, x: Float[Array, "..."], *, num_dims: int = 1) -> Float[Array, "..."]:
    """Normalises x; its channels are the last num_dims dims: (..., d), or (..., h, k) with heads."""
    y = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(y), axis=tuple(range(-num_dims, 0)), keepdims=True)
    scale = self.scale[...].astype(jnp.float32).reshape(x.shape[-num_dims:])
    return (y * jax.lax.rsqrt(mean + self.eps) * scale).astype(x.dtype)


@jax.named_scope("norm")
def normalize(x: Float[Array, "... d"], eps: float) -> Float[Array, "... d"]:
  """Layer norm without parameters, over the last dim; float32 in and out."""
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
  """Layer norm with scale and bias, over the last dim, in float32."""

  def __init__(self, dim: int, *, eps: float, param_dtype=jnp.float32, rngs: nnx.Rngs):
    self.eps = eps
    self.scale = param(rngs, ones, (dim,), param_dtype, (None,))
    self.bias = param(rngs, zeros, (dim,), param_dtype, (None,))

  def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    y = normalize(x, self.eps) * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
    return y.astype(x.dtype)
