"""Quantised frozen bases: numbers, memory, training, files."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx

from tests.helpers import relative_error
from tests.test_meshes import one_gradient, packed_batch
from univid_jax.checkpoints.run_parts import create_model, transformer_config
from univid_jax.codecs.dct import DCTCodec
from univid_jax.codecs.encoders import PlainEncoders
from univid_jax.config.boundary import override
from univid_jax.core.errors import UserError
from univid_jax.core.options import Quantize
from univid_jax.diffusion.flow import FlowMatching
from univid_jax.diffusion.loss import draw_noise
from univid_jax.inference.experts import Transformer
from univid_jax.inference.pipeline import Pipeline
from univid_jax.models.dit import DiT
from univid_jax.models.layers import Linear, quantize_linears
from univid_jax.models.lora import LORA
from univid_jax.models.quantized import (
  QTYPES,
  QuantizationError,
  QuantizedKernel,
  dequantize,
  in_words,
  is_quantized,
  quantize,
  tile_size,
)
from univid_jax.models.variants import VARIANTS
from univid_jax.parallel.mesh import make_mesh
from univid_jax.training.memory import abstract_batch, compile_step
from univid_jax.training.state import StateSpec, describe_training
from univid_jax.training.step import make_train_step, make_update

# In a process of its own, because JAX has to be prepared before its first import. No stack of kernels is in floats.
COMPILE_FOR_TPU = """
from univid_jax.platform.topologies import describe_devices, use_tpu_compiler
use_tpu_compiler()
import re
from univid_jax.config.boundary import override
from univid_jax.config.presets import tiny
from univid_jax.parallel.mesh import make_mesh
from univid_jax.planning.forecasts import compile_training
mesh = make_mesh({}, describe_devices("v5e:1x1"))
shape = {"dim": 256, "ffn_dim": 1024, "num_layers": 12, "num_heads": 2, "dtype": "bfloat16", "look_back": ()}
changes = {f"model.{key}": value for key, value in shape.items()} | {"lora.rank": 2, "ema_decay": 0.0}
stack = r"(bf16|f32)\\[12,(256|1024|4,64|16,64),(256|1024)\\]"
for method in ("none", "int8", "fp8", "nf4"):
  program, found = compile_training(override(tiny(), {**changes, "base.quantize": method}), mesh)
  assert bool(re.search(stack, program.as_text())) == (method == "none"), method
# The loop slices the base in the memory of the host, without copies of whole stacks of kernels.
shape = {"dim": 512, "ffn_dim": 1024, "num_layers": 12, "num_heads": 4, "remat": "offload"}
changes |= {f"model.{key}": value for key, value in shape.items()}
changes |= {"base.offload": True, "rows.num_tokens": 768, "rows.per_batch": 1}
hidden = 12 * 768 * 512 * 2
for method in ("none", "int8", "fp8", "nf4"):
  program, found = compile_training(override(tiny(), {**changes, "base.quantize": method}), mesh)
  memory = program.memory_analysis()
  base, others = memory.host_argument_size_in_bytes, memory.host_temp_size_in_bytes
  assert base > 1e7 and hidden < others < hidden + base / 4, (method, base, others)
