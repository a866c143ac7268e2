"""Attention on a mesh: what each device computes, and what the devices that share a row exchange."""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from univid_jax.models.attention.intervals import all_keys, pad_tokens
from univid_jax.models.attention.pieces import Ring
from univid_jax.parallel.mesh import ROWS, SEQUENCE, row_shards

AttentionFn = Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class Exchange:
  """How the devices of the sequence axis share heads and tokens.

  Neighbours along the axis form groups, as large as the heads divide over, in which an all-to-all exchanges heads for
  tokens (Ulysses, Jacobs et al. 2023): each device then has a part of the heads for all tokens of its group. Devices
  with the same heads form a ring, in which keys and values travel.

  Attributes:
    group: number of devices in a group.
    ring: number of groups.
  """

  group: int
  ring: int

  @classmethod
  def of(cls, num_devices: int, num_heads: int) -> "Exchange":
    group = math.gcd(num_devices, num_heads)
    return cls(group, num_devices // group)

  def split_heads(self, x: Float[Array, "b l h k"]) -> Float[Array, "b all_l some_h k"]:
    """Gives each device of a group the group's tokens for a part of the heads."""
    return x if self.group == 1 else self._swap(x, split_axis=2, concat_axis=1)

  def join_heads(self, x: Float[Array, "b all_l some_h k"]) -> Float[Array, "b l h k"]:
    """Undoes `split_heads`."""
    return x if self.group == 1 else self._swap(x, split_axis=1, concat_axis=2)

  def gather_keys(self, x: Float[Array, "b n h k"]) -> Float[Array, "b all_n h k"]:
    """Gives each device the keys of its ring."""
    groups = [list(range(first, self.group * self.ring, self.group)) for first in range(self.group)]
    return jax.lax.all_gather(x, SEQUENCE, axis=1, tiled=True, axis_index_groups=groups if self.group > 1 else None)

  def own_part(self, x: Int[Array, "b l ..."] | Float[Array, "b l"]) -> Array:
    """Selects the tokens of this device's group from those of all devices."""
    size = x.shape[1] // self.ring
    position = jax.lax.axis_index(SEQUENCE) // self.group
    return x if self.ring == 1 else jax.lax.dynamic_slice_in_dim(x, position * size, size, axis=1)

  def _swap(self, x: Array, *, split_axis: int, concat_axis: int) -> Array:
    groups = np.arange(self.group * self.ring).reshape(self.ring, self.group).tolist() if self.ring > 1 else None
    return jax.lax.all_to_all(
      x, SEQUENCE, split_axis=split_axis, concat_axis=concat_axis, tiled=True, axis_index_groups=groups
    )


def shard_attention(run: AttentionFn, mesh: AbstractMesh, *, takes_ring: bool) -> AttentionFn:
  """Wraps a backend to run on each device's shard of rows, heads and tokens; see `api.attention`.

  Args:
    run: the backend.
    mesh: the devices.
    takes_ring: whether the backend has an argument `ring`; otherwise the keys of a ring are gathered on each of its
      devices.
  """
  devices = mesh.shape[SEQUENCE]

  def run_sharded(
    q: Float[Array, "b l h k"],
    k: Float[Array, "b n h k"],
    v: Float[Array, "b n h k"],
    *,
    key_intervals: Int[Array | np.ndarray, "b l 2"] | None,
    key_bias: Float[Array, "b n"] | None,
  ) -> Float[Array, "b l h k"]:
    num_rows, num_queries, num_heads, _ = q.shape
    rows = ROWS if num_rows % row_shards(mesh) == 0 else None
    heads = "tensor" if num_heads % mesh.shape["tensor"] == 0 else None
    sequence = SEQUENCE if devices > 1 else None
    shards_keys = sequence is not None and k.shape[1] >= num_queries
    local_heads = num_heads // (mesh.shape["tensor"] if heads else 1)
    exchange = Exchange.of(devices, local_heads) if shards_keys else Exchange(group=1, ring=1)

    if key_intervals is None and (num_queries % devices or (shards_keys and k.shape[1] % devices)):
      key_intervals = all_keys(num_rows, num_queries, k.shape[1])
    q, key_intervals = pad_tokens(q, devices), pad_tokens(key_intervals, devices)
    if shards_keys:
      k, v, key_bias = (pad_tokens(x, devices) for x in (k, v, key_bias))

    def run_local(q, k, v, key_intervals, key_bias):
      options = {}
      q = exchange.split_heads(q)
      if shards_keys:
        k, v = exchange.split_heads(k), exchange.split_heads(v)
      if exchange.group > 1 and key_intervals is not None:
        key_intervals = exchange.own_part(key_intervals)
      if exchange.ring > 1 and takes_ring:
        options["ring"] = Ring(SEQUENCE, exchange.ring, stride=exchange.group, num_keys=k.shape[1])
        key_bias = None if key_bias is None else exchange.own_part(key_bias)
      elif exchange.ring > 1:
        k, v = exchange.gather_keys(k), exchange.gather_keys(v)
      return exchange.join_heads(run(q, k, v, key_intervals=key_intervals, key_bias=key_bias, **options))

    q_spec = PartitionSpec(rows, sequence, heads)
    kv_spec = PartitionSpec(rows, sequence if shards_keys else None, heads)
    interval_spec = PartitionSpec(rows, None if exchange.group > 1 else sequence)
    sharded = jax.shard_map(
      run_local,
      in_specs=(q_spec, kv_spec, kv_spec, interval_spec, PartitionSpec(rows)),
      out_specs=q_spec,
      check_vma=False,
    )
    return sharded(q, k, v, key_intervals, key_bias)[:, :num_queries]

  return run_sharded


def rows_per_device(num_rows: int) -> int:
  """Returns how many rows of a batch each device of the current mesh computes: all if they do not divide evenly."""
  shards = row_shards(jax.sharding.get_abstract_mesh())
  return num_rows // shards if num_rows % shards == 0 else num_rows
