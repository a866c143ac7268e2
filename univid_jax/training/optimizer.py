"""Optimizers and schedules by name, all from optax."""

from collections.abc import Mapping
from typing import Any

import jax
import optax


def make_schedule(config: Mapping[str, Any], num_steps: int) -> optax.Schedule:
  """A learning rate as a factor of the peak, from 0 to 1.

  `constant`; `cosine` to 0; or `linear` to 0 over the last `decay_fraction` of the steps; each after `warmup_steps`.
  """
  name, warmup = config["schedule"], config["warmup_steps"]
  if name == "constant":
    decay = optax.constant_schedule(1.0)
  elif name == "cosine":
    decay = optax.cosine_decay_schedule(1.0, max(num_steps - warmup, 1))
  elif name == "linear":
    length = max(int(num_steps * config["decay_fraction"]), 1)
    decay = optax.linear_schedule(1.0, 0.0, length, transition_begin=max(num_steps - warmup - length, 0))
  else:
    raise ValueError(f"unknown schedule {name!r}; there are constant, cosine, linear")
  return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), decay], [warmup]) if warmup else decay


def make_optimizer(config: Mapping[str, Any], num_steps: int) -> optax.GradientTransformation:
  """The optimizer of a config: `adamw`, or `muon` on the matrices of self-attention and feed-forward and Adam on all else."""
  schedule = make_schedule(config, num_steps)

  def rate(peak):
    return lambda step: peak * schedule(step)

  name = config["name"]
  if name == "adamw":
    update = optax.adamw(rate(config["learning_rate"]), b1=config["b1"], b2=config["b2"], eps=config["eps"],
                         weight_decay=config["weight_decay"])
  elif name == "muon":
    update = optax.contrib.muon(rate(config["learning_rate"]), weight_decay=config["weight_decay"], adam_b1=config["b1"],
                                adam_b2=config["b2"], adam_learning_rate=rate(config["adam_learning_rate"]),
                                muon_weight_dimension_numbers=muon_dimensions)
  else:
    raise ValueError(f"unknown optimizer {name!r}; there are adamw, muon")
  clip = config["clip_norm"]
  return optax.chain(optax.clip_by_global_norm(clip), update) if clip else update


def muon_dimensions(params):
  """Which parameters Muon orthogonalises: the stacked (layers, in, out) matrices of self-attention and feed-forward."""
  def dimensions(path, value):
    names = [key.key for key in path]
    chosen = value.ndim == 3 and "kernel" in names and ("self_attn" in names or "ffn" in names)
    return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if chosen else None
  return jax.tree_util.tree_map_with_path(dimensions, params)
