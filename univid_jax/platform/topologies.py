"""TPUs that need not be here: their compiler runs on a CPU. The only module that uses `jax.experimental.topologies`.

tests/test_topologies.py fails if an upgrade of JAX or libtpu changes what this relies on.
"""

import importlib.resources
import os
from collections.abc import Sequence

from univid_jax.core.errors import UserError
from univid_jax.platform.chips import Device


def use_tpu_compiler() -> None:
  """Prepares JAX, before its first import, to compile for a TPU on this machine's CPU.

  Raises:
    UserError: libtpu is not installed.
  """
  try:
    library = importlib.resources.files("libtpu") / "libtpu.so"
  except ModuleNotFoundError as error:
    raise UserError("compiling for a TPU needs its compiler: pip install libtpu") from error
  os.environ["TPU_LIBRARY_PATH"] = str(library)
  os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}


def describe_devices(topology: str) -> Sequence[Device]:
  """Returns descriptions of the chips of a topology that libtpu knows, such as v5e:2x4.

  Raises:
    UserError: libtpu does not know it.
  """
  import jax  # after `use_tpu_compiler`
  from jax.experimental import topologies

  # libtpu takes four chips for a host, unless it is told that there is only one.
  options = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).removeprefix("INVALID_ARGUMENT: ")
    raise UserError(
      f"{topology!r} is not a topology of TPUs that libtpu knows, such as v5e:2x4, v5p:2x2x2 or v6e:2x4: {reason}"
    ) from error
