"""Adds LoRAs to the weights of a transformer."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from univid_jax.checkpoints.lora.stacking import stack_loras
from univid_jax.checkpoints.lora.weights import LoRAWeights
from univid_jax.core.errors import UserError
from univid_jax.core.options import Quantize
from univid_jax.inference.experts import Transformer
from univid_jax.inference.lora_specs import RequestedLoRA
from univid_jax.models.changes import INNER, attach_changes, merge_changes
from univid_jax.models.lora import LORA, LoRAParam
from univid_jax.models.quantized import quantization_of
from univid_jax.models.variants import DiTConfig
from univid_jax.parallel.sharding import parameter_shardings


def add_to_transformer(
  config: DiTConfig,
  transformer: Transformer,
  loras: Sequence[RequestedLoRA],
  *,
  mesh: Mesh,
  merged: bool,
  skip_unmatched: bool,
) -> Transformer:
  """Returns a transformer with LoRAs added, see `add_loras`; its parameters stay on the devices or in host memory."""
  if not loras:
    return transformer
  pairs = [(lora.weights, lora.weight) for lora in loras]
  changed = Transformer(
    *add_loras(
      config, transformer.graph, transformer.load(), pairs, mesh=mesh, merged=merged, skip_unmatched=skip_unmatched
    )
  )
  return changed.offload() if transformer.is_offloaded else changed


@functools.partial(jax.jit, static_argnames="dtype")
def _add(x: ArrayLike, diff: ArrayLike, *, dtype: DTypeLike) -> jax.Array:
  """Adds in float32. Tensors of one shape share a program."""
  return (jnp.asarray(x, jnp.float32) + diff).astype(dtype)


def add_loras(
  config: DiTConfig,
  graph: nnx.GraphDef,
  params: Mapping[str, Any],
  loras: Sequence[tuple[LoRAWeights, float]],
  *,
  mesh: Mesh,
  merged: bool,
  skip_unmatched: bool = False,
) -> tuple[nnx.GraphDef, Mapping[str, Any]]:
  """Returns a transformer with LoRAs, each with its weight, added to the weights or computed separately.

  Adapters that it has already stay in effect, and parameters that do not change are shared with the given ones. Biases,
  scales of norms and modulation are always added. Unmerged they become float32, so that nothing is lost to rounding.

  Args:
    config: of the transformer.
    graph: the transformer without its parameters.
    params: its parameters; merging donates those that change.
    loras: each with its weight.
    mesh: the devices.
    merged: whether to add the changes of kernels as well.
    skip_unmatched: whether to leave out tensors without a counterpart in the base.

  Raises:
    UserError: a LoRA does not fit the base, or is to be merged into quantised kernels.
  """
  if merged and (method := quantization_of(params)) != Quantize.NONE:
    raise UserError(
      f"LoRAs cannot be merged into a base in {method}, which would round them away: leave out merge_lora"
    )
  leaves: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(params))
  shapes = {path: value.shape for path, value in leaves.items() if LORA not in path}
  changes = stack_loras(loras, config, shapes, skip_unmatched=skip_unmatched)
  for path, diff in changes.others.items():
    leaves[path] = _add(leaves[path], diff, dtype=leaves[path].dtype if merged else jnp.float32)
  module = nnx.eval_shape(lambda: nnx.merge(graph, params))
  attach_changes(module, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), changes.kernels))
  shardings = traverse_util.flatten_dict(parameter_shardings(module, mesh, kind=LoRAParam))
  for path, groups in changes.kernels.items():
    parts = {
      group: {name: jax.device_put(value, shardings[*path, LORA, group, name]) for name, value in values.items()}
      for group, values in groups.items()
    }
    if not merged:
      earlier = {key: value for key, value in leaves.items() if key[: len(path) + 1] == (*path, LORA)}
      leaves = {key: value for key, value in leaves.items() if key not in earlier}
      leaves |= {(*path, LORA, INNER, *key[len(path) + 1 :]): value for key, value in earlier.items()}
      leaves |= {(*path, LORA, *key): value for key, value in traverse_util.flatten_dict(parts).items()}
      continue
    kernel = leaves[*path, "kernel"]
    merge = jax.jit(merge_changes, donate_argnums=0, out_shardings=kernel.sharding)
    leaves[*path, "kernel"] = merge(kernel, parts)
  return graph if merged else nnx.graphdef(module), traverse_util.unflatten_dict(leaves)
