"""How a LoRA was trained travels with it, in every format, and decides how it is run."""

import dataclasses
import json
import shutil
import types
from unittest import mock

import jax
import numpy as np
import pytest

import univid_jax
from tests.helpers import GOLDENS, compile_plain_step, package_or_skip, parameters, random_pipeline
from univid_jax.checkpoints.checksums import digest_contents
from univid_jax.checkpoints.lora.folder import write_lora_folder
from univid_jax.checkpoints.lora.formats import FORMATS, write_lora
from univid_jax.checkpoints.lora.kinds import LoRALayer
from univid_jax.checkpoints.lora.reading import read_lora
from univid_jax.checkpoints.lora.weights import LoRAWeights
from univid_jax.checkpoints.origin import Origin
from univid_jax.checkpoints.run import RunRecord, write_run
from univid_jax.checkpoints.tensor_files import save_safetensors
from univid_jax.checkpoints.usage import Usage, merge_usages
from univid_jax.cli import summaries
from univid_jax.cli.flags import CommandFlags
from univid_jax.cli.model_shape import ModelShape
from univid_jax.cli.prompts import task_prompt
from univid_jax.cli.requests import RequestRunner
from univid_jax.cli.sampling import SamplingArguments, resolve_steps
from univid_jax.cli.sampling_flags import SamplingFlags
from univid_jax.config.boundary import override
from univid_jax.config.presets import tiny
from univid_jax.config.section import MAX_COUNT
from univid_jax.convert.commands import convert_any, inspect
from univid_jax.core.dims import MAX_POSITION
from univid_jax.core.errors import UserError
from univid_jax.core.options import MAX_FPS, MAX_SHIFT, MAX_STEPS, Attention, ClipFit, ContextTimestep, Expert, Quantize
from univid_jax.core.protocols import SentenceSource
from univid_jax.data.clips import ClipFormat
from univid_jax.data.sources.open import open_data
from univid_jax.data.sources.unused_keys import adapt_clips
from univid_jax.inference import lora_specs
from univid_jax.inference.distillation_loras import read_distillation
from univid_jax.inference.lora_specs import RequestedLoRA, lora_usage, read_loras, warn_of_other_context
from univid_jax.inference.plan import SamplingOptions
from univid_jax.parallel.mesh import make_mesh
from univid_jax.training import loop
from univid_jax.training.loop import TrainResult, train

USAGE = Usage(
  attention=Attention.CONTEXT_CAUSAL,
  shift=3.5,
  num_inference_steps=3,
  sizes=((32, 48), (48, 32)),
  num_frames=9,
  fit=ClipFit.PAD,
  fps=24000 / 1001,
  base_model="tiny",
  base_checksum="abc",
  prompts={"depth map": 'a "prompt", ü', "edges": ""},
)


def make_lora(usage: Usage | None = USAGE, *, seed: int = 0) -> LoRAWeights:
  rng = np.random.default_rng(seed)
  down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 96), (96, 2)))
  changes = {"blocks.0.self_attn.q.weight": LoRALayer(down, up, 2.0)}
  metadata = {"software": "univid_jax 1", "step": "7", **usage.to_metadata()} if usage else {}
  return LoRAWeights(changes, "jax", metadata)


def write(folder, lora, name):
  folder.mkdir()
  if name == "jax":
    write_lora_folder(folder, lora)
    return folder
  path = folder / f"lora{FORMATS[name].suffixes[-1]}"
  write_lora(path, lora, name)
  return path


@pytest.mark.parametrize("name", [*FORMATS, "jax"])
def test_every_format_carries_it_and_hands_it_on(tmp_path, name):
  if name == "univid":
    pytest.importorskip("torch", reason="a .ckpt is a PyTorch file; needs the extra `convert`")
  path = write(tmp_path / "first", make_lora(), name)
  read = read_lora(path)
  assert read.usage == USAGE and read.metadata["step"] == "7" and not read.notes, "the scale is stored"
  again = read_lora(write(tmp_path / "again", read, "comfyui"))
  assert again.usage == USAGE
  shown = inspect(str(path))
  for line in (
    "attention: context_causal",
    "shift: 3.5",
    "num_inference_steps: 3",
    "sizes: 32x48 48x32",
    "num_frames: 9",
    "fit: pad",
    "fps: 23.976023976023978",
  ):
    assert f"  {line}\n" in f"{shown}\n"


