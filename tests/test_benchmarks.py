"""The benchmarks' own arithmetic: costs read off compiled programs, the scaling table, the peers' noise levels."""

import dataclasses
import importlib.util
import json
import os
import random
import re
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import ablations, encoders, gpu, million, ranking, scaling, soak
from benchmarks.attempts import Attempt
from benchmarks.bounds import bound_seconds
from benchmarks.faults import Site
from benchmarks.figures import FigureFile, read_figures
from benchmarks.programs import collective_bytes, estimated_cycles, memory_bytes
from benchmarks.sample import euler_sigmas
from benchmarks.steps import find_variant
from benchmarks.timing import Program, race
from benchmarks.train_step import Work
from univid_jax.config.boundary import override
from univid_jax.config.presets import wan_1_3b
from univid_jax.core.errors import UserError
from univid_jax.data.sources.computed import open_computed
from univid_jax.data.sources.grids import GridSentences
from univid_jax.diffusion.flow import FlowMatching
from univid_jax.diffusion.solvers import Euler
from univid_jax.evaluation.sentences import plan_sentences
from univid_jax.parallel.mesh import make_mesh
from univid_jax.planning.estimates import estimate, row_sentences
from univid_jax.platform.chips import CHIPS
from univid_jax.training.memory import DoesNotFitError, Forecast


def test_collectives_count_inside_and_outside_of_loops():
  """A sum over eight devices outside of a loop, and a gather inside a loop over three layers."""
  mesh = make_mesh({"data": 8})
  spec = jax.sharding.PartitionSpec("data")

  def local(x, layers):
    def body(carry, layer):
      return carry + jnp.sum(jax.lax.all_gather(layer, "data", tiled=True)), None

    total, _ = jax.lax.scan(body, jax.lax.psum(x, "data")[0, 0], layers)
    return total

  run = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(spec, jax.sharding.PartitionSpec(None, "data")),
      check_vma=False,
      out_specs=jax.sharding.PartitionSpec(),
    )
  )
  text = run.lower(np.zeros((8, 64), np.float32), np.zeros((3, 80), np.float32)).compile().as_text()
  found = collective_bytes(text, 3)
  assert found["all-reduce"] == 64 * 4 and found["all-gather"] == 3 * 80 * 4


def test_collectives_of_the_last_layer_count_once():
  """Of three layers, two gather 80 numbers and the last gathers 40."""
  mesh = make_mesh({"data": 8})

  def local(layers):
    def gather(layer):
      return jnp.sum(jax.lax.all_gather(layer, "data", tiled=True))

    def body(carry, inputs):
      index, layer = inputs
      return carry + jax.lax.cond(index < 2, gather, lambda layer: gather(layer[:5]), layer), None

    return jax.lax.scan(body, 0.0, (jnp.arange(3), layers))[0]

  run = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=jax.sharding.PartitionSpec(None, "data"),
      check_vma=False,
      out_specs=jax.sharding.PartitionSpec(),
    )
  )
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
  %y = f32[8,128]{1,0:T(8,128)} fusion(%done, %layers), calls=%fused, backend_config={"estimated_cycles":"500"}
  ROOT %r = (s32[], f32[8,128]{1,0}, f32[3,8,128]{2,1,0}) tuple(%i, %y, %layers)
}

