"""Mapping from names of dims to mesh axes: one table for parameters, one for activations."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univid_jax.core.errors import UserError
from univid_jax.core.packed_row import TOKEN_FIELDS
from univid_jax.parallel.host_memory import is_on_host
from univid_jax.parallel.mesh import ROWS, SEQUENCE, row_shards

# The axes that may shard a dim of a parameter. Those used are larger than 1, not used by its other dims, and divide it
# jointly. The sequence axis is included, since otherwise devices that share a row would all hold the same weights.
PARAMETER_AXES: Mapping[str, tuple[str, ...]] = {"embed": ("fsdp", SEQUENCE), "heads": ("tensor",), "mlp": ("tensor",)}

BATCH = PartitionSpec(ROWS)
TOKENS = PartitionSpec(ROWS, SEQUENCE)

Tree = TypeVar("Tree")


def parameter_spec(shape: Sequence[int], dims: Sequence[str | None], mesh: Mesh) -> PartitionSpec:
  """Returns the mesh axes of each dim of a parameter; unnamed leading dims (stacked layers) are not sharded."""
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
  """Returns the shardings of a model's parameters (or other kind of variables), abstract or not, in nested dicts."""

  def sharding(variable: nnx.Variable) -> Any:
    dims = variable.get_metadata()["dims"]
    # A quantised kernel is two arrays: its numbers, and scales with the same dims.
    return jax.tree.map(lambda x: NamedSharding(mesh, parameter_spec(x.shape, dims, mesh)), variable.get_value())

  flat = nnx.to_flat_state(nnx.state(model, kind))
  return traverse_util.unflatten_dict({path: sharding(variable) for path, variable in flat})


def row_owners(num_rows: int, mesh: Mesh) -> list[tuple[int, ...]]:
  """Returns the processes that hold each row of a batch, ascending; several where they share its tokens."""
  owners: list[set[int]] = [set() for _ in range(num_rows)]
  for device, (rows,) in NamedSharding(mesh, BATCH).devices_indices_map((num_rows,)).items():
    for row in range(num_rows)[rows]:
      owners[row].add(device.process_index)
  return [tuple(sorted(each)) for each in owners]


def own_rows(num_rows: int, mesh: Mesh, process: int | None = None) -> list[int]:
  """Returns the rows of a batch that a process's devices hold, ascending; by default those of this process."""
  process = jax.process_index() if process is None else process
  return [row for row, owners in enumerate(row_owners(num_rows, mesh)) if process in owners]


def rows_by_owner(num_rows: int, mesh: Mesh) -> list[int]:
  """Returns the rows of a batch, grouped by the processes that hold them: process 0's first."""
  return sorted(range(num_rows), key=row_owners(num_rows, mesh).__getitem__)


def is_per_token(path: Sequence[Any]) -> bool:
  """Returns whether a leaf of a batch, by its path in the tree, has one entry per token."""
  return bool(path) and getattr(path[-1], "name", None) in TOKEN_FIELDS


def check_tokens(count: int, mesh: Mesh) -> None:
  """Raises UserError if the tokens of a row do not divide over the sequence axis."""
  if count % mesh.shape[SEQUENCE]:
    raise UserError(
      f"rows of {count} tokens do not divide over config.mesh.context = {mesh.shape[SEQUENCE]} devices: change "
      "config.rows.num_tokens or config.mesh.context"
    )


def shard_batch(batch: Tree, mesh: Mesh) -> Tree:
  """Puts a batch onto the mesh; every process passes all rows.

  Rows are sharded over data and fsdp, the tokens of a `PackedRow` also over the sequence axis.

  Raises:
    UserError: the tokens of a row do not divide over the sequence axis.
  """
  return _shard_rows(batch, mesh, range(row_shards(mesh)))


def shard_own_rows(batch: Tree, mesh: Mesh) -> Tree:
  """Puts a batch onto the mesh, like `shard_batch`; every process passes the rows that its devices hold, `own_rows`."""
  return _shard_rows(batch, mesh, own_rows(row_shards(mesh), mesh))


def _shard_rows(batch: Tree, mesh: Mesh, shards: Sequence[int]) -> Tree:
  """Puts a batch onto the mesh, given the rows of some of its shards, which include those of this process."""
  places = {shard: place for place, shard in enumerate(shards)}

  def reader(x: np.ndarray, size: int) -> Callable[[Any], np.ndarray]:
    def read(index: tuple[slice, ...]) -> np.ndarray:
      first = places[(index[0].start or 0) // size] * size
      return x[(slice(first, first + size), *index[1:])]

    return read

  def place(path, x):
    x = np.asarray(x)
    has_tokens = is_per_token(path)
    if has_tokens:
      check_tokens(x.shape[1], mesh)
    size, rest = divmod(len(x), len(shards))
    if rest:
      raise ValueError(f"{len(x)} rows do not divide over {len(shards)} shards of rows")
    sharding = NamedSharding(mesh, TOKENS if has_tokens else BATCH)
    return jax.make_array_from_callback((size * row_shards(mesh), *x.shape[1:]), sharding, reader(x, size))

  return jax.tree_util.tree_map_with_path(place, batch)


def bytes_per_device(tree: Any, *, on_host: bool = False) -> int:
  """Sums the bytes of arrays, or of their descriptions, on each device, or in host memory per device."""
  leaves = [x for x in jax.tree.leaves(tree) if is_on_host(x) == on_host]
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
