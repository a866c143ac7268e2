"""Arrays in host memory, which programs fetch to their devices when they need them."""

from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from univid_jax.core.errors import UserError

# JAX's name of the host memory that devices can copy from while they compute.
KIND = "pinned_host"
# The first version of JAX that can use it with several devices.
FIRST_VERSION = (0, 10, 2)

Tree = TypeVar("Tree")


def require_host_memory(mesh: Mesh, key: str) -> None:
  """Checks that the devices of a mesh can use host memory.

  Raises:
    UserError: they cannot; the message names `key`, the config key that needs it.
  """
  if mesh.size > 1 and jax.__version_info__ < FIRST_VERSION:  # the partitioner of older versions fails
    needed = ".".join(map(str, FIRST_VERSION))
    raise UserError(f"{key} on several devices needs JAX {needed}, this is {jax.__version__}")
  device = mesh.devices.flat[0]
  if KIND not in {memory.kind for memory in device.addressable_memories()}:
    raise UserError(f"{key} needs devices that copy from the host's memory while they compute: {device} cannot")


def fetch(tree: Tree) -> Tree:
  """Copies what is in host memory to the devices, within a program."""

  def move(x: Any) -> Any:
    is_on_host = jax.typeof(x).memory_space == jax.memory.Space.Host
    return jax.device_put(x, jax.memory.Space.Device) if is_on_host else x

  return jax.tree.map(move, tree)


def is_on_host(x: Any) -> bool:
  """Returns whether an array, or the description of one, is in host memory."""
  return x.sharding.memory_kind == KIND
