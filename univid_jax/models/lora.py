"""Low-rank adapters (LoRA): a trained update of a frozen Linear, W + scale * down @ up."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from univid_jax.config.schema import LoRAConfig
from univid_jax.core.errors import UserError
from univid_jax.models.layers import Linear
from univid_jax.models.names import original_name
from univid_jax.platform import cpu
from univid_jax.platform.current import Platform, current_platform

# The attribute of a Linear that holds its adapter; also the last part of an adapter's path in nested parameters.
LORA = "lora"


class LoRAParam(nnx.Variable):
  """A parameter of an adapter."""


class DropoutKey(nnx.Variable):
  """The random key of an adapter's dropout, replaced in every training step."""


class LoRA(nnx.Module):
  """Maps the input of a Linear to its adapter's output; `down` starts random, `up` at zero, both float32.

  Args:
    kernel: the Linear's, ([layers,] in_dim, out_dim); determines shapes and names of dims.
    config: rank, scale and dropout.
    dtype: of the matrix products.
    rngs: provides the stream `params`.
  """

  def __init__(self, kernel: nnx.Variable, config: LoRAConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
    *layers, in_dim, out_dim = kernel.shape
    in_name, out_name = kernel.get_metadata()["dims"]
    self.scale, self.dropout, self.dtype = config.scale, config.dropout, dtype
    # As in PEFT: uniform within 1 / sqrt(in_dim).
    bound = in_dim**-0.5
    down = jax.random.uniform(rngs.params(), (*layers, in_dim, config.rank), jnp.float32, -bound, bound)
    self.down = LoRAParam(down, dims=(in_name, None))
    self.up = LoRAParam(jnp.zeros((*layers, config.rank, out_dim), jnp.float32), dims=(None, out_name))
    self.key = DropoutKey(jax.random.split(jax.random.key(0), tuple(layers))) if config.dropout else None

  def __call__(self, x: Float[Array, "... i"], kernel: Float[Array, "i o"] | None = None) -> Float[Array, "... o"]:
    del kernel  # adapters of other kinds depend on it
    x = x.astype(self.dtype)
    if self.key is not None:
      kept = jax.random.bernoulli(self.key[...], jnp.float32(1 - self.dropout), x.shape)
      x = jnp.where(kept, x / (1 - self.dropout), 0)
    y = multiply_low_rank(x, self.down[...].astype(self.dtype), self.up[...].astype(self.dtype))
    return y if self.scale == 1 else y * jnp.asarray(self.scale, self.dtype)


def multiply_low_rank(
  x: Float[Array, "... i"], down: Float[Array, "i r"], up: Float[Array, "r o"]
) -> Float[Array, "... o"]:
  """Returns x @ down @ up."""
  x = x @ down
  return cpu.project_up(x, up) if current_platform() == Platform.CPU else x @ up


def attach(model: nnx.Module, config: LoRAConfig, *, rngs: nnx.Rngs) -> list[str]:
  """Adds an adapter to each Linear of a transformer that a target of the config matches.

  Returns:
    The official names of these Linears; for stacked ones that of layer 0.

  Raises:
    UserError: a target matches no Linear.
  """
  linears = {
    linear_name(path, 0 if path[0] == "blocks" else None): module
    for path, module in nnx.iter_modules(model)
    if isinstance(module, Linear)
  }
  matched = {name: module for name, module in linears.items() if any(_matches(name, t) for t in config.targets)}
  unmatched = [target for target in config.targets if not any(_matches(name, target) for name in matched)]
  if unmatched:
    raise UserError(f"no Linear of the model matches the LoRA target {', '.join(unmatched)}")
  for module in matched.values():
    module.lora = LoRA(module.kernel, config, dtype=module.dtype, rngs=rngs)
  return sorted(matched)


def linear_name(path: Iterable[Any], layer: int | None) -> str:
  """Returns the official name of a Linear of the transformer; for stacked layers that of one layer."""
  return original_name("transformer", (*path, "kernel"), layer).removesuffix(".weight")


def _matches(name: str, target: str) -> bool:
  return fnmatch.fnmatch(name, target) or fnmatch.fnmatch(name, f"*.{target}")


def join(base: Mapping[str, Any], lora: Mapping[str, Any]) -> dict[str, Any]:
  """Joins the nested parameters of a base and of its adapters."""
  return traverse_util.unflatten_dict(_flatten(base) | _flatten(lora))


def remove_dropout(model: nnx.Module) -> None:
  """Removes the dropout of adapters, which is for training only."""
  for _, module in nnx.iter_modules(model):
    if isinstance(module, LoRA):
      module.dropout, module.key = 0.0, None


def with_dropout_keys(lora: Mapping[str, Any], key: PRNGKeyArray) -> dict[str, Any]:
  """Gives each adapter a new dropout key, one per layer."""
  out = {}
  for (name, value), part in zip(sorted(lora.items()), jax.random.split(key, len(lora))):
    if name == LORA:
      out[name] = {**value, "key": jax.random.split(part, value["down"].shape[:-2])}
    else:
      out[name] = with_dropout_keys(value, part)
  return out


def _flatten(params: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
  return traverse_util.flatten_dict(dict(params))


def lora_targets(names: Sequence[str]) -> list[str]:
  """Returns the official names of adapted Linears without their layer, each once."""
  return sorted({name.split(".", 2)[2] if name.startswith("blocks.") else name for name in names})