def test_it_is_that_of_the_run():
  changes = {"model.attention": "context_causal", "flow.shift": 2.0, "data.buckets": ["64x16"], "data.fit": "pad"}
  config = override(tiny(), {**changes, "data.pairs": "x"})
  usage = Usage.from_config(config, prompts={"x": "y"})
  assert usage == dataclasses.replace(
    USAGE,
    shift=2.0,
    num_inference_steps=2,
    sizes=((32, 32), (64, 16)),
    num_frames=5,
    fps=0.0,
    base_model="",
    base_checksum="",
    prompts={"x": "y"},
    contexts=("I", "II", "III"),
    clip_counts=(4,),
  )
  read = Usage.from_metadata({"software": "univid_jax 1", **usage.to_metadata()}, source="")
  assert read == usage and read.is_known


def test_only_sizes_and_fits_that_a_source_uses_are_trained():
  """All sources but records have one size, and crop; sources of one's own may have any."""
  config = override(tiny(), {"data.buckets": ["64x16"], "data.fit": "pad"})
  computed = open_data(config).sources.values()
  assert not adapt_clips(computed) and adapt_clips([*computed, mock.Mock(spec=SentenceSource)])
  for adapts_clips, expected in ((False, (1, ClipFit.CROP)), (True, (2, ClipFit.PAD))):
    usage = Usage.from_config(config, adapts_clips=adapts_clips)
    assert (len(usage.sizes), usage.fit) == expected


@pytest.mark.parametrize("key", ["manifest", "metadata"])
def test_prompts_of_records_are_remembered(key):
  changes = {f"data.{key}": "x", "data.prompt": "detailed"}
  usage = Usage.from_config(override(tiny(), changes), prompts={"x": "y"})
  assert usage.own_prompts and merge_usages([("a", Usage()), ("b", usage)])[0].own_prompts
  assert Usage.from_metadata({"software": "univid_jax 1", **usage.to_metadata()}, source="") == usage
  for without in ({f"data.weights.{key}": 0.0}, {"data.prompt": "null"}):  # with which records' own are not read
    assert not Usage.from_config(override(tiny(), changes | without)).own_prompts


