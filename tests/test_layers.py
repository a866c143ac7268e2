"""Tests of the layers that the models share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import relative_error
from univid_jax.config.schema import LoRAConfig
from univid_jax.core.options import ModelType, Quantize, RematPolicy
from univid_jax.models import lora
from univid_jax.models.dit import REMAT_POLICIES
from univid_jax.models.dit_blocks import ImageEmbedding
from univid_jax.models.layers import Linear, RMSNorm, quantize_linears
from univid_jax.models.quantized import QuantizedKernel, dequantize
from univid_jax.models.variants import DiTConfig

HEADS, WIDTH = 6, 8


@pytest.fixture(params=["plain", "adapted", *(str(each) for each in Quantize if each != Quantize.NONE), "nf4, adapted"])
def linear(request) -> Linear:
  """Maps 48 channels to 48."""
  linear = Linear(48, HEADS * WIDTH, dims=("embed", "heads"), rngs=nnx.Rngs(0))
  linear.bias[...] = jax.random.normal(jax.random.key(1), linear.bias.shape)
  for part in request.param.split(", "):
    if part == "adapted":
      linear.lora = lora.LoRA(linear.kernel, LoRAConfig(rank=2), dtype=jnp.float32, rngs=nnx.Rngs(2))
      linear.lora.up[...] = jax.random.normal(jax.random.key(3), linear.lora.up.shape)
    elif part != "plain":
      quantize_linears(linear, Quantize(part))
  return linear


def value_and_gradients(function, linear: Linear, x: jax.Array):
  """Returns the output, and the gradients to x and to the parameters; a quantised kernel is a constant."""
  graph, state = nnx.split(linear)
  constants = {"kernel": state.pop("kernel")} if isinstance(linear.kernel[...], QuantizedKernel) else {}

  def loss(x, others):
    y = function(nnx.merge(graph, nnx.State({**others, **constants})), x)
    return jnp.sum(jnp.sin(y)), y

  grads, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, state)
  return jax.tree.leaves((y, grads))


def apply(linear: Linear, x: jax.Array) -> jax.Array:
  """Maps (..., 48) to (..., 48) without the methods of the layer."""
  y = x @ dequantize(linear.kernel[...]) + linear.bias[...]
  return y if linear.lora is None else y + linear.lora(x)


def test_an_output_in_heads_is_the_output_split(linear):
  x = jax.random.normal(jax.random.key(4), (2, 5, 48))
  split = value_and_gradients(lambda linear, x: apply(linear, x).reshape(2, 5, HEADS, WIDTH), linear, x)
  in_heads = value_and_gradients(lambda linear, x: linear.to_heads(x, HEADS), linear, x)
  for ours, theirs in zip(in_heads, split, strict=True):
    assert ours.shape == theirs.shape and relative_error(ours, theirs) <= 1e-6


def test_an_input_in_heads_is_the_input_joined(linear):
  x = jax.random.normal(jax.random.key(4), (2, 5, HEADS, WIDTH))
  joined = value_and_gradients(lambda linear, x: apply(linear, x.reshape(2, 5, 48)), linear, x)
  in_heads = value_and_gradients(lambda linear, x: linear.from_heads(x), linear, x)
  for ours, theirs in zip(in_heads, joined, strict=True):
    assert ours.shape == theirs.shape and relative_error(ours, theirs) <= 1e-6


def test_heads_come_from_the_product_itself(linear):
  """Otherwise XLA copies its result on TPUs."""
  program = str(jax.make_jaxpr(lambda x: linear.to_heads(x, HEADS))(jnp.ones((2, 5, 48))))
  assert f"f32[2,5,{HEADS},{WIDTH}] = dot_general" in program
  program = str(jax.make_jaxpr(linear.from_heads)(jnp.ones((2, 5, HEADS, WIDTH))))
  assert "dimension_numbers=(([2, 3], [0, 1]), ([], []))" in program


def test_adapters_start_within_the_bound_of_their_inputs():
  """As in PEFT: `down` is uniform within 1 / sqrt(64), whatever the rank."""
  kernel = nnx.Param(jnp.zeros((64, 8)), dims=("embed", None))
  for rank in (4, 16):
    down = np.asarray(lora.LoRA(kernel, LoRAConfig(rank=rank), dtype=jnp.float32, rngs=nnx.Rngs(0)).down[...])
    assert down.shape == (64, rank) and 0.12 < np.abs(down).max() <= 0.125
    assert down.std() == pytest.approx(0.125 / np.sqrt(3), rel=0.1)


def test_norms_of_image_features_are_pytorchs():
  """Their epsilon is that of nn.LayerNorm, 1e-5, and not the transformer's: it shows in weak features."""
  config = DiTConfig(dim=4, ffn_dim=4, num_heads=1, num_layers=1, model_type=ModelType.I2V, image_dim=6)
  embedding = ImageEmbedding(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
  for norm, size in ((embedding.norm_in, 6), (embedding.norm_out, 4)):
    x = 1e-3 * np.arange(size, dtype=np.float64)
    expected = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4)


def test_a_norm_over_heads_is_that_over_their_channels_side_by_side():
  norm = RMSNorm(HEADS * WIDTH, rngs=nnx.Rngs(0))
  norm.scale[...] = jax.random.normal(jax.random.key(1), norm.scale.shape)
  x = jax.random.normal(jax.random.key(2), (2, 5, HEADS, WIDTH))
  np.testing.assert_allclose(norm(x, num_dims=2), norm(x.reshape(2, 5, -1)).reshape(x.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("method", Quantize)
def test_remat_dots_keeps_products(method, dtype):
  layer = Linear(64, 64, dims=("embed", "heads"), dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
  quantize_linears(layer, method)
  block = jax.checkpoint(lambda x: jnp.sin(layer(x)), policy=REMAT_POLICIES[RematPolicy.DOTS])
  program = jax.jit(jax.grad(lambda x: jnp.sum(block(block(x))))).lower(jnp.ones((4, 64), dtype)).as_text()
  assert program.count("stablehlo.dot_general") == 4  # of which two are the gradient's
