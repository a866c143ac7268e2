"""The devices as a mesh of four axes: data, fsdp, tensor, context."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor", "context")


def mesh_shape(sizes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
  """The size of each axis; one of them may be -1 and takes the devices that are left.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  shape = [int(sizes.get(axis, 1)) for axis in AXES]
  if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
    raise ValueError(f"mesh axes are positive, at most one of them -1, got {dict(zip(AXES, shape))}")
  if -1 in shape:
    shape[shape.index(-1)] = max(num_devices // -int(np.prod(shape)), 1)
  if np.prod(shape) != num_devices:
    raise ValueError(f"a mesh of {dict(zip(AXES, shape))} needs {np.prod(shape)} devices, there are {num_devices}")
  return tuple(shape)


def make_mesh(sizes: Mapping[str, int], devices=None) -> Mesh:
  """A mesh over all devices (or those given), compilers free to place what is not annotated.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or these are of several TPU slices.
  """
  devices = jax.devices() if devices is None else devices
  if len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) > 1:
    raise ValueError("the devices are of several TPU slices; a mesh lies in one")
  # A row of chips may serve two axes, as jax.make_mesh has it for v5e alone: else fsdp 8 would fit no v6e of 4 x 4.
  placed = mesh_utils.create_device_mesh(mesh_shape(sizes, len(devices)), devices, allow_split_physical_axes=True)
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))
