"""Private and experimental APIs of JAX that `parallel` relies on."""

import dataclasses
import signal
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from tests.commands import finish, free_port, run_command, start_python
from univid_jax.config.schema import MeshConfig
from univid_jax.core.errors import UserError
from univid_jax.parallel.mesh import local_mesh, make_mesh, row_shards
from univid_jax.runtime.processes import (
  connect,
  count_cluster_processes,
  count_distinct,
  gather_arrays,
  wait_for_processes,
)


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
  """`runtime.processes` uses multihost_utils' process_allgather and sync_global_devices, here with one process.

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
from univid_jax.runtime.processes import CoordinationStore, connect, disconnect

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
  """`runtime.processes` uses jax._src.distributed.global_state.client: key_value_set (which raises ALREADY_EXISTS or
  overwrites) and key_value_dir_get.

  Without them processes do not hear of each other's signals, failures and deaths. JAX has no public access to the
  service; orbax.checkpoint.multihost uses the same object.
  """
  done = finish(start_python("-c", STORE, free_port()))
  assert done.returncode == 0, done.stderr


SLURM = {
  f"SLURM_{name}": str(value)
  for name, value in dict(JOB_ID=7, STEP_NODELIST="node[3-4]", NTASKS=2, PROCID=1, LOCALID=0, STEP_NUM_NODES=2).items()
}
OPEN_MPI = {
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
  **{f"OMPI_COMM_WORLD_{name}": value for name, value in dict(SIZE="3", RANK="1", LOCAL_RANK="1").items()},
}


class TestClusters:
  """`runtime.processes` uses jax._src.clusters: ClusterEnv's _cluster_types, opt_in_only_method, is_env_present,
  get_process_count and auto_detect_unset_distributed_params; K8sCluster; and of SlurmCluster and OmpiCluster
  get_local_process_id.

  JAX tells nobody whether it would find other processes, nor the address of process 0, which the relay has to know. If
  these tests fail after an upgrade, commands in clusters fail or believe that they are alone; with --coordinator,
  --num_processes and --process_id only `_choose_devices` is used.
  """

  @pytest.fixture(autouse=True)
  def outside(self, monkeypatch):
    """No cluster; variables of a test come on top."""
    tpus = (f"TPU_{name}" for name in ("WORKER_HOSTNAMES", "PROCESS_ADDRESSES", "WORKER_ID"))
    others = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX", "JAX_LOCAL_DEVICE_IDS", "JAX_COORDINATOR_ADDRESS")
    for name in (*SLURM, *OPEN_MPI, *tpus, *others):
      monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cloud_tpu_cluster.BaseTpuCluster, "wait_for_coordinator", lambda *_: None)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", self.refuse)

  @staticmethod
  def refuse(key):
    raise ConnectionError(f"no metadata server has been asked for {key},\nwhich takes minutes")

  class Relay:
    """`relay.Relay` without connections."""

    def __init__(self, address, on_loss):
      self.address, self.lost = address, threading.Event()

  def set_variables(self, monkeypatch, variables):
    for name, value in variables.items():
      monkeypatch.setenv(name, value)

  @pytest.mark.parametrize(
    "variables, count",
    [
      ({}, 1),
      ({"SLURM_NTASKS": "4"}, 1),  # outside of srun
      (SLURM, 2),
      (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, 1),
      (OPEN_MPI, 3),
      ({"TPU_WORKER_HOSTNAMES": "a,b"}, 1),  # without TPUs
      ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 1),  # any pod
    ],
    ids=str,
  )
  def test_without_tpus(self, monkeypatch, variables, count):
    self.set_variables(monkeypatch, variables)
    assert count_cluster_processes() == count
    if "KUBERNETES_SERVICE_HOST" not in variables:
      found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 10)
      assert (found[1] or 1) == count

  @pytest.mark.parametrize(
    "variables, metadata, count",
    [
      ({"TPU_PROCESS_ADDRESSES": "a:8476,b:8476", "TPU_WORKER_ID": "1"}, {}, 2),
      ({"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "1"}, {}, 3),
      ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, {}, 1),
      ({}, {"agent-worker-number": "2", "worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2,c:2:10.0.0.3"}, 3),
      ({}, {"agent-worker-number": "0", "worker-network-endpoints": "10.0.0.1"}, 1),
    ],
    ids=str,
  )
  @pytest.mark.filterwarnings("ignore:.maxsplit. is passed:DeprecationWarning")  # in JAX 0.12 on Python 3.13
  def test_on_tpus(self, monkeypatch, variables, metadata, count):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    self.set_variables(monkeypatch, variables | {"TPU_SKIP_MDS_QUERY": "1"})
    if metadata:
      monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    answers = {"tpu-env": "ZONE: 'here'", **metadata}
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (answers[key], 200))
    assert count_cluster_processes() == count
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 10)
    assert found[1] == count and str(found[2]) == variables.get("TPU_WORKER_ID", metadata.get("agent-worker-number"))

  def test_pods_of_an_indexed_job(self, monkeypatch):
    self.set_variables(monkeypatch, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"})
    monkeypatch.setattr(clusters.K8sCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(clusters.K8sCluster, "_job", lambda: SimpleNamespace(spec=SimpleNamespace(parallelism=4)))
    assert count_cluster_processes() == 4 and clusters.K8sCluster.get_process_id() == 1

  def test_what_cannot_be_found_is_one_line(self, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    with pytest.raises(UserError, match=r"ConnectionError: no metadata .* minutes\); give --coordinator") as caught:
      count_cluster_processes()
    assert "\n" not in str(caught.value)
    self.set_variables(monkeypatch, SLURM | {"SLURM_PROCID": "first"})
    with pytest.raises(UserError, match=r"invalid literal for int.*'first'.*; give --coordinator"):
      connect(None, None, None, heartbeat_seconds=60)

  @pytest.mark.parametrize(
    "variables, devices, given",
    [
      ({}, None, True),
      *((SLURM, [0], given) for given in (True, False)),
      *((OPEN_MPI, [1], given) for given in (True, False)),
      *((SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1,2"}, [0, 1, 2], given) for given in (True, False)),
    ],
    ids=str,
  )
  def test_what_jax_is_told(self, monkeypatch, variables, devices, given):
    """The same with the flags, which ask no metadata server and need no cluster."""
    self.set_variables(monkeypatch, variables)
    monkeypatch.setattr("univid_jax.runtime.processes.CoordinationStore", lambda: None)
    monkeypatch.setattr("univid_jax.runtime.processes.Relay", self.Relay)
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *args, **options: calls.append((args, options)))
    connect(*(("10.0.0.1:80", 2, 0) if given else (None,) * 3), heartbeat_seconds=60)
    (((address, count, index), options),) = calls
    assert options["local_device_ids"] == devices and options["cluster_detection_method"] == "deactivate"
    if given:
      assert (address, count, index) == ("10.0.0.1:80", 2, 0)
    else:
      assert address.rpartition(":")[0] == ("node3" if variables.keys() & SLURM.keys() else "10.96.0.1")
      assert (count, index) == ((2, 1) if variables.keys() & SLURM.keys() else (3, 1))


@pytest.mark.parametrize(
  "variables, error",
  [
    ({"SLURM_NTASKS": "4"}, ""),
    (SLURM | {"SLURM_NTASKS": "many"}, "error: JAX could not find out which processes of this cluster belong together"),
  ],
)
def test_commands_in_a_cluster(tmp_path, monkeypatch, variables, error):
  """One that JAX finds in no cluster runs alone; one in a cluster that cannot be read ends with a line."""
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  done = run_command("tests.loop_command", f"--workdir={tmp_path}", "--steps=1")
  assert done.returncode == bool(error) and done.stderr.startswith(error) and done.stderr.count("\n") == bool(error)


ALONE = """
import sys, time
import jax

jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
print(flush=True)
time.sleep(60)
"""


@pytest.mark.long
def test_jax_aborts_when_process_0_dies():
  """The reason for `runtime.relay`. If the second process survives, or ends without a stack trace, that can go."""
  port = free_port()
  first, second = (start_python("-c", ALONE, port, index) for index in (0, 1))
  for process in (first, second):
    process.stdout.readline()
  first.kill()
  finish(first)
  done = finish(second)
  assert done.returncode == -signal.SIGABRT and "stack trace" in done.stderr
