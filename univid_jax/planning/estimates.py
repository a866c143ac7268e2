"""Estimates memory and time of a training step by formula, without compiling it.

Estimates order and prune the options of `planning.advice`. The compiler decides what fits; for an NVIDIA GPU that is
not present the estimate does, calibrated on a measurement: an H100, 31,200 tokens through 8 blocks of the 1.3B's width
(docs/benchmarks/gpu.md). That step had one sentence, whose attention has no mask; the cost of masks is added on top.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from univid_jax.checkpoints.run_parts import create_model, transformer_config
from univid_jax.checkpoints.sentence_lengths import clip_tokens
from univid_jax.config.schema import BaseConfig, LoRAConfig, ModelConfig, RunConfig
from univid_jax.core.options import AttentionBackend, OptimizerName, Quantize, RematPolicy
from univid_jax.models.attention import xla
from univid_jax.models.attention.api import best_backend
from univid_jax.models.attention.sharded import Exchange
from univid_jax.models.flops import step_flops
from univid_jax.models.lora import LoRAParam
from univid_jax.models.quantized import is_quantized
from univid_jax.models.variants import DiTConfig
from univid_jax.platform.chips import Chip
from univid_jax.platform.current import Platform

# Peak memory of a block's backward pass besides the block's own weights, in hidden states of all tokens. TPU compilers
# report 43 (the 1.3B, offloaded, jax 0.10.2) to 78 for the 1.3B, 44 to 93 for the 14B, and more where tokens are
# sharded; the H100's reports 51.
LEAST_PEAK = 43
GPU_PEAK = 51
# Relative margin of a GPU's activations: they are extrapolated from one shape.
GPU_MARGIN = 0.15
# Factor for what remat policies other than full and attention store, which has not been measured on a GPU.
GPU_UNMEASURED = 2
# How far the GPU compiler's own estimate of the same step fell short: 0.15 of 6.23 GiB.
GPU_RUNTIME = 0.16e9
# Bytes per pair of tokens in cuDNN's attention: the mask, the same in 16 bits to add to logits, and its gradient, which
# JAX computes even if it is not needed. Not measured.
MASK_BYTES = 1 + 2 + 2
# Buffers of logits that plain XLA attention and its gradient need on a GPU: 16.7 GiB at 31,200 tokens and 12 heads.
LOGITS = 12
# Hidden states that a block reads from and writes to memory in a step with full remat: 498 (1.3B), 410 (14B).
TRAFFIC = 450
# Bytes per second between a chip and the host's memory: an assumption, about half of PCIe's.
HOST_BANDWIDTH = 16e9
# Operations per weight of dequantisation, and the share of a chip's peak that operations other than matrix products
# reach.
DEQUANTIZATION = {Quantize.NONE: 0, Quantize.INT8: 4, Quantize.FP8: 4, Quantize.NF4: 40}
VECTOR_SHARE = 1 / 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """What a step needs on each device.

  Attributes:
    weights: bytes of parameters and of the optimizer.
    stored: bytes that the forward pass keeps for the backward pass.
    block: lower bound on the bytes of a block's backward pass at its peak.
    attention: on a GPU, bytes of the masks or logits of a block.
    margin: on a GPU, bytes that are likely or possible on top.
    compute, memory, network: seconds at the chip's peaks.
    rows: rows of a step, on all devices.
  """

  weights: float
  stored: float
  block: float
  attention: float = 0.0
  margin: float = 0.0
  compute: float
  memory: float
  network: float
  rows: int

  @property
  def least(self) -> float:
    """Bytes that a step certainly needs."""
    return self.weights + self.stored + self.block

  @property
  def total(self) -> float:
    """Bytes that suffice as far as is known; on TPUs `least`."""
    return self.least + self.attention + self.margin

  @property
  def seconds(self) -> float:
    """The time of a step, as if nothing overlapped."""
    return self.compute + self.memory + self.network


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelBytes:
  """Bytes of a model on one device.

  Attributes:
    base: bytes of its base.
    blocks: the part of them for the matrices of all blocks.
    adapters: bytes of its adapters.
    block: bytes of a block's kernels in the compute dtype.
    stored_block: bytes of the same kernels as stored.
  """

  base: int
  blocks: int
  adapters: int
  block: float
  stored_block: float


def model_bytes(config: RunConfig) -> ModelBytes:
  """Counts the bytes of a config's model."""
  model = dataclasses.replace(config.model, remat=RematPolicy.FULL)  # remat changes no weights
  return _model_bytes(model, config.base, config.lora, codec=config.codec, init_from=config.init_from)


