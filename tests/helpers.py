"""Shared by several tests: goldens, models with golden weights, relative errors."""

import dataclasses
import importlib.util
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh
from PIL import Image
from safetensors.numpy import load_file

from univid_jax.checkpoints.run_parts import create_model, open_encoders, transformer_config
from univid_jax.checkpoints.usage import Usage
from univid_jax.config.schema import RunConfig
from univid_jax.convert.layout import make_fills, match_fills
from univid_jax.core.packed_row import ContextMode, PackedRow
from univid_jax.core.params import ParamTree
from univid_jax.core.unfinished import unfinished_path
from univid_jax.inference.experts import OffloadedParams, Transformer
from univid_jax.inference.pipeline import Pipeline
from univid_jax.models.dit import DiT
from univid_jax.models.variants import DiTConfig
from univid_jax.training.state import TrainState
from univid_jax.training.step import Metrics, TrainStep, _count


class LazyPackage:
  """A package that is imported when it is first used. All workers collect all tests; few run those with PyTorch."""

  def __init__(self, name: str):
    self._name = name

  def __getattr__(self, attribute: str):
    if attribute.startswith("_"):  # pytest asks every object of a module of tests whether it wraps a fixture
      raise AttributeError(attribute)
    return getattr(importlib.import_module(self._name), attribute)


def package_or_skip(name: str, *, reason: str) -> LazyPackage:
  """Returns a package of an extra, or skips the test, or the whole module of tests; does not import the package."""
  if importlib.util.find_spec(name) is None:
    pytest.skip(reason, allow_module_level=True)
  return LazyPackage(name)


GOLDENS = Path(__file__).parent / "goldens"
GOLDENS22 = Path(__file__).parent / "goldens22"  # of Wan2.2

CAUSAL = ContextMode(causal=True, zero_timestep=True)


def golden(name: str, folder: Path = GOLDENS):
  """Returns (description, inputs and outputs, weights or None) of a golden."""
  weights = folder / f"{name}.weights.safetensors"
  return (
    json.loads((folder / f"{name}.json").read_text()) if (folder / f"{name}.json").exists() else {},
    load_file(folder / f"{name}.io.safetensors"),
    load_file(weights) if weights.exists() else None,
  )


def relative_error(value, expected) -> float:
  value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
  assert value.shape == expected.shape, (value.shape, expected.shape)
  return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


def load(component: str, init: Callable[[], nnx.Module], weights: Mapping[str, np.ndarray]) -> nnx.Module:
  """Builds a model with weights given by official name."""
  model = nnx.eval_shape(init)
  arrays = {}
  for fill in match_fills(make_fills(component, model.config), {name: x.shape for name, x in weights.items()}):
    layers = [fill.from_original(weights[name]) for name in fill.names]
    arrays[fill.path] = np.stack(layers) if fill.stacked else layers[0]

  def fill_leaf(path, leaf):
    return leaf.replace(jnp.asarray(arrays[tuple(map(str, path))], leaf.dtype))

  leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
  nnx.update(model, nnx.from_flat_state([(path, fill_leaf(path, leaf)) for path, leaf in leaves]))
  return model


def load_dit(config: DiTConfig, weights, **options) -> DiT:
  return load("transformer", lambda: DiT(config, rngs=nnx.Rngs(0), **options), weights)


def dit_config(dit) -> DiTConfig:
  """Builds the config that the sampling and training goldens describe with short names."""
  return DiTConfig(
    dim=dit["dim"],
    ffn_dim=dit["ffn"],
    num_heads=dit["heads"],
    num_layers=dit["layers"],
    freq_dim=dit["freq"],
    text_dim=dit["text"],
  )


def channels_last(latents):
  return rearrange(latents, "c t y x -> t y x c")


def random_pipeline(config: RunConfig, mesh: Mesh) -> Pipeline:
  """Builds a pipeline with random weights, as a run of the config would leave it."""
  graph, params = nnx.split(create_model(config), nnx.Param)
  return Pipeline(
    transformer_config(config),
    [Transformer(graph, nnx.to_pure_dict(params))],
    encoders=open_encoders(config, mesh),
    mesh=mesh,
    usage=Usage.from_config(config),
  )


def compile_plain_step(run: object) -> TrainStep:
  """Stands in for `compile_train_step` where a run has to move, not to learn: compiling is most of a short run.

  Its steps add a hundredth to every parameter and to the average of each; the loss is not finite if a parameter is not.
  """

  def add(x: jax.Array) -> jax.Array:
    return jax.device_put(np.asarray(x) + np.asarray(0.01, x.dtype), x.sharding)

  def step(state: TrainState, frozen: ParamTree, row: PackedRow) -> tuple[TrainState, Metrics]:
    loss = jnp.float32(sum(float(np.sum(np.asarray(x, np.float32))) for x in jax.tree.leaves(state.params)))
    number = jax.device_put(np.asarray(state.step) + np.int32(1), state.step.sharding)
    params, ema = (jax.tree.map(add, params) for params in (state.params, state.ema))
    moved = dataclasses.replace(state, step=number, params=params, ema=ema)
    return moved, {"loss": loss, "grad_norm": jnp.float32(1), **_count(jax.tree.map(jnp.asarray, jax.device_get(row)))}

  return step


def give_prompts(pipeline: Pipeline) -> Pipeline:
  """Gives a pipeline without a text encoder one, of ones for each letter, so that negative prompts have an effect."""
  dim = pipeline.config.text_dim
  pipeline.encoders.embed_prompt = lambda text: np.ones((len(text), dim), np.float32)
  return pipeline


def left_by_killed(path: Path, *, machine: str | None = None) -> Path:
  """Returns the name of an unfinished file or folder whose process was killed, here or on another machine."""
  owner, dot, name = unfinished_path(path).name.partition(".partial-")[2].partition(".")
  here, _, start, unique = owner.split("-")
  return path.with_name(f".partial-{machine or here}-999999999-{start}-{unique}{dot}{name}")


def make_old(*paths: Path) -> None:
  """Makes files and folders look as if nobody had changed them for longer than a day."""
  for path in paths:
    os.utime(path, (time.time() - 100_000,) * 2)


def parameters(pipe: Pipeline) -> ParamTree:
  """Returns the parameters of a pipeline's only transformer."""
  (transformer,) = pipe.experts.transformers
  assert not isinstance(transformer.params, OffloadedParams)
  return transformer.params


def image_width(path: Path) -> int:
  """Returns the width of an image in pixels; the file is closed."""
  with Image.open(path) as image:
    return image.width
