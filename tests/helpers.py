"""What several tests need: goldens, models filled from official names, and errors as numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from safetensors.numpy import load_file

from tools.convert_weights.layout import check_fills, fills, read_parameters
from univid_jax.models.dit import DiT, DiTConfig

GOLDENS = Path(__file__).parent / "goldens"


def golden(name: str):
  """(json, inputs and outputs, weights or None) of a golden."""
  weights = GOLDENS / f"{name}.weights.safetensors"
  return (json.loads((GOLDENS / f"{name}.json").read_text()) if (GOLDENS / f"{name}.json").exists() else {},
          load_file(GOLDENS / f"{name}.io.safetensors"), load_file(weights) if weights.exists() else None)


def relative_error(value, expected) -> float:
  value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
  assert value.shape == expected.shape, (value.shape, expected.shape)
  return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


def load(component: str, init: Callable[[], nnx.Module], weights) -> nnx.Module:
  """A model with the weights of an official file."""
  model = nnx.eval_shape(init)
  leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
  wanted = fills(component, model.config, {path: leaf.shape for path, leaf in leaves})
  wanted = check_fills(wanted, {name: value.shape for name, value in weights.items()})
  arrays = read_parameters(wanted, weights.__getitem__)
  nnx.update(model, nnx.from_flat_state([(path, leaf.replace(jnp.asarray(arrays[path], leaf.dtype))) for path, leaf in leaves]))
  return model


def load_dit(config: DiTConfig, weights, **options) -> DiT:
  return load("transformer", lambda: DiT(config, rngs=nnx.Rngs(0), **options), weights)


def dit_config(dit) -> DiTConfig:
  """From the short names of the sampling and training goldens."""
  return DiTConfig(dim=dit["dim"], ffn_dim=dit["ffn"], num_heads=dit["heads"], num_layers=dit["layers"], freq_dim=dit["freq"],
                   text_dim=dit["text"])


def channels_last(latents):
  return rearrange(latents, "c t y x -> t y x c")
