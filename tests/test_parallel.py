"""Private and experimental APIs of JAX that `parallel` relies on."""

import dataclasses
import signal

import jax
import numpy as np
import pytest
from jax._src import clusters
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from tests.commands import finish, free_port, start_python
from univid_jax.config.schema import MeshConfig
from univid_jax.parallel.mesh import local_mesh, make_mesh, row_shards
from univid_jax.parallel.processes import count_distinct, gather_arrays, wait_for_processes


@dataclasses.dataclass(frozen=True)
class Chip:
  """The attributes of a TPU that JAX reads to place it in a mesh."""

  id: int
  coords: tuple[int, int, int]
  core_on_chip: int = 0
  process_index: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v6 lite"


def test_mesh_axes_can_share_a_physical_axis():
  """`parallel.mesh` uses `mesh_utils.create_device_mesh` for allow_split_physical_axes, which jax.make_mesh lacks.

  Without it fsdp = 8 does not fit a v6e of 4 x 4. If the first call fails after an upgrade of JAX, the argument has
  moved; if the second stops raising, jax.make_mesh may do as well.
  """
  chips = [Chip(4 * y + x, (x, y, 0)) for y in range(4) for x in range(4)]
  assert mesh_utils.create_device_mesh((2, 8), chips, allow_split_physical_axes=True).shape == (2, 8)
  with pytest.raises(NotImplementedError):
    mesh_utils.create_device_mesh((2, 8), chips, allow_split_physical_axes=False)


def test_arrays_are_gathered_and_processes_wait():
  """`parallel.processes` uses multihost_utils' process_allgather and sync_global_devices, here with one process.

  Runs of two processes are tested in tests/test_train.py, which are slow.
  """
  mesh = make_mesh(MeshConfig(data=2, fsdp=4))
  assert row_shards(mesh) == 8
  x = np.arange(16, dtype=np.float32).reshape(8, 2)
  sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
  np.testing.assert_array_equal(gather_arrays({"x": sharded})["x"], x)
  np.testing.assert_array_equal(multihost_utils.process_allgather(sharded, tiled=True), x)
  multihost_utils.sync_global_devices("test")
  wait_for_processes("test")
  assert count_distinct(["a", "b", "a"]) == 2


def test_part_of_a_mesh_that_needs_no_other_process(monkeypatch):
  """The mesh itself if there is no other process, so that numbers stay as they are."""
  mesh = make_mesh({"data": 2, "tensor": 4})
  assert local_mesh(mesh) is mesh
  monkeypatch.setattr("jax.local_devices", lambda: jax.devices()[2:6])
  assert list(local_mesh(mesh).devices.flat) == jax.devices()[2:6] and local_mesh(mesh).shape["fsdp"] == 4


STORE = """
import sys
from univid_jax.parallel.processes import CoordinationStore, connect, disconnect

connect(f"127.0.0.1:{sys.argv[1]}", 1, 0, heartbeat_seconds=60)
store = CoordinationStore()
store.create("event/stop", "first")
store.create("event/stop", "second")
store.replace("event/beat", "1")
store.replace("event/beat", "2")
store.create("other", "x")
assert dict(store.read("event")) == {"stop": "first", "beat": "2"}, store.read("event")
assert dict(store.read("nothing")) == {}
disconnect()
"""


def test_the_coordination_service_stores_text():
  """`parallel.processes` uses jax._src.distributed.global_state.client: key_value_set (which raises ALREADY_EXISTS or
  overwrites) and key_value_dir_get.

  Without them processes do not hear of each other's signals, failures and deaths. JAX has no public access to the
  service; orbax.checkpoint.multihost uses the same object.
  """
  done = finish(start_python("-c", STORE, free_port()))
  assert done.returncode == 0, done.stderr


def test_clusters_are_detected(monkeypatch):
  """`parallel.processes` asks JAX for the address of process 0 itself, because its relay has to know it."""
  variables = dict(JOB_ID=7, STEP_NODELIST="node[3-4]", NTASKS=2, PROCID=1, LOCALID=0, STEP_NUM_NODES=2)
  for name, value in variables.items():
    monkeypatch.setenv(f"SLURM_{name}", str(value))
  found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 10)
  (address, *numbers) = found
  assert address.rpartition(":")[0] == "node3" and address.rpartition(":")[2].isdigit()
  assert numbers == [2, 1, [0]]


ALONE = """
import sys, time
import jax

jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
print(flush=True)
time.sleep(60)
"""


@pytest.mark.long
def test_jax_aborts_when_process_0_dies():
  """The reason for `parallel.relay`. If the second process survives, or ends without a stack trace, that can go."""
  port = free_port()
  first, second = (start_python("-c", ALONE, port, index) for index in (0, 1))
  for process in (first, second):
    process.stdout.readline()
  first.kill()
  finish(first)
  done = finish(second)
  assert done.returncode == -signal.SIGABRT and "stack trace" in done.stderr
