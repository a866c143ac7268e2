"""From names of dims to axes of the mesh: one table for parameters, one for what runs through the model."""

from collections.abc import Sequence

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


def parameter_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
  """A sharding for each parameter of an (abstract) state, in the same structure."""
  def sharding(variable):
    value = variable.get_value() if hasattr(variable, "get_value") else variable.value
    return variable.replace(NamedSharding(mesh, parameter_spec(value.shape, variable.get_metadata().get("dims", ()), mesh)))
  return jax.tree.map(sharding, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def shard_batch(batch, mesh: Mesh):
  """Puts this process's rows of a batch onto the mesh, rows spread over data and fsdp."""
  sharding = NamedSharding(mesh, BATCH)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
