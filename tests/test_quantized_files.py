"""Quantised bases from end to end: converted, loaded, trained on, resumed, exported, sampled."""

import logging
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import univid_jax
from tests.checkpoint_files import is_matrix, random_float8, write_safetensors
from tests.helpers import GOLDENS, parameters, relative_error
from univid_jax.checkpoints.info import read_info
from univid_jax.checkpoints.lora.reading import read_lora
from univid_jax.checkpoints.origin import Origin
from univid_jax.checkpoints.run_parts import check_base
from univid_jax.config.boundary import override
from univid_jax.config.presets import wan_1_3b
from univid_jax.convert.commands import convert_any, inspect, verify
from univid_jax.core.errors import UserError
from univid_jax.core.options import Quantize
from univid_jax.models.quantized import dequantize, is_quantized, quantize
from univid_jax.parallel.mesh import make_mesh
from univid_jax.planning.advice import Machine, advise
from univid_jax.training.loop import train

RELEASE = GOLDENS / "tiny_wan"
WEIGHTS = load_file(RELEASE / "diffusion_pytorch_model.safetensors")
KERNEL = ("blocks", "ffn", "up", "kernel")


def one_device():
  return make_mesh({}, devices=jax.devices()[:1])


def kernel_of(params):
  return params["blocks"]["ffn"]["up"]["kernel"]


def velocity(pipe, latents_seed=0):
  rng = np.random.default_rng(latents_seed)
  latents = rng.standard_normal((2, 4, 4, 16), np.float32)
  return pipe.predict_velocity(latents, 500.0, rng.standard_normal((5, pipe.config.text_dim), np.float32))


@pytest.fixture(scope="module")
def release(tmp_path_factory):
  """The miniature transformer alone."""
  folder = tmp_path_factory.mktemp("release")
  shutil.copy(RELEASE / "config.json", folder)
  return str(write_safetensors(folder / "wan.safetensors", WEIGHTS))


@pytest.fixture(scope="module")
def plain(release, tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("plain") / "base")
  convert_any(release, folder)
  return folder


@pytest.mark.parametrize(
  "method", ["int8", pytest.param("fp8", marks=pytest.mark.long), pytest.param("nf4", marks=pytest.mark.long)]
)
class TestFiles:
  def test_quantised_at_conversion_equals_quantised_at_loading(self, release, plain, method, tmp_path, caplog):
    stored = str(tmp_path / "stored")
    with caplog.at_level(logging.INFO, logger="univid_jax"):
      convert_any(release, stored, quantize=method)
      pipes = [
        univid_jax.load_pipeline(stored, dtype="float32", mesh=one_device()),
        univid_jax.load_pipeline(
          plain, dtype="float32", quantize=method, mesh=make_mesh({"fsdp": 2}, jax.devices()[:2])
        ),
      ]
    lines = [record.message for record in caplog.records if "relative error of each in %" in record.message]
    assert (
      len(lines) == 3 and len(set(lines)) == 1 and lines[0].startswith(f"transformer: {method} weights of 3 blocks")
    )
    assert lines[0].removeprefix("transformer: ") in inspect(stored)
    jax.tree.map(np.testing.assert_array_equal, *(parameters(pipe) for pipe in pipes))
    exact = jax.tree.map(
      lambda x: dequantize(quantize(x, Quantize(method))) if x.ndim == 3 and x.shape[1] > 6 else x,
      parameters(univid_jax.load_pipeline(plain, dtype="float32", mesh=one_device())),
    )
    assert relative_error(dequantize(kernel_of(parameters(pipes[0]))), kernel_of(exact)) == 0
    assert all(pipe.experts.quantize == method for pipe in pipes)
    # The checksum is that of the base, and samples are told apart all the same.
    assert read_info(stored).components["transformer"].checksum == read_info(plain).components["transformer"].checksum
    sums = [Origin.resolve(plain), Origin.resolve(plain, quantize=method), Origin.resolve(stored)]
    assert sums[1].checksums == sums[2].checksums == {**sums[0].checksums, "quantize": method}

  def test_the_adviser_knows_how_a_base_is_stored(self, release, plain, method, tmp_path):
    stored = str(tmp_path / "stored")
    convert_any(release, stored, quantize=method)
    config = override(wan_1_3b(), {"init_from": stored, "model.variant": ""})
    options = advise(config, Machine(name="h200"), None, count=1)
    assert {str(option.config.base.quantize) for option in options} == {method}
    assert not any("base.quantize" in option.changes for option in options)

  def test_what_was_lost_is_not_asked_for(self, release, plain, method, tmp_path):
    stored = str(tmp_path / "stored")
    convert_any(release, stored, quantize=method)
    other = "nf4" if method != "nf4" else "int8"
    with pytest.raises(
      UserError, match=f"is stored in {method}, not {other}: convert the release with --quantize={other}"
    ):
      univid_jax.load_pipeline(stored, quantize=other)
    for action in (lambda: convert_any(stored, str(tmp_path / "out"), to="original"), lambda: verify(release, stored)):
      with pytest.raises(UserError, match=f"stores its transformer in {method}, which has lost the original weights"):
        action()
    with pytest.raises(UserError, match=f"a base in {method} cannot be trained"):
      check_base(override(wan_1_3b(), {"init_from": stored, "model.variant": "", "lora.rank": 0}))


