"""Attention to keys in pieces: too many for one kernel, or on several devices (ring attention, Liu et al. 2023).

A piece yields an output and its log-sum-exps (lse), the logarithms of the sums of exponentials of its logits. These
weight the outputs when they are merged; given the merged ones, each piece computes its part of the gradient alone.
"""

import dataclasses
import functools
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

# Name of the forward results that the backward pass needs; a `jax.checkpoint` policy that saves them avoids computing
# attention twice.
OUTPUT_NAME = "attention"

# The output of some queries (..., l, k), in float32 or the dtype of v, and its log-sum-exps (..., l, 1), in float32.
Piece = tuple[Float[Array, "... l c"], Float[Array, "... l 1"]]


@runtime_checkable
class Kernel(Protocol):
  """An implementation of attention; hashable.

  Queries are (b, ..., l, k), keys (b, ..., n, k) and values (b, ..., n, c), with the same dims between; intervals are
  those of `api.attention`, within the keys. The log-sum-exp of a query without keys is so low that its output gets
  weight 0 when merged.
  """

  def output(self, q: Array, k: Array, v: Array, intervals: Array, bias: Array | None) -> Array:
    """Returns the output alone, for calls without a gradient."""
    ...

  def forward(self, q: Array, k: Array, v: Array, intervals: Array, bias: Array | None) -> Piece: ...

  def backward(
    self, q: Array, k: Array, v: Array, intervals: Array, bias: Array | None, merged: Piece, d_out: Array
  ) -> tuple[Array, Array, Array]:
    """Returns the gradients of q, k and v, given the output over all pieces and its gradient."""
    ...


@dataclasses.dataclass(frozen=True)
class Ring:
  """Devices that each hold a part of the keys of a row, in order.

  Attributes:
    axis: axis of the mesh.
    size: number of devices in a ring.
    stride: distance between neighbours along the axis, which holds `stride` interleaved rings.
    num_keys: keys on each device, padding not counted.
  """

  axis: str
  size: int
  stride: int
  num_keys: int

  @property
  def position(self) -> Int[Array, ""]:
    """The position of this device in its ring."""
    return jax.lax.axis_index(self.axis) // self.stride

  def pass_on(self, tree: Any) -> Any:
    """Sends arrays to the next device of the ring and returns those of the previous one."""
    devices = self.size * self.stride
    return jax.lax.ppermute(tree, self.axis, [(i, (i + self.stride) % devices) for i in range(devices)])

  def clip(self, intervals: Int[Array, "... 2"], step: int) -> Int[Array, "... 2"]:
    """Returns the parts of intervals within the keys that this device holds after `step` steps around the ring."""
    return clip_intervals(intervals, (self.position - step) % self.size * self.num_keys, self.num_keys)


def attend(
  kernel: Kernel,
  ring: Ring | None,
  q: Float[Array, "b *heads l k"],
  k: Float[Array, "b *heads n k"],
  v: Float[Array, "b *heads n c"],
  intervals: Int[Array, "b l 2"],
  bias: Float[Array, "b n"] | None,
) -> Float[Array, "b *heads l c"]:
  """Attends to the keys of this device, or of all devices of a ring; no gradient flows to the bias.

  Args:
    kernel: attends to the keys that a device holds.
    ring: the devices, within `jax.shard_map`; None attends to the given keys only.
    q: queries of this device.
    k: keys of this device.
    v: values of this device.
    intervals: of the queries, among all keys.
    bias: of the keys of this device.
  """
  return cast(Array, _attend(kernel, ring, q, k, v, intervals, bias))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernel: Kernel, ring: Ring | None, q, k, v, intervals, bias):
  if ring is None:
    return kernel.output(q, k, v, intervals, bias).astype(v.dtype)
  return _forward(kernel, ring, q, k, v, intervals, bias)[0]


def _forward(kernel: Kernel, ring: Ring | None, q, k, v, intervals, bias):
  """Returns the output, and what `_backward` needs."""
  if ring is None:
    out, lse = kernel.forward(q, k, v, intervals, bias)
  else:
    out, lse = kernel.forward(q, k, v, ring.clip(intervals, 0), bias)
    keys, values, biases = k, v, bias
    for step in range(1, ring.size):
      keys, values, biases = ring.pass_on((keys, values, biases))
      piece = kernel.forward(q, keys, values, ring.clip(intervals, step), biases)
      out, lse = merge((out, lse), piece)
  # Drops the last dim of size 1, which a TPU might store as 128 channels.
  out, lse = (checkpoint_name(x, OUTPUT_NAME) for x in (out.astype(v.dtype), lse[..., 0]))
  return out, (q, k, v, intervals, bias, out, lse)


def _backward(kernel: Kernel, ring: Ring | None, saved, d_out):
  """Returns the gradients; those of keys and values travel around the ring with them, summing up on the way."""
  q, k, v, intervals, bias, out, lse = saved
  none = None, None if bias is None else jnp.zeros_like(bias)
  merged = out, lse[..., None]
  if ring is None:
    return *kernel.backward(q, k, v, intervals, bias, merged, d_out), *none
  keys, values, biases = k, v, bias
  dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
  for step in range(ring.size):
    parts = kernel.backward(q, keys, values, ring.clip(intervals, step), biases, merged, d_out)
    dq, dk, dv = (total + part.astype(jnp.float32) for total, part in zip((dq, dk, dv), parts))
    dk, dv = ring.pass_on((dk, dv))
    if step < ring.size - 1:
      keys, values, biases = ring.pass_on((keys, values, biases))
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), *none


_attend.defvjp(_forward, _backward)


def merge(a: Piece, b: Piece) -> Piece:
  """Returns the output over the keys of two pieces."""
  (out, lse), (other_out, other_lse) = a, b
  merged = jnp.logaddexp(lse, other_lse)
  weight, other_weight = jnp.exp(lse - merged), jnp.exp(other_lse - merged)
  return out.astype(jnp.float32) * weight + other_out.astype(jnp.float32) * other_weight, merged


def clip_intervals(intervals: Int[Array, "... 2"], first: int | Array, num_keys: int) -> Int[Array, "... 2"]:
  """Returns the parts of intervals within the `num_keys` keys from `first` on, counted from there."""
  return jnp.clip(intervals - first, 0, num_keys)
