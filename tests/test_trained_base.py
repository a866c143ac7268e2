"""Bases that this project trains from scratch: written, sampled with, trained on, and the one in the package."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.commands import run_here
from tests.helpers import compile_plain_step, parameters
from univid_jax.checkpoints import built_in
from univid_jax.checkpoints.built_in import BUILT_IN, locate
from univid_jax.checkpoints.info import is_checkpoint, read_info
from univid_jax.checkpoints.lora.reading import read_lora
from univid_jax.checkpoints.pretrained import PretrainedCheckpoint
from univid_jax.checkpoints.run import RunRecord, write_run
from univid_jax.cli.verification import verify
from univid_jax.config.boundary import override
from univid_jax.config.presets import small
from univid_jax.convert.commands import convert_any, inspect
from univid_jax.convert.release_configs import scheduler_config
from univid_jax.core.errors import UserError
from univid_jax.data.sources.grids import GridSentences
from univid_jax.data.tasks.grids.base import GridSplit
from univid_jax.data.tasks.grids.rendering import Rendering
from univid_jax.inference.load import load_pipeline
from univid_jax.inference.ratio_tables import TableKey, read_table, require_tables, write_table
from univid_jax.training import loop
from univid_jax.training.loop import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_config):
  """The workdir of a model trained from scratch, and the base written of it."""
  root = tmp_path_factory.mktemp("trained")
  config = override(
    tiny_config, {"validation.every_steps": 0, "eval.sentences_per_case": 0, "model.clip_gap": 2, "flow.shift": 4.0}
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "compile_train_step", compile_plain_step)
    train(config, str(root / "run"))
  convert_any(str(root / "run"), str(root / "base"))
  return root, config


def flat(pipe):
  return jax.tree.map(np.asarray, parameters(pipe))


def test_a_base_is_the_run_it_was_written_of(trained):
  root, _ = trained
  run, base = load_pipeline(str(root / "run")), load_pipeline(str(root / "base"))
  jax.tree.map(np.testing.assert_array_equal, flat(run), flat(base))
  assert run.encoders.codec == base.encoders.codec and run.config == base.config
  assert (base.usage.clip_gap, base.usage.shift, base.usage.sizes) == (2, 4.0, ((16, 16),))
  assert run.usage == base.usage
  assert scheduler_config(PretrainedCheckpoint.open(str(root / "base")))["flow_shift"] == 4.0


def test_loras_are_trained_on_it_and_applied_to_it(trained, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(loop, "compile_train_step", compile_plain_step)
  root, config = trained
  tuned = override(
    config, {"init_from": str(root / "base"), "lora.rank": 2, "num_steps": 2, "checkpoint.every_steps": 1}
  )
  result = train(tuned, str(tmp_path / "run"))
  for name in ("cache", "lora_high.safetensors"):
    assert not (tmp_path / "run" / name).exists()  # the codec costs nothing, so nothing is cached
  frozen = flat(load_pipeline(str(root / "base")))
  applied = load_pipeline(str(root / "base"), lora=str(tmp_path / "run" / "lora.safetensors"))
  jax.tree.map(np.testing.assert_array_equal, parameters(result.pipeline), parameters(applied))
  assert len(jax.tree.leaves(parameters(applied))) > len(jax.tree.leaves(frozen))
  assert "are the same LoRA" not in caplog.text
  load_pipeline(str(tmp_path / "run"), lora=str(tmp_path / "run" / "lora.safetensors"))
  assert "lora.safetensors are the same LoRA: it is applied twice" in caplog.text
  loras = []
  for step in ("1", "2"):
    convert_any(str(tmp_path / "run"), str(path := tmp_path / f"{step}.safetensors"), to="comfyui", step=step)
    loras.append(read_lora(path))
  assert [lora.metadata["step"] for lora in loras] == ["1", "2"]
  assert not np.array_equal(*(next(iter(lora.changes.values())).up for lora in loras))


def test_a_step_is_one_of_a_run(trained, tmp_path, capfd):
  root, _ = trained
  convert_any(str(root / "run"), str(tmp_path / "again"), step="4")
  assert read_info(tmp_path / "again").components == read_info(root / "base").components
  with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3 in .*; there are 4"):
    convert_any(str(root / "run"), str(tmp_path / "out"), step="3")
  with pytest.raises(FileNotFoundError, match="no checkpoint of step 3 in "):
    inspect(str(root / "run"), step="3")
  for source in (str(root / "base"), "small"):
    with pytest.raises(UserError, match=f"--step=4 is for the workdirs of runs, and {source} is none: leave it out"):
      inspect(source, step="4")
  assert run_here("univid_jax.convert.__main__", root / "run", tmp_path / "out", "--step=best") == 1
  assert "no finished checkpoint with a validation loss" in capfd.readouterr().err
  assert run_here("univid_jax.convert.__main__", "a", "b", "--verify", "--step=4") == 2


def test_a_copy_has_the_same_contents(trained, tmp_path):
  root, _ = trained
  shutil.copytree(root / "base", tmp_path / "copy")
  convert_any(str(root / "run"), str(tmp_path / "half"), dtype="bfloat16")
  here, copy, half = (
    PretrainedCheckpoint.open(str(path)).contents for path in (root / "base", tmp_path / "copy", tmp_path / "half")
  )
  assert here == copy and {"transformer", "configs"} <= here.keys() and here != half


def test_it_is_quantised_like_others(trained):
  root, _ = trained
  pipe = load_pipeline(str(root / "base"), quantize="int8")
  assert "int8" in {leaf.dtype.name for leaf in jax.tree.leaves(parameters(pipe))}


def test_dtype_and_damage(trained, tmp_path):
  root, _ = trained
  convert_any(str(root / "run"), str(tmp_path / "half"), dtype="bfloat16")
  exact, half = flat(load_pipeline(str(root / "base"))), flat(load_pipeline(str(tmp_path / "half")))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), exact, half)
  assert "bfloat16" in inspect(str(tmp_path / "half"))
  weights = tmp_path / "half" / "transformer.safetensors"
  weights.write_bytes(weights.read_bytes()[:-10])
  with pytest.raises(UserError, match=r"transformer\.safetensors"):
    load_pipeline(str(tmp_path / "half"), verify_weights=False)


def test_a_layout_that_cannot_hold_a_run_is_refused_at_once(trained, tmp_path):
  """Not with the advice to convert it to jax, from where it cannot be written either."""
  root, config = trained
  write_run(tmp_path, RunRecord(override(config, {"model.rope_scale": 1.5}), "", "0.2.0"))
  for source in (str(tmp_path), str(root / "run")):
    with pytest.raises(UserError, match=r"in the layout diffusers: this layout cannot say .* rope_") as caught:
      convert_any(source, str(tmp_path / "out"), to="diffusers")
    assert "jax first" not in str(caught.value)
  with pytest.raises(UserError, match="convert it to jax first, and the result to original"):
    convert_any(str(root / "run"), str(tmp_path / "out"), to="original")


def test_runs_on_a_base_are_not_written(trained, tmp_path):
  root, config = trained
  tmp_path.joinpath("run").mkdir()
  write_run(tmp_path / "run", RunRecord(override(config, {"init_from": str(root / "base")}), ("",), "0.2.0"))
  with pytest.raises(UserError, match=r"trained the whole of .*base"):
    convert_any(str(tmp_path / "run"), str(tmp_path / "again"))
  with pytest.raises(UserError, match=r"trained the whole of .*base"):
    convert_any(str(tmp_path / "run"), str(tmp_path / "again"), to="diffusers")


def test_a_built_in_name_wins_over_a_folder(trained, tmp_path, monkeypatch):
  root, _ = trained
  monkeypatch.chdir(tmp_path)
  (tmp_path / "small").symlink_to(root / "base")
  assert read_info("small").variant == "small" and read_info("./small").variant == "tiny"
  assert locate("small").parent.name == "bases" and all(map(is_checkpoint, BUILT_IN))
  assert "tiny" in inspect("./small") and "small" in inspect("small")
  assert [str(found.path) for found in verify("./small", write=False)] == ["small"]
  assert read_info(epath.Path("./small")).variant == "tiny", "whose string is the name"


def test_commands_know_it_by_its_name(tmp_path, monkeypatch, caplog):
  """They read it in the package, and write nothing there nor to a folder of its name."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(built_in, "CACHE_FOLDER", str(tmp_path / "cache"))
  assert [(found.path, found.damaged) for found in verify("small", write=False)] == [(locate("small"), [])]
  convert_any("small", str(tmp_path / "release"), to="original")
  assert "has no checksums" not in caplog.text
  key = TableKey(
    weights={},
    solver="euler",
    sigmas=[1.0, 0.5],
    guidance_scales=[1.0],
    guidance_range=[0.0, 1.0],
    attention="full",
    context_timestep="target",
  )
  with pytest.raises(UserError, match=r"there is no .*cache/bases/small/step_cache.json"):
    require_tables("small")
  assert write_table("small", key, [[1.0, 1.5]]) == tmp_path / "cache" / "bases" / "small" / "step_cache.json"
  require_tables("small")
  assert read_table("small", key) == [[1.0, 1.5]]
  with pytest.raises(UserError, match=r"small is the name of a base in the package: write to \./small"):
    convert_any(str(tmp_path / "release"), "small")
  assert {path.name for path in tmp_path.iterdir()} == {"cache", "release"}


