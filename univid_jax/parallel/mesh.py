"""The mesh of devices: data and fsdp shard rows, fsdp and tensor shard weights, context shards the tokens of a row."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax

# Experimental, used here alone: unlike jax.make_mesh it lets two mesh axes share a physical axis of a TPU slice.
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from univid_jax.core.errors import UserError
from univid_jax.core.text import describe_value
from univid_jax.platform.chips import Device

# The axis that shards the tokens of a row, named after the config key config.mesh.context.
SEQUENCE = "context"
AXES = ("data", "fsdp", "tensor", SEQUENCE)
# Axes that shard the rows of a batch.
ROWS = ("data", "fsdp")


@runtime_checkable
class MeshSizes(Protocol):
  """Devices along each axis; one may be -1, which takes the remaining devices. `config.mesh` implements it."""

  @property
  def data(self) -> int: ...
  @property
  def fsdp(self) -> int: ...
  @property
  def tensor(self) -> int: ...
  @property
  def context(self) -> int: ...


def make_mesh(sizes: MeshSizes | Mapping[str, int], devices: Sequence[Device] | None = None) -> Mesh:
  """Makes a mesh over all devices or those given; the compiler chooses the sharding of what is not annotated.

  Args:
    sizes: size of each axis; axes that a mapping lacks have size 1.
    devices: the devices; TPUs must be of one slice.

  Raises:
    UserError: the sizes do not multiply to the number of devices, or the devices belong to several TPU slices.
  """
  devices = jax.devices() if devices is None else devices
  if len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) > 1:
    raise UserError("a mesh must be within one TPU slice, but the devices belong to several")
  # Without splitting physical axes, which jax.make_mesh does for v5e only, fsdp = 8 would not fit a v6e of 4 x 4.
  placed = mesh_utils.create_device_mesh(mesh_shape(sizes, len(devices)), devices, allow_split_physical_axes=True)
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def require_mesh(mesh: Any) -> Mesh:
  """Returns a mesh; raises UserError if it is not one, or lacks an axis that shards parameters or rows."""
  if not isinstance(mesh, Mesh) or not set(AXES) <= set(mesh.axis_names):
    found = f"one with {', '.join(map(str, mesh.axis_names))}" if isinstance(mesh, Mesh) else describe_value(mesh)
    raise UserError(
      f"mesh must be a jax.sharding.Mesh with the axes {', '.join(AXES)}, as univid_jax.parallel.mesh.make_mesh makes "
      f"it, got {found}"
    )
  return mesh


def local_mesh(mesh: Mesh, own: Sequence[Device] | None = None) -> Mesh:
  """Returns the mesh or, if it has other processes' devices, an fsdp mesh over this process's devices.

  Computations on it need no other process, so each process may compute something else.

  Args:
    mesh: of all processes.
    own: devices of the process, if it is only described; by default those of this process.
  """
  devices = [device for device in (jax.local_devices() if own is None else own) if device in mesh.devices.flat]
  return mesh if len(devices) == mesh.size else make_mesh({"fsdp": -1}, devices)


def mesh_shape(sizes: MeshSizes | Mapping[str, int], num_devices: int) -> tuple[int, ...]:
  """Returns the size of each axis, -1 resolved.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  shape = [int(sizes.get(axis, 1) if isinstance(sizes, Mapping) else getattr(sizes, axis)) for axis in AXES]
  if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
    raise UserError(f"mesh axes must be positive, at most one of them -1, got {dict(zip(AXES, shape))}")
  if -1 in shape:
    others = math.prod(size for size in shape if size != -1)
    shape[shape.index(-1)] = max(num_devices // others, 1)
  needed = math.prod(shape)
  if needed != num_devices:
    raise UserError(f"a mesh of {dict(zip(AXES, shape))} needs {needed} devices, there are {num_devices}")
  return tuple(shape)


def row_shards(mesh: Mesh | AbstractMesh) -> int:
  """Returns how many groups of devices the rows of a batch are sharded over; 1 on a mesh without these axes."""
  return math.prod(mesh.shape.get(axis, 1) for axis in ROWS)
