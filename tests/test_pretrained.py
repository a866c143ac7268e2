"""Checkpoint folders: components are found, loaded, and reported if they are missing or damaged."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from tests.helpers import GOLDENS
from univid_jax import load_pipeline
from univid_jax.checkpoints import pretrained, run_parts, sentence_lengths
from univid_jax.checkpoints.info import CHECKPOINT_FILE, is_checkpoint
from univid_jax.checkpoints.origin import Origin
from univid_jax.checkpoints.pretrained import PretrainedCheckpoint
from univid_jax.checkpoints.run import RunRecord, require_run, write_run
from univid_jax.checkpoints.run_parts import open_base
from univid_jax.config.boundary import override
from univid_jax.config.presets import small_lora, tiny
from univid_jax.config.schema import RunConfig
from univid_jax.convert.commands import convert_any
from univid_jax.core.errors import UserError
from univid_jax.models.dit import DiT
from univid_jax.models.variants import DiTConfig
from univid_jax.parallel.mesh import make_mesh

WEIGHTS = GOLDENS / "tiny_wan" / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
  """A checkpoint that contains a transformer only."""
  convert_any(str(WEIGHTS), str(tmp_path / "checkpoint"))
  return tmp_path / "checkpoint"


def test_load(folder):
  checkpoint = PretrainedCheckpoint.open(folder)
  assert checkpoint.has("transformer") and not checkpoint.has("vae")
  config = checkpoint.config("transformer")
  assert isinstance(config, DiTConfig) and config.patch_size == (1, 2, 2)
  mesh = make_mesh({}, devices=jax.devices()[:1])
  graph, params = checkpoint.load("transformer", mesh=mesh, dtype=jnp.float32, param_dtype=jnp.bfloat16)
  bias = load_file(WEIGHTS)["head.head.bias"]
  assert np.array_equal(params["head"]["head"]["bias"], bias.astype(jnp.bfloat16))
  assert isinstance(nnx.merge(graph, params), DiT)
  _, params = checkpoint.load("transformer", mesh=mesh, dtype=jnp.float32)
  assert np.array_equal(params["head"]["head"]["bias"], bias)


def test_missing_component(folder):
  checkpoint = PretrainedCheckpoint.open(folder)
  message = "has no vae, only transformer: convert a release that includes it"
  for use in (
    lambda: checkpoint.config("vae"),
    lambda: checkpoint.checksum("vae"),
    lambda: checkpoint.load("vae", mesh=make_mesh({}, devices=jax.devices()[:1]), dtype=jnp.float32),
  ):
    with pytest.raises(UserError, match=message):
      use()
  with pytest.raises(UserError, match="has no tokenizer"):
    checkpoint.tokenizer_path()


def test_the_origin_of_samples_has_configs_and_tokenizer(folder):
  """Tables of ratios, which depend on weights alone, are found all the same."""

  def identify(**changes):
    values = json.loads((folder / CHECKPOINT_FILE).read_text())
    values["components"]["transformer"]["config"] |= changes
    (folder / CHECKPOINT_FILE).write_text(json.dumps(values))
    origin = Origin.resolve(str(folder))
    assert origin.checksums  # now: they are computed once
    return origin

  before = identify()
  assert before.checksums.keys() == {"transformer", "configs"} and before.weights.keys() == {"transformer"}
  changed = identify(rope_theta=5000.0)
  assert {name for name in before.checksums if before.checksums[name] != changed.checksums[name]} == {"configs"}
  found = []
  for text in ("one", "other"):
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text(text)
    values = json.loads((folder / CHECKPOINT_FILE).read_text())
    (folder / CHECKPOINT_FILE).write_text(json.dumps(values | {"tokenizer": "tokenizer/tokenizer.json"}))
    found.append(identify())
  assert found[0].checksums["tokenizer"] != found[1].checksums["tokenizer"]
  assert found[0].checksums["configs"] == changed.checksums["configs"] and found[0].weights == before.weights


@pytest.mark.parametrize(
  "options, message",
  [
    ({"dtype": "foo"}, "dtype must be one of float32, bfloat16, float16, got 'foo'"),
    ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
    ({"step": 3}, "is a converted checkpoint, which has no step 3"),
    ({"step": "best"}, "is a converted checkpoint, which has no step best"),
    ({"on_damaged_checkpoint": "foo"}, "on_damaged_checkpoint must be one of fallback, stop, got 'foo'"),
    ({"quantize": "foo"}, "quantize must be one of none, "),
  ],
)
def test_options_that_do_not_apply(folder, options, message):
  with pytest.raises(UserError, match=message):
    load_pipeline(str(folder), **options)
  if not options.keys() & {"dtype", "quantize"}:
    with pytest.raises(UserError, match=message):
      Origin.resolve(str(folder), **options)


@pytest.mark.parametrize(
  "options, message",
  [({"dtype": "foo"}, "dtype must be one of"), ({"on_damaged_checkpoint": "foo"}, "on_damaged_checkpoint must be")],
)
def test_options_of_runs_are_checked_before_the_run_is_read(tmp_path, options, message):
  with pytest.raises(UserError, match=message):
    load_pipeline(str(tmp_path / "run"), **options)


def test_incomplete_component(folder):
  next((folder / "transformer").rglob("0.0.0")).unlink()
  with pytest.raises(UserError, match=r"transformer has \d+ files instead of \d+: convert the release again"):
    PretrainedCheckpoint.open(folder).load("transformer", mesh=make_mesh({}, devices=jax.devices()[:1]))


def test_damaged_or_missing_description(folder, tmp_path):
  for text in ("{", "[]", '{"format": 2}', '{"format": 1, "components": {"vae": {"x": 1}}}'):
    (folder / CHECKPOINT_FILE).write_text(text)
    with pytest.raises(UserError, match=rf"cannot read .*{CHECKPOINT_FILE}"):
      PretrainedCheckpoint.open(folder)
  assert not is_checkpoint(tmp_path)
  with pytest.raises(FileNotFoundError, match="not a converted checkpoint"):
    PretrainedCheckpoint.open(tmp_path)


@pytest.mark.parametrize(
  "path, as_checkpoint, as_base",
  [
    ("goldens/tiny_wan", "contains weights: convert it with", "contains weights: convert it with"),
    ("goldens22/tiny_wan22_a14b", "contains weights: convert it with", "contains weights: convert it with"),
    ("cases/lora/loha.safetensors", "; it is a LoRA: give its base as the ch", "it is a LoRA: training starts from"),
    (
      "cases/lora",
      r"; cases/lora/.*\.safetensors is a LoRA: give its",
      r"cases/lora/.*\.safetensors is a LoRA: training",
    ),
    ("goldens/umt5.weights.safetensors", r"no config.json of one\)$", r"no checkpoint.json\); create one with"),
    ("cases/lora/peft_folder", "it is a LoRA: give its base as the checkpoint", "it is a LoRA: training starts from"),
    (
      "Wan-AI/Wan2.1-T2V-1.3B",
      r"\(hf download Wan-AI/Wan2.1-T2V-1.3B --local",
      r"convert it \(python -m univid_jax.conv",
    ),
    ("runs/tiny", "one of the built-in bases: small$", r"no checkpoint.json\); create one with"),
  ],
)
def test_what_is_no_checkpoint_is_named(monkeypatch, path, as_checkpoint, as_base):
  monkeypatch.chdir(GOLDENS.parent)
  with pytest.raises(FileNotFoundError, match=as_checkpoint):
    require_run(path)
  with pytest.raises(FileNotFoundError, match=f"^config.init_from: {path} is not .*{as_base}"):
    open_base(RunConfig(init_from=path))


def test_a_checkpoint_inside_of_a_folder_is_named(tmp_path, folder):
  shutil.copytree(folder, tmp_path / "all" / "base")
  for open_it in (require_run, lambda path: open_base(RunConfig(init_from=path))):
    with pytest.raises(FileNotFoundError, match=f"; name the folder in it, {tmp_path}/all/base"):
      open_it(str(tmp_path / "all"))


def test_an_other_config_is_no_run(tmp_path):
  (tmp_path / "config.json").write_text("[")
  with pytest.raises(FileNotFoundError, match="is not a converted checkpoint"):
    open_base(RunConfig(init_from=str(tmp_path)))


@pytest.mark.parametrize(
  "values, message",
  [
    ({"lora.rank": 2}, "run that trained a LoRA on random weights: only the same run"),
    (
      {"lora.rank": 2, "init_from": "wan"},
      "run that trained a LoRA on wan: name its base instead, as only the same run",
    ),
    ({"init_from": "wan"}, "run that trained all of wan, which is no base: only the same run continues it: --workdir="),
    ({}, r"it is the workdir of a run: python -m univid_jax.convert .* DST makes a base of it"),
  ],
)
def test_a_run_is_no_base(tmp_path, values, message):
  write_run(tmp_path, RunRecord(override(tiny(), values), ("",), "0.2.0"))
  with pytest.raises(FileNotFoundError, match=message):
    open_base(RunConfig(init_from=str(tmp_path)))


@pytest.mark.parametrize(
  "function",
  [
    run_parts.transformer_config,
    run_parts.check_base,
    run_parts.with_stored_base,
    run_parts.make_flow,
    run_parts.codec_shape,
    sentence_lengths.clip_tokens,
    run_parts.base_checksums,
    lambda config: nnx.eval_shape(lambda: run_parts.create_model(config)),
  ],
)
def test_a_base_is_opened_once(function, monkeypatch):
  """Reading checkpoint.json in a bucket takes a while each time."""
  read, opened = pretrained.read_info, []
  monkeypatch.setattr(pretrained, "read_info", lambda folder: (opened.append(folder), read(folder))[1])
  function(small_lora())
  assert opened == ["small"]
