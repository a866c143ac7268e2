"""Start and end of runs with several processes.

On TPU pod slices, under SLURM and under Kubernetes JAX finds the other processes itself. Elsewhere every process is
given the address of process 0, the number of processes and its own number.
"""

import logging
import os
import sys

from univid_jax.cli.flags import ProcessFlags, UsageError

# How long a process that fails waits for the others before it ends the run. Processes that succeed have no limit: they
# wait for each other first.
SHUTDOWN_TIMEOUT = 60


def start_processes(flags: ProcessFlags) -> None:
  """Joins the other processes, if there are any; call before JAX is used.

  Raises:
    UsageError: only some of the flags are given.
  """
  import jax

  address = {
    "coordinator_address": flags.coordinator.value,
    "num_processes": flags.num_processes.value,
    "process_id": flags.process_id.value,
  }
  given = [value is not None for value in address.values()]
  if any(given) and not all(given):
    raise UsageError("--coordinator, --num_processes and --process_id must be given together")
  if not any(given) and not _is_cluster():
    return
  jax.distributed.initialize(**address, shutdown_timeout_seconds=SHUTDOWN_TIMEOUT)
  if jax.process_index() > 0:
    logging.getLogger("univid_jax").setLevel(logging.WARNING)


def _is_cluster() -> bool:
  hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
  return len(hosts) > 1 or int(os.environ.get("SLURM_NTASKS", "1")) > 1


def wait_for_all() -> None:
  """Waits until all processes of the run have come here; returns at once in a run of one process."""
  jax = sys.modules.get("jax")
  if jax is None or not jax.distributed.is_initialized():
    return
  from univid_jax.parallel.processes import wait_for_processes

  wait_for_processes("the command is done")
