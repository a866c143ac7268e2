"""Counts of operations, memory traffic and collectives, against the compiler's own where it has them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import CAUSAL
from univid_jax.config.schema import LoRAConfig
from univid_jax.core.options import AttentionBackend, RematPolicy
from univid_jax.core.packed_row import UNIVID_CONTEXT
from univid_jax.core.sentence import Role, Sentence
from univid_jax.data.rows.packing import RowShape, pack, target_indices
from univid_jax.data.rows.tokens import sentence_features
from univid_jax.diffusion.loss import timestep_table
from univid_jax.models import dit
from univid_jax.models.attention import xla
from univid_jax.models.dit import DiT
from univid_jax.models.flops import forward_flops, step_flops
from univid_jax.models.lora import LoRAParam, attach
from univid_jax.models.variants import VARIANTS, DiTConfig
from univid_jax.parallel.mesh import make_mesh
from univid_jax.platform.chips import find_chip, find_chip_by_name

# One layer, because the compiler counts the body of a scan once.
CONFIG = DiTConfig(dim=256, ffn_dim=1024, num_heads=2, num_layers=1, freq_dim=16, text_dim=64)


def compiled_flops(f, *args) -> float:
  return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


def one_row(side, frames, text_dim=64, causal=False):
  clips = tuple(np.zeros((frames, side, side, 16), np.float32) for _ in range(4))
  sentence = Sentence(clips=clips, roles=(Role.CONTEXT,) * 3 + (Role.TARGET,))
  features = sentence_features(sentence, patch_size=(1, 2, 2), prompt_embedding=np.zeros((63, text_dim)), text_len=512)
  mode = CAUSAL if causal else UNIVID_CONTEXT
  shape = RowShape(num_tokens=len(features.tokens), num_text_tokens=64, num_slots=1, context_mode=mode)
  return jax.tree.map(jnp.asarray, pack([features], shape))


@pytest.mark.parametrize("only_targets", [pytest.param(False, marks=pytest.mark.long), True])
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 16])
def test_formula_equals_the_compiler(monkeypatch, rank, only_targets):
  monkeypatch.setattr(xla, "choose_blocks", lambda *_: xla.Blocks(1, 0, 0, smallest=1 << 40))
  monkeypatch.setitem(dit.REMAT_POLICIES, RematPolicy.FULL, jax.checkpoint_policies.everything_saveable)
  row = dataclasses.replace(one_row(16, 2), key_intervals=None, text_intervals=None, modulation_ids=None)
  length = row.tokens.shape[1]
  counts = dict(tokens=length, text_tokens=64, attended=length**2, attended_text=length * 64)
  if only_targets:
    row = dataclasses.replace(row, targets=jnp.asarray(target_indices(np.asarray(row.target_mask))))
    counts["targets"] = length / 4
  remat = RematPolicy.FULL if only_targets else RematPolicy.NONE
  model = nnx.jit(lambda: DiT(CONFIG, attention_backend=AttentionBackend.XLA, remat=remat, rngs=nnx.Rngs(0)))()
  run = lambda model, row: model(row.tokens, jnp.zeros((1, 1)), row)  # noqa: E731
  forward = compiled_flops(lambda row: run(model, row), row)
  assert forward_flops(CONFIG, **counts) == pytest.approx(forward, rel=0.06)  # plus softmax, norms and modulation
  assert forward_flops(CONFIG, **counts) < forward
  if rank:
    attach(model, LoRAConfig(rank=rank, alpha=rank, targets=("q", "k", "v", "o", "ffn.0", "ffn.2")), rngs=nnx.Rngs(0))
  graph, trained, frozen = nnx.split(model, LoRAParam if rank else nnx.Param, ...)

  def loss(trained, tokens):
    return jnp.sum(run(nnx.merge(graph, trained, frozen), dataclasses.replace(row, tokens=tokens)) ** 2)

  # With the gradient of the input that all blocks but the first need.
  step = compiled_flops(jax.grad(loss, (0, 1)), trained, row.tokens)
  assert step_flops(CONFIG, lora_rank=rank, **counts) == pytest.approx(step, rel=0.08)
  assert step_flops(CONFIG, lora_rank=rank, recompute=True, **counts) > 1.3 * step_flops(
    CONFIG, lora_rank=rank, **counts
  )


def test_cached_context_saves_most_operations_of_a_step(monkeypatch):
  """Compiles one layer of the 1.3B at context I of 832x480 and 17 frames."""
  monkeypatch.setattr(xla, "choose_blocks", lambda *_: xla.Blocks(1, 0, 0, smallest=1 << 40))
  config = dataclasses.replace(VARIANTS["wan2.1-t2v-1.3b"], num_layers=1)
  clips = tuple(np.zeros((5, 60, 104, 16), np.float32) for _ in range(4))
  features = sentence_features(
    Sentence(clips=clips, roles=(Role.CONTEXT,) * 3 + (Role.TARGET,)),
    patch_size=(1, 2, 2),
    prompt_embedding=np.zeros((63, 4096)),
    text_len=512,
  )
  shape = RowShape(num_tokens=31200, num_targets=7800, num_text_tokens=64, num_slots=1, context_mode=CAUSAL)
  row = jax.tree.map(jnp.asarray, pack([features], shape))
  model = nnx.eval_shape(lambda: DiT(config, attention_backend=AttentionBackend.XLA, rngs=nnx.Rngs(0)))
  graph, params = nnx.split(model)
  table = timestep_table(jnp.full((1, 1), 0.5), row)

  whole = compiled_flops(lambda params, tokens: nnx.merge(graph, params)(tokens, table, row), params, row.tokens)
  context = jax.eval_shape(lambda params: nnx.merge(graph, params).encode_context(row), params)
  of_targets = lambda params, tokens, context: nnx.merge(graph, params)(tokens, table, row.target_queries(), context)  # noqa: E731
  cached = compiled_flops(of_targets, params, row.tokens[:, :7800], context)
  assert whole / cached >= 3.5


def test_chips_by_name():
  assert find_chip_by_name("TPU v5 lite").flops == 197e12 and find_chip_by_name("TPU v5").flops == 459e12
  assert find_chip_by_name("NVIDIA H100 80GB HBM3").flops == 989e12
  for name, flops, bandwidth in (
    ("NVIDIA H100 PCIe", 756e12, 2000e9),
    ("NVIDIA H100 NVL", 835e12, 3900e9),
    ("NVIDIA H200 NVL", 835e12, 4800e9),
    ("NVIDIA H200", 989e12, 4800e9),
    ("NVIDIA A100 80GB PCIe", 312e12, 1935e9),
    ("NVIDIA A100-SXM4-80GB", 312e12, 2039e9),
  ):
    chip = find_chip_by_name(name)
    assert (chip.flops, chip.bandwidth) == (flops, bandwidth), name
  assert find_chip(make_mesh({"data": -1}).devices.flat[0]) is None
