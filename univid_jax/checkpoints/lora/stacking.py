"""Converts between LoRA weights and the changes that a transformer with stacked layers applies."""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from univid_jax.checkpoints.lora.kinds import Change, Difference, DoRALayer, LoRALayer
from univid_jax.checkpoints.lora.names import list_names
from univid_jax.checkpoints.lora.weights import LoRAWeights
from univid_jax.core.errors import UserError
from univid_jax.core.params import ParamPath
from univid_jax.models.changes import CHANGE_KINDS
from univid_jax.models.lora import linear_name
from univid_jax.models.names import original_name
from univid_jax.models.variants import DiTConfig

Shapes = Mapping[ParamPath, tuple[int, ...]]
Parts = Mapping[str, np.ndarray]

log = logging.getLogger(__name__)

# Names of the published models by width, for error messages.
_MODEL_NAMES = {1536: "1.3B", 3072: "5B", 5120: "14B"}


class Target(NamedTuple):
  """An official tensor of the base.

  Attributes:
    path: path of the parameter.
    layer: index into the stacked layers; None if they are not stacked.
    stack: shape of the stacked dims, (layers,) or ().
    shape: shape of one layer of the parameter: (in, out) if it is a kernel.
  """

  path: ParamPath
  layer: int | None
  stack: tuple[int, ...]
  shape: tuple[int, ...]

  @property
  def is_kernel(self) -> bool:
    return self.path[-1] == "kernel"

  @property
  def is_convolution(self) -> bool:
    return self.path == ("patch_embedding", "kernel")


class StackedChanges(NamedTuple):
  """The changes of a transformer by path.

  Attributes:
    kernels: for Linears, parts by group and name, see `models.changes`, stacked like the kernel.
    others: differences of all other parameters, float32, by path of the parameter.
  """

  kernels: dict[ParamPath, dict[str, dict[str, np.ndarray]]]
  others: dict[ParamPath, np.ndarray]


def find_targets(shapes: Shapes) -> dict[str, Target]:
  """Returns the tensors of a base by official name.

  Args:
    shapes: shapes of its parameters by path.
  """
  targets = {}
  for path, shape in shapes.items():
    stack = tuple(shape[:1]) if path[0] == "blocks" else ()
    for layer in range(stack[0]) if stack else (None,):
      targets[original_name("transformer", path, layer)] = Target(path, layer, stack, tuple(shape[len(stack) :]))
  return targets


def stack_loras(
  loras: Sequence[tuple[LoRAWeights, float]], config: DiTConfig, shapes: Shapes, *, skip_unmatched: bool = False
) -> StackedChanges:
  """Converts LoRAs to changes of a base, which add up: low-rank ones are concatenated along the rank.

  Args:
    loras: the LoRAs, each with its weight.
    config: config of the base.
    shapes: shapes of the base's parameters by path.
    skip_unmatched: whether to leave out tensors without a counterpart in the base.

  Raises:
    UserError: a LoRA does not fit the base.
  """
  targets = find_targets(shapes)
  kernels: dict[ParamPath, dict[str, dict[int | None, Parts]]] = defaultdict(lambda: defaultdict(dict))
  others: dict[ParamPath, np.ndarray] = {}
  for number, (lora, weight) in enumerate(loras):
    for name, change in match_base(lora, config, targets, skip_unmatched=skip_unmatched).changes.items():
      target = targets[name]
      if target.is_kernel:
        group, parts = _kernel_parts(change, weight, config if target.is_convolution else None)
        layers = kernels[target.path[:-1]][group if group in _ADD else f"{group}_{number}"]
        layers[target.layer] = _ADD[group](layers[target.layer], parts) if target.layer in layers else parts
      else:
        assert isinstance(change, Difference)
        with np.errstate(all="ignore"):
          parts = {"diff": change.diff.astype(np.float32).reshape(target.shape) * np.float32(weight)}
        stacked = others.setdefault(target.path, np.zeros((*target.stack, *target.shape), np.float32))
        stacked[() if target.layer is None else target.layer] += parts["diff"]
      if not all(np.isfinite(part).all() for part in parts.values()):
        raise UserError(f"{lora.source}: the change of {name} is not finite in float32")
  stacks = {path: shapes[*path, "kernel"][:-2] for path in kernels}
  return StackedChanges(
    {
      path: {group: _stack(layers, stacks[path]) for group, layers in groups.items()}
      for path, groups in kernels.items()
    },
    others,
  )


# How two changes of a kernel become one, for kinds whose sum is of the same kind.
_ADD = {
  "lora": lambda a, b: {
    "down": np.concatenate([a["down"], b["down"]], axis=1),
    "up": np.concatenate([a["up"], b["up"]], axis=0),
  },
  "diff": lambda a, b: {"diff": a["diff"].astype(np.float32) + b["diff"].astype(np.float32)},
}


def _kernel_parts(change: Change, weight: float, convolution: DiTConfig | None) -> tuple[str, Parts]:
  """Returns the parts of a kernel's change, and the name of the group of changes that can be stacked with it."""
  with np.errstate(all="ignore"):
    group, parts = change.kernel_parts(weight)
  if convolution is not None:
    # The patch embedding's kernel, which is small, is ordered (t, y, x, channel), PyTorch's is (channel, t, y, x).
    channels, patch = convolution.in_dim, convolution.patch_size
    diff = np.asarray(CHANGE_KINDS[group].change({name: jnp.asarray(part) for name, part in parts.items()}))
    diff = np.moveaxis(diff.reshape(channels, *patch, -1), 0, 3).reshape(diff.shape)
    group, parts = (
      "diff",
      {"diff": diff, **{part: parts[part] for part in ("magnitude_out", "weight") if part in parts}},
    )
  if isinstance(change, DoRALayer):
    group += f"_{change.axis}"
  if group.startswith("lokr"):
    group += f"_{'x'.join(str(size) for part in ('w1', 'w2') for size in parts[part].shape)}"
  return group, parts