@pytest.mark.parametrize(
  "changes",
  [
    {"flow.shift": 5e-324, "data.fps": 5e-324, "eval.num_inference_steps": 1, "data.num_frames": 1},
    {"flow.shift": MAX_SHIFT, "data.fps": MAX_FPS, "eval.num_inference_steps": MAX_STEPS},
    {"model.clip_gap": MAX_POSITION - 1, "data.num_frames": MAX_COUNT // 4 * 4 - 3},
    {"data.pairs": "x", "data.buckets": [f"{MAX_COUNT}x1"], "data.num_clips": {f"clips_{MAX_COUNT - 1}": 1.0}},
    {"name": ' "ü"\n', "model.context_timestep": "zero", "lora.rank": 1, "base.quantize": "nf4"},
  ],
  ids=str,
)
def test_what_a_config_accepts_can_be_read_again(changes):
  config = override(tiny(), changes)
  usage = Usage.from_config(config, base_model=config.name, prompts={"\u2028": '"\n'}, expert=Expert.LOW)
  assert Usage.from_metadata({"software": "univid_jax 1", **usage.to_metadata()}, source="") == usage


@pytest.mark.parametrize(
  "field, text, message",
  [("shift", "2000", "above 0 and at most 1000"), ("fps", "20000", "from 0 to 10000"), ("fps", "-1", "from 0 to")],
)
def test_headers_out_of_range_name_the_range(field, text, message):
  metadata = {"software": "univid_jax 1", **USAGE.to_metadata(), field: text}
  with pytest.raises(UserError, match=f"the header of a has {field} = '{text}': it must be {message}"):
    Usage.from_metadata(metadata, source="a")


def test_files_of_earlier_versions_do_not_say_what_their_training_saw():
  """Their sizes and lengths are the defaults, with which nothing may be compared."""
  read = Usage.from_metadata({"software": "univid_jax 0.1.0", "attention": "full", "base_model": "x"}, source="")
  assert read is not None and not read.is_known


OWN_BASE_NOTE = "; only univid_jax can use it: no other program can load its base, small"


def test_only_this_project_can_use_a_lora_of_its_own_base(tmp_path):
  for name, note in (("small", OWN_BASE_NOTE), ("wan2.2-ti2v-5b", ""), ("custom", ""), ("", "")):
    path = tmp_path / "lora.safetensors"
    write_lora(path, make_lora(dataclasses.replace(USAGE, base_model=name)), "comfyui")
    for to in ("musubi", "jax"):
      written = convert_any(str(path), str(tmp_path / f"{name}_{to}.safetensors"), to=to)
      assert written.partition(")")[2] == (note if to == "musubi" else "")


def test_a_run_proposes_exports_that_others_can_use(checkpoint):
  """Not those of a LoRA whose base no other program can load."""
  result = TrainResult(make_pipeline=lambda: pytest.fail("it was loaded"), steps_taken=3, seconds=1.0)
  for base, proposes in (("small", False), (checkpoint, True)):
    text = summaries.trained(result, override(tiny(), {"init_from": base, "lora.rank": 2}), "runs/x")
    assert "runs/x/lora.safetensors" in text and ("--to=diffusers" in text) is ("ComfyUI" in text) is proposes


@pytest.mark.parametrize(
  "prompts, has_task", [({"a": "x", "b": "y"}, True), ({"a": "x", "b": "x"}, False), ({"a": ""}, False), ({}, False)]
)
def test_a_run_of_several_prompts_proposes_to_name_a_task(tmp_path, prompts, has_task):
  write_run(tmp_path, RunRecord(tiny(), (), "0", prompts))
  result = TrainResult(make_pipeline=lambda: pytest.fail("it was loaded"), steps_taken=3, seconds=1.0)
  assert summaries.trained(result, tiny(), str(tmp_path)).endswith("--out=B2.mp4" + " --task=NAME" * has_task)
  if not has_task:
    manifest = override(tiny(), {"data.manifest": "x", "data.prompt": "detailed"})
    assert summaries.trained(result, manifest, str(tmp_path)).endswith("--out=B2.mp4 --prompt=TEXT")


def test_a_missing_tokenizer_is_named_before_the_model_is_loaded(tmp_path, checkpoint):
  folder = shutil.copytree(checkpoint, tmp_path / "base")
  ModelShape.read(str(folder)).check_tokenizer()
  info = json.loads((folder / "checkpoint.json").read_text())
  info["components"]["text_encoder"] = info["components"]["transformer"]
  (folder / "checkpoint.json").write_text(json.dumps(info))
  flags = SamplingFlags(command := CommandFlags(None), clips_required=False)
  command.parse(["univid-sample", f"--checkpoint={folder}"])
  with mock.patch("univid_jax.cli.loading.load_model"), pytest.raises(UserError, match="has no tokenizer: convert a"):
    flags.load()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """The miniature release."""
  package_or_skip("torch", reason="the release contains PyTorch files; needs the extra `convert`")
  folder = tmp_path_factory.mktemp("converted") / "tiny_wan"
  convert_any(str(GOLDENS / "tiny_wan"), str(folder))
  return str(folder)


class TestSampling:
  def load(self, base, *loras, **options):
    mesh = make_mesh({}, devices=jax.devices()[:1])
    return univid_jax.load_pipeline(base, list(map(str, loras)), dtype="float32", mesh=mesh, **options)

  def test_a_lora_is_run_as_it_was_trained(self, base, tmp_path, caplog):
    pipeline = self.load(base, write(tmp_path / "lora", make_lora(), "diffusers"))
    assert pipeline.attention == "context_causal" and pipeline.size == (32, 48) and pipeline.num_frames == 9
    assert pipeline.clip_format == ClipFormat(
      size=(32, 48), num_frames=9, fit=ClipFit.PAD, fps=24000 / 1001, buckets=((48, 32),)
    )
    assert [
      len(pipeline.plan(**options).sigmas) for options in ({}, {"num_inference_steps": 5}, {"solver": "distilled"})
    ] == [3, 5, 4]
    assert "was trained on other base weights (tiny)" in caplog.text
    clips = [np.full((1, 16, 16, 3), shade, np.uint8) for shade in (10, 100, 200)]
    sample = {shift: pipeline.sample(clips, num_inference_steps=2, shift=shift).latents for shift in (None, 3.5, 5.0)}
    assert np.array_equal(sample[None], sample[3.5]) and not np.allclose(sample[None], sample[5.0])
    assert self.load(base, tmp_path / "lora" / "lora.safetensors", attention="full").attention == "full"

  def test_loras_that_disagree(self, base, tmp_path, caplog):
    first = write(tmp_path / "first", make_lora(), "comfyui")
    second = write(tmp_path / "second", make_lora(dataclasses.replace(USAGE, attention=Attention.FULL)), "comfyui")
    foreign = write(tmp_path / "foreign", make_lora(None), "comfyui")
    with pytest.raises(UserError, match="choose one with --attention= of sample, or attention= of load_pipeline"):
      self.load(base, first, second)
    assert self.load(base, first, second, attention="full").attention == "full"
    assert self.load(base, foreign, first).attention == "context_causal"
    assert self.load(base, foreign).usage == self.load(base).usage == Usage()
    assert not self.load(base, foreign).usage.is_known and self.load(base, foreign, first).usage.is_known
    nf4 = write(tmp_path / "nf4", make_lora(dataclasses.replace(USAGE, base_quantize=Quantize.NF4)), "diffusers")
    self.load(base, nf4)
    assert "was trained on a base in nf4, this one is in none" in caplog.text
    caplog.clear()
    self.load(base, nf4, quantize="nf4")
    assert "in nf4" not in caplog.text
    usages = [("a", USAGE), ("b", dataclasses.replace(USAGE, shift=5.0, prompts={"edges": "z", "new": "w"}))]
    merged, notes = merge_usages(usages)
    assert notes == ["a was trained with shift 3.5, which is used, and b with 5.0"]
    assert merged == dataclasses.replace(USAGE, prompts={**USAGE.prompts, "new": "w"})


@pytest.mark.parametrize(
  "field, value",
  [
    ("attention", "magic"),
    ("shift", "0"),
    ("shift", "nan"),
    ("num_inference_steps", "0"),
    ("num_inference_steps", "many"),
    ("sizes", "4x"),
    ("sizes", ""),
    ("num_frames", "8"),
    ("fps", "inf"),
    ("prompts", "[]"),
    ("prompts", "{"),
    ("prompts", '{"a": 3}'),
  ],
)
def test_malformed_entries_are_named(tmp_path, field, value):
  lora = make_lora()
  tensors = {
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight": lora.changes["blocks.0.self_attn.q.weight"].parts()["down"]
  }
  tensors["diffusion_model.blocks.0.self_attn.q.lora_B.weight"] = np.zeros((32, 2), np.float32)
  metadata = {"software": "univid_jax 1", **USAGE.to_metadata(), field: value}
  save_safetensors(tmp_path / "lora.safetensors", tensors, metadata=metadata)
  with pytest.raises(UserError, match=rf"the header of .*lora\.safetensors has {field} = "):
    _ = read_lora(tmp_path / "lora.safetensors").usage
  metadata["software"] = "another trainer"
  save_safetensors(tmp_path / "lora.safetensors", tensors, metadata=metadata)
  assert read_lora(tmp_path / "lora.safetensors").usage is None


def test_damaged_sidecars_are_named(tmp_path):
  pytest.importorskip("torch", reason="a .ckpt is a PyTorch file; needs the extra `convert`")
  path = write(tmp_path / "lora", make_lora(), "univid")
  sidecar = path.with_name("lora.ckpt.json")
  assert json.loads(sidecar.read_text())["attention"] == "context_causal"
  sidecar.write_text("{")
  with pytest.raises(UserError, match=r"lora\.ckpt\.json is not valid JSON"):
    read_lora(path)


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_asked_for_decides_only_about_itself(order):
  """Two LoRAs whose timesteps of the context differ are refused, whatever their order, unless one is chosen."""
  full, causal = Attention.FULL, Attention.CONTEXT_CAUSAL
  target, zero = ContextTimestep.TARGET, ContextTimestep.ZERO

  def used(*trained, attention=None, context_timestep=None):
    usages = [Usage(attention=each, context_timestep=timestep) for each, timestep in trained]
    loras = [(RequestedLoRA(make_lora(usage)), "") for usage in usages[::order]]
    asked = {"attention": attention, "context_timestep": context_timestep}
    return lora_usage(loras, **asked, quantize=Quantize.NONE).context_timestep

  for attention in (None, full):
    with pytest.raises(UserError, match="trained with context_timestep"):
      used((full, target), (full, zero), attention=attention)
    assert used((full, target), (full, zero), attention=attention, context_timestep=zero) == zero
  with pytest.raises(UserError, match="trained with attention"):
    used((full, target), (causal, zero))
  assert used((full, target), (causal, zero), attention=full) == target
  assert used((full, target), (causal, zero), attention=causal) == zero
  assert used((causal, zero), (causal, zero), attention=full) == ContextTimestep.AUTO


@pytest.mark.parametrize(
  "asked, expected",
  [
    ({}, []),
    ({"attention": Attention.FULL}, []),
    ({"context_timestep": ContextTimestep.ZERO}, ["a was trained with context_timestep target, not zero: "]),
    ({"attention": Attention.CONTEXT_CAUSAL}, ["a was trained with attention full, not context_causal: "]),
  ],
)
def test_another_context_than_that_of_training_is_reported(caplog, asked, expected):
  usage = Usage(attention=Attention.FULL, context_timestep=ContextTimestep.TARGET)
  asked = {"attention": None, "context_timestep": None} | asked
  lora_usage([], run=("a", usage), quantize=Quantize.NONE, **asked)
  assert caplog.messages == [f"{line}expect worse results" for line in expected]
  warn_of_other_context("b", Usage(), **asked)
  assert "b was trained with context_timestep" not in caplog.text, "it is not known"


def test_a_sidecar_is_part_of_the_checksum(tmp_path):
  """Attention, shift and gaps of a .ckpt are in it, so that stored samples of others are not taken."""
  pytest.importorskip("torch", reason="a .ckpt is a PyTorch file; needs the extra `convert`")
  paths = [write(tmp_path / str(gap), make_lora(dataclasses.replace(USAGE, clip_gap=gap)), "univid") for gap in (0, 7)]
  origins = [Origin.resolve("small", loras=[(str(path), 1.0)]) for path in (*paths, paths[1])]
  sums = [origin.checksums["lora 0"] for origin in origins[:2]]
  paths[1].with_name("lora.ckpt.json").unlink()
  assert len({*sums, origins[2].checksums["lora 0"]}) == 3


def test_the_step_of_a_lora_run_is_chosen_once(tiny_config, tmp_path, monkeypatch):
  """What it saves afterwards is neither loaded nor named as the origin of samples."""
  monkeypatch.setattr(loop, "compile_train_step", compile_plain_step)
  changes = {"lora.rank": 2, "num_steps": 2, "checkpoint.every_steps": 1, "validation.every_steps": 0}
  train(override(tiny_config, changes), run := str(tmp_path / "run"))
  folder = tmp_path / "run" / "checkpoints"
  newest = (folder / "2").rename(tmp_path / "2")
  first = Origin.resolve("small", loras=[(f"both={run}", 0.5)])
  newest.rename(folder / "2")
  second = Origin.resolve("small", distillation=[(run, 0.5)], lora_steps=read_distillation(run).steps)
  assert (first.lora_steps, second.lora_steps) == ({run: 1}, {run: 2})
  assert first.checksums["lora 0"].split()[1:] != second.checksums["accelerator 0"].split()
  assert first.checksums["lora 0"] == f"both {digest_contents(folder / '1' / 'model', listed_in=None)} x 0.5"
  mesh = make_mesh({}, jax.devices()[:1])
  one, two, newest = (
    parameters(univid_jax.load_pipeline(run, lora=run, lora_steps=steps, mesh=mesh))
    for steps in (first.lora_steps, second.lora_steps, None)
  )
  assert jax.tree.all(jax.tree.map(np.array_equal, two, newest))
  assert not jax.tree.all(jax.tree.map(np.array_equal, one, two))


@pytest.mark.parametrize("given, shift", [({}, 3.5), ({"shift": 2.0}, 2.0), ({"sigmas": (1.0, 0.5)}, None)])
def test_what_training_decides_is_recorded(tiny_config, given, shift):
  """So that results of other weights of that name, trained otherwise, are not kept."""
  pipeline = random_pipeline(tiny_config, make_mesh({}, jax.devices()[:1]))
  pipeline.usage = dataclasses.replace(USAGE, clip_gap=7)
  steps = resolve_steps(pipeline, SamplingOptions(**given))
  assert steps.shift == shift and np.array_equal(pipeline.make_plan(steps).sigmas, pipeline.plan(**given).sigmas)
  runner = RequestRunner(pipeline, pipeline.clip_format, SamplingArguments(steps=steps), {})
  assert runner._record([], num_frames=1, size=(16, 16), fps=None)["clip_gap"] == 7


def test_prompts_of_tasks():
  trained = {"my style": "in my style", "edges": ""}
  assert task_prompt("my_style", trained) == "in my style" and task_prompt("edges", trained) == ""
  assert "its corresponding depth map" in task_prompt("depth map", {})
  assert "its corresponding scribble map" in task_prompt("scribble", {}), "as training names the target"
  assert "camera motion" in task_prompt("camera_movement", {})
  with pytest.raises(UserError, match=r"--task=camera_movment is not known: did you mean 'camera movement'\?"):
    task_prompt("camera_movment", trained)


@pytest.mark.parametrize(
  "given, prompts, has_text_encoder, expected, logged",
  [
    (["--task=edges"], {"edges": ""}, True, "", "--task=edges changes nothing"),
    (["--task=edges"], {"edges": "z"}, True, "z", ""),
    ([], {"edges": "z"}, True, "z", "prompt: 'z', that of training; --prompt= samples without one"),
    ([], {"edges": "z", "more edges": "z"}, True, "z", "prompt: 'z', that of training"),
    ([], {"edges": "z", "depth": "y"}, True, "", ""),
    ([], {"edges": "z", "depth": ""}, True, "", ""),
    ([], {"edges": "z"}, False, "", ""),
    (["--lora=own"], {"edges": "z"}, True, "", ""),
    ([], {"edges": ""}, True, "", ""),
    ([], {}, True, "", ""),
    (["--prompt="], {"edges": "z"}, True, "", ""),
    (["--prompt=x"], {"edges": "z"}, True, "x", ""),
  ],
)
def test_the_prompt_is_that_of_training(caplog, given, prompts, has_text_encoder, expected, logged):
  caplog.set_level("INFO")
  command = CommandFlags(None)
  flags = SamplingFlags(command, clips_required=False)
  command.parse(["univid-sample", "--checkpoint=x", *given])
  encoders = types.SimpleNamespace(has_text_encoder=has_text_encoder)
  usage = dataclasses.replace(USAGE, prompts=prompts, own_prompts=given == ["--lora=own"])
  pipeline = types.SimpleNamespace(usage=usage, encoders=encoders)
  assert flags.choose_prompt(pipeline) == expected
  assert logged in caplog.text and bool(caplog.text) == bool(logged)


@pytest.mark.parametrize(
  "prompts, is_new", [({"edges": "z", "depth": "y"}, True), ({"edges": "z", "depth": ""}, False)]
)
def test_a_null_prompt_that_training_did_not_have_is_reported_once(tiny_config, caplog, prompts, is_new):
  pipeline = random_pipeline(tiny_config, make_mesh({}, jax.devices()[:1]))
  pipeline.usage = dataclasses.replace(USAGE, prompts=prompts)
  for name in ("negative_prompt", "prompt", "prompt"):
    pipeline.embed("", name)
  message = "the prompt is empty, and those of training were not; it had 2 tasks (depth, edges): --task=NAME, or "
  assert [line[: len(message)] for line in caplog.messages] == [message] * is_new
  caplog.clear()
  pipeline.usage = dataclasses.replace(USAGE, prompts={}, own_prompts=True)
  pipeline.embed("")
  assert caplog.messages[0].endswith("not; lines of its manifest or table may have had their own: --prompt=TEXT takes "
                                     "one like theirs")  # fmt: skip


@pytest.mark.parametrize(
  "asked, expected", [("high", ["high"]), ("low", ["low"]), ("both", ["high", "low"])], ids=["high", "low", "both"]
)
def test_each_expert_gets_its_own_lora_of_a_run_of_both(monkeypatch, asked, expected):
  """A single one goes where it is sent."""
  both = [make_lora(dataclasses.replace(USAGE, expert=Expert(name))) for name in ("high", "low")]
  monkeypatch.setattr(lora_specs, "_read", lambda path, **options: both if path == "run" else both[:1])
  found = read_loras({asked: "run"}, verify=True)
  assert [(str(each.weights.usage.expert), each.expert) for each in found] == [(name, None) for name in expected]
  (single,) = read_loras({asked: "file"}, verify=True)
  assert str(single.expert) == asked
