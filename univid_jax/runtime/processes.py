"""Communication between the processes of a run; the only module that uses JAX's private and experimental APIs for it.

Private, and checked by tests/test_parallel.py: the client of the coordination service, which stores text by key, and
the detection of clusters.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

from univid_jax.core.errors import UserError, first_line
from univid_jax.runtime.peers import ADVICE, Peers
from univid_jax.runtime.relay import Relay

# Seconds that may pass between the starts of processes.
START_TIMEOUT = 300

# JAX's own watchdog aborts a process with a stack trace, so it reacts this many seconds later than ours.
SECOND_WATCHDOG = 60

# Parts of the messages of errors that the end of another process may cause.
_SIGNS = (
  "Gloo",
  "NCCL",
  "UNAVAILABLE",
  "DEADLINE_EXCEEDED",
  "ABORTED",
  "barrier",
  "Barrier",
  "Connection",
  "collective",
)


def count_cluster_processes() -> int:
  """Returns the number of processes of the cluster that JAX detects; 1 outside of clusters.

  JAX detects TPU slices (on Google Cloud by the metadata server, which only machines with TPUs ask, and on GKE),
  SLURM's `srun`, Open MPI's `mpirun` and, with the package `kubernetes`, the pods of indexed Jobs.

  Raises:
    UserError: JAX detects a cluster, but cannot read its description.
  """
  with _explain_detection():
    for cluster in clusters.ClusterEnv._cluster_types:
      if cluster.opt_in_only_method or (cluster is clusters.K8sCluster and _JOB_INDEX not in os.environ):
        continue  # JAX needs the index; without it, as in a notebook's pod, it would ask for permissions and then fail
      if cluster.is_env_present():
        return cluster.get_process_count()
  return 1


# The variable of pods of an indexed Job in Kubernetes.
_JOB_INDEX = "JOB_COMPLETION_INDEX"


@contextlib.contextmanager
def _explain_detection() -> Iterator[None]:
  """Turns whatever JAX and its libraries raise while they detect a cluster into a UserError."""
  try:
    yield
  except Exception as error:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise UserError(
      f"JAX could not find out which processes of this cluster belong together ({reason}); give "
      "--coordinator=HOST:PORT, --num_processes and --process_id, or set TPU_SKIP_MDS_QUERY=1 on a single machine with "
      "TPUs"
    ) from error


def connect(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  heartbeat_seconds: int,
  on_loss: Callable[[str], None] = lambda message: None,
) -> Peers:
  """Joins the other processes of the run.

  Args:
    coordinator: HOST:PORT of process 0; this and the next two are None in a cluster that JAX detects.
    num_processes: number of processes of the run.
    process_id: index of this process.
    heartbeat_seconds: silence after which a process counts as dead.
    on_loss: called with a message, from another thread, if process 0 ends while this process waits for the others. JAX
      itself would keep waiting.

  Raises:
    UserError: they cannot be reached.
  """
  devices = _choose_devices()
  if coordinator is None:
    with _explain_detection():
      coordinator, num_processes, process_id, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, devices, None, START_TIMEOUT
      )
  joined = threading.Event()

  def report_loss() -> None:
    if not joined.is_set():  # later the peers report it
      on_loss(f"process 0 at {coordinator} ended before all processes had joined; {ADVICE}")

  relay = Relay(coordinator, report_loss) if coordinator and process_id else None
  try:
    jax.distributed.initialize(
      relay.address if relay else coordinator,
      num_processes,
      process_id,
      local_device_ids=devices,
      cluster_detection_method="deactivate",  # already done
      initialization_timeout=START_TIMEOUT,
      heartbeat_timeout_seconds=2 * heartbeat_seconds + SECOND_WATCHDOG,
    )
  except RuntimeError as error:
    reason = first_line(error)
    raise UserError(
      f"process {process_id} of {num_processes} could not join the others at {coordinator}: {reason}"
    ) from error
  joined.set()
  assert num_processes is not None and process_id is not None, "known by now"
  return Peers(
    CoordinationStore(),
    index=process_id,
    count=num_processes,
    heartbeat_seconds=heartbeat_seconds,
    is_cut_off=relay.lost.is_set if relay else lambda: False,
  )


def _choose_devices() -> list[int] | None:
  """Returns the GPUs of this process, chosen as JAX does; None for all.

  They are those in JAX_LOCAL_DEVICE_IDS, or one for each process of SLURM or Open MPI on a machine.
  """
  if given := os.environ.get("JAX_LOCAL_DEVICE_IDS"):
    if not all(device.strip().isdecimal() for device in given.split(",")):
      raise UserError(f"JAX_LOCAL_DEVICE_IDS must be numbers, separated by commas, got {given!r}")
    return [int(device) for device in given.split(",")]
  for cluster in (clusters.OmpiCluster, clusters.SlurmCluster):
    with _explain_detection():
      if cluster.is_env_present() and (device := cluster.get_local_process_id()) is not None:
        return [device]
  return None


def disconnect() -> None:
  """Disconnects from the other processes; returns when all have called it."""
  jax.distributed.shutdown()


class CoordinationStore:
  """`peers.Store` in JAX's coordination service."""

  def __init__(self):
    client = distributed.global_state.client
    assert client is not None, "the processes are connected"
    self._client = client

  def create(self, key: str, value: str) -> None:
    try:
      self._client.key_value_set(_PREFIX + key, value)
    except jax.errors.JaxRuntimeError as error:
      if "ALREADY_EXISTS" not in str(error):
        raise

  def replace(self, key: str, value: str) -> None:
    self._client.key_value_set(_PREFIX + key, value, allow_overwrite=True)

  def read(self, folder: str) -> Mapping[str, str]:
    prefix = f"{_PREFIX}{folder}/"
    return {key.removeprefix(prefix): value for key, value in self._client.key_value_dir_get(prefix)}


_PREFIX = "univid_jax/"


def may_come_from_another_process(error: BaseException) -> bool:
  """Returns whether the end of another process may have caused an error."""
  return not isinstance(error, UserError) and any(sign in str(error) for sign in _SIGNS)


def gather_arrays(tree: Any) -> Any:
  """Returns sharded arrays as whole NumPy arrays, on every process; all processes must call it."""

  def gather(x: jax.Array) -> np.ndarray:
    return jax.device_get(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(gather, tree)


def sum_over_processes(value: int) -> int:
  """Returns the sum of a number over all processes; all processes must call it."""
  if jax.process_count() == 1:
    return value
  return int(np.sum(multihost_utils.process_allgather(np.int64(value))))


def count_distinct(values: Iterable[str]) -> int:
  """Returns how many different texts the processes have in total; all processes must call it."""
  hashes = [int.from_bytes(hashlib.blake2b(value.encode(), digest_size=4).digest()) >> 1 for value in set(values)]
  if jax.process_count() == 1:
    return len(hashes)
  most = int(np.max(multihost_utils.process_allgather(np.int32(len(hashes)))))
  padded = np.full(most, -1, np.int32)
  padded[: len(hashes)] = hashes
  return len(set(multihost_utils.process_allgather(padded).ravel().tolist()) - {-1})


def wait_for_processes(name: str) -> None:
  """Blocks until all processes have called this with the same name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