@pytest.mark.long
def test_it_is_calibrated(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(built_in, "CACHE_FOLDER", str(tmp_path / "cache"))
  Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
  clip = tmp_path / "a.png"
  assert run_here("univid_jax.calibrate", "--checkpoint=small", f"--clips={clip},{clip},{clip}", "--steps=3") == 0
  out, err = capfd.readouterr()
  assert out.splitlines()[-1] == f"ratios: {tmp_path}/cache/bases/small/step_cache.json"
  assert "3/3 [" in err and " 0step" not in err
  Image.new("RGB", (60, 62), "red").save(clip)
  flags = ["--checkpoint=small", f"--clips={clip},{clip},{clip}", "--steps=3"]
  assert run_here("univid_jax.calibrate", *flags, "--size=input") == 0
  assert f"{clip}: 60 x 62 extended to 64 x 64" in capfd.readouterr().err, "as univid-sample reads it"


def test_the_base_in_the_package_follows_an_example():
  """Permutations of colours and grids that it was never trained on; its files are intact, and say how to run it."""
  pipe, config = load_pipeline("small"), override(small(), {"data.contexts.II": 1.0})
  size = sum(path.stat().length for path in locate("small").iterdir())
  assert size < 20e6 and pipe.usage.sizes == ((64, 64),) and pipe.usage.num_frames == 9 and pipe.usage.is_known
  source = dataclasses.replace(
    GridSentences.open(config), families={"recolor": 1.0}, num_clips={4: 1.0}, split_name=GridSplit.HELD_OUT
  )
  rendering = Rendering.from_config(config.data)
  right = 0
  for index in range(4):
    *context, truth = source[index].clips
    sample = pipe.sample(context, num_frames=1, num_inference_steps=2, seed=index)
    (found,), (expected,) = rendering.decode(sample.frames), rendering.decode(truth)
    right += found.shape == expected.shape and bool((found == expected).all())
  assert right >= 3