def _stack(layers: Mapping[int | None, Parts], stack: tuple[int, ...]) -> dict[str, np.ndarray]:
  """Stacks the parts of layers, padded with zeros to the largest rank; absent layers are zero."""
  stacked: dict[str, np.ndarray] = {}
  for name in next(iter(layers.values())):
    shapes = [parts[name].shape for parts in layers.values()]
    dtypes = {parts[name].dtype for parts in layers.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.float32
    array = np.zeros((*stack, *np.max(shapes, axis=0).astype(int)), dtype)
    for layer, parts in layers.items():
      at = () if layer is None else (layer,)
      array[(*at, *(slice(size) for size in parts[name].shape))] = parts[name]
    stacked[name] = array
  return stacked


def match_base(
  lora: LoRAWeights, config: DiTConfig, targets: Mapping[str, Target], *, skip_unmatched: bool
) -> LoRAWeights:
  """Returns the changes that have a counterpart in a base.

  Raises:
    UserError: the LoRA is for another base, or has further tensors that are not to be skipped.
  """
  dims = {
    change.shape[1]
    for name, change in lora.changes.items()
    if re.search(r"(attn\.[qkv]|ffn\.0)\.weight$", name) and len(change.shape) == 2
  }
  absent = [name for name, change in lora.changes.items() if not _has_counterpart(change, targets.get(name), config)]
  unmatched = [*lora.names_of(absent), *lora.unmatched]
  if dims and dims != {config.dim}:
    raise UserError(
      f"{lora.source} needs a base with {_describe_dims(dims)} and at least {lora.num_layers} layers, the base has "
      f"{_describe_dims({config.dim})} and {config.num_layers} layers"
    )
  if unmatched and (not skip_unmatched or len(absent) == len(lora.changes)):
    reasons = {
      "k_img, v_img and img_emb exist in Wan2.1's I2V models only": re.search("_img|img_", " ".join(absent)),
      "the channels of a latent differ": "patch_embedding.weight" in absent,
      f"it needs at least {lora.num_layers} layers, the base has {config.num_layers}": (
        lora.num_layers > config.num_layers
      ),
    }
    reason = "; ".join(text for text, applies in reasons.items() if applies)
    raise UserError(
      f"{lora.source} has {len(unmatched)} tensors without a counterpart in the base{reason and f' ({reason})'}: "
      + list_names(unmatched)
      + ("" if skip_unmatched else "; --lora_skip_unmatched (lora_skip_unmatched=True) leaves them out")
    )
  if unmatched:
    log.warning("%s: left out %d tensors without a counterpart: %s", lora.source, len(unmatched), list_names(unmatched))
  found = lora.select(name for name in lora.changes if name not in absent)
  for name, change in found.changes.items():
    _check_shape(lora, name, change, targets[name], config)
  return found


def _has_counterpart(change: Change, target: Target | None, config: DiTConfig) -> bool:
  """Returns whether a base has a tensor for a change; a patch embedding with other latent channels does not count."""
  if target is None or not target.is_convolution:
    return target is not None
  return change.shape[0] != config.dim or math.prod(change.shape[1:]) == config.in_dim * config.patch_volume


def _check_shape(lora: LoRAWeights, name: str, change: Change, target: Target, config: DiTConfig) -> None:
  expected = target.shape[::-1] if target.is_kernel else target.shape
  if target.is_convolution and len(change.shape) > 2:
    expected = (config.dim, config.in_dim, *config.patch_size)
  found, needed = (tuple(size for size in shape if size != 1) for shape in (change.shape, expected))
  if found != needed:
    raise UserError(
      f"{lora.source} does not fit the base: its {name} has the shape {tuple(change.shape)}, the base's {expected}"
    )
  if not target.is_kernel and not isinstance(change, Difference):
    raise UserError(f"{lora.source} has a {change.kind} change of {name}, which is not a matrix")
  if target.is_convolution and isinstance(change, DoRALayer) and change.axis == "in":
    raise UserError(f"{lora.source} has DoRA magnitudes per input channel for {name}, which is not supported")


def _describe_dims(dims: set[int]) -> str:
  return "dim " + ", ".join(f"{dim} ({_MODEL_NAMES[dim]})" if dim in _MODEL_NAMES else f"{dim}" for dim in sorted(dims))


def unstack_lora(
  params: Mapping[str, Any], *, alpha: float, rslora: bool = False, metadata: Mapping[str, str] | None = None
) -> LoRAWeights:
  """Converts adapter parameters to a LoRA.

  Args:
    params: nested dicts with `down` and `up` under `lora`.
    alpha: the alpha used in training.
    rslora: whether training scaled by alpha / sqrt(rank).
    metadata: metadata of the LoRA.
  """
  flat = traverse_util.flatten_dict(params)
  changes: dict[str, Change] = {}
  for path, down in flat.items():
    if path[-2:] != ("lora", "down"):
      continue
    linear = path[:-2]
    down, up = (np.asarray(value, np.float32) for value in (down, flat[(*linear, "lora", "up")]))
    rank = down.shape[-1]
    for layer in range(len(down)) if down.ndim == 3 else (None,):
      at = () if layer is None else layer
      changes[f"{linear_name(linear, layer)}.weight"] = LoRALayer(
        np.ascontiguousarray(down[at].T), np.ascontiguousarray(up[at].T), alpha * rank**0.5 if rslora else float(alpha)
      )
  return LoRAWeights(changes, "jax", metadata or {})
