"""The forms of a computation for one platform equal the general ones, and are used on that platform only."""

import functools
import platform
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from tests.helpers import relative_error
from univid_jax.codecs import vae_layers
from univid_jax.config.schema import LoRAConfig
from univid_jax.inference import batch_size
from univid_jax.models import lora, rope
from univid_jax.models.dit_blocks import project_to_heads
from univid_jax.models.layers import Linear
from univid_jax.platform import cpu, tpu
from univid_jax.platform.current import Platform, current_platform
from univid_jax.platform.machine_memory import available_memory

TPU_MESH = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice("TPU v5 lite", 1, "tpu"))


def traced_operations(function, *args, platform):
  """Returns the program of a function and its gradient as text, traced for a platform."""
  gradient = jax.make_jaxpr(lambda *args: (function(*args), jax.grad(lambda *args: jnp.sum(function(*args)))(*args)))
  if platform == Platform.CPU:
    return str(gradient(*args))
  with use_abstract_mesh(TPU_MESH):
    return str(gradient(*args))


def test_platform_is_that_of_the_mesh():
  assert current_platform() == Platform.CPU
  with use_abstract_mesh(TPU_MESH):
    assert current_platform() == Platform.TPU


def test_pairs_are_swapped_by_a_product_on_tpus_only():
  x, table = jnp.ones((1, 3, 2, 8)), jnp.ones((1, 3, 1, 8))
  program = {
    platform: traced_operations(lambda x: rope.rotate(x, table, table), x, platform=platform)
    for platform in (Platform.CPU, Platform.TPU)
  }
  assert "dot_general" in program[Platform.TPU] and "dot_general" not in program[Platform.CPU]


@pytest.mark.parametrize("adapted", [True, False])
def test_sums_with_an_adapter_are_behind_a_barrier_on_tpus_only(adapted):
  linear = Linear(8, 8, dims=(None, None), rngs=nnx.Rngs(0))
  if adapted:
    linear.lora = lora.LoRA(linear.kernel, LoRAConfig(rank=2), dtype=jnp.float32, rngs=nnx.Rngs(0))
  has_barrier = {
    platform: "optimization_barrier"
    in traced_operations(lambda x: project_to_heads(linear, x, 2), jnp.ones((1, 3, 8)), platform=platform)
    for platform in (Platform.CPU, Platform.TPU)
  }
  assert has_barrier == {Platform.CPU: False, Platform.TPU: adapted}
  np.testing.assert_array_equal(tpu.materialize(jnp.ones(3)), jnp.ones(3))


def test_adapters_have_their_own_gradient_on_cpus_only():
  linear = Linear(6, 4, dims=(None, None), rngs=nnx.Rngs(0))
  adapter = lora.LoRA(linear.kernel, LoRAConfig(rank=2), dtype=jnp.float32, rngs=nnx.Rngs(0))
  program = {
    platform: traced_operations(adapter, jnp.ones((3, 6)), platform=platform)
    for platform in (Platform.CPU, Platform.TPU)
  }
  assert "custom_vjp" in program[Platform.CPU] and "custom_vjp" not in program[Platform.TPU]


def test_gradient_of_adapters_on_cpus_equals_the_general_one():
  rng = np.random.default_rng(0)
  x, up, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 3), (3, 7), (2, 5, 7)))
  ours, general = (
    jax.grad(lambda x, up: jnp.sum(product(x, up) * weight), (0, 1))(x, up)  # noqa: B023
    for product in (cpu.project_up, jnp.matmul)
  )
  for a, b in zip(ours, general):
    assert relative_error(a, b) <= 1e-6


@pytest.mark.parametrize("dtype, with_ynnpack", [(jnp.float32, False), (jnp.bfloat16, True)])
def test_training_on_cpus_multiplies_with_ynnpack_in_bfloat16_only(dtype, with_ynnpack):
  """Where JAX multiplies by YNNPACK; once it does not, the option is not needed any more."""
  x = jnp.ones((256, 256), dtype)
  default, ours = (
    jax.jit(lambda x: cpu.tensordot(x, x, 1), compiler_options=options).lower(x).compile().as_text()
    for options in (None, cpu.compiler_options(dtype))
  )
  if (sys.platform, platform.machine()) == ("linux", "x86_64"):
    assert "__ynn_fusion" in default
    assert ("__ynn_fusion" in ours) == with_ynnpack


