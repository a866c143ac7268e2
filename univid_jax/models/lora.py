"""Low-rank adapters (LoRA): a trained update of a frozen Linear, W + scale * down @ up."""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from univid_jax.models.layers import Linear, next_key
from univid_jax.weights.names import original_name

# What the reference trains: the Linears of attention and feed-forward, by their official names.
DEFAULT_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")


class LoRAParam(nnx.Variable):
  """A parameter of an adapter."""


class DropoutKey(nnx.Variable):
  """The random key of an adapter's dropout, new in every training step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
  """What to adapt, and how strongly.

  Attributes:
    rank: of the update.
    alpha: the update is scaled by alpha / rank.
    targets: patterns (`fnmatch`) of the official names of Linears, or of their ends: `q` is every `....q`.
    dropout: share of the adapter's inputs that training drops.
    rslora: scale by alpha / sqrt(rank) instead.
  """

  rank: int = 16
  alpha: float = 16.0
  targets: tuple[str, ...] = DEFAULT_TARGETS
  dropout: float = 0.0
  rslora: bool = False

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f"a LoRA's rank is at least 1, got {self.rank}")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"a LoRA's dropout is at least 0 and below 1, got {self.dropout}")

  @property
  def scale(self) -> float:
    return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRA(nnx.Module):
  """x to its part of a Linear's output; `down` starts random, `up` at zero, both float32.

  Args:
    kernel: of the Linear, ([layers,] in_dim, out_dim); gives shapes and names of dims.
    config: rank, scale and dropout.
    dtype: of the products.
    rngs: the stream `params`.
  """

  def __init__(self, kernel: nnx.Variable, config: LoRAConfig, *, dtype, rngs: nnx.Rngs):
    *layers, in_dim, out_dim = kernel.shape
    in_name, out_name = kernel.get_metadata()["dims"]
    self.scale, self.dropout, self.dtype = config.scale, config.dropout, dtype
    # PEFT's start: uniform within 1 / sqrt(in_dim).
    bound = in_dim**-0.5
    down = jax.random.uniform(next_key(rngs), (*layers, in_dim, config.rank), jnp.float32, -bound, bound)
    self.down = LoRAParam(down, dims=(in_name, None))
    self.up = LoRAParam(jnp.zeros((*layers, config.rank, out_dim), jnp.float32), dims=(None, out_name))
    self.key = DropoutKey(jax.random.split(jax.random.key(0), tuple(layers))) if config.dropout else None

  def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
    x = x.astype(self.dtype)
    if self.key is not None:
      kept = jax.random.bernoulli(self.key[...], 1 - self.dropout, x.shape)
      x = jnp.where(kept, x / (1 - self.dropout), 0)
    y = _widened(x @ self.down[...].astype(self.dtype), self.up[...].astype(self.dtype))
    return y if self.scale == 1 else y * jnp.asarray(self.scale, self.dtype)


@jax.custom_vjp
def _widened(x: Float[Array, "... r"], up: Float[Array, "r o"]) -> Float[Array, "... o"]:
  """x @ up. Its own gradient of `up` has x first: JAX's has the output's first, which XLA on CPUs then transposes as a whole."""
  return x @ up


def _widened_backward(saved, gradient):
  x, up = saved
  tokens = tuple(range(x.ndim - 1))
  return gradient @ up.T, jax.lax.dot_general(x, gradient, ((tokens, tokens), ((), ())))


_widened.defvjp(lambda x, up: (x @ up, (x, up)), _widened_backward)


def attach(model: nnx.Module, config: LoRAConfig, *, rngs: nnx.Rngs) -> list[str]:
  """Gives the model's Linears that the targets name an adapter each.

  Returns:
    The official names of these Linears; of stacked ones, that of layer 0.

  Raises:
    ValueError: a target matches none.
  """
  matched: dict[str, str] = {}
  for path, module in list(nnx.iter_modules(model)):
    if isinstance(module, Linear):
      name = linear_name(path, 0 if path[0] == "blocks" else None)
      target = next((target for target in config.targets if _matches(name, target)), None)
      if target is not None:
        module.lora = LoRA(module.kernel, config, dtype=module.dtype, rngs=rngs)
        matched[name] = target
  idle = [target for target in config.targets if not any(_matches(name, target) for name in matched)]
  if idle:
    raise ValueError(f"no Linear of the model matches the LoRA target {', '.join(idle)}")
  return sorted(matched)


def linear_name(path: Iterable[str], layer: int | None = None) -> str:
  """The official name of a Linear of the transformer; of one layer where layers are stacked."""
  return original_name("transformer", (*path, "kernel"), layer).removesuffix(".weight")


def _matches(name: str, target: str) -> bool:
  return fnmatch.fnmatch(name, target) or fnmatch.fnmatch(name, f"*.{target}")


def split_lora(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Nested parameters of a model with adapters as those of the base and those of the adapters."""
  base, lora = {}, {}
  for key, value in params.items():
    if key == "lora":
      lora[key] = value
    elif isinstance(value, Mapping):
      base[key], inner = split_lora(value)
      if inner:
        lora[key] = inner
    else:
      base[key] = value
  return base, lora


def join(base: Mapping[str, Any], lora: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `split_lora`."""
  out = dict(base)
  for key, value in lora.items():
    out[key] = join(base[key], value) if isinstance(value, Mapping) and key in base else value
  return out


def with_dropout_keys(lora: Mapping[str, Any], key: PRNGKeyArray) -> dict[str, Any]:
  """Adapters with a new key each, one a layer, for dropout."""
  out = {}
  for (name, value), part in zip(sorted(lora.items()), jax.random.split(key, len(lora))):
    if name == "lora":
      out[name] = {**value, "key": jax.random.split(part, value["down"].shape[:-2])}
    else:
      out[name] = with_dropout_keys(value, part)
  return out


def merge(base: Mapping[str, Any], lora: Mapping[str, Any], *, scale: float = 1.0, strength: float = 1.0) -> dict[str, Any]:
  """Base parameters with the adapters' updates added to the kernels, computed in float32."""
  out = dict(base)
  for key, value in lora.items():
    if key == "lora":
      update = jnp.matmul(value["down"], value["up"], precision=jax.lax.Precision.HIGHEST) * (scale * strength)
      out["kernel"] = (base["kernel"].astype(jnp.float32) + update).astype(base["kernel"].dtype)
    else:
      out[key] = merge(base[key], value, scale=scale, strength=strength)
  return out


def lora_targets(names: Sequence[str]) -> list[str]:
  """Official names of adapted Linears in short: each once, whatever its layer."""
  return sorted({name.split(".", 2)[2] if name.startswith("blocks.") else name for name in names})
