"""From names of dims to axes of the mesh: one table for parameters, one for what runs through the model."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# A dim of a parameter goes to the first of its axes that is larger than 1, free in this parameter, and divides it.
PARAMETER_AXES = {
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
}

BATCH = PartitionSpec(("data", "fsdp"))


def parameter_spec(shape: Sequence[int], dims: Sequence[str | None], mesh: Mesh) -> PartitionSpec:
  """The axes of each dim of a parameter; dims in front of the named ones (stacked layers) stay whole."""
  dims = (None,) * (len(shape) - len(dims)) + tuple(dims)
  spec, used = [], set()
  for size, dim in zip(shape, dims):
    fitting = [axis for axis in PARAMETER_AXES.get(dim, ())
               if mesh.shape[axis] > 1 and axis not in used and size % mesh.shape[axis] == 0]
    spec.append(fitting[0] if fitting else None)
    used.update(fitting[:1])
  return PartitionSpec(*spec)


def parameter_shardings(model: nnx.Module, mesh: Mesh, kind: type[nnx.Variable] = nnx.Param) -> dict:
  """A sharding for each parameter (or variable of another kind) of a model, abstract or not, in nested dicts."""
  def sharding(variable):
    return NamedSharding(mesh, parameter_spec(variable.shape, variable.get_metadata()["dims"], mesh))
  flat = nnx.to_flat_state(nnx.state(model, kind))
  return unflatten((path, sharding(variable)) for path, variable in flat)


def unflatten(leaves: Iterable[tuple[tuple[str, ...], Any]]) -> dict:
  """(path, value) pairs as nested dicts."""
  tree: dict = {}
  for path, value in leaves:
    branch = tree
    for key in path[:-1]:
      branch = branch.setdefault(key, {})
    branch[path[-1]] = value
  return tree


def shard_batch(batch, mesh: Mesh):
  """Puts this process's rows of a batch onto the mesh, rows spread over data and fsdp."""
  sharding = NamedSharding(mesh, BATCH)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
