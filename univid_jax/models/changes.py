"""Changes of weights from LoRA files, applied by the Linear that they belong to or merged into its kernel.

Every kind is a few small factors, and only they are stored. A plain low-rank change maps the input through its two
matrices. Other kinds form the kernel's change whenever the layer runs: memory stays that of the file, but the layer
computes a second product of full size, which merging avoids.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from univid_jax.models.layers import Linear
from univid_jax.models.lora import LoRAParam, multiply_low_rank

# The parts of a change by name, or by group and name.
Parts = Mapping[str, Array]
Shapes = Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]

# Names of a kernel's dims, which parts use for theirs.
IN, OUT = "in", "out"


@dataclasses.dataclass(frozen=True)
class ChangeKind:
  """A way to write a change of a kernel (in, out).

  Attributes:
    dims: names of each part's dims.
    change: computes the change from the parts.
  """

  dims: Mapping[str, tuple[str | None, ...]]
  change: Callable[[Parts], Float[Array, "i o"]]


def _multiply(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


_LOW_RANK, _DIFFERENCE, _LOHA, _LOKR = "lora", "diff", "loha", "lokr"
CHANGE_KINDS: Mapping[str, ChangeKind] = {
  _LOW_RANK: ChangeKind({"down": (IN, None), "up": (None, OUT)}, lambda parts: _multiply(parts["down"], parts["up"])),
  _DIFFERENCE: ChangeKind({"diff": (IN, OUT)}, lambda parts: parts["diff"].astype(jnp.float32)),
  _LOHA: ChangeKind(
    {"down": (IN, None), "up": (None, OUT), "down_2": (IN, None), "up_2": (None, OUT)},
    lambda parts: _multiply(parts["down"], parts["up"]) * _multiply(parts["down_2"], parts["up_2"]),
  ),
  _LOKR: ChangeKind({"w1": (None, None), "w2": (None, None)}, lambda parts: jnp.kron(parts["w1"], parts["w2"])),
}

# DoRA, with any kind: along one axis the changed kernel has the norms `magnitude`.
MAGNITUDES: Mapping[str, int] = {"magnitude_out": 0, "magnitude_in": 1}
_DORA_DIMS = {"magnitude_out": (None, OUT), "magnitude_in": (IN, None), "weight": ()}


def kind_of(group: str) -> str:
  """Returns the kind of a group of changes, which is named after it: KIND or KIND_NUMBER."""
  return group.partition("_")[0]


def kernel_change(group: str, parts: Parts, kernel: Float[Array, "i o"]) -> Float[Array, "i o"]:
  """Computes a change of a kernel in float32.

  Args:
    group: see `kind_of`.
    parts: those of its kind, scaled; for DoRA also a magnitude and the weight of the whole change.
    kernel: the base's kernel, of one layer.
  """
  change = CHANGE_KINDS[kind_of(group)].change(parts)
  for name, axis in MAGNITUDES.items():
    if name in parts:
      base = kernel.astype(jnp.float32)
      changed = base + change
      norm = jnp.linalg.norm(changed, axis=axis, keepdims=True)
      change = parts["weight"] * (changed * (parts[name] / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)) - base)
  return change


# The attribute in which changes keep the adapter that their Linear had before, if any.
INNER = "inner"


class Changes(nnx.Module):
  """Maps the input of a Linear to the output of the changes of its kernel, plus that of the adapter that it had before.

  Args:
    groups: shapes of the parts by group, see `kernel_change`; stacked like the kernel.
    linear: the Linear whose kernel they change.
  """

  def __init__(self, groups: Shapes, linear: Linear):
    self.dtype, self.groups, self.inner = linear.dtype, tuple(groups), nnx.data(linear.lora)
    names = dict(zip((IN, OUT), linear.kernel.get_metadata()["dims"], strict=True))
    for group, parts in groups.items():
      dims = {**CHANGE_KINDS[kind_of(group)].dims, **_DORA_DIMS}
      variables = {
        part: LoRAParam(value, dims=tuple(names.get(dim) if dim else None for dim in dims[part]))
        for part, value in parts.items()
      }
      setattr(self, group, nnx.Dict(variables))

  def __call__(self, x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    x = x.astype(self.dtype)
    outputs = []
    for group in self.groups:
      parts = {name: variable[...] for name, variable in getattr(self, group).items()}
      if parts.keys() == {"down", "up"}:
        outputs.append(multiply_low_rank(x, parts["down"].astype(self.dtype), parts["up"].astype(self.dtype)))
      else:
        outputs.append(x @ kernel_change(group, parts, kernel).astype(self.dtype))
    if self.inner is not None:
      outputs.append(self.inner(x, kernel))
    return sum(outputs[1:], start=outputs[0])


def attach_changes(model: nnx.Module, shapes: Mapping[tuple[str, ...], Shapes]) -> None:
  """Adds changes to Linears of an abstract model (see `nnx.eval_shape`), given by path."""
  linears = {tuple(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}
  for path, groups in shapes.items():
    linears[path].lora = Changes(groups, linears[path])


def merge_changes(kernel: Float[Array, "*layers i o"], groups: Mapping[str, Parts]) -> Float[Array, "*layers i o"]:
  """Adds changes to a kernel, in float32; stacked layers in place, one by one, to save temporary memory."""

  def merge_layer(kernel: Array, groups: Mapping[str, Parts]) -> Array:
    changes = [kernel_change(group, parts, kernel) for group, parts in groups.items()]
    return (kernel.astype(jnp.float32) + sum(changes[1:], start=changes[0])).astype(kernel.dtype)

  def merge_at(layer: Int[Array, ""], stacked: Array) -> Array:
    merged = merge_layer(
      *jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), (stacked, groups))
    )
    return jax.lax.dynamic_update_index_in_dim(stacked, merged, layer, axis=0)

  return merge_layer(kernel, groups) if kernel.ndim == 2 else jax.lax.fori_loop(0, len(kernel), merge_at, kernel)
