"""Forecasts the memory of training, sampling, encoding and decoding on a device, with the compiler."""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univid_jax.checkpoints.pretrained import abstract_component, abstract_parameters
from univid_jax.checkpoints.run_parts import (
  codec_shape,
  context_mode,
  create_model,
  text_encoder_shape,
  transformer_config,
)
from univid_jax.checkpoints.sentence_lengths import check_rows
from univid_jax.codecs.vae_config import VAEConfig
from univid_jax.codecs.wan_vae import VAE, jit_method
from univid_jax.config.schema import RunConfig
from univid_jax.core.dims import latent_shape
from univid_jax.core.errors import UserError
from univid_jax.core.options import TrainedExpert
from univid_jax.core.text import size_text
from univid_jax.diffusion.guidance import Branch
from univid_jax.diffusion.solvers import Euler
from univid_jax.inference.jobs import pack_in_bucket
from univid_jax.inference.sampler import Sampler
from univid_jax.parallel.mesh import AXES, SEQUENCE, local_mesh, row_shards
from univid_jax.parallel.sharding import TOKENS, bytes_per_device, check_tokens, is_per_token
from univid_jax.training.memory import (
  ADVICE,
  Forecast,
  abstract_batch,
  compile_program,
  compile_step,
  describe_program,
  placeholder_features,
)
from univid_jax.training.state import describe_training
from univid_jax.training.step import make_train_step

TILING_ADVICE = "config.vae_tiling.size=32 computes large frames in tiles, config.data.num_frames takes fewer frames"


def forecast(config: RunConfig, mesh: Mesh) -> Forecast:
  """Forecasts the training of a config on each device of a mesh.

  Raises:
    UserError: the rows fail `check_rows`.
    DoesNotFitError: the compiler itself sees that it cannot fit.
  """
  return compile_training(config, mesh)[1]


def compile_training(config: RunConfig, mesh: Mesh) -> tuple[Any, Forecast]:
  """Compiles the training step of a config; see `forecast`."""
  check_rows(config)
  optimizers, spec = describe_training(config, mesh)
  step = make_train_step(config, spec, optimizers, mesh)
  return compile_step(step, spec, abstract_batch(config, transformer_config(config), mesh), mesh)


def forecast_sampling(config: RunConfig, mesh: Mesh) -> Forecast:
  """Forecasts sampling one sentence of context I on each device, without codec and encoders.

  Both experts of a model with two are on the devices.

  Raises:
    UserError: it cannot fit, or the tokens of the sentence do not divide over the sequence axis.
  """
  check_rows(config)
  features = placeholder_features(transformer_config(config), clip_latents(config), num_clips=4)
  row = pack_in_bucket(features, context_mode=context_mode(config))
  num_experts = 1 if config.model.expert == TrainedExpert.ONLY else 2
  module = nnx.eval_shape(lambda: create_model(config, adapters=False))
  graph, params = nnx.graphdef(module), abstract_parameters(module, mesh)
  is_sharded = row_shards(mesh) == 1 and mesh.shape[SEQUENCE] > 1  # as the sampler does with one row
  if is_sharded:
    check_tokens(row.tokens.shape[1], mesh)
  whole = NamedSharding(mesh, PartitionSpec())

  def place(path: Any, x: Any) -> jax.ShapeDtypeStruct:
    has_shards = is_sharded and is_per_token(path)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, TOKENS) if has_shards else whole)

  row = jax.tree_util.tree_map_with_path(place, row)
  with jax.set_mesh(mesh):
    branch = jax.eval_shape(lambda params, row: Branch.create(nnx.merge(graph, params), row), params, row)
    branch = dataclasses.replace(branch, row=row, cache=jax.tree_util.tree_map_with_path(place, branch.cache))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    coefficients = jax.ShapeDtypeStruct((1,), jnp.float32)
    step: Any = Sampler(mesh).step(Euler())
    lowered = step.lower(graph, params, (branch, None), row.tokens, scalar, coefficients, scalar)
    compiled = compile_program(lowered, ADVICE)
  return Forecast(
    weights=num_experts * bytes_per_device(params),
    batch=bytes_per_device(row),
    cache=bytes_per_device(branch.cache.keys_and_values if branch.cache else None),
    note=_describe_sharding(mesh, shards_tokens=is_sharded),
    **describe_program(compiled, mesh),
  )


def forecast_autoencoder(config: RunConfig, mesh: Mesh, *, decoding: bool) -> Forecast:
  """Forecasts encoding or decoding one clip; see `compile_autoencoder`."""
  return compile_autoencoder(config, mesh, decoding=decoding)[1]


