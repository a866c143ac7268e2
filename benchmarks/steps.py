"""The transformer on random weights as the benchmarks time it, a forward pass or a LoRA step; and its shape for the peer."""

import os
import sys
from collections.abc import Callable
from typing import Any

from univid_jax.models.dit import DiTConfig
from univid_jax.types import PackedRow


def diffusers_options(shape: DiTConfig) -> dict[str, Any]:
  """What diffusers.WanTransformer3DModel takes for the same shape; plain values, so that the peer's process has no JAX in it."""
  return dict(num_attention_heads=shape.num_heads, attention_head_dim=shape.head_dim, in_channels=shape.in_dim,
              out_channels=shape.out_dim, text_dim=shape.text_dim, freq_dim=shape.freq_dim, ffn_dim=shape.ffn_dim,
              num_layers=shape.num_layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=shape.eps)


def row_program(shape: DiTConfig, *, dtype: str, mode: str, backend: str, remat: str = "full") -> Callable[[PackedRow], None]:
  """A program that takes a row (or several) through the model, to the end; compiled for each shape of row.

  Args:
    shape: of the transformer.
    dtype: of weights and products; adapters are float32.
    mode: "train" is a step of AdamW on adapters of rank 16; "forward" a forward pass.
    backend: of attention.
    remat: what a step keeps of the forward pass, see `models.dit.DiT`.
  """
  # The configs stand beside the benchmarks, not in the package.
  sys.path.insert(0, os.getcwd())
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from configs.video_tasks import get_config
  from univid_jax import build
  from univid_jax.models.lora import join
  from univid_jax.parallel.mesh import make_mesh
  from univid_jax.parallel.sharding import shard_batch
  from univid_jax.training.forecast import compile_step
  from univid_jax.training.optimizer import make_optimizer
  from univid_jax.training.step import StateSpec, make_train_step

  config = get_config("wan_1_3b")
  config.model.update({"variant": "", "dim": shape.dim, "ffn_dim": shape.ffn_dim, "num_heads": shape.num_heads,
                       "num_layers": shape.num_layers, "freq_dim": shape.freq_dim, "text_dim": shape.text_dim,
                       "rope_theta": 10000.0, "rope_scale": 1.0, "dtype": dtype, "param_dtype": dtype,
                       "attention_backend": backend, "remat": remat})
  mesh = make_mesh({"data": 1, "fsdp": -1})
  optimizer = make_optimizer(config.optimizer, 1000)
  spec = StateSpec.of(lambda: build.model(config), optimizer, mesh, ema=False, lora=True)
  # One parameter after another, so that making them is not what takes the most memory.
  draw = jax.jit(lambda x: 0.02 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype))
  frozen = jax.tree.map(lambda x: jax.device_put(draw(jnp.zeros(x.shape, x.dtype)), x.sharding), spec.abstract_frozen)
  state = spec.create()
  if mode == "forward":
    forward = jax.jit(lambda params, frozen, row: nnx.merge(spec.graph, join(frozen, params))(
        row.tokens, jnp.full((len(row.tokens), 1), 500.0), row))

    def run_forward(row: PackedRow) -> None:
      with jax.set_mesh(mesh):
        jax.block_until_ready(forward(state.params, frozen, shard_batch(row, mesh)))
    return run_forward
  step = make_train_step(spec, optimizer, build.flow(config), mesh=mesh, ema_decay=0.0, seed=0)
  holder, programs = [state], {}

  def run_step(row: PackedRow) -> None:
    row = shard_batch(row, mesh)
    shapes = str(jax.tree.map(jnp.shape, row))
    if shapes not in programs:
      programs[shapes], _ = compile_step(step, spec, row, mesh)
    with jax.set_mesh(mesh):
      holder[0], metrics = programs[shapes](holder[0], frozen, row)
      jax.block_until_ready(metrics)
  return run_step