@functools.cache
def _model_bytes(model: ModelConfig, base: BaseConfig, lora: LoRAConfig, **others: Any) -> ModelBytes:
  config = RunConfig(model=model, base=base, lora=lora, **others)
  module = nnx.eval_shape(lambda: create_model(config))

  def count(part: Any, kind: type[nnx.Variable], *, min_dims: int = 0) -> int:
    leaves = [x for x in jax.tree.leaves(nnx.state(part, kind)) if len(x.shape) >= min_dims]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)

  kernels = jax.tree.leaves(nnx.to_pure_dict(nnx.state(module.blocks, nnx.Param)), is_leaf=is_quantized)
  block = sum(math.prod(x.shape[1:]) for x in kernels) * jnp.dtype(model.dtype).itemsize
  blocks = count(module.blocks, nnx.Param, min_dims=3)
  return ModelBytes(
    base=count(module, nnx.Param),
    blocks=blocks,
    adapters=count(module, LoRAParam),
    block=block,
    stored_block=blocks / transformer_config(config).num_layers,
  )


def estimate(config: RunConfig, chip: Chip, mesh: Mapping[str, int], *, is_tpu: bool) -> Estimate:
  """Estimates a training step.

  Args:
    config: of the run.
    chip: the kind of each device.
    mesh: sizes of data, fsdp and context, which multiply to the number of devices.
    is_tpu: whether the chip is a TPU; else it is an NVIDIA GPU.

  Raises:
    UserError: the rows do not divide over the devices, or the config is not valid.
  """
  shape = transformer_config(config)
  shards, sharers = mesh["data"] * mesh["fsdp"], mesh["fsdp"] * mesh["context"]
  rows = config.rows.batch_size(shards)
  item = jnp.dtype(config.model.dtype).itemsize
  at_once = rows // shards // config.rows.microbatches  # rows of a device
  hidden = at_once * config.rows.num_tokens / mesh["context"] * shape.dim * item
  sizes = model_bytes(config)
  stored = _stored(config, shape) * hidden * shape.num_layers
  # Kernels of a block, copied from the host, dequantised or gathered.
  block = hidden * LEAST_PEAK + config.base.offload * sizes.stored_block / sharers
  block += sizes.block * ((sharers > 1) + (config.base.quantize != Quantize.NONE))
  attention = margin = 0.0
  if not is_tpu:
    attention = _attention_bytes(config, shape, at_once, mesh["context"])
    margin = hidden * (GPU_PEAK * (1 + GPU_MARGIN) - LEAST_PEAK) + GPU_RUNTIME
    if config.model.remat in (RematPolicy.NONE, RematPolicy.DOTS):
      margin += (GPU_UNMEASURED - 1) * stored
  compute, memory, network = _seconds(config, shape, sizes, chip, mesh, rows=rows, is_tpu=is_tpu)
  return Estimate(
    weights=_state_bytes(config, sizes) / sharers,
    stored=stored,
    block=block,
    attention=attention,
    margin=margin,
    compute=compute,
    memory=memory,
    network=network,
    rows=rows,
  )


def _attention_bytes(config: RunConfig, shape: DiTConfig, rows: int, context: int) -> float:
  """Returns the bytes of the masks or logits of self-attention on a GPU, where rows always have intervals.

  Args:
    config: of the run.
    shape: of the transformer.
    rows: rows that a device computes at once.
    context: devices that share a row.
  """
  tokens, exchange = config.rows.num_tokens, Exchange.of(context, shape.num_heads)
  backend = config.model.attention_backend
  if backend == AttentionBackend.AUTO:
    mask_size = rows * tokens**2
    backend = best_backend(Platform.GPU, jnp.dtype(config.model.dtype), shape.head_dim, mask_size=mask_size)
  queries = tokens / exchange.ring
  if backend == AttentionBackend.CUDNN:  # the keys of a ring are gathered
    return MASK_BYTES * rows * queries * tokens
  logits = shape.num_heads / exchange.group * min(xla.OTHER_BLOCKS.queries, queries) * queries
  return 4 * LOGITS * min(logits, xla.LARGEST)


def _state_bytes(config: RunConfig, sizes: ModelBytes) -> float:
  """Returns the bytes of parameters, moving average, moments and gradients on one device."""
  moments = 1 if config.optimizer.name == OptimizerName.MUON else 2
  trained = sizes.adapters if config.lora.enabled else sizes.base
  frozen = sizes.base - sizes.blocks * config.base.offload if config.lora.enabled else 0
  experts = len(config.model.expert.parts)
  # Moments, the average, and the sum over microbatches are in float32, as adapters are.
  in_float32 = trained if config.lora.enabled else trained * 4 / jnp.dtype(config.model.param_dtype).itemsize
  total = experts * (frozen + trained + in_float32 * (moments + (config.ema_decay > 0)))
  return total + trained + in_float32 * (config.rows.microbatches > 1)


