"""What one run of several processes exchanges. The only module that uses jax.experimental.multihost_utils."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh


def gather_arrays(tree: Any) -> Any:
  """Returns sharded arrays as whole NumPy arrays, on every process; all processes must call it."""

  def gather(x: jax.Array) -> np.ndarray:
    return jax.device_get(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(gather, tree)


def local_rows(x: np.ndarray, mesh: Mesh) -> np.ndarray:
  """Returns this process's rows of a batch for a mesh, whose devices may be this process's alone."""
  processes = sorted({device.process_index for device in mesh.devices.flat})
  count, place = len(x) // len(processes), processes.index(jax.process_index())
  return x[place * count : (place + 1) * count]


def sum_over_processes(value: int) -> int:
  """Returns the sum of a number over all processes; all processes must call it."""
  if jax.process_count() == 1:
    return value
  return int(np.sum(multihost_utils.process_allgather(np.int64(value))))


def wait_for_processes(name: str) -> None:
  """Blocks until all processes have called this with the same name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
