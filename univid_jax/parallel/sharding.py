"""From names of dims to axes of the mesh: one table for parameters, one for what runs through the model."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univid_jax.types import TOKEN_FIELDS

# A dim of a parameter spreads over those of its axes that are larger than 1, free in this parameter, and divide it together.
# Context is among them: without it every device of a row would hold the same weights.
PARAMETER_AXES = {
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
}

# Rows of a batch spread over data and fsdp; tokens within a row over context.
ROWS = ("data", "fsdp")
BATCH = PartitionSpec(ROWS)
TOKENS = PartitionSpec(ROWS, "context")


def parameter_spec(shape: Sequence[int], dims: Sequence[str | None], mesh: Mesh) -> PartitionSpec:
  """The axes of each dim of a parameter; dims in front of the named ones (stacked layers) stay whole."""
  dims = (None,) * (len(shape) - len(dims)) + tuple(dims)
  spec, used = [], set()
  for size, dim in zip(shape, dims):
    chosen: list[str] = []
    for axis in PARAMETER_AXES.get(dim, ()):
      shards = int(np.prod([mesh.shape[name] for name in (*chosen, axis)]))
      if mesh.shape[axis] > 1 and axis not in used and size % shards == 0:
        chosen.append(axis)
    spec.append(tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None)
    used.update(chosen)
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
  """Puts this process's rows of a batch onto the mesh: rows over data and fsdp, tokens of `PackedRow`s over context.

  Raises:
    ValueError: the tokens of a row do not divide over context.
  """
  def place(path, x):
    x = np.asarray(x)
    name = getattr(path[-1], "name", None) if path else None
    if name in TOKEN_FIELDS and x.shape[1] % mesh.shape["context"]:
      raise ValueError(f"rows of {x.shape[1]} tokens do not divide over context = {mesh.shape['context']} devices")
    return jax.make_array_from_process_local_data(NamedSharding(mesh, TOKENS if name in TOKEN_FIELDS else BATCH), x)
  return jax.tree_util.tree_map_with_path(place, batch)


def gathered(tree: Any) -> Any:
  """Sharded arrays as whole NumPy arrays, on every process."""
  def whole(x):
    return jax.device_get(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
  return jax.tree.map(whole, tree)


def own_rows(x: np.ndarray, mesh: Mesh) -> np.ndarray:
  """This process's rows of a batch for a mesh, which may be of this process's devices alone."""
  processes = sorted({device.process_index for device in mesh.devices.flat})
  share, place = len(x) // len(processes), processes.index(jax.process_index())
  return x[place * share:(place + 1) * share]