def compile_autoencoder(config: RunConfig, mesh: Mesh, *, decoding: bool) -> tuple[jax.stages.Compiled, Forecast]:
  """Compiles encoding or decoding one clip of a config on one device; its weights need not be present.

  Args:
    config: the config of a run; with `vae_tiling`, one tile at a time is on the device.
    mesh: its first device runs the autoencoder.
    decoding: whether to decode latents to frames; else frames are encoded.

  Raises:
    UserError: it cannot fit, or the codec has no weights and needs no device.
  """
  shape = codec_shape(config)
  if not isinstance(shape, VAEConfig):
    raise UserError("the codec of this config has no weights and runs on no device: only an autoencoder is forecast")
  _, y, x = latents = clip_latents(config)
  if config.vae_tiling.size:
    latents = latents[0], min(y, config.vae_tiling.size), min(x, config.vae_tiling.size)
  stride = shape.spatial_stride
  sizes = [(*latents, shape.latent_channels), (config.data.num_frames, latents[1] * stride, latents[2] * stride, 3)]
  mesh = Mesh(mesh.devices.ravel()[:1].reshape((1,) * len(AXES)), AXES)
  whole = NamedSharding(mesh, PartitionSpec())
  clip, frames = (jax.ShapeDtypeStruct(size, jnp.float32, sharding=whole) for size in sizes)
  module = abstract_component("vae", shape, dtype=jnp.float32, param_dtype=jnp.float32)
  graph, params = nnx.graphdef(module), abstract_parameters(module, mesh)
  method = VAE.decode if decoding else VAE.encode
  with jax.set_mesh(mesh):
    lowered = jit_method(method, graph).lower(params, clip if decoding else frames)
    compiled = compile_program(lowered, TILING_ADVICE)
  return compiled, Forecast(
    weights=bytes_per_device(params),
    batch=bytes_per_device((clip, frames)),
    note=f"the autoencoder alone, on one device, with {'tiles' if config.vae_tiling.size else 'frames'} of "
    f"{size_text(frames.shape[1:3])} pixels (width x height)",
    **describe_program(compiled, mesh),
  )


def forecast_text_encoder(config: RunConfig, mesh: Mesh) -> Forecast:
  """Forecasts embedding a prompt; see `compile_text_encoder`."""
  return compile_text_encoder(config, mesh)[1]


def compile_text_encoder(config: RunConfig, mesh: Mesh) -> tuple[jax.stages.Compiled, Forecast]:
  """Compiles embedding a prompt, with weights in bfloat16 that need not be present.

  Args:
    config: of a run on a base.
    mesh: the devices; prompts are embedded on those of one process.

  Raises:
    UserError: it cannot fit, or the config has no base and thus no text encoder.
  """
  shape = text_encoder_shape(config)
  first, *_ = mesh.devices.flat
  mesh = local_mesh(mesh, [device for device in mesh.devices.flat if device.process_index == first.process_index])
  module = abstract_component("text_encoder", shape, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  params, length = abstract_parameters(module, mesh), transformer_config(config).text_len
  prompt = tuple(jax.ShapeDtypeStruct((1, length), dtype) for dtype in (jnp.int32, bool))
  with jax.set_mesh(mesh):
    compiled = compile_program(jit_method(operator.call, nnx.graphdef(module)).lower(params, *prompt), ADVICE)
  return compiled, Forecast(
    weights=bytes_per_device(params),
    batch=5 * length,
    note=f"the text encoder alone; {_describe_sharding(mesh, shards_tokens=False) or 'on one device'}",
    **describe_program(compiled, mesh),
  )


def clip_latents(config: RunConfig) -> tuple[int, int, int]:
  """Returns the latents (t, y, x) of a clip of a config; raises UserError like `latent_shape`."""
  codec, data = codec_shape(config), config.data
  size = data.num_frames, data.height, data.width
  return latent_shape(size, temporal_stride=codec.temporal_stride, spatial_stride=codec.spatial_stride)


def _describe_sharding(mesh: Mesh, *, shards_tokens: bool) -> str:
  """Describes what is sharded over which axes in sampling; "" on one device."""
  if mesh.size == 1:
    return ""
  axes = [f"{axis} {size}" for axis, size in mesh.shape.items() if axis != "data" and size > 1]
  weights = f"weights are sharded over {' x '.join(axes)}" if axes else "each device has all weights"
  return f"{weights}; {'the tokens are sharded over ' + SEQUENCE if shards_tokens else 'the sentence is whole on each'}"
