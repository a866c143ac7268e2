"""What univid_jax relies on of jax.experimental.topologies and libtpu.

If one of these tests fails after an upgrade, `univid_jax.forecast --topology` and benchmarks/scaling.py cannot compile
for TPUs that are not here, and platform/topologies.py has to be adapted; training and sampling, also on TPUs, are not
affected. Those that need libtpu run where it is installed.
"""

import inspect
import subprocess
import sys

import jax
import pytest
from jax.experimental import topologies

from univid_jax.core.errors import UserError
from univid_jax.platform.topologies import describe_devices, find_topology, use_tpu_compiler

# In a process of its own, because JAX has to be prepared before its first import.
COMPILE = """
import math
from univid_jax.core.errors import UserError
from univid_jax.platform.topologies import SLICES, describe_devices, use_tpu_compiler
use_tpu_compiler()
for wrong in ("v9:2x2", "v5e:3x5", "v5e:1x3", "v5e:0x1", "v5e", "v5e:", "v5e:axb", "v5e:-1x2", "v5e:2x2x2", "v5p:2x2"):
  try:
    describe_devices(wrong)
    raise AssertionError(wrong)
  except UserError as error:
    assert "v5e:2x4" in str(error) and "\\n" not in str(error), error
for chip, sizes in {"v5e": ["1x2", "2x1", "4x2"], "v6e": ["1x2"], "v5p": ["1x2x1", "2x1x1"]}.items():
  for size in [*SLICES[chip], *sizes]:
    devices = describe_devices(f"{chip}:{size}")
    assert len(devices) == math.prod(map(int, size.split("x"))), (chip, size)

import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from univid_jax.parallel.mesh import make_mesh
from univid_jax.platform.chips import find_chip
from univid_jax.platform.current import Platform, current_platform
devices = describe_devices("v5e:2x2")
assert len(devices) == 4 and all(device.platform == "tpu" and find_chip(device) for device in devices)
mesh = make_mesh({"fsdp": 4}, devices)
x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
with jax.set_mesh(mesh):
  assert current_platform() == Platform.TPU
  program = jax.jit(lambda x: jnp.sum((x @ x) @ x.T)).lower(x).compile()
assert program.memory_analysis().temp_size_in_bytes >= 0
assert program.memory_analysis().argument_size_in_bytes == 1024 * 1024 * 2 // 4
assert "all-" in program.as_text()
"""


def test_topologies_take_these_arguments():
  assert {"platform", "topology_name"} <= set(inspect.signature(topologies.get_topology_desc).parameters)
  assert "devices" in inspect.signature(topologies.TopologyDescription).parameters


def test_without_libtpu(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(UserError, match=r"libtpu: pip install -e .*\[tpu\]"):
    use_tpu_compiler()


def test_unknown_topologies_are_user_errors(monkeypatch):
  def reject(**_):
    raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Invalid TPU external name: TPU v9")

  monkeypatch.setattr(topologies, "get_topology_desc", reject)
  with pytest.raises(UserError, match=r"'v9:2x2' is not a topology .* such as v5e:2x4.*: Invalid TPU external name"):
    describe_devices("v9:2x2")


def test_v4_is_refused():
  with pytest.raises(UserError, match="'v4:2x2x2': libtpu describes the two cores of a v4"):
    describe_devices("v4:2x2x2")


def test_number_of_chips():
  assert find_topology("v5e", 16) == "v5e:4x4" and find_topology("v5p", 1) == "v5p:1x1x1"
  with pytest.raises(UserError, match=r"no slice of 3 v6e; the nearest have 1 \(v6e:1x1\) and 4 \(v6e:2x2\)"):
    find_topology("v6e", 3)
  with pytest.raises(UserError, match=r"the nearest have 256 \(v5e:16x16\)$"):
    find_topology("v5e", 300)


@pytest.mark.long
def test_programs_compile_without_a_tpu():
  pytest.importorskip("libtpu")
  done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