@pytest.mark.parametrize("heads", [False, True])
def test_products_of_bfloat16_on_cpus_sum_in_float32_and_equal_the_general_ones(heads):
  rng = np.random.default_rng(0)
  x, kernel, weight = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((2, 5, 48), (48, 24), (2, 5, 24)))
  if heads:  # two dims on each side
    x, kernel, weight = x.reshape(2, 5, 6, 8), kernel.reshape(6, 8, 4, 6), weight.reshape(2, 5, 4, 6)

  def out_and_gradients(product, x, kernel, weight):
    out, vjp = jax.vjp(lambda x, kernel: product(x, kernel, 2 if heads else 1), x, kernel)
    return out, *vjp(weight)

  ours = functools.partial(out_and_gradients, cpu.tensordot)
  exact = out_and_gradients(jnp.tensordot, *(a.astype(jnp.float32) for a in (x, kernel, weight)))
  for a, b in zip(ours(x, kernel, weight), exact, strict=True):
    assert a.dtype == jnp.bfloat16 and a.shape == b.shape
    assert relative_error(a.astype(jnp.float32), b) <= 4e-3  # half a unit in the last place
  products = [e for e in jax.make_jaxpr(ours)(x, kernel, weight).jaxpr.eqns if e.primitive.name == "dot_general"]
  assert len(products) >= 2
  for product in products:
    assert [v.aval.dtype for v in (*product.invars, *product.outvars)] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize(
  "kernel, strides, padding, zero_frames",
  [
    ((3, 3, 3), (1, 1, 1), 1, 2),
    ((3, 1, 1), (2, 1, 1), 0, 0),
    ((1, 3, 3), (1, 2, 2), 0, 0),
    ((1, 1, 1), (1, 1, 1), 0, 0),
  ],
  ids=["causal", "halves time", "halves y and x", "1 x 1 x 1"],
)
def test_convolutions_on_cpus_equal_the_general_ones(monkeypatch, kernel, strides, padding, zero_frames):
  rngs, x = nnx.Rngs(0), jnp.asarray(np.random.default_rng(0).normal(size=(5, 7, 9, 4)), jnp.float32)
  options = dict(strides=strides, padding=padding, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)
  conv = vae_layers.Convolution(4, 6, kernel, **options)
  out = conv.convolve(x, zero_frames=zero_frames)
  monkeypatch.setattr(vae_layers, "current_platform", lambda: Platform.OTHER)
  assert relative_error(out, conv.convolve(x, zero_frames=zero_frames)) <= 1e-6


def test_positions_are_repeated_by_windows_on_tpus_only():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 4)), jnp.float32)
  times = dict(frames=2, rows=1, columns=2)
  general = vae_layers.repeat_positions(x, **times)
  np.testing.assert_array_equal(general, np.repeat(np.repeat(x, 2, axis=0), 2, axis=2))
  np.testing.assert_array_equal(tpu.repeat(x, (2, 1, 2, 1)), general)
  program = {
    platform: traced_operations(lambda x: vae_layers.repeat_positions(x, **times), x, platform=platform)
    for platform in (Platform.CPU, Platform.TPU)
  }
  assert "reduce_window" in program[Platform.TPU] and "reduce_window" not in program[Platform.CPU]


class TestAvailableMemory:
  """Of a machine whose /proc and /sys are in a folder."""

  @staticmethod
  def write(root, files):
    for name, text in {"proc/meminfo": "MemTotal: 64000 kB\nMemFree: 100 kB\nMemAvailable: 8000 kB\n", **files}.items():
      (root / name).parent.mkdir(parents=True, exist_ok=True)
      (root / name).write_text(text)

  def test_page_cache_is_available(self, tmp_path):
    self.write(tmp_path, {"proc/self/cgroup": "0::/session\n", "sys/fs/cgroup/session/memory.max": "max\n"})
    assert available_memory(tmp_path) == 8000 * 1024

  def test_there_is_none_elsewhere(self, tmp_path):
    """As on macOS, where the kernel has no such files."""
    assert available_memory(tmp_path) is None

  @pytest.mark.parametrize(
    "groups, files, left",
    [
      (  # the limit of a parent counts, and the files that it caches do not
        "0::/job/step\n",
        {
          "job/memory.max": "5000000",
          "job/memory.current": "4000000",
          "job/memory.stat": "anon 9\ninactive_file 500000\n",
          "job/step/memory.max": "max",
          "job/step/memory.current": "10",
        },
        1_500_000,
      ),
      ("0::/\n", {"memory.max": "2000000", "memory.current": "3000000"}, 0),
      (
        "5:cpu:/a\n4:memory:/docker/b\n0::/docker/b\n",  # a container with version 1 sees its group at the root
        {
          "memory/memory.limit_in_bytes": "4000000",
          "memory/memory.usage_in_bytes": "1000000",
          "memory/memory.stat": "total_inactive_file 250000\n",
        },
        3_250_000,
      ),
      (
        "4:memory:/\n",
        {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "1"},
        8_192_000,
      ),
    ],
  )
  def test_limits_of_control_groups(self, groups, files, left, tmp_path):
    groups_files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    self.write(tmp_path, {"proc/self/cgroup": groups, **groups_files})
    assert available_memory(tmp_path) == left

  def test_automatic_batches_use_it(self, monkeypatch):
    """Where it is unknown, too, which was an error on macOS."""
    device = jax.devices("cpu")[0]
    for available, expected in ((None, None), (8_000, 8_000 // jax.local_device_count("cpu"))):
      monkeypatch.setattr(batch_size, "available_memory", lambda available=available: available)
      assert batch_size.free_memory(device) == expected
