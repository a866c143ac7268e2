"""Conversion between LoRA weights and the adapter parameters of a transformer, whose layers are stacked."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from univid_jax.checkpoints.lora.weights import LoRALayer, LoRAWeights
from univid_jax.core.errors import UserError
from univid_jax.models.lora import linear_name
from univid_jax.models.variants import DiTConfig

Shapes = Mapping[tuple[str, ...], tuple[int, ...]]

# Names of the published models by width, for error messages.
_MODEL_NAMES = {1536: "1.3B", 5120: "14B"}


class Linear(NamedTuple):
  """A Linear of the base.

  Attributes:
    path: of the module.
    layer: index into the stacked layers; None if they are not stacked.
    stack: shape of the stacked dims, (layers,) or ().
    in_dim, out_dim: of one layer.
  """

  path: tuple[str, ...]
  layer: int | None
  stack: tuple[int, ...]
  in_dim: int
  out_dim: int


def find_linears(shapes: Shapes) -> dict[str, Linear]:
  """Finds the Linears that a LoRA can adapt, by official name.

  Args:
    shapes: of the base's parameters by path.
  """
  linears = {}
  for path, shape in shapes.items():
    if path[-1] == "kernel" and path[0] != "patch_embedding":
      *stack, in_dim, out_dim = shape
      for layer in range(stack[0]) if path[0] == "blocks" else (None,):
        linears[linear_name(path[:-1], layer)] = Linear(path[:-1], layer, tuple(stack), in_dim, out_dim)
  return linears


def stack_loras(
  loras: Sequence[tuple[LoRAWeights, float]], config: DiTConfig, shapes: Shapes
) -> tuple[dict[str, Any], int]:
  """Converts LoRAs to adapter parameters; several LoRAs are concatenated along the rank.

  Args:
    loras: each with its weight, which is multiplied into `up` together with alpha / rank.
    config: of the base.
    shapes: of the base's parameters by path.

  Returns:
    Nested float32 arrays `down` ([layers,] in, rank) and `up` ([layers,] rank, out), and their common rank.

  Raises:
    UserError: a LoRA does not fit the base.
  """
  linears = find_linears(shapes)
  for lora, _ in loras:
    check_base(lora, config, linears)
  rank = sum(max(lora.ranks) for lora, _ in loras)
  arrays: dict[tuple[str, ...], np.ndarray] = {}
  start = 0
  for lora, weight in loras:
    for name, layer in lora.layers.items():
      linear = linears[name]
      down_path, up_path = (*linear.path, "lora", "down"), (*linear.path, "lora", "up")
      if down_path not in arrays:
        arrays[down_path] = np.zeros((*linear.stack, linear.in_dim, rank), np.float32)
        arrays[up_path] = np.zeros((*linear.stack, rank, linear.out_dim), np.float32)
      at = () if linear.layer is None else (linear.layer,)
      ranks = slice(start, start + layer.rank)
      arrays[down_path][(*at, slice(None), ranks)] = layer.down.astype(np.float32).T
      arrays[up_path][(*at, ranks)] = layer.up.astype(np.float32).T * np.float32(weight * layer.alpha / layer.rank)
    start += max(lora.ranks)
  return traverse_util.unflatten_dict(arrays), rank


def check_base(lora: LoRAWeights, config: DiTConfig, linears: Mapping[str, Linear]) -> None:
  """Raises UserError unless every layer of a LoRA fits a Linear of the base."""
  dims = {layer.down.shape[1] for name, layer in lora.layers.items() if re.search(r"(attn\.[qkv]|ffn\.0)$", name)}
  if lora.num_layers > config.num_layers or (dims and dims != {config.dim}):
    needed = " and ".join([*([_describe_dims(dims)] if dims else []), f"at least {lora.num_layers} layers"])
    raise UserError(
      f"the LoRA needs a base with {needed}, the base has {_describe_dims({config.dim})} and {config.num_layers} layers"
    )
  absent = sorted(name for name in lora.layers if name not in linears)
  if absent:
    reason = "; k_img and v_img exist in I2V models only" if any(name.endswith("_img") for name in absent) else ""
    raise UserError(f"the LoRA adapts {len(absent)} Linears that the base lacks: {', '.join(absent[:8])}{reason}")
  for name, layer in lora.layers.items():
    found, expected = (layer.down.shape[1], layer.up.shape[0]), (linears[name].in_dim, linears[name].out_dim)
    if found != expected:
      raise UserError(
        f"the LoRA does not fit the base: its {name} maps {found[0]} to {found[1]} channels, the base's "
        f"{expected[0]} to {expected[1]}"
      )


def _describe_dims(dims: set[int]) -> str:
  return "dim " + ", ".join(f"{dim} ({_MODEL_NAMES[dim]})" if dim in _MODEL_NAMES else f"{dim}" for dim in sorted(dims))


def unstack_lora(
  params: Mapping[str, Any], *, alpha: float, rslora: bool = False, metadata: Mapping[str, str] | None = None
) -> LoRAWeights:
  """Converts adapter parameters to a LoRA.

  Args:
    params: nested dicts with `down` and `up` under `lora`.
    alpha: used in training.
    rslora: whether training scaled by alpha / sqrt(rank).
    metadata: of the LoRA.
  """
  flat = traverse_util.flatten_dict(params)
  layers = {}
  for path, down in flat.items():
    if path[-2:] != ("lora", "down"):
      continue
    linear = path[:-2]
    down, up = (np.asarray(value, np.float32) for value in (down, flat[(*linear, "lora", "up")]))
    rank = down.shape[-1]
    for layer in range(len(down)) if down.ndim == 3 else (None,):
      at = () if layer is None else layer
      layers[linear_name(linear, layer)] = LoRALayer(
        np.ascontiguousarray(down[at].T), np.ascontiguousarray(up[at].T), alpha * rank**0.5 if rslora else float(alpha)
      )
  return LoRAWeights(layers, "jax", metadata or {})