"""

METHODS = [Quantize.INT8, Quantize.FP8, Quantize.NF4]


@pytest.fixture
def lora_config(tiny_config):
  return override(tiny_config, {"lora.rank": 2, "model.look_back": ()})


@pytest.mark.parametrize("method", METHODS)
class TestKernels:
  @pytest.mark.parametrize("shape", [(2, 256, 3), (70, 4), (2, 1)], ids=str)
  def test_equal_qwix(self, method, shape):
    in_dim = shape[-2]
    kernel = jax.random.normal(jax.random.key(in_dim), shape).at[..., 0, 0].set(-3)
    quantized = quantize(kernel, method)
    tile = in_dim if method == Quantize.FP8 else tile_size(in_dim)
    axis = kernel.ndim - 2
    channels = [other for other in range(kernel.ndim) if other != axis]
    theirs = qwix.quantize(kernel, QTYPES[method], channelwise_axes=channels, tiled_axes={axis: tile})
    assert quantized.shape == shape and quantized.scale.shape == theirs.scale.shape
    np.testing.assert_array_equal(dequantize(quantized), qwix.dequantize(theirs))

  def test_products_and_their_gradients_are_those_of_the_dequantised_kernel(self, method):
    linear = Linear(128, 48, dims=("embed", "heads"), rngs=nnx.Rngs(0))
    exact = Linear(128, 48, dims=("embed", "heads"), rngs=nnx.Rngs(0))
    quantize_linears(linear, method)
    assert isinstance(linear.kernel[...], QuantizedKernel)
    exact.kernel[...] = dequantize(linear.kernel[...])
    x = jax.random.normal(jax.random.key(1), (3, 5, 128))
    for ours, theirs in zip(*(jax.value_and_grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x) for f in (linear, exact))):
      assert relative_error(ours, theirs) <= 1e-6

  @pytest.mark.long
  def test_adapters_get_the_gradients_over_the_dequantised_base(self, method, lora_config):
    row = packed_batch(lora_config)
    quantized = create_model(override(lora_config, {"base.quantize": str(method)}))
    lora, base = map(nnx.to_pure_dict, nnx.state(quantized, nnx.PathContains(LORA), ...))
    lora = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) / 8, lora)
    exact = jax.tree.map(dequantize, base, is_leaf=is_quantized)
    spec = StateSpec.for_model(
      lambda: create_model(lora_config), optax.sgd(1.0), make_mesh({}, jax.devices()[:1]), ema=False, lora=True
    )
    update = jax.jit(make_update(spec, optax.sgd(1.0)))
    noise, levels = draw_noise(jax.random.key(3), row, FlowMatching.from_config(lora_config.flow))
    steps = [update(spec.create(lora), frozen, row, noise, levels, jax.random.key(0)) for frozen in (base, exact)]
    changes = [jax.tree.leaves(jax.tree.map(lambda new, old: new - old, state.params, lora)) for state, _ in steps]
    flat = [np.concatenate([np.ravel(change) for change in each]) for each in changes]
    assert relative_error(flat[0], flat[1]) <= 1e-5 and np.linalg.norm(flat[1]) > 0
    assert float(steps[0][1]["loss"]) == pytest.approx(float(steps[1][1]["loss"]), rel=1e-6)


@pytest.mark.long
def test_velocities_of_blocks_of_the_size_of_wan_1_3b():
  """Relative L2 error of the velocity against the base in bfloat16, with random weights."""
  shape = dataclasses.replace(VARIANTS["wan2.1-t2v-1.3b"], num_layers=4)
  graph, params = nnx.split(jax.jit(lambda: DiT(shape, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))(), nnx.Param)
  rng = np.random.default_rng(0)
  latents, prompt = rng.standard_normal((2, 8, 8, 16), np.float32), rng.standard_normal((7, 4096), np.float32)

  def velocity(method):
    model = nnx.merge(graph, params)
    quantize_linears(model.blocks, method)
    quantized = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    encoders = PlainEncoders(DCTCodec(latent_channels=16, spatial_stride=8), shape.text_dim)
    pipe = Pipeline(shape, [Transformer(graph, quantized)], encoders=encoders, mesh=make_mesh({}, jax.devices()[:1]))
    return pipe.predict_velocity(latents, 600.0, prompt)

  exact = velocity(Quantize.NONE)
  errors = {method: relative_error(velocity(method), exact) for method in METHODS}
  print({str(method): f"{error:.2%}" for method, error in errors.items()})
  limits = {Quantize.INT8: 0.02, Quantize.FP8: 0.04, Quantize.NF4: 0.15}
  assert all(1e-4 < errors[method] <= limit for method, limit in limits.items())


def test_only_linear_weights_of_blocks_are_quantised(lora_config):
  model = nnx.eval_shape(lambda: create_model(override(lora_config, {"base.quantize": "int8"})))
  flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
  quantized = {path for path, leaf in flat if isinstance(leaf.get_value(), QuantizedKernel)}
  assert (
    quantized == {path for path, _ in flat if path[0] == "blocks" and path[-1] == "kernel"} and len(quantized) == 10
  )


@pytest.mark.parametrize("method", [Quantize.INT8, Quantize.NF4, pytest.param(Quantize.FP8, marks=pytest.mark.long)])
@pytest.mark.parametrize("shape", [(2, 256, 3), (1, 36, 5), (2, 8, 3), (2, 6, 3)], ids=str)
def test_words_hold_the_same_numbers(method, shape):
  kernel = quantize(jax.random.normal(jax.random.key(0), shape), method)
  words = in_words(kernel)
  can_pack = kernel.numbers.shape[-2] * tile_size(shape[1]) // shape[1] % 4 == 0
  assert words.numbers.dtype == (jnp.uint32 if can_pack else kernel.numbers.dtype)
  assert words.shape == kernel.shape and words.numbers.nbytes == kernel.numbers.nbytes
  np.testing.assert_array_equal(dequantize(words), dequantize(kernel))


def test_the_error_of_a_layer_is_that_of_all_its_kernels():
  """Relative: the root of the sum of squared errors, over that of squared weights."""
  error = QuantizationError()
  for layer, squares in ((1, (1.0, 100.0)), (0, (7.0, 4.0)), (0, (2.0, 32.0))):
    error.add(layer, np.array(squares))
  assert error.by_layer == pytest.approx([(9 / 36) ** 0.5, 0.1])


def test_odd_numbers_of_inputs_have_no_nf4():
  assert quantize(jnp.ones((7, 2)), Quantize.INT8).shape == (7, 2)
  with pytest.raises(UserError, match="7 inputs, an odd number"):
    quantize(jnp.ones((7, 2)), Quantize.NF4)


def test_a_trained_base_is_not_quantised(tiny_config):
  with pytest.raises(UserError, match="a base in int8 cannot be trained"):
    create_model(override(tiny_config, {"base.quantize": "int8"}))


class TestMemory:
  """The compiled step holds the base quantised, and one block of it in floats."""

  def compile(self, config, method):
    config = override(config, {"base.quantize": method})
    mesh = make_mesh({}, jax.devices()[:1])
    optimizers, spec = describe_training(config, mesh)
    step = make_train_step(config, spec, optimizers, mesh)
    return compile_step(step, spec, abstract_batch(config, transformer_config(config), mesh), mesh)[1], spec

  @pytest.mark.parametrize(
    "method",
    [
      pytest.param(Quantize.INT8, marks=pytest.mark.long),
      pytest.param(Quantize.FP8, marks=pytest.mark.long),
      Quantize.NF4,
    ],
  )
  def test_dequantisation_stays_in_the_loop(self, lora_config, method):
    shape = {"model.dim": 256, "model.ffn_dim": 1024, "model.num_layers": 12, "rows.per_batch": 1, "ema_decay": 0.0}
    found, spec = self.compile(override(lora_config, shape), str(method))
    kernels = [x for x in jax.tree.leaves(spec.abstract_frozen, is_leaf=is_quantized) if is_quantized(x)]
    in_floats = 4 * sum(int(np.prod(kernel.shape)) for kernel in kernels)
    assert found.weights < {Quantize.NF4: 0.2}.get(method, 0.32) * in_floats + 0.05 * in_floats
    assert found.activations < in_floats / 4  # hoisted, the kernels alone would take all of it

  @pytest.mark.long
  def test_dequantisation_stays_in_the_loop_of_a_tpu(self):
    pytest.importorskip("libtpu")
    done = subprocess.run([sys.executable, "-c", COMPILE_FOR_TPU], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr

  @pytest.mark.long
  @pytest.mark.parametrize("method", METHODS)
  def test_layers_add_none_of_their_kernels_in_floats(self, lora_config, method):
    """With the policy that keeps matrix products; a block's own temporary memory may be large."""
    shape = {"model.dim": 256, "model.ffn_dim": 1024, "model.remat": "dots", "rows.per_batch": 1, "ema_decay": 0.0}
    few, many = (
      self.compile(override(lora_config, shape | {"model.num_layers": count}), str(method))[0].activations
      for count in (4, 12)
    )
    assert many - few < 8 * 4 * (8 * 256**2 + 2 * 256 * 1024) / 4


@pytest.mark.long
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2, "context": 2}, {"data": 2, "fsdp": 4}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_meshes_equal_one_device(lora_config, sizes, method):
  config = override(lora_config, {"base.quantize": str(method)})
  row = packed_batch(config)
  loss, grads, _ = one_gradient(config, make_mesh({}, devices=jax.devices()[:1]), row)
  other_loss, other, spec = one_gradient(config, make_mesh(sizes), row)
  assert other_loss == pytest.approx(loss, rel=1e-5) and relative_error(other, grads) <= 1e-5
  kernel = spec.abstract_frozen["blocks"]["ffn"]["up"]["kernel"].numbers
  shards = np.prod([sizes.get(axis, 1) for axis in ("fsdp", "context", "tensor")])
  assert np.prod(kernel.sharding.shard_shape(kernel.shape)) * shards == kernel.size
