"""Arrays in host memory, which programs fetch to their devices when they need them."""

from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from univid_jax.core.errors import UserError
from univid_jax.platform.current import Platform

# JAX's name of the host memory that devices can copy from while they compute.
KIND = "pinned_host"
# The first version of JAX that can use it with several devices, or on a CPU.
FIRST_VERSION = (0, 10, 2)

Tree = TypeVar("Tree")


def require_host_memory(mesh: Mesh, key: str) -> None:
  """Checks that the devices of a mesh can use host memory.

  Raises:
    UserError: they cannot; the message names `key`, the config key that needs it.
  """
  device = mesh.devices.flat[0]
  if KIND not in {memory.kind for memory in device.addressable_memories()}:
    raise UserError(f"{key} needs devices that copy from the host's memory while they compute: {device} cannot")
  # In older versions the partitioner fails, and CPU devices cannot copy within a program.
  if (mesh.size > 1 or device.platform == Platform.CPU) and jax.__version_info__ < FIRST_VERSION:
    where = "several devices" if mesh.size > 1 else "a CPU"
    needed = ".".join(map(str, FIRST_VERSION))
    raise UserError(f"{key} on {where} needs JAX {needed}, this is {jax.__version__}")


def fetch(tree: Tree) -> Tree:
  """Copies what is in host memory to the devices, within a program."""

  def move(x: Any) -> Any:
    is_on_host = jax.typeof(x).memory_space == jax.memory.Space.Host
    return jax.device_put(x, jax.memory.Space.Device) if is_on_host else x

  return jax.tree.map(move, tree)


def is_on_host(x: Any) -> bool:
  """Returns whether an array, or the description of one, is in host memory."""
  return x.sharding.memory_kind == KIND
