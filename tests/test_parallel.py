"""Experimental APIs of JAX that `parallel` relies on."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from univid_jax.config.schema import MeshConfig
from univid_jax.parallel.mesh import make_mesh, row_shards
from univid_jax.parallel.processes import gather_arrays, local_rows, wait_for_processes


@dataclasses.dataclass(frozen=True)
class Chip:
  """The attributes of a TPU that JAX reads to place it in a mesh."""

  id: int
  coords: tuple[int, int, int]
  core_on_chip: int = 0
  process_index: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v6 lite"


def test_mesh_axes_can_share_a_physical_axis():
  """`parallel.mesh` uses `mesh_utils.create_device_mesh` for allow_split_physical_axes, which jax.make_mesh lacks.

  Without it fsdp = 8 does not fit a v6e of 4 x 4. If the first call fails after an upgrade of JAX, the argument has
  moved; if the second stops raising, jax.make_mesh may do as well.
  """
  chips = [Chip(4 * y + x, (x, y, 0)) for y in range(4) for x in range(4)]
  assert mesh_utils.create_device_mesh((2, 8), chips, allow_split_physical_axes=True).shape == (2, 8)
  with pytest.raises(NotImplementedError):
    mesh_utils.create_device_mesh((2, 8), chips, allow_split_physical_axes=False)


def test_arrays_are_gathered_and_processes_wait():
  """`parallel.processes` uses multihost_utils' process_allgather and sync_global_devices, here with one process.

  Runs of two processes are tested in tests/test_train.py, which are slow.
  """
  mesh = make_mesh(MeshConfig(data=2, fsdp=4))
  assert row_shards(mesh) == 8
  x = np.arange(16, dtype=np.float32).reshape(8, 2)
  sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
  np.testing.assert_array_equal(gather_arrays({"x": sharded})["x"], x)
  np.testing.assert_array_equal(multihost_utils.process_allgather(sharded, tiled=True), x)
  multihost_utils.sync_global_devices("test")
  wait_for_processes("test")
  np.testing.assert_array_equal(local_rows(x, mesh), x)