class TestFloat8Files:
  """8-bit files of ComfyUI are fp8 bases as they are."""

  @pytest.mark.parametrize("scales", [pytest.param("none", marks=pytest.mark.long), "one", "rows", "blocks"])
  def test_are_taken_as_they_are(self, tmp_path, scales):
    random, tensors = np.random.default_rng(0), {}
    for name, value in WEIGHTS.items():
      if not (is_matrix(name, value) and name.startswith("blocks.")):
        tensors[name] = value.astype(ml_dtypes.bfloat16)
        continue
      tensors[name] = random_float8(value.shape, "float8_e4m3fn", random)
      shape = {"one": (), "rows": (len(value), 1), "blocks": (len(value), 2, 1)}.get(scales)
      if shape is not None:
        tensors[f"{name.removesuffix('.weight')}.scale_weight"] = random.uniform(1e-4, 1e-3, shape).astype(np.float32)
    shutil.copy(RELEASE / "config.json", tmp_path)
    file = write_safetensors(tmp_path / "fp8.safetensors", tensors)
    convert_any(str(file), str(tmp_path / "exact"))
    convert_any(str(file), str(tmp_path / "fp8"), quantize="fp8")
    exact, found = (
      parameters(univid_jax.load_pipeline(str(tmp_path / name), dtype="float32", mesh=one_device()))
      for name in ("exact", "fp8")
    )
    errors = read_info(tmp_path / "fp8").components["transformer"].quantize_errors
    if scales == "blocks":
      assert 0 < max(errors) < 0.04  # their scales are finer than ours: rounded again
      return
    assert max(errors) == 0
    dense = jax.tree.map(lambda x: dequantize(x) if is_quantized(x) else x, found, is_leaf=is_quantized)
    jax.tree.map(np.testing.assert_array_equal, dense, exact)


@pytest.mark.long
def test_training(tiny_config, tmp_path):
  """One step, resumed for another, equals two; the run, its LoRA on the base and a merge do what they say."""
  config = override(
    tiny_config,
    {"lora.rank": 2, "model.look_back": (), "base.quantize": "nf4", "num_steps": 2, "checkpoint.every_steps": 1},
  )
  for steps in (1, 2):
    resumed = train(override(config, {"num_steps": steps}), str(tmp_path / "resumed")).pipeline
  whole = train(config, str(tmp_path / "whole")).pipeline
  jax.tree.map(np.testing.assert_array_equal, parameters(resumed), parameters(whole))
  usage = read_lora(str(tmp_path / "whole" / "lora.safetensors")).usage
  assert usage and usage.base_quantize == Quantize.NF4
  with pytest.raises(UserError, match=r"base\.quantize = 'nf4', not 'int8'"):
    train(override(config, {"base.quantize": "int8", "num_steps": 3}), str(tmp_path / "whole"))
  clips = [np.full((1, 16, 16, 3), 90 * number, np.uint8) for number in range(3)]
  expected = whole.sample(clips, num_inference_steps=1).latents
  loaded = univid_jax.load_pipeline(str(tmp_path / "whole"))
  assert relative_error(loaded.sample(clips, num_inference_steps=1).latents, expected) <= 1e-5
  assert loaded.experts.quantize == "nf4"
  exact = univid_jax.load_pipeline(str(tmp_path / "whole"), quantize="none")
  assert 1e-4 < relative_error(exact.sample(clips, num_inference_steps=1).latents, expected) < 0.5
  with pytest.raises(UserError, match="LoRAs cannot be merged into a base in nf4"):
    univid_jax.load_pipeline(str(tmp_path / "whole"), merge_lora=True)


@pytest.mark.long
def test_a_model_that_was_trained_whole_is_sampled_quantised(tiny_config, tmp_path):
  config = override(tiny_config, {"num_steps": 1, "validation.every_steps": 0})
  train(config, str(tmp_path))
  pipe = univid_jax.load_pipeline(str(tmp_path), quantize="int8")
  clips = [np.full((1, 16, 16, 3), 90 * number, np.uint8) for number in range(3)]
  found, expected = (
    each.sample(clips, num_inference_steps=1).latents for each in (pipe, univid_jax.load_pipeline(str(tmp_path)))
  )
  assert pipe.experts.quantize == "int8" and 0 < relative_error(found, expected) < 0.02
