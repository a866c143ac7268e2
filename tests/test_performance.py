"""Counted operations against the compiler's own count."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import scaling
from benchmarks.scaling import collective_bytes, memory_bytes
from univid_jax.attention import xla
from univid_jax.data.packing import RowShape, pack, sentence_features, target_places
from univid_jax.diffusion.loss import timestep_table
from univid_jax.models import dit
from univid_jax.models.dit import PRESETS, DiT, DiTConfig
from univid_jax.models.lora import LoRAConfig, LoRAParam, attach
from univid_jax.parallel.mesh import make_mesh
from univid_jax.performance import chip_of, forward_flops, step_flops
from univid_jax.types import Role, Sentence

# The compiler counts the body of a scan once, so one layer.
CONFIG = DiTConfig(dim=256, ffn_dim=1024, num_heads=2, num_layers=1, freq_dim=16, text_dim=64)


def compiled_flops(f, *args) -> float:
  return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


def one_row(side, frames, text_dim=64, causal=False):
  clips = tuple(np.zeros((frames, side, side, 16), np.float32) for _ in range(4))
  sentence = Sentence(clips=clips, roles=(Role.CONTEXT,) * 3 + (Role.TARGET,))
  features = sentence_features(sentence, patch_size=(1, 2, 2), prompt_embedding=np.zeros((63, text_dim)), text_len=512)
  return pack([features], RowShape(num_tokens=len(features["tokens"]), num_text_tokens=64, num_slots=1, context_causal=causal))


@pytest.mark.parametrize("only_targets", [False, True])
@pytest.mark.parametrize("rank", [0, 16])
def test_formula_against_the_compiler(monkeypatch, rank, only_targets):
  monkeypatch.setitem(xla.BLOCKS, "cpu", xla.Blocks(1, 0, 0, smallest=1 << 40))
  monkeypatch.setitem(dit.REMAT_POLICIES, "full", jax.checkpoint_policies.everything_saveable)
  row = dataclasses.replace(one_row(16, 2), key_intervals=None, text_intervals=None, modulation_ids=None)
  length = row.tokens.shape[1]
  counts = dict(tokens=length, text_tokens=64, attended=length**2, attended_text=length * 64)
  if only_targets:
    row = dataclasses.replace(row, targets=target_places(row.target_mask))
    counts["targets"] = length / 4
  model = DiT(CONFIG, attention_backend="xla", remat="full" if only_targets else "none", rngs=nnx.Rngs(0))
  run = lambda model, row: model(row.tokens, jnp.zeros((1, 1)), row)  # noqa: E731
  forward = compiled_flops(lambda row: run(model, row), row)
  assert forward_flops(CONFIG, **counts) == pytest.approx(forward, rel=0.06)  # the rest is softmax, norms and modulation
  assert forward_flops(CONFIG, **counts) < forward
  if rank:
    attach(model, LoRAConfig(rank=rank, alpha=rank, targets=("q", "k", "v", "o", "ffn.0", "ffn.2")), rngs=nnx.Rngs(0))
  graph, trained, frozen = nnx.split(model, LoRAParam if rank else nnx.Param, ...)

  def loss(trained, tokens):
    return jnp.sum(run(nnx.merge(graph, trained, frozen), dataclasses.replace(row, tokens=tokens)) ** 2)

  # With a gradient of the input, as a block in the middle has.
  step = compiled_flops(jax.grad(loss, (0, 1)), trained, row.tokens)
  assert step_flops(CONFIG, lora_rank=rank, **counts) == pytest.approx(step, rel=0.08)
  assert step_flops(CONFIG, lora_rank=rank, recompute=True, **counts) > 1.3 * step_flops(CONFIG, lora_rank=rank, **counts)


def test_cached_context_saves_most_of_a_step(monkeypatch):
  """The 1.3B's widths at context I of 832x480 and 17 frames, compiled and not run."""
  monkeypatch.setitem(xla.BLOCKS, "cpu", xla.Blocks(1, 0, 0, smallest=1 << 40))
  config = dataclasses.replace(PRESETS["wan2.1-t2v-1.3b"], num_layers=1)
  clips = tuple(np.zeros((5, 60, 104, 16), np.float32) for _ in range(4))
  features = sentence_features(Sentence(clips=clips, roles=(Role.CONTEXT,) * 3 + (Role.TARGET,)), patch_size=(1, 2, 2),
                               prompt_embedding=np.zeros((63, 4096)), text_len=512)
  row = pack([features], RowShape(num_tokens=31200, num_targets=7800, num_text_tokens=64, num_slots=1, context_causal=True))
  model = nnx.eval_shape(lambda: DiT(config, attention_backend="xla", rngs=nnx.Rngs(0)))
  graph, params = nnx.split(model)
  table = timestep_table(np.full((1, 1), 0.5, np.float32), row)

  whole = compiled_flops(lambda params, tokens: nnx.merge(graph, params)(tokens, table, row), params, row.tokens)
  context = jax.eval_shape(lambda params: nnx.merge(graph, params).encode_context(row), params)
  of_targets = lambda params, tokens, context: nnx.merge(graph, params)(tokens, table, row.of_targets(), context)  # noqa: E731
  cached = compiled_flops(of_targets, params, row.tokens[:, :7800], context)
  assert whole / cached >= 3.5


