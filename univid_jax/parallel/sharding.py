"""From names of dims to axes of the mesh: one table for parameters, one for activations."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univid_jax.core.errors import UserError
from univid_jax.core.packed_row import TOKEN_FIELDS
from univid_jax.parallel.host_memory import is_on_host
from univid_jax.parallel.mesh import SEQUENCE

# The axes that may shard a dim of a parameter. Those used are larger than 1, unused by its other dims, and divide it
# together. The sequence axis is among them, or the devices that share a row would all hold the same weights.
PARAMETER_AXES: Mapping[str, tuple[str, ...]] = {"embed": ("fsdp", SEQUENCE), "heads": ("tensor",), "mlp": ("tensor",)}

# Axes that shard the rows of a batch.
ROWS = ("data", "fsdp")
BATCH = PartitionSpec(ROWS)
TOKENS = PartitionSpec(ROWS, SEQUENCE)

Tree = TypeVar("Tree")


def parameter_spec(shape: Sequence[int], dims: Sequence[str | None], mesh: Mesh) -> PartitionSpec:
  """Returns the axes of each dim of a parameter; unnamed leading dims (stacked layers) are not sharded."""
  dims = (None,) * (len(shape) - len(dims)) + tuple(dims)
  spec, used = [], set()
  for size, dim in zip(shape, dims):
    chosen: list[str] = []
    for axis in PARAMETER_AXES.get(dim, ()) if dim is not None else ():
      shards = int(np.prod([mesh.shape[name] for name in (*chosen, axis)]))
      if mesh.shape[axis] > 1 and axis not in used and size % shards == 0:
        chosen.append(axis)
    spec.append(tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None)
    used.update(chosen)
  return PartitionSpec(*spec)


def parameter_shardings(model: nnx.Module, mesh: Mesh, kind: type[nnx.Variable] = nnx.Param) -> dict[str, Any]:
  """Returns the sharding of each parameter (or other kind of variable) of a model, abstract or not, in nested dicts."""

  def sharding(variable: nnx.Variable) -> Any:
    dims = variable.get_metadata()["dims"]
    # A quantised kernel is two arrays: its numbers, and scales with the same dims.
    return jax.tree.map(lambda x: NamedSharding(mesh, parameter_spec(x.shape, dims, mesh)), variable.get_value())

  flat = nnx.to_flat_state(nnx.state(model, kind))
  return traverse_util.unflatten_dict({path: sharding(variable) for path, variable in flat})


def shard_batch(batch: Tree, mesh: Mesh) -> Tree:
  """Puts this process's rows of a batch onto the mesh.

  Rows are sharded over data and fsdp, the tokens of a `PackedRow` also over the sequence axis.

  Raises:
    UserError: the tokens of a row do not divide over the sequence axis.
  """

  def place(path, x):
    x = np.asarray(x)
    is_per_token = bool(path) and getattr(path[-1], "name", None) in TOKEN_FIELDS
    if is_per_token and x.shape[1] % mesh.shape[SEQUENCE]:
      raise UserError(
        f"rows of {x.shape[1]} tokens do not divide over context = {mesh.shape[SEQUENCE]} devices: change "
        "config.rows.num_tokens or config.mesh.context"
      )
    return jax.make_array_from_process_local_data(NamedSharding(mesh, TOKENS if is_per_token else BATCH), x)

  return jax.tree_util.tree_map_with_path(place, batch)


def bytes_per_device(tree: Any, *, on_host: bool = False) -> int:
  """Sums the bytes of arrays, or of their descriptions, on each device, or in the host's memory for each."""
  leaves = [x for x in jax.tree.leaves(tree) if is_on_host(x) == on_host]
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