def _stored(config: RunConfig, shape: DiTConfig) -> float:
  """Returns the hidden states per block that the forward pass keeps for the backward pass."""
  width = shape.ffn_dim / shape.dim
  return {
    RematPolicy.OFFLOAD: 0,
    RematPolicy.FULL: 1,
    RematPolicy.ATTENTION: 3,  # with the results of self- and cross-attention
    RematPolicy.DOTS: 10 + width,
    RematPolicy.NONE: 20 + 3 * width,
  }[config.model.remat]


def row_sentences(config: RunConfig) -> tuple[int, ...]:
  """Returns the tokens of each sentence of a filled row: of context I, and in the space left over, of images alone."""
  left, found = config.rows.num_tokens, []
  for frames in (config.data.num_frames, 1):
    clips = dataclasses.replace(config.data, num_frames=frames)
    length = 4 * clip_tokens(dataclasses.replace(config, data=clips))
    count = min(left // length, config.rows.num_sentences - len(found))
    found += [length] * count
    left -= length * count
  return tuple(found) or (config.rows.num_tokens,)


def step_operations(config: RunConfig, remat: RematPolicy | None = None, *, skips: bool = True) -> float:
  """Returns the operations of a training step on a row of `row_sentences`, recomputation included.

  Args:
    config: of the run.
    remat: policy that replaces the config's.
    skips: whether attention skips the other sentences of a row, as on TPUs.
  """
  shape, sentences = transformer_config(config), row_sentences(config)
  tokens, text = sum(sentences), config.rows.num_text_tokens
  counts = {
    "tokens": tokens,
    "text_tokens": text,
    "targets": tokens / 4,
    "attended": sum(length**2 for length in sentences) if skips else config.rows.num_tokens**2,
    "attended_text": tokens * text / len(sentences),
  }
  once, twice = (step_flops(shape, lora_rank=config.lora.rank, recompute=again, **counts) for again in (False, True))
  attention = (shape.num_layers - 0.75) * 4 * counts["attended"] * shape.dim  # the last block computes only the targets
  again = {
    RematPolicy.OFFLOAD: twice - once,
    RematPolicy.FULL: twice - once,
    RematPolicy.ATTENTION: twice - once - attention,
    RematPolicy.DOTS: 0.0,
    RematPolicy.NONE: 0.0,
  }
  return once + again[remat or config.model.remat]


def _seconds(
  config: RunConfig,
  shape: DiTConfig,
  sizes: ModelBytes,
  chip: Chip,
  mesh: Mapping[str, int],
  *,
  rows: int,
  is_tpu: bool,
) -> tuple[float, float, float]:
  """Returns the seconds of compute, memory (the host's included) and network at the chip's peaks."""
  num_devices, sharers = mesh["data"] * mesh["fsdp"] * mesh["context"], mesh["fsdp"] * mesh["context"]
  operations = step_operations(config, skips=is_tpu)
  passes = 2 + (config.model.remat != RematPolicy.NONE)
  compute = rows * operations / num_devices / chip.flops
  item = jnp.dtype(config.model.dtype).itemsize
  local = rows * config.rows.num_tokens / num_devices * shape.dim * item  # a hidden state
  in_dtype = sizes.block * shape.num_layers
  compute += passes * in_dtype / item * DEQUANTIZATION[config.base.quantize] / (VECTOR_SHARE * chip.flops)
  share = operations / step_operations(config, RematPolicy.FULL, skips=is_tpu)
  moved = TRAFFIC * local * shape.num_layers * share + passes * sizes.base
  if config.base.quantize != Quantize.NONE:  # kernels are written dequantised, and read again
    moved += passes * 2 * in_dtype
  on_host = (passes - 1) * sizes.blocks / sharers if config.base.offload else 0.0
  if config.model.remat == RematPolicy.OFFLOAD:
    on_host += 2 * local * shape.num_layers
  carried = 0.0
  if sharers > 1:
    carried += passes * sizes.base * (sharers - 1) / sharers
  if mesh["context"] > 1:  # queries, keys, values and outputs swap heads for tokens
    carried += 4 * (passes + 1) * local * shape.num_layers * (mesh["context"] - 1) / mesh["context"]
  trained = sizes.adapters if config.lora.enabled else sizes.base
  if num_devices > 1:
    carried += 2 * trained
  exposed = max(on_host / HOST_BANDWIDTH - compute, 0.0)  # the device computes meanwhile
  return compute, moved / chip.bandwidth + exposed, carried / chip.network