def test_traffic_is_read_off_the_program():
  """A sum over eight devices outside a loop, and a gather inside one of three layers."""
  mesh = make_mesh({"data": 8})
  spec = jax.sharding.PartitionSpec("data")

  def local(x, layers):
    def body(carry, layer):
      return carry + jnp.sum(jax.lax.all_gather(layer, "data", tiled=True)), None
    total, _ = jax.lax.scan(body, jax.lax.psum(x, "data")[0, 0], layers)
    return total
  run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec, jax.sharding.PartitionSpec(None, "data")), check_vma=False,
                              out_specs=jax.sharding.PartitionSpec()))
  text = run.lower(np.zeros((8, 64), np.float32), np.zeros((3, 80), np.float32)).compile().as_text()
  found = collective_bytes(text, 3)
  assert found["all-reduce"] == 64 * 4 and found["all-gather"] == 3 * 80 * 4


def test_traffic_of_the_last_layer_counts_once():
  """Of three layers two gather 80 numbers, the last one 40."""
  mesh = make_mesh({"data": 8})

  def local(layers):
    def gathered(layer):
      return jnp.sum(jax.lax.all_gather(layer, "data", tiled=True))

    def body(carry, inputs):
      index, layer = inputs
      return carry + jax.lax.cond(index < 2, gathered, lambda layer: gathered(layer[:5]), layer), None
    return jax.lax.scan(body, 0.0, (jnp.arange(3), layers))[0]
  run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=jax.sharding.PartitionSpec(None, "data"), check_vma=False,
                              out_specs=jax.sharding.PartitionSpec()))
  text = run.lower(np.zeros((3, 80), np.float32)).compile().as_text()
  assert collective_bytes(text, 3)["all-gather"] == (2 * 80 + 40) * 4


def test_collectives_of_several_arrays_count_all_of_them():
  text = """ENTRY %main (a: f32[4]) -> f32[4] {
  %r = (f32[100]{0:T(128)S(1)}, f32[50]{0}) all-reduce(%a, %b), to_apply=%add
  %g = ((f32[10]{0}, f32[20]{0}), (f32[80]{0}, f32[160]{0})) all-gather-start(%c, %d), dimensions={0}
  %p = (bf16[64]{0}, bf16[64]{0}, u32[], u32[]) collective-permute-start(%e), source_target_pairs={{0,1}}
}
"""
  found = collective_bytes(text, 3)
  assert (found["all-reduce"], found["all-gather"], found["collective-permute"]) == (150 * 4, 240 * 4, 64 * 2)


PROGRAM = """HloModule jit_step
%fused (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %n = f32[8,128]{1,0} negate(%p)
}

%body (t: (s32[], f32[8,128], f32[3,8,128])) -> (s32[], f32[8,128], f32[3,8,128]) {
  %t = (s32[], f32[8,128]{1,0:T(8,128)}, f32[3,8,128]{2,1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %layers = f32[3,8,128]{2,1,0:T(8,128)} get-tuple-element(%t), index=2
  %start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)
  %y = f32[8,128]{1,0:T(8,128)} fusion(%done, %layers), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"500"}
  ROOT %r = (s32[], f32[8,128]{1,0}, f32[3,8,128]{2,1,0}) tuple(%i, %y, %layers)
}

%condition (t: (s32[], f32[8,128], f32[3,8,128])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8,128], w: f32[3,8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %w = f32[3,8,128]{2,1,0:T(8,128)} parameter(1)
  %b = f32[8,128]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"70"}
  %loop = (s32[], f32[8,128]{1,0}, f32[3,8,128]{2,1,0}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_memory_traffic_is_read_off_the_program():
  """Before the loop a fusion reads and writes; in each of three layers a copy to the chip reads, and a fusion reads the copy from
  there, one layer's weights from memory, and writes."""
  block = 8 * 128 * 4
  assert memory_bytes(PROGRAM, 3) == 2 * block + 3 * (block + 2 * block)
  assert scaling.estimated_cycles(PROGRAM, 3) == 70 + 3 * 500


def test_a_real_program_s_memory_traffic():
  x = np.zeros((256, 512), np.float32)
  text = jax.jit(lambda x: jnp.sin(x) + 1).lower(x).compile().as_text()
  assert memory_bytes(text, 1) == 2 * x.nbytes


def test_the_scaling_table_stops_at_the_first_mesh_that_fits_and_goes_on_from_its_file(monkeypatch, tmp_path):
  compiled = []

  def compile_apart(preset, topology, fsdp, context):
    compiled.append((fsdp, context))
    return {"preset": preset, "topology": topology, "fsdp": fsdp, "context": context, "fits": fsdp > 1}
  monkeypatch.setattr(scaling, "compile_apart", compile_apart)
  for name, value in {"OUT": str(tmp_path / "table.jsonl"), "ALL": False}.items():
    monkeypatch.setattr(scaling, name, type("Flag", (), {"value": value}))
  lines = list(scaling.lines_of("tiny", "v5e:4x4", 10, [1, 4], []))
  assert compiled == [(1, 1), (8, 1), (1, 4), (4, 4)] and [line["fits"] for line in lines] == [False, True] * 2
  known = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
  assert list(scaling.lines_of("tiny", "v5e:4x4", 10, [1, 4], known)) == lines and len(compiled) == 4
  assert [line["fsdp"] for line in scaling.lines_of("tiny", "v5e:4x4", 17e9 * 9, [1], [])] == [16], "weights alone are too much"


def test_chips_by_the_names_that_jax_gives_them():
  class Device:
    def __init__(self, kind):
      self.device_kind = kind
  assert chip_of(Device("TPU v5 lite")).flops == 197e12 and chip_of(Device("TPU v5")).flops == 459e12
  assert chip_of(Device("NVIDIA H100 80GB HBM3")).flops == 989e12
  assert chip_of(make_mesh({"data": -1}).devices.flat[0]) is None
