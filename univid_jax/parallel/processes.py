"""Several processes as one run: what the commands share to find each other.

On TPU pod slices and under SLURM or Kubernetes JAX finds the others by itself; elsewhere each process is told where the first one
listens, how many there are and which it is.
"""

import os

from absl import flags

COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT where process 0 listens, for runs of several processes.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are, with --coordinator.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0, with --coordinator.", lower_bound=0)


def start_processes() -> None:
  """Joins the other processes, where there are any; call before JAX is used.

  Raises:
    ValueError: only some of the flags are given.
  """
  import jax
  given = [flag.value is not None for flag in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)]
  if all(given):
    jax.distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
  elif any(given):
    raise ValueError("--coordinator, --num_processes and --process_id belong together")
  elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
    jax.distributed.initialize()
