"""Start of runs with several processes, and the lock of the folder that a command writes.

On TPU slices, under SLURM, Open MPI and Kubernetes JAX finds the other processes itself; see
`runtime.processes.count_cluster_processes`. Elsewhere every process is given the address of process 0, the number of
processes and its own number.
"""

import logging

from univid_jax.cli.flags import ProcessFlags, UsageError
from univid_jax.core import lock
from univid_jax.core.paths import refuse_other_buckets
from univid_jax.runtime import supervisor


def start_processes(flags: ProcessFlags, *, writes: str | None = None) -> None:
  """Joins the other processes, if there are any, and locks a folder; call before JAX is used.

  Args:
    flags: of the command.
    writes: the folder, if no two commands may write to it at the same time; locked until the command ends.

  Raises:
    UsageError: only some of the flags are given.
    UserError: another command writes to the folder, it is in another bucket than gs://, or the other processes cannot
      be found or reached.
  """
  given = flags.given
  if any(given) and not all(given):
    raise UsageError("--coordinator, --num_processes and --process_id must be given together")
  index, count = flags.process_id.value or 0, flags.num_processes.value or 0
  if all(given) and index >= count:
    raise UsageError(f"--process_id={index} must be less than --num_processes={count}")
  if writes:
    refuse_other_buckets(writes, "workdirs and results of evaluations")
  from univid_jax.runtime import processes  # imports JAX

  if not any(given) and processes.count_cluster_processes() == 1:
    _lock(writes, 0)
    return
  if all(given):
    _hide_status(index)
    _lock(writes, index)  # before joining, so that a command that is started twice does not disturb the first
  peers = processes.connect(
    flags.coordinator.value,
    flags.num_processes.value,
    flags.process_id.value,
    heartbeat_seconds=flags.heartbeat_seconds.value,
    on_loss=supervisor.current().end,
  )
  _hide_status(peers.index)
  supervisor.current().join(peers, processes.disconnect)
  if not all(given):
    _lock(writes, peers.index)


def _lock(folder: str | None, process: int) -> None:
  if folder is not None:
    running = supervisor.current()
    running.resources.enter_context(lock.hold(folder, process=process, on_loss=running.end))


def _hide_status(process: int) -> None:
  """Leaves status messages to process 0; warnings of the others say which process they are of."""
  if process:
    log = logging.getLogger("univid_jax")
    log.setLevel(logging.WARNING)
    for handler in log.handlers:
      handler.setFormatter(logging.Formatter(f"process {process}: %(message)s"))