%condition (t: (s32[], f32[8,128], f32[3,8,128])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8,128], w: f32[3,8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %w = f32[3,8,128]{2,1,0:T(8,128)} parameter(1)
  %b = f32[8,128]{1,0:T(8,128)} fusion(%a), calls=%fused, backend_config={"estimated_cycles":"70"}
  %loop = (s32[], f32[8,128]{1,0}, f32[3,8,128]{2,1,0}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_memory_traffic_of_a_loop():
  """A fusion before the loop reads and writes. In each of three layers a copy to the chip reads, and a fusion reads the
  copy, reads one layer's weights from memory, and writes."""
  block = 8 * 128 * 4
  assert memory_bytes(PROGRAM, 3) == 2 * block + 3 * (block + 2 * block)
  assert estimated_cycles(PROGRAM, 3) == 70 + 3 * 500


class TestRanking:
  TEXT = """ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %copy.1 = f32[8,128]{0,1} copy(%a), metadata={op_name="jit(f)/norm/add"}, backend_config={"estimated_cycles":"10"}
  %copy.12 = f32[8,128] copy(%copy.1), metadata={op_name="jit(f)/norm/add"}, backend_config={"estimated_cycles":"20"}
  %fusion.3 = f32[8,128]{1,0} fusion(%copy.12), metadata={op_name="jit(f)/transpose(jvp())/while/body/closed_call/\
checkpoint/self_attention/rotary/mul"}, backend_config={"estimated_cycles":"50"}
  ROOT %fusion.4 = f32[8,128] fusion(%fusion.3), metadata={op_name="jit(f)/transpose(jvp())/while/body/eval_jaxpr/\
checkpoint/rematted_computation/self_attention/rotary/mul"}, backend_config={"estimated_cycles":"20"}
}
"""

  def test_instructions_are_added_up_by_pass_part_and_name(self, tmp_path, capsys):
    (tmp_path / "program.txt").write_text(self.TEXT)
    assert ranking.main(["ranking", f"--program={tmp_path / 'program.txt'}", "--layers=1", "--top=2"]) == 0
    gb = 2 * 8 * 128 * 4 / 1e9
    assert capsys.readouterr().out.splitlines()[2:] == [
      f"| backward | self_attention/rotary/mul | fusion | 1 | 0.000 | 50.0% | {gb:.1f} |",
      f"| forward | norm/add | copy | 2 | 0.000 | 30.0% | {gb:.1f} |",
      "",
      "0.000 x 10^9 cycles without kernels: backward 50%, forward 30%, recomputed 20%",
    ]

  @pytest.mark.parametrize(
    "argument, message",
    [
      ("--program=nowhere", "--program: no such file: nowhere"),
      ("--topology=v5e", "'v5e' is not a topology"),
      ("--override=nothing", "--override takes KEY=VALUE"),
    ],
  )
  def test_mistakes_are_one_line(self, argument, message, capfd):
    assert ranking.main(["ranking", argument]) == 1
    assert message in capfd.readouterr().err


def test_memory_traffic_of_a_compiled_program():
  x = np.zeros((256, 512), np.float32)
  text = jax.jit(lambda x: jnp.sin(x) + 1).lower(x).compile().as_text()
  assert memory_bytes(text, 1) == 2 * x.nbytes


def test_policies_that_recompute_everything_have_hardware_operations():
  shape = find_variant("wan2.1-t2v-1.3b")

  def count(remat):
    return Work.for_shape(shape, 1000, rows=1, remat=remat)

  assert count(["full"]) == count(["offload"]) == count(["full", "offload"])
  assert count(["full"]).hardware > count(["full"]).model == count(["full", "attention"]).model
  assert count(["full", "attention"]).hardware == count(None).hardware == 0 < count(None).model


class TestScalingTable:
  def compile_apart(self, setup: scaling.Setup) -> scaling.Line:
    self.compiled.append((setup.fsdp, setup.context))
    return scaling.Line(**dataclasses.asdict(setup), data=1, fits=setup.fsdp > 1, memory_gb=1.0)

  def lines(self, table, *, weights=10.0, contexts=(1, 4)):
    return list(scaling.table_lines(table, "tiny", "v5e:4x4", weights=weights, contexts=contexts))

  def test_stops_at_the_first_mesh_that_fits_and_resumes_from_its_file(self, monkeypatch, tmp_path):
    self.compiled = []
    monkeypatch.setattr(scaling, "compile_apart", self.compile_apart)
    path = tmp_path / "table.jsonl"
    lines = self.lines(scaling.Table(path))
    assert self.compiled == [(1, 1), (8, 1), (1, 4), (4, 4)]
    assert [line.fits for line in lines] == [False, True] * 2
    assert self.lines(scaling.Table(path)) == lines
    assert len(self.compiled) == 4

  def test_skips_meshes_that_cannot_hold_the_weights(self, monkeypatch):
    self.compiled = []
    monkeypatch.setattr(scaling, "compile_apart", self.compile_apart)
    assert [line.fsdp for line in self.lines(scaling.Table(""), weights=17e9 * 9, contexts=[1])] == [16]

  def test_weights_in_the_memory_of_the_host_take_none_of_the_devices(self):
    whole, rest, quantised = (
      scaling.weight_bytes("wan_14b", changes)
      for changes in ("", "base.offload=true,model.remat=offload", "base.quantize=int8")
    )
    assert 28e9 < whole < 29e9 and rest < 0.02 * whole and 0.5 * whole < quantised < 0.6 * whole
    assert scaling.weight_bytes("wan22_a14b", "model.expert=both") == 2 * scaling.weight_bytes("wan22_a14b", "")

  @pytest.mark.parametrize(
    "changes, expert", [("", "high"), ("model.expert=low", "low"), ("model.expert=both", "both")]
  )
  def test_lines_say_which_expert_is_trained(self, changes, expert):
    setup = scaling.Setup("wan22_a14b", "v6e:2x2", 1, 4, changes)
    line = scaling.Line(**dataclasses.asdict(setup), data=1, fits=False, memory_gb=39.8)
    assert setup.config.model.expert == expert
    assert line.to_markdown().startswith(f"| wan22_a14b, expert {expert} |")
    assert "| 39.8 besides inputs: does not fit |" in line.to_markdown()
    assert "| 39.8: does not fit |" in dataclasses.replace(line, of_gb=33.5).to_markdown()

  @pytest.mark.parametrize(
    "argument, message",
    [
      ("--topologies=v5e", "'v5e' is not a topology: slices of v5e are 1x1, 2x2"),
      ("--topologies=v5e:2x4x1", "slices of v5e are 1x1"),
      ("--topologies=v5e:0x4", "slices of v5e are 1x1"),
      ("--topologies=v4:2x2x2", "it starts with v5e, v6e, v5p"),
      ("--contexts=x", "--contexts must be numbers of devices, at least 1, got 'x'"),
      ("--contexts=1,0", "got '0'"),
      ("--presets=huge", "--presets must be among"),
    ],
  )
  def test_mistakes_are_one_line(self, argument, message, capfd):
    assert scaling.main(["scaling", argument]) == 1
    out, err = capfd.readouterr()
    assert out == "" and message in err and err.count("\n") == 1

  @pytest.mark.parametrize("remat, seconds", [("full", 5.17), ("offload", 5.17), ("none", 3.76), ("attention", 4.25)])
  def test_compute_follows_from_what_is_recomputed(self, remat, seconds):
    """Of the row of docs/benchmarks/tpu.md with full; attention, forward, takes 0.92 s of it."""
    config, chip = override(wan_1_3b(), {"model.remat": remat}), CHIPS["TPU v5 lite"]
    with mock.patch.multiple("benchmarks.bounds", collective_bytes=lambda *_: {}, memory_bytes=lambda *_: 0.0):
      found, _ = bound_seconds(config, "", rows=1, num_chips=1, chip=chip)
    assert found["compute"] == pytest.approx(seconds, abs=0.01)
    one = {"data": 1, "fsdp": 1, "context": 1}
    assert estimate(config, chip, one, is_tpu=True).compute == found["compute"]

  def test_overrides(self):
    """A row of another size is one sentence."""
    plain, long = (
      scaling.Setup("wan_1_3b", "v5e:4x4", 1, 4, changes).config
      for changes in ("", "rows.num_tokens=131040,data.num_frames=81,data.fit=crop")
    )
    assert row_sentences(plain) == (31200, 6240) and row_sentences(long) == (131040,)
    assert row_sentences(override(plain, {"data.num_frames": 9, "rows.num_tokens": 40000})) == (18720, 18720)
    assert row_sentences(override(plain, {"rows.num_sentences": 1})) == (31200,)
    assert (long.data.num_frames, long.data.fit, long.mesh.context) == (81, "crop", 4)
    for wrong, message in (("rows.num_tokens", "takes KEY=VALUE"), ("rows.tokens=1", "tokens")):
      with pytest.raises(UserError, match=message):
        scaling.Setup("wan_1_3b", "v5e:4x4", 1, 4, wrong).config  # noqa: B018


# A warning of XLA; versions differ in a space.
NOT_SUPPORTED = "cpu_aot_loader.cc:195] Loading XLA:CPU AOT result. Target machine feature +prefer-no-"


class TestFigureFile:
  def test_a_line_that_a_kill_has_cut_off_is_found_again(self, tmp_path):
    path = tmp_path / "folder" / "figures.jsonl"
    FigureFile(path).add({"first": 1})
    FigureFile(path).add({"second": "\u2028"})
    whole = path.read_bytes()
    for length in range(len(whole)):
      path.write_bytes(whole[:length])
      file = FigureFile(path)
      assert len(file.lines) == whole[: length + 1].count(b"\n"), "a line is whole without its end"
      for figures in [{"first": 1}, {"second": "\u2028"}][len(file.lines) :]:
        file.add(figures)
      assert path.read_bytes() == whole and FigureFile(path).lines == file.lines == read_figures(path)

  def test_other_files_are_refused_and_stay(self, tmp_path):
    path = tmp_path / "README.md"
    for text, line in (('{"a": 1}\nwords\nand no end', 2), ("no end", 1), ('{"a": 1}\nno end', 2)):
      path.write_text(text)
      with pytest.raises(UserError, match=f"is not a file of figures: line {line} is not JSON"):
        FigureFile(path)
      assert path.read_text() == text

  def test_without_a_path_nothing_is_written(self, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = FigureFile("")
    file.add(1)
    assert file.lines == [1] and not list(tmp_path.iterdir())


class TestAblations:
  def run(self, monkeypatch, *arguments):
    """Runs it with scores that follow from the seed; returns what was trained."""
    trained = []

    def score(variant, seed):
      trained.append((variant.name, variant.config.model.clip_gap, seed))
      return {"held out: dB": 20.0 + seed + variant.config.model.clip_gap}

    monkeypatch.setattr(ablations, "run_apart", score)
    assert ablations.main(["ablations", "--questions=clip_gap", *arguments]) == 0
    return trained

  def test_trains_each_model_with_each_seed_and_resumes_from_its_file(self, monkeypatch, tmp_path, capsys):
    out = f"--out={tmp_path / 'scores.jsonl'}"
    expected = [(f"gap of {gap}", gap, seed) for gap in (0, 4, 16) for seed in (0, 1)]
    assert self.run(monkeypatch, "--seeds=0,1", out) == expected
    assert "| gap of 4 | 24.5 ± 0.7 |" in capsys.readouterr().out
    assert self.run(monkeypatch, "--seeds=0,1,2", out) == [(f"gap of {gap}", gap, 2) for gap in (0, 4, 16)]
    assert "| gap of 16 | 37.0 ± 1.0 |" in capsys.readouterr().out
    assert len(self.run(monkeypatch, "--seeds=0", "--steps=7", out)) == 3, "of other steps"

  @pytest.mark.parametrize("question", ["clip_gap", "contexts", "reversal", "grids_contexts"])
  def test_models_of_a_question_get_the_same_held_out_sentences(self, question):
    def targets(config):
      if question.startswith("grids"):
        held_out = {"grids": GridSentences.open(config).split(0.0)[1]}
      else:
        held_out = {"computed": open_computed(config, "held_out", seed=0)}
      planned = plan_sentences(config, held_out)
      return [planned[number].read().clips[-1].tobytes() for number in (0, len(planned) - 1)]

    variants = ablations.questions(5)[question]
    for column, changes in variants[0].evaluations.items():
      first, *others = (override(variant.config, {"seed": seed, **variant.evaluations[column]})
                        for seed, variant in enumerate(variants))  # fmt: skip
      assert all(targets(config) == targets(first) for config in others) and changes == variants[-1].evaluations[column]

  def test_rows_have_as_many_sentences_of_any_length(self):
    for question in ("shots", "contexts", "grids_contexts"):
      assert {variant.config.rows.num_sentences for variant in ablations.questions(5)[question]} == {1}

  @pytest.mark.long
  def test_scores_of_a_model(self, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device
    (variant, _) = ablations.questions(1)["new_task"]
    variant = dataclasses.replace(
      variant, config=override(variant.config, {"num_steps": 1, "eval.sentences_per_case": 1})
    )
    scores = ablations.run_apart(variant, 5)
    assert {name.removeprefix("held out: ") for name in scores} == {
      "dB", "dB, another task's pair", "exact grids (%)", "cells (%)"
    }  # fmt: skip

  def test_models_differ_in_what_is_asked(self):
    asked = ablations.questions(5)
    gaps = [variant.config for variant in asked["clip_gap"]]
    assert [override(config, {"model.clip_gap": 0}) for config in gaps] == [gaps[0]] * 3
    counts = [{n for n, weight in variant.config.data.clip_counts.items() if weight} for variant in asked["shots"]]
    assert counts == [{4}, {6}, {8}]
    lora, scratch = (variant.config for variant in asked["new_task"])
    assert lora.lora.enabled and lora.init_from == "small" and not scratch.lora.enabled and not scratch.init_from
    assert lora.data == scratch.data and lora.num_steps == scratch.num_steps
    for variant in asked["contexts"]:
      drawn = [override(variant.config, changes).data.contexts for changes in variant.evaluations.values()]
      assert [{n for n, weight in each.items() if weight} for each in drawn] == [{"I"}, {"II"}, {"III"}]

  @pytest.mark.parametrize(
    "argument, message",
    [
      ("--questions=why", "unknown question 'why'; there are new_task, clip_gap"),
      ("--seeds=0,a", "--seeds are numbers, got 'a'"),
    ],
  )
  def test_mistakes_are_one_line(self, capfd, argument, message):
    assert ablations.main(["ablations", argument]) == 1
    assert message in capfd.readouterr().err


class TestSoak:
  """Its checks see what they are for."""

  def site(self, folder):
    site = Site(folder / "base", folder / "pairs", folder / "programs", folder / "run")
    site.workdir.mkdir(parents=True)
    self.write(site, [1.5, 1.25])
    metadata = {"univid_checksum": str(folder), "rank": "2"}
    save_file({"up": np.ones(3)}, site.workdir / "lora.safetensors", metadata)
    return site

  def write(self, site, losses, first=1):
    rows = [{"step": step, "loss": loss, "step_time": random.random()} for step, loss in enumerate(losses, first)]
    (site.workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3')

  def test_a_bit_of_a_loss_or_weight(self, tmp_path):
    sites = [self.site(tmp_path / name) for name in ("undisturbed", "run_1")]
    assert not soak.differences(*sites)
    self.write(sites[1], [1.5, 1.25 + 2**-52])
    save_file({"up": np.array([1, 1, 1 + 2**-52])}, sites[1].workdir / "lora.safetensors", {"rank": "2"})
    assert soak.differences(*sites) == ["metrics differ from step 2", "the LoRA differs"]

  @pytest.mark.parametrize(
    "code, printed, problem",
    [
      (1, "error: disk full", None),
      (1, "train:  10%|# | 1/9\rerror: disk full\n", None),
      (75, "stopped by SIGTERM", "has exit code 75"),
      (1, "", "ends with 1 and 0 lines"),
      (1, "error: one\nerror: two", "ends with 1 and 2 lines"),
      (1, "Traceback (most recent call last):\nerror: x", "prints after .*Traceback"),
      (1, "error: internal error (KeyError)", "internal error"),
      (1, f"E1127 02:39:39.8 2635 {NOT_SUPPORTED}gather is not  supported on the host machine.\nerror: x", None),
      (1, f"E1127 02:39:39.8 2635 {NOT_SUPPORTED}scatter is not supported on the host machine.\nerror: x", None),
      (1, "E1127 02:39:39.8 2635 other.cc:195] Loading failed\nerror: x", "prints after .*other.cc"),
    ],
  )
  def test_ends(self, tmp_path, code, printed, problem):
    attempt = object.__new__(Attempt)  # that has ended
    attempt.processes = [mock.Mock(returncode=code)]
    attempt._logs = [tmp_path / "process_0"]
    (tmp_path / "process_0.err").write_text(printed)
    site = self.site(tmp_path)
    problems = soak.check_end(attempt, site, ["full disk"], {1})
    assert re.search(problem, problems[0]) if problem else not problems
    self.write(site, [1.0, 2.0], first=2)
    assert "metrics.jsonl has the steps [2, 3]" in soak.check_end(attempt, site, [], {1})


def build_program(*, seconds: float = 0.0, fails: bool = False, dies: bool = False):
  """Builds a program of `TestRace`, in a process of its own."""
  if fails:
    raise RuntimeError("out of memory\nand more")
  if dies:
    os._exit(3)
  return lambda: time.sleep(seconds) or {"forecast_gib": 1.5}


class TestRace:
  """Programs that fail are left out, with their reason, and the others are measured."""

  @pytest.mark.long
  @pytest.mark.parametrize("at_once", [True, False])
  def test_failures(self, capfd, at_once):
    programs = {
      "ours": Program(build_program, {}),
      "broken": Program(build_program, {"fails": True}),
      "dead": Program(build_program, {"dies": True}),
      "peer": Program(build_program, {"seconds": 0.05}, is_peer=True),
    }
    failed = {}
    figures = race(programs, pairs=2, at_once=at_once, patience=60, failed=failed)
    assert list(figures) == ["ours", "peer"] and figures["ours"]["forecast_gib"] == 1.5
    assert figures["peer"]["median_s"] >= 0.05
    assert failed == {"broken": "RuntimeError: out of memory", "dead": "its process ended with 3"}
    assert "dead                   failed: its process ended with 3" in capfd.readouterr().out

  @pytest.mark.long
  def test_patience(self):
    slow, failed = Program(build_program, {"seconds": 90}, is_peer=True), {}
    assert list(race({"ours": Program(build_program, {}), "slow": slow}, pairs=1, patience=20, failed=failed)) == [
      "ours"
    ]
    assert failed == {"slow": "not warm in time"}

  def test_a_failure_is_an_error_by_default(self):
    with pytest.raises(UserError, match="broken: RuntimeError: out of memory"):
      race({"broken": Program(build_program, {"fails": True})}, pairs=1)


class TestGPU:
  """`python -m benchmarks.gpu --tiny`."""

  def run(self, tmp_path, capfd, *flags):
    code = gpu.main(["gpu", "--tiny", f"--out={tmp_path}", *flags])
    records = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    out, err = capfd.readouterr()
    assert code == 0, err
    return records, out

  @pytest.mark.long
  @pytest.mark.parametrize("name", [benchmark.name for benchmark in gpu.BENCHMARKS])
  def test_benchmark(self, tmp_path, capfd, monkeypatch, name):
    """Each writes its figures and a row; without the peer, as on a machine that lacks its packages."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    (record,), out = self.run(tmp_path, capfd, f"--only={name}", "--minutes=3")
    assert record["code"] == 0 and record["machine"]["versions"]["jax"] == jax.__version__
    programs = dict(gpu.find_programs(record))
    figures = {**record.get("errors", {}), **record.get("figures", {})}
    assert bool(programs) != bool(figures) and not {"torch", "torch_compile"} & set(programs)
    title = next(benchmark.title for benchmark in gpu.BENCHMARKS if benchmark.name == name)
    assert out.count(f"| {title}") == len(programs or figures)

  def test_what_takes_too_long_is_left_out(self, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(gpu, "describe_machine", lambda: {"gpu": "NVIDIA", "jax_device": "NVIDIA"})
    assert gpu.main(["gpu", f"--out={tmp_path}", "--minutes=0.1"]) == 0
    assert "left out, 6 s remain: ceiling (about 25 s), train (about" in capfd.readouterr().out
    assert (tmp_path / "gpu.jsonl").read_text() == ""

  def test_a_benchmark_that_hangs_is_ended(self, tmp_path, capfd, monkeypatch):
    hangs = gpu.Benchmark("hangs", "hangs", 0.5, "matmul", "--size=20000 --repeats=1000", tiny="")
    monkeypatch.setattr(gpu, "BENCHMARKS", [hangs])
    monkeypatch.setattr(gpu, "describe_machine", lambda: {"gpu": "NVIDIA", "jax_device": "NVIDIA"})
    assert gpu.main(["gpu", f"--out={tmp_path}"]) == 1
    out, err = capfd.readouterr()
    assert "hangs: ended after 1 s" in out and "failed, or ended too late: hangs" in err
    assert json.loads((tmp_path / "gpu.jsonl").read_text())["code"] is None

  def test_no_gpu(self, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(gpu, "describe_machine", lambda: {"gpu": "none", "jax_device": "cpu"})
    assert gpu.main(["gpu", f"--out={tmp_path}"]) == 1
    assert "JAX finds no GPU (its device: cpu; nvidia-smi: none); --tiny runs on a CPU" in capfd.readouterr().err


@pytest.mark.long
def test_ten_thousand_records(tmp_path, capsys):
  """The simulation of a million clips, small: it checks order, disjointness, resuming and damage itself."""

  def run_here(function, *calls):
    return [function(*arguments) for arguments in calls]

  figures = million.measure(tmp_path, records=10_000, hosts=[256], run=run_here)
  assert figures["index_bytes_per_record"] < 25 and figures["shards"] == 20
  assert {"open_s", "reads_per_s_16_threads", "resume_s", "first_batch_s_of_256_hosts"} < figures.keys()
  assert "loader_records_per_s" in capsys.readouterr().out


def test_peers_sample_at_the_same_noise_levels():
  np.testing.assert_allclose(euler_sigmas(50), Euler().sigmas(FlowMatching(), 50), rtol=1e-6)


@pytest.mark.parametrize("name", ["wan2.2-i2v-a14b", "wan2.1-i2v-14b-480p", "wan3"])
def test_models_with_conditions_are_refused(name):
  with pytest.raises(UserError, match=rf"--variant must be one of .*wan2.2-ti2v-5b.*, got '{name}'"):
    find_variant(name)


class TestEncoders:
  @pytest.fixture(autouse=True)
  def compiler(self, monkeypatch):
    """A compiler in which only tiles of up to 48 latents fit; it counts what it compiles."""
    self.compiled = []

    def compile_autoencoder(config, mesh, *, decoding):
      tile = config.vae_tiling.size
      self.compiled.append((config.data.height, config.data.width, config.data.num_frames, decoding, tile))
      if tile == 0:
        raise DoesNotFitError("RESOURCE_EXHAUSTED", "")
      forecast = Forecast(weights=1, batch=0, activations=10**9 * tile, device="chip", memory=50 * 10**9)
      text = 'ENTRY %main () -> f32[] {\n  %a = f32[] add(), backend_config={"estimated_cycles":"7"}\n}\n'
      return mock.Mock(**{"as_text.return_value": text}), forecast

    monkeypatch.setattr("univid_jax.planning.forecasts.compile_autoencoder", compile_autoencoder)
    monkeypatch.setattr(encoders, "use_tpu_compiler", lambda: None)
    monkeypatch.setattr(encoders, "describe_devices", lambda topology: jax.devices()[:1])

  def test_the_largest_tiles_that_fit(self, tmp_path, capsys):
    command = ["encoders", "--topologies=v5e:1x1", "--sizes=64x96", "--frames=5", "--parts=encoding,decoding"]
    assert encoders.main([*command, f"--out={tmp_path / 'out.jsonl'}"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[2:] == [
      f"| v5e:1x1 | {part} | 64x96 | 5 | 48.0 of 50.0 GB | 0.00 | tiles of 48 |" for part in ("encoding", "decoding")
    ]
    assert self.compiled == [(64, 96, 5, decoding, tile) for decoding in (False, True) for tile in (0, 64, 48)]
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["figures"]["cycles"] == 7
    assert encoders.main([*command, f"--out={tmp_path / 'out.jsonl'}"]) == 0
    assert capsys.readouterr().out.splitlines() == table and len(self.compiled) == 6, "not compiled again"

  @pytest.mark.parametrize(
    "argument, message",
    [
      ("--parts=tokenizing", "--parts must be of encoding, decoding, prompts, got 'tokenizing'"),
      ("--sizes=wide", "--sizes and --frames are HEIGHTxWIDTH and numbers"),
      ("--frames=many", "--sizes and --frames are HEIGHTxWIDTH and numbers"),
    ],
  )
  def test_mistakes_are_one_line(self, argument, message, capsys):
    assert encoders.main(["encoders", "--parts=encoding", argument]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
