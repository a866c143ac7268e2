"""Wan2.2 against its original code: transformers, timesteps of the context, conversion and whole sampling runs."""

import dataclasses
import functools
import json
import math
import shutil
import weakref
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import univid_jax
from tests.helpers import GOLDENS, GOLDENS22, channels_last, golden, load_dit, parameters, relative_error
from tests.test_meshes import one_gradient, packed_batch
from univid_jax.checkpoints import run_parts
from univid_jax.checkpoints.experts import find_expert, named_expert
from univid_jax.checkpoints.info import read_info
from univid_jax.checkpoints.lora.reading import read_lora
from univid_jax.checkpoints.run_parts import check_base, context_mode, make_flow, split_config, transformer_config
from univid_jax.checkpoints.tensor_files import open_tensors
from univid_jax.checkpoints.trained import read_run_loras
from univid_jax.cli.model_shape import ModelShape
from univid_jax.config.boundary import override
from univid_jax.config.presets import tiny, wan22_a14b, wan22_i2v_a14b, wan22_ti2v_5b, wan_1_3b
from univid_jax.convert.commands import convert_any, inspect, verify
from univid_jax.core.errors import UserError
from univid_jax.core.options import Attention, ContextTimestep, ModelType, Objective, TrainedExpert
from univid_jax.core.packed_row import UNIVID_CONTEXT, ContextMode
from univid_jax.core.sentence import Sentence, reference_roles
from univid_jax.data.rows.packing import RowShape, pack, select_target_tokens
from univid_jax.data.rows.tokens import patchify, sentence_features, unpatchify
from univid_jax.diffusion.flow import FlowMatching
from univid_jax.diffusion.loss import timestep_table
from univid_jax.diffusion.step_cache import RatioMeasurement, StepCache
from univid_jax.inference.experts import Experts, OffloadedParams, Transformer
from univid_jax.inference.jobs import pack_single
from univid_jax.models.variants import VARIANTS, DiTConfig
from univid_jax.parallel.mesh import make_mesh
from univid_jax.training.expert_schedule import PERIOD, ExpertSchedule
from univid_jax.training.loop import train

PATCH = (1, 2, 2)
ZERO = ContextMode(zero_timestep=True)


def read_tensors(folder):
  tensors = open_tensors(folder / "diffusion_pytorch_model.safetensors.index.json")
  return {name: tensors.read(name) for name in tensors.infos}


def one_device():
  return make_mesh({}, devices=jax.devices()[:1])


def features_of(latents, lengths, prompt):
  """Returns the features of a sentence whose clips have these lengths in latent frames."""
  clips = tuple(np.split(latents, np.cumsum(lengths)[:-1]))
  return sentence_features(
    Sentence(clips=clips, roles=reference_roles(len(clips))), patch_size=PATCH, prompt_embedding=prompt, text_len=512
  )


@pytest.fixture(scope="module")
def ti2v():
  """The golden of TI2V's transformer: its model, the features of its sentence, the timestep, and both outputs."""
  info, io, _ = golden("dit_ti2v", GOLDENS22)
  model = load_dit(DiTConfig.from_json(info["config"]), read_tensors(GOLDENS22 / "tiny_wan22_ti2v"))
  features = features_of(channels_last(io["x"]), info["clip_latent_frames"], io["context"])
  return (
    model,
    features,
    float(io["t"][0]),
    {name: channels_last(io[f"out_{name}"]) for name in ("uniform", "context_zero")},
  )


class TestTransformer:
  # A pipeline's velocities are compared with both goldens, see `TestTI2V`.
  MODES = (pytest.param("uniform", UNIVID_CONTEXT, marks=pytest.mark.long), ("context_zero", ZERO))

  @pytest.mark.parametrize("name, mode", MODES)
  def test_ti2v_equals_the_original(self, ti2v, name, mode):
    model, features, t, expected = ti2v
    row = pack_single(features, context_mode=mode)
    assert (row.modulation_ids is None) == (name == "uniform")
    out = jax.jit(model)(row.tokens, timestep_table(jnp.full((1, 1), t / 1000), row), row)[0]
    assert relative_error(unpatchify(np.asarray(out), expected[name].shape[:3], PATCH), expected[name]) <= 2e-5

  @pytest.mark.parametrize("name, mode", MODES)
  def test_packed_with_others_the_targets_are_the_same(self, ti2v, name, mode):
    """Three sentences with noise levels of their own, in a row with padding."""
    model, features, t, expected = ti2v
    rng = np.random.default_rng(0)
    other = features_of(rng.normal(size=(3, 4, 6, 48)).astype(np.float32), [1, 1, 1], np.ones((2, 48), np.float32))
    shape = RowShape(num_tokens=80, num_text_tokens=40, num_slots=4, num_targets=40, context_mode=mode)
    row = pack([other, features, other], shape)
    timesteps = timestep_table(jnp.array([[0.2, t / 1000, 0.7, 0.0]]), row)
    out = jax.jit(model)(row.tokens, timesteps, row)
    target = patchify(expected[name], PATCH)[features.target_mask]
    assert relative_error(select_target_tokens(out, row, (0, 2)), target) <= 2e-5

  @pytest.mark.parametrize(
    "kind, mode",
    [
      ("ti2v", ZERO),
      ("i2v", UNIVID_CONTEXT),
      *(
        pytest.param(*case, marks=pytest.mark.long)
        for case in (("ti2v", UNIVID_CONTEXT), ("a14b", UNIVID_CONTEXT), ("a14b", ZERO), ("i2v", ZERO))
      ),
    ],
  )
  def test_packed_rows(self, ti2v, kind, mode):
    """Contexts I to IV, images and videos, 4 to 8 clips, all in one row: each sentence is as it is alone.

    The first is alone without padding too; the others in a row as long, for which nothing is compiled again.
    """
    if kind == "ti2v":
      model = ti2v[0]
    elif kind == "a14b":
      folder = GOLDENS22 / "tiny_wan22_a14b" / "high_noise_model"
      shape = DiTConfig.from_json(json.loads((folder / "config.json").read_text()) | {"text_dim": 48})
      model = load_dit(shape, read_tensors(folder))
    else:
      info, _, weights = golden("dit_i2v22", GOLDENS22)
      model = load_dit(dataclasses.replace(DiTConfig.from_json(info["config"]), image_dim=0), weights)
    config, rng = model.config, np.random.default_rng(0)

    def draw(lengths):
      latents = rng.normal(size=(sum(lengths), 4, 6, config.in_dim)).astype(np.float32)
      features = features_of(latents[..., : config.out_dim], lengths, rng.normal(size=(3, config.text_dim)))
      condition = patchify(latents[..., config.out_dim :], PATCH) if config.takes_condition else None
      return dataclasses.replace(features, condition=condition)

    sentences = [
      draw(lengths) for lengths in ([1, 1, 1, 1], [1, 2, 1, 2], [2, 1, 2, 1], [2, 2, 2, 2], [1] * 6, [2, 1] * 4)
    ]
    shape = RowShape(num_tokens=300, num_text_tokens=100, num_slots=8, num_targets=60, context_mode=mode)
    sigmas = jnp.linspace(0.1, 0.9, 8)[None]
    row = pack(sentences, shape)
    run = jax.jit(model)
    packed = run(row.tokens, timestep_table(sigmas, row), row)
    singles = [pack([features], shape) for features in sentences]
    for place, single in enumerate([*singles, pack_single(sentences[0], context_mode=mode)]):
      place %= len(sentences)
      alone = run(single.tokens, timestep_table(jnp.full((1, single.num_slots), sigmas[0, place]), single), single)
      targets = select_target_tokens(alone, single, (0, 1))
      assert relative_error(select_target_tokens(packed, row, (0, place + 1)), targets) <= 2e-5

  def test_i2v_has_no_image_features(self):
    info, io, weights = golden("dit_i2v22", GOLDENS22)
    config = dataclasses.replace(DiTConfig.from_json(info["config"]), image_dim=0)
    assert config.takes_condition and not config.takes_image_features
    features = features_of(channels_last(io["x"]), [3], io["context"])
    row = pack_single(features, context_mode=UNIVID_CONTEXT)
    row = dataclasses.replace(row, condition=patchify(channels_last(io["y"]), PATCH)[None])
    model = load_dit(config, weights)
    out = unpatchify(np.asarray(jax.jit(model)(row.tokens, io["t"][None], row))[0], (3, 4, 6), PATCH)
    assert relative_error(out, channels_last(io["out"])) <= 2e-5
    with pytest.raises(UserError, match="image_features must not be given to this i2v model"):
      row = dataclasses.replace(row, image_features=np.zeros((1, 257, 4), np.float32))
      jax.jit(model)(row.tokens, io["t"][None], row)


class TestContextMode:
  def test_defaults(self):
    of = ContextMode.from_options
    assert of(Attention.FULL, ContextTimestep.AUTO, default=ContextTimestep.TARGET) == UNIVID_CONTEXT
    assert of(Attention.FULL, ContextTimestep.AUTO, default=ContextTimestep.ZERO) == ZERO
    assert of(Attention.FULL, ContextTimestep.TARGET, default=ContextTimestep.ZERO) == UNIVID_CONTEXT
    causal = of(Attention.CONTEXT_CAUSAL, ContextTimestep.AUTO, default=ContextTimestep.TARGET)
    assert causal.causal and causal.zero_timestep
    assert {name: config.context_timestep for name, config in VARIANTS.items() if "2.2" in name} == {
      "wan2.2-ti2v-5b": "zero",
      "wan2.2-t2v-a14b": "target",
      "wan2.2-i2v-a14b": "target",
    }

  def test_causal_context_needs_timestep_zero(self):
    changes = {"model.attention": "context_causal", "model.context_timestep": "target"}
    with pytest.raises(
      UserError, match=r"context_timestep must be auto or zero with .* = context_causal, got 'target'"
    ):
      override(tiny(), changes)
    with pytest.raises(UserError, match="attention = context_causal needs context_timestep = zero"):
      univid_jax.load_pipeline("missing", attention="context_causal", context_timestep="target")
    with pytest.raises(UserError, match="context_timestep must be one of auto, target, zero, got 'null'"):
      override(tiny(), {"model.context_timestep": "null"})


@pytest.fixture(scope="module")
def release(tmp_path_factory):
  """The miniature TI2V, with the text encoder and tokenizer that it shares with Wan2.1's."""
  pytest.importorskip("torch", reason="the autoencoder is a PyTorch file; needs the extra `convert`")
  folder = tmp_path_factory.mktemp("release") / "ti2v"
  shutil.copytree(GOLDENS22 / "tiny_wan22_ti2v", folder)
  shutil.copy(GOLDENS / "tiny_wan" / "models_t5_umt5-xxl-enc-bf16.pth", folder)
  shutil.copytree(GOLDENS / "tiny_wan" / "google", folder / "google")
  return folder


@pytest.fixture(scope="module")
def checkpoint(release, tmp_path_factory):
  folder = tmp_path_factory.mktemp("converted") / "ti2v"
  convert_any(str(release), str(folder))
  return str(folder)


@pytest.fixture(scope="module")
def pipe(checkpoint):
  return univid_jax.load_pipeline(checkpoint, dtype="float32", mesh=one_device())


class TestTI2V:
  """The miniature TI2V as a release."""

  def test_converts_and_converts_back(self, release, checkpoint, tmp_path):
    assert "Wan" in inspect(str(release)) and "ti2v" in json.dumps(
      read_info(checkpoint).components["transformer"].config
    )
    convert_any(checkpoint, str(tmp_path / "back"), to="original")
    assert (tmp_path / "back" / "Wan2.2_VAE.pth").exists()
    before, after = read_tensors(release), open_tensors(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.infos.keys()
    assert all(after.read(name).tobytes() == value.tobytes() for name, value in before.items())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((release / "config.json").read_text())
    assert {key: original[key] for key in written if key in original}.items() <= written.items()
    convert_any(str(tmp_path / "back"), str(tmp_path / "again"))
    assert read_info(tmp_path / "again").components["transformer"].checksum == (
      read_info(checkpoint).components["transformer"].checksum
    )

  def test_without_config_json_the_latents_tell(self, release, tmp_path):
    (folder := tmp_path / "release").mkdir()
    for path in release.glob("diffusion_pytorch_model*"):
      shutil.copy(path, folder)
    config = json.loads((release / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"num_heads": config["num_heads"]}))
    convert_any(str(folder), str(tmp_path / "converted"))
    assert read_info(tmp_path / "converted").components["transformer"].config["model_type"] == ModelType.TI2V

  @pytest.mark.long
  def test_diffusers_agrees(self, checkpoint, tmp_path):
    pytest.importorskip("diffusers", reason="needs the extra `parity`")
    convert_any(checkpoint, str(tmp_path / "theirs"), to="diffusers")
    index = json.loads((tmp_path / "theirs" / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline" and index["expand_timesteps"] is True
    report, equal = verify(str(tmp_path / "theirs"), checkpoint)
    assert equal and report.count("error against PyTorch") == 3, report

  def test_the_autoencoder_of_another_release_is_refused(self, release, tmp_path):
    folder = shutil.copytree(release, tmp_path / "release")
    (folder / "Wan2.2_VAE.pth").unlink()
    shutil.copy(GOLDENS / "tiny_wan" / "Wan2.1_VAE.pth", folder)
    with pytest.raises(UserError, match="they do not belong together"):
      convert_any(str(folder), str(tmp_path / "converted"))

  def test_a_lora_of_another_base_is_refused(self, checkpoint):
    with pytest.raises(UserError, match="univid_lora"):
      univid_jax.load_pipeline(checkpoint, lora=str(GOLDENS / "tiny_wan" / "univid_lora.ckpt"), mesh=one_device())

  @pytest.mark.parametrize(
    "name, context_timestep",
    [
      ("context_zero", None),
      *(pytest.param(*case, marks=pytest.mark.long) for case in (("context_zero", "zero"), ("uniform", "target"))),
    ],
  )
  def test_whole_sampling_runs(self, checkpoint, pipe, name, context_timestep):
    info, io, _ = golden(f"sampling_ti2v_{name}", GOLDENS22)
    if context_timestep is not None:
      pipe = univid_jax.load_pipeline(checkpoint, dtype="float32", context_timestep=context_timestep, mesh=one_device())
    clips = [io[f"clip{i}"] for i in range(3)]
    for i, clip in enumerate(clips):
      assert relative_error(pipe.encode(clip), channels_last(io[f"latent{i}"])) <= 1e-4
    options = {"num_inference_steps": info["steps"], "shift": info["sigma_shift"], "prompt_embeds": io["context"]}
    out = pipe.sample(clips, latents=channels_last(io["noise"]), **options)
    assert relative_error(out.latents, channels_last(io["latent3"])) <= 1e-4
    assert relative_error(pipe.decode(out.latents), np.clip(np.moveaxis(io["target_video"], 0, -1), -1, 1)) <= 1e-3

  def test_velocity_with_a_timestep_for_each_latent_frame(self, pipe):
    info, io, _ = golden("dit_ti2v", GOLDENS22)
    latents, t = channels_last(io["x"]), float(io["t"][0])
    *context, target = info["clip_latent_frames"]
    timesteps = np.repeat([0.0, t], [sum(context), target])
    expected = {name: channels_last(io[f"out_{name}"]) for name in ("context_zero", "uniform")}
    out = pipe.predict_velocity(latents, timesteps, io["context"])
    assert relative_error(out, expected["context_zero"]) <= 2e-5
    assert relative_error(pipe.predict_velocity(latents, t, io["context"]), expected["uniform"]) <= 2e-5
    with pytest.raises(UserError, match="latents of this model have 48 channels, got 16"):
      pipe.predict_velocity(latents[..., :16], t, io["context"])
    with pytest.raises(UserError, match="one for each of the 6 latent frames, got 2"):
      pipe.predict_velocity(latents, np.array([0.0, t]), io["context"])

  @pytest.mark.long
  def test_batches_are_single_samples(self, pipe):
    _, io, _ = golden("sampling_ti2v_context_zero", GOLDENS22)
    clips = [io[f"clip{i}"] for i in range(3)]
    batch = pipe.sample_batch([clips, clips[:1], clips], num_inference_steps=2, seeds=[0, 1, 2])
    for clip, seed, sampled in zip((clips, clips[:1], clips), range(3), batch):
      assert relative_error(sampled.latents, pipe.sample(clip, num_inference_steps=2, seed=seed).latents) <= 1e-5

  @pytest.mark.parametrize("is_alone", [False, pytest.param(True, marks=pytest.mark.long)])
  def test_a_first_frame_stays(self, pipe, is_alone):
    """TI2V's image-to-video mode, in a sentence and alone: one step is one velocity."""
    _, io, _ = golden("sampling_ti2v_context_zero", GOLDENS22)
    clips, image = [io[f"clip{i}"] for i in range(3)], io["clip2"][3]
    start, rng = pipe.encode(image[None]), np.random.default_rng(0)
    noise = rng.normal(size=(3, *start.shape[1:])).astype(np.float32)
    context = [] if is_alone else clips
    out = pipe.sample(context, first_frame=image, num_frames=9, num_inference_steps=1, latents=noise)
    assert np.array_equal(out.latents[:1], start) and out.frames.shape == (9, *image.shape)
    latents = np.concatenate([*(pipe.encode(clip) for clip in context), start, noise[1:]])
    timesteps = np.where(np.arange(len(latents)) < len(latents) - 2, 0.0, 1000.0)
    velocity = pipe.predict_velocity(latents, timesteps, pipe.encode_prompt(""))
    assert relative_error(out.latents[1:], noise[1:] - velocity[-2:]) <= 1e-5
    with pytest.raises(UserError, match="num_frames must be more than 1"):
      pipe.sample(clips[:1], first_frame=image, num_inference_steps=1)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
  """The miniature A14B, converted, with the text encoder and tokenizer that it shares with Wan2.1's."""
  pytest.importorskip("torch", reason="the autoencoder is a PyTorch file; needs the extra `convert`")
  folder = tmp_path_factory.mktemp("release") / "a14b"
  shutil.copytree(GOLDENS22 / "tiny_wan22_a14b", folder)
  shutil.copy(GOLDENS / "tiny_wan" / "models_t5_umt5-xxl-enc-bf16.pth", folder)
  shutil.copytree(GOLDENS / "tiny_wan" / "google", folder / "google")
  convert_any(str(folder), str(folder.with_name("converted")))
  return folder, str(folder.with_name("converted"))


@pytest.fixture(scope="module")
def i2v_experts(tmp_path_factory):
  """A miniature I2V-A14B, converted: the original's transformer, and a low-noise expert with other weights."""
  pytest.importorskip("torch", reason="the autoencoder is a PyTorch file; needs the extra `convert`")
  info, _, weights = golden("dit_i2v22", GOLDENS22)
  folder = tmp_path_factory.mktemp("release") / "i2v"
  shutil.copytree(GOLDENS / "tiny_wan" / "google", folder / "google")
  for name in (
    GOLDENS22 / "tiny_wan22_a14b" / "Wan2.1_VAE.pth",
    GOLDENS / "tiny_wan" / "models_t5_umt5-xxl-enc-bf16.pth",
  ):
    shutil.copy(name, folder)
  for name, scale in (("high_noise_model", 1.0), ("low_noise_model", 1.1)):
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps({"_class_name": "WanModel", **info["config"]}))
    save_file({key: scale * x for key, x in weights.items()}, folder / name / "diffusion_pytorch_model.safetensors")
  convert_any(str(folder), str(folder.with_name("converted")))
  return str(folder.with_name("converted"))


class TestExperts:
  """The miniature A14B: a high-noise and a low-noise expert."""

  def test_both_convert_and_convert_back(self, experts, tmp_path):
    release, checkpoint = experts
    assert "Wan2.2 A14B, both experts" in inspect(checkpoint)
    convert_any(checkpoint, str(tmp_path / "back"), to="original")
    for name in ("high_noise_model", "low_noise_model"):
      before = open_tensors(release / name / "diffusion_pytorch_model.safetensors.index.json")
      after = open_tensors(tmp_path / "back" / name / "diffusion_pytorch_model.safetensors")
      assert before.infos.keys() == after.infos.keys()
      assert all(before.read(key).tobytes() == after.read(key).tobytes() for key in before.infos)
      assert (tmp_path / "back" / name / "config.json").exists()
    checksums = [read_info(checkpoint).components[name].checksum for name in ("transformer", "transformer_2")]
    assert len(set(checksums)) == 2

  @pytest.mark.long
  def test_diffusers_agrees(self, experts, tmp_path):
    pytest.importorskip("diffusers", reason="needs the extra `parity`")
    _, checkpoint = experts
    convert_any(checkpoint, str(tmp_path / "theirs"), to="diffusers")
    index = json.loads((tmp_path / "theirs" / "model_index.json").read_text())
    assert index["boundary_ratio"] == 0.875 and index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
    report, equal = verify(str(tmp_path / "theirs"), checkpoint)
    assert equal and report.count("error against PyTorch") == 4, report

  def test_experts_of_different_models_are_refused(self, experts, tmp_path):
    folder = shutil.copytree(experts[0], tmp_path / "release")
    config = json.loads((folder / "low_noise_model" / "config.json").read_text())
    (folder / "low_noise_model" / "config.json").write_text(json.dumps(config | {"eps": 1e-5}))
    with pytest.raises(UserError, match="has experts of different models"):
      convert_any(str(folder), str(tmp_path / "converted"))
    (folder / "low_noise_model").rename(folder / "high_noise_model_2")
    with pytest.raises(UserError, match="not one for high and one for low noise"):
      convert_any(str(folder), str(tmp_path / "converted"))

  def test_whole_sampling_runs(self, experts):
    """The switch at 0.875, guidance 4 above and 3 below it, with both experts on the devices and one at a time."""
    info, io, _ = golden("sampling_a14b", GOLDENS22)
    clips = [io[f"clip{i}"] for i in range(3)]
    options = {"num_inference_steps": info["steps"], "shift": info["sigma_shift"], "prompt_embeds": io["context"]}
    options |= {"negative_prompt_embeds": io["negative_context"], "latents": channels_last(io["noise"])}
    for offload in (False, True):
      pipe = univid_jax.load_pipeline(experts[1], dtype="float32", offload_inactive=offload, mesh=one_device())
      out = pipe.sample(clips, guidance_scale=(3.0, 4.0), **options)
      assert relative_error(out.latents, channels_last(io["latent3"])) <= 1e-4
    assert relative_error(pipe.decode(out.latents), np.clip(np.moveaxis(io["target_video"], 0, -1), -1, 1)) <= 1e-3
    swapped = pipe.sample(clips, guidance_scale=(4.0, 3.0), **options)
    assert relative_error(swapped.latents, out.latents) > 1e-3
    with pytest.raises(UserError, match="guidance_scale must be one number, or two for low and high noise, got 3"):
      pipe.sample(clips, guidance_scale=(3.0, 4.0, 5.0), **options)

  def test_configs_tell_what_experts_take(self, experts):
    shape = ModelShape.read(experts[1])
    shape.check_size((32, 48))
    with pytest.raises(UserError, match="the height must be a multiple of 16, got 40; the nearest are 32 and 48"):
      shape.check_size((40, 48))
    shape.check_guidance((3.0, 4.0))
    with pytest.raises(UserError, match="guidance_scale must be one number, or two for low and high noise, got 3"):
      shape.check_guidance((3.0, 4.0, 5.0))

  @pytest.mark.parametrize("kind", ["one sentence", pytest.param("a whole video", marks=pytest.mark.long)])
  def test_an_inactive_expert_leaves_the_devices_before_the_other_comes(self, experts, monkeypatch, kind):
    pipe = univid_jax.load_pipeline(experts[1], dtype="float32", offload_inactive=True, mesh=one_device())
    loaded, load = [], OffloadedParams.load

    def load_alone(params):
      assert all(reference() is None for reference in loaded)
      arrays = load(params)
      loaded.extend(map(weakref.ref, jax.tree.leaves(arrays)))
      return arrays

    monkeypatch.setattr(OffloadedParams, "load", load_alone)
    options = {"num_inference_steps": 2, "solver": "unipc", "shift": 5.0}
    assert [pipe.experts.find(sigma) for sigma in pipe.plan(**options).sigmas.tolist()] == [0, 1]
    clips = [np.full((5, 32, 48, 3), shade, np.uint8) for shade in (10, 100, 200)]
    if kind == "one sentence":
      pipe.sample(clips, **options)
    else:
      clips[2] = np.full((9, 32, 48, 3), 200, np.uint8)
      list(pipe.sample_video(clips[:2], clips[2], num_frames=5, **options))
    assert len(loaded) == 2 * len(jax.tree.leaves(pipe.experts.transformers[0].params.values))

  def test_the_largest_timestep_selects_the_expert(self, experts, tmp_path):
    release = experts[0]
    singles = {}
    for name in ("high", "low"):
      folder = tmp_path / f"{name}_noise_model"
      shutil.copytree(release / f"{name}_noise_model", folder)
      convert_any(str(folder), str(tmp_path / name))
      singles[name] = univid_jax.load_pipeline(str(tmp_path / name), dtype="float32", mesh=one_device())
    pipe = univid_jax.load_pipeline(experts[1], dtype="float32", mesh=one_device())
    rng = np.random.default_rng(0)
    latents, prompt = rng.normal(size=(2, 4, 6, 16)).astype(np.float32), np.ones((3, 48), np.float32)
    for timestep, name in ((900.0, "high"), (875.0, "high"), (874.0, "low"), (np.array([0.0, 880.0]), "high")):
      expected = singles[name].predict_velocity(latents, timestep, prompt)
      assert relative_error(pipe.predict_velocity(latents, timestep, prompt), expected) <= 1e-6

  @pytest.mark.parametrize(
    "name, expert",
    [
      ("wan22_high.safetensors", "high"),
      ("style_LOW_noise_rank_64.safetensors", "low"),
      ("HighNoise-style.safetensors", "high"),
      ("low_noise_model/adapter.safetensors", "low"),
      ("runs/high/lora.safetensors", "high"),
      ("style_low_rank_64_high.safetensors", "high"),
      ("my_low-rank_lora.safetensors", None),
      ("high_quality.safetensors", None),
      ("high_and_low.safetensors", None),
      ("slow_highway.safetensors", None),
    ],
  )
  def test_names_of_loras(self, name, expert):
    assert named_expert(f"/models/{name}") == expert

  def test_ti2v_is_no_expert(self, tmp_path):
    path = tmp_path / "low" / "Wan2.2-TI2V-5B-high" / "model.safetensors"
    assert find_expert(path, {}, VARIANTS["wan2.2-ti2v-5b"]) is None
    assert find_expert(path, {}, VARIANTS["wan2.1-i2v-14b-480p"]) is None
    assert find_expert(tmp_path / "model.safetensors", {}, VARIANTS["wan2.2-i2v-a14b"]) == "unknown"

  def test_one_expert_stays_what_it_is(self, experts, tmp_path):
    folder = shutil.copytree(experts[0] / "low_noise_model", tmp_path / "low_noise_model")
    convert_any(str(folder), str(tmp_path / "low"))
    for layout in ("original", "diffusers"):
      convert_any(str(tmp_path / "low"), str(tmp_path / layout), to=layout)
      convert_any(str(tmp_path / layout), str(tmp_path / f"{layout}_again"))
      assert read_info(tmp_path / f"{layout}_again").expert == "low"
    config = override(wan22_a14b(), {"init_from": str(tmp_path / "low"), "model.variant": ""})
    with pytest.raises(UserError, match=r"config.model.expert is high, but .* is the low-noise expert"):
      check_base(config)
    check_base(override(config, {"model.expert": "low"}))
    for config in (override(tiny(), {"model.expert": "low"}), wan_1_3b()):
      with pytest.raises(UserError, match=r"needs a base: set config.init_from to a folder"):
        check_base(config)

  @pytest.mark.parametrize("boundary, above", [(0.9, 0.9), (0.875, 0.875)])
  def test_the_boundary_belongs_to_high_noise(self, boundary, above):
    """Also if the noise level was rounded to float32, as solvers do."""
    transformer = Transformer(nnx.graphdef(nnx.Module()), {})
    model = Experts((transformer, transformer), boundary)
    assert model.find(above) == model.find(float(np.float32(above))) == 0
    assert model.find(float(np.nextafter(np.float32(above), np.float32(0)))) == 1
    assert model.guidance_scales(np.float64(3)) == model.guidance_scales(3) == (3.0, 3.0)
    assert model.guidance_scales((3, 4)) == (4.0, 3.0)

  @pytest.mark.parametrize("expert, expected", [("low", [0.25, 0.5]), ("high", [0.875, 0.9])])
  def test_validation_is_at_the_noise_levels_of_an_expert(self, monkeypatch, expert, expected):
    shape = mock.Mock(spec=DiTConfig, expert_boundary=0.875)
    monkeypatch.setattr(run_parts, "_transformer_config", lambda config, base: shape)
    changes = {"model.expert": expert, "validation.sigmas": (0.25, 0.5, 0.875, 0.9)}
    assert run_parts.validated_sigmas(override(tiny(), changes)) == expected

  def test_loras_belong_to_experts(self, experts, tmp_path):
    """By their metadata, by their name, or as asked; those of one expert leave the other as it was."""
    lora = GOLDENS / "tiny_wan" / "univid_lora.ckpt"
    for name in ("style_high_noise.ckpt", "style_low_noise.ckpt", "style.ckpt"):
      shutil.copy(lora, tmp_path / name)
    high, low, unnamed = (
      str(tmp_path / name) for name in ("style_high_noise.ckpt", "style_low_noise.ckpt", "style.ckpt")
    )

    def load(lora):
      return univid_jax.load_pipeline(
        experts[1], lora=lora, lora_skip_unmatched=True, dtype="float32", mesh=one_device()
      )

    rng = np.random.default_rng(0)
    latents, prompt = rng.normal(size=(2, 4, 6, 16)).astype(np.float32), np.ones((3, 48), np.float32)

    def velocities(pipe):
      return [pipe.predict_velocity(latents, timestep, prompt) for timestep in (900.0, 500.0)]

    plain = velocities(load(None))
    for specs, changed in (
      ([high], (True, False)),
      ([low], (False, True)),
      ([high, (low, 0.5)], (True, True)),
      ({"high": unnamed}, (True, False)),
      ({"low": high}, (False, True)),
      ({"both": unnamed}, (True, True)),
    ):
      for ours, base, differs in zip(velocities(load(specs)), plain, changed):
        assert (relative_error(ours, base) > 1e-4) == differs, specs
    with pytest.raises(UserError, match=r"nothing says whether .* is for the high-noise or the low-noise expert"):
      load(unnamed)
    with pytest.raises(UserError, match="LoRAs by expert have the keys high, low, both, got middle"):
      load({"middle": unnamed})

  def test_step_caching_starts_over_at_the_boundary(self, experts):
    """Residuals of one expert are not reused by the other, whose first steps are computed again."""
    io = golden("sampling_a14b", GOLDENS22)[1]
    clips = [io[f"clip{i}"] for i in range(3)]
    options = {"num_inference_steps": 8, "shift": 5.0, "prompt_embeds": io["context"]}
    pipe = univid_jax.load_pipeline(experts[1], dtype="float32", offload_inactive=True, mesh=one_device())
    measurement = RatioMeasurement()
    dense = pipe.sample(clips, step_cache=measurement, **options)
    chosen = [pipe.experts.find(sigma) for sigma in pipe.plan(8, shift=5.0).sigmas.tolist()]
    assert chosen == [0] * 4 + [1] * 4
    (ratios,) = measurement.table
    assert [i for i, ratio in enumerate(ratios) if ratio == 1] == [0, 4]
    cache = StepCache(ratios=[ratios], threshold=10, max_skip=10)
    plan = pipe.plan(8, shift=5.0, step_cache=cache)
    computed = plan.computed_steps(chosen, plan.guided_steps() & False)
    assert computed[0].tolist() == [True, False, False, False] * 2
    out = pipe.sample(clips, step_cache=cache, **options)
    assert 1e-4 < relative_error(out.latents, dense.latents) < 0.5

  def test_a_distillation_has_a_file_for_each_expert(self, experts):
    """They are sampled at the published noise levels, not with the shift of 12 that the base has."""
    lora = str(GOLDENS / "tiny_wan" / "univid_lora.ckpt")
    options = {"lora_skip_unmatched": True, "dtype": "float32", "mesh": one_device()}
    rng = np.random.default_rng(0)
    latents, prompt = rng.normal(size=(2, 4, 6, 16)).astype(np.float32), np.ones((3, 48), np.float32)
    pipe = univid_jax.load_pipeline(experts[1], accelerate=[f"high={lora}:0.5", f"low={lora}"], **options)
    same = univid_jax.load_pipeline(experts[1], {"high": (lora, 0.5), "low": lora}, **options)
    for timestep in (937.5, 625.0):
      ours, theirs = (each.predict_velocity(latents, timestep, prompt) for each in (pipe, same))
      assert np.array_equal(ours, theirs)
    assert pipe.plan().sigmas.tolist() == np.array([1, 0.9375, 5 / 6, 0.625], np.float32).tolist()
    assert len(same.plan().sigmas) == 50 and same.plan().sigmas[1] > 0.99


# A LoRA run of a few steps on a miniature base.
SMALL = {
  "log_every": 1,
  "model.variant": "",
  "model.dtype": "float32",
  "model.param_dtype": "float32",
  "data.bundled": True,
  "data.height": 32,
  "data.width": 32,
  "data.num_frames": 5,
  "data.num_sentences": 4,
  "data.num_threads": 1,
  "data.buckets": (),
  "data.num_clips.clips_6": 0.5,
  "rows.num_tokens": 48,
  "rows.num_sentences": 3,
  "rows.num_text_tokens": 1536,
  "validation.every_steps": 2,
  "validation.sentences": 2,
  "validation.previews": 0,
  "validation.num_inference_steps": 1,
  "checkpoint.every_steps": 2,
  "optimizer.learning_rate": 1e-2,
  "lora.rank": 2,
}


def is_zero(lora):
  """Whether a LoRA changes nothing: B starts as zero."""
  return all(not np.any(change.up) for change in lora.changes.values())


def predict(pipe, timestep):
  rng = np.random.default_rng(0)
  return pipe.predict_velocity(
    rng.normal(size=(2, 4, 6, 16)).astype(np.float32), timestep, np.ones((3, 48), np.float32)
  )


class TestTraining:
  @pytest.mark.long
  def test_ti2v(self, checkpoint, tmp_path):
    """Two steps, resumed for two more, equal four at once; the LoRA says how it was trained, and is used so."""
    config = override(wan22_ti2v_5b(), SMALL | {"init_from": checkpoint, "validation.previews": 1})
    assert context_mode(config) == ZERO
    for steps in (2, 4):
      resumed = train(override(config, {"num_steps": steps}), str(tmp_path / "resumed")).pipeline
    whole = train(override(config, {"num_steps": 4}), str(tmp_path / "whole")).pipeline
    jax.tree.map(np.testing.assert_array_equal, parameters(resumed), parameters(whole))
    usage = read_lora(str(tmp_path / "whole" / "lora.safetensors")).usage
    assert usage.context_timestep == "zero" and usage.expert is None
    _, io, _ = golden("sampling_ti2v_context_zero", GOLDENS22)
    clips, options = [io[f"clip{i}"] for i in range(3)], {"num_inference_steps": 2, "prompt_embeds": io["context"]}
    expected = whole.sample(clips, **options).latents
    load = functools.partial(univid_jax.load_pipeline, dtype="float32")
    for loaded in (
      load(str(tmp_path / "whole")),
      load(checkpoint, lora=str(tmp_path / "whole" / "lora.safetensors")),
      load(checkpoint, lora=str(tmp_path / "whole" / "lora.safetensors"), merge_lora=True),
    ):
      assert loaded.context_mode == ZERO
      assert relative_error(loaded.sample(clips, **options).latents, expected) <= 1e-5
    assert relative_error(load(checkpoint).sample(clips, **options).latents, expected) > 1e-4

  @pytest.mark.long
  def test_one_expert_trained_whole(self, experts, tmp_path):
    """The run's model has the other one from the base."""
    run, base = str(tmp_path / "run"), experts[1]
    changes = {"init_from": base, "num_steps": 1, "lora.rank": 0, "model.expert": "low", "eval.sentences_per_case": 0}
    train(override(wan22_a14b(), SMALL | changes), run)
    trained, base = (univid_jax.load_pipeline(path, dtype="float32").experts for path in (run, base))
    differs = [
      not all(map(np.array_equal, jax.tree.leaves(trained.load(i)), jax.tree.leaves(base.load(i)))) for i in (0, 1)
    ]
    assert differs == [False, True]

  @pytest.mark.long
  def test_experts(self, experts, tmp_path):
    """Each expert in a run of its own, at its own noise levels; together they are the model with two LoRAs."""
    config = override(wan22_a14b(), SMALL | {"init_from": experts[1], "num_steps": 2, "eval.sentences_per_case": 0})
    with pytest.raises(UserError, match=r"has two experts: set config.model.expert to both, or to high or low"):
      transformer_config(override(config, {"model.expert": "only"}))
    files, losses = {}, {}
    for expert in ("high", "low"):
      workdir = tmp_path / expert
      train(override(config, {"model.expert": expert}), str(workdir))
      files[expert] = str(workdir / f"lora_{expert}.safetensors")
      assert read_lora(files[expert]).usage.expert == expert
      line = (workdir / "metrics.jsonl").read_text().splitlines()[-1]
      losses[expert] = {name for name in json.loads(line) if name.startswith("val_loss/sigma")}
    assert losses == {
      "high": {"val_loss/sigma_0.9", "val_loss/sigma_0.95"},
      "low": {"val_loss/sigma_0.3", "val_loss/sigma_0.6"},
    }
    load = functools.partial(univid_jax.load_pipeline, dtype="float32")
    both, plain = load(experts[1], lora=list(files.values())), load(experts[1])
    rng = np.random.default_rng(0)
    latents, prompt = rng.normal(size=(2, 4, 6, 16)).astype(np.float32), np.ones((3, 48), np.float32)
    for timestep, expert, other in ((900.0, "high", "low"), (500.0, "low", "high")):
      expected = both.predict_velocity(latents, timestep, prompt)
      base = plain.predict_velocity(latents, timestep, prompt)
      assert relative_error(expected, base) > 1e-5
      trained, untrained = load(str(tmp_path / expert)), load(str(tmp_path / other))
      assert relative_error(trained.predict_velocity(latents, timestep, prompt), expected) <= 1e-6
      assert relative_error(untrained.predict_velocity(latents, timestep, prompt), base) <= 1e-6
    with pytest.raises(UserError, match=r"must have a noise level of the high-noise expert, from 0.875 to 1"):
      train(override(config, {"validation.sigmas": (0.5,)}), str(tmp_path / "none"))

  @pytest.mark.long
  @pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "context": 2}, {"tensor": 2, "context": 4}], ids=str)
  @pytest.mark.parametrize("kind", ["ti2v", "a14b", "i2v"])
  def test_meshes(self, checkpoint, experts, i2v_experts, kind, sizes):
    """Loss and gradients of a LoRA on packed rows are those of one device."""
    preset, base = {
      "ti2v": (wan22_ti2v_5b, checkpoint), "a14b": (wan22_a14b, experts[1]), "i2v": (wan22_i2v_a14b, i2v_experts)
    }[kind]  # fmt: skip
    config = override(preset(), SMALL | {"init_from": base, "rows.num_tokens": 64, "data.num_sentences": 24})
    config = split_config(config)[0]
    row = packed_batch(config)
    (loss, grads, _), (other_loss, other, _) = (
      one_gradient(config, mesh, row) for mesh in (make_mesh({}, devices=jax.devices()[:1]), make_mesh(sizes))
    )
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert np.linalg.norm(other - grads) <= 1e-5 * np.linalg.norm(grads)

  def test_experts_alternate(self):
    """Evenly, in proportion to the probability of their noise levels, and counted without taking the steps."""
    config = override(wan22_a14b(), {"flow.shift": 7.0})  # one half each
    assert config.model.expert == TrainedExpert.BOTH
    schedule = ExpertSchedule.from_config(config)
    high_steps = [bool(schedule.trains_high(jnp.int32(step))) for step in range(PERIOD + 4)]
    assert sum(high_steps[:PERIOD]) == schedule.num_high and abs(schedule.num_high - 500) <= 1
    assert schedule.count_steps(PERIOD + 3) == (
      sum(high_steps[: PERIOD + 3]),
      PERIOD + 3 - sum(high_steps[: PERIOD + 3]),
    )
    assert high_steps[:4] == [False, True, False, True]

  @pytest.mark.long
  def test_both_experts_in_one_run(self, experts, tmp_path):
    """A step trains one of them and leaves the other; the run resumes and exports two files."""
    changes = {"init_from": experts[1], "eval.sentences_per_case": 0, "flow.shift": 7.0}
    config = override(wan22_a14b(), SMALL | changes)
    for steps in (1, 4):
      train(override(config, {"num_steps": steps, "checkpoint.every_steps": 1}), str(tmp_path / "run"))
      loras = {lora.usage.expert: lora for lora in read_run_loras(tmp_path / "run")}
      if steps == 1:  # of the low-noise expert alone
        assert is_zero(loras["high"]) and not is_zero(loras["low"])
    whole = train(override(config, {"num_steps": 4}), str(tmp_path / "whole")).pipeline
    for resumed, other in zip(*(read_run_loras(tmp_path / name) for name in ("run", "whole")), strict=True):
      assert all(np.array_equal(change.up, other.changes[name].up) for name, change in resumed.changes.items())
    metrics = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {
      "val_loss/expert_high",
      "val_loss/expert_low",
      "val_loss/sigma_0.95",
      "val_loss/sigma_0.3",
    } <= metrics.keys()
    load = functools.partial(univid_jax.load_pipeline, dtype="float32")
    files = [str(tmp_path / "run" / f"lora_{expert}.safetensors") for expert in ("high", "low")]
    convert_any(str(tmp_path / "run"), str(tmp_path / "out.safetensors"), to="musubi")
    converted = [str(tmp_path / f"out_{expert}.safetensors") for expert in ("high", "low")]
    for pipe in (
      load(str(tmp_path / "run")),
      load(experts[1], lora=files),
      load(experts[1], lora=str(tmp_path / "run")),
      load(experts[1], lora=converted),
      load(experts[1], accelerate=str(tmp_path / "run")),
      load(experts[1], lora={"both": str(tmp_path / "run")}),
      load(experts[1], lora=dict.fromkeys(("high", "low"), str(tmp_path / "run"))),
    ):
      for timestep in (900.0, 500.0):
        expected = predict(whole, timestep)
        assert relative_error(predict(pipe, timestep), expected) <= 1e-6
        assert relative_error(predict(load(experts[1]), timestep), expected) > 1e-5
    with pytest.raises(UserError, match=r"config\.model\.expert is both, which trains LoRAs"):
      check_base(override(config, {"lora.rank": 0}))

  @pytest.mark.long
  def test_i2v(self, i2v_experts, tmp_path):
    """Both experts on rows with conditions: resumed runs are whole ones, and the condition of the target is used."""
    config = override(wan22_i2v_a14b(), SMALL | {"init_from": i2v_experts, "eval.sentences_per_case": 0})
    for steps in (2, 4):
      train(override(config, {"num_steps": steps}), str(tmp_path / "run"))
    train(override(config, {"num_steps": 4}), str(tmp_path / "whole"))
    for resumed, whole in zip(*(read_run_loras(tmp_path / name) for name in ("run", "whole")), strict=True):
      assert not is_zero(resumed)
      assert all(np.array_equal(change.up, whole.changes[name].up) for name, change in resumed.changes.items())
    resumed, whole = (
      [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
      for name in ("run", "whole")
    )
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
    pipe = univid_jax.load_pipeline(str(tmp_path / "run"), dtype="float32", mesh=one_device())
    image = np.full((32, 32, 3), 200, np.uint8)
    clip = np.zeros((5, 32, 32, 3), np.uint8)
    options = {"num_inference_steps": 2, "prompt_embeds": np.ones((3, 48), np.float32)}
    plain, begun = (pipe.sample([clip] * 3, **options, **more).latents for more in ({}, {"first_frame": image}))
    assert plain.shape == begun.shape == (2, 4, 4, 16) and relative_error(begun, plain) > 1e-3

  def test_resolution_shift_counts_pixels(self):
    """TI2V's autoencoder makes a quarter of the tokens: clips of one size have one shift with either."""
    one, other = (make_flow(override(config, {"flow.shift": 5.0})) for config in (wan_1_3b(), wan22_ti2v_5b()))
    one, other = (dataclasses.replace(flow, objective=Objective.RESOLUTION_SHIFT) for flow in (one, other))
    sigmas = [
      flow.sample(jax.random.key(0), jnp.full((9,), float(tokens)))[0] for flow, tokens in ((one, 7800), (other, 1950))
    ]
    assert np.array_equal(*sigmas)
    assert np.allclose(
      sigmas[0], dataclasses.replace(one, objective=Objective.UNIVID).sample(jax.random.key(0), jnp.ones(9))[0]
    )

  @pytest.mark.parametrize("objective", Objective)
  @pytest.mark.parametrize("stratified", [False, True])
  def test_noise_levels_of_an_expert(self, objective, stratified):
    """They are those of the whole range, restricted: in the range, and with the same quantiles."""
    flow = FlowMatching(shift=3.0, stratified=stratified, objective=objective)
    counts = jnp.full((20_000,), 100.0)
    whole = np.asarray(flow.sample(jax.random.key(0), counts)[0])
    for low, high in ((0.0, 0.6), (0.6, math.inf)):
      part = np.asarray(dataclasses.replace(flow, noise_range=(low, high)).sample(jax.random.key(1), counts)[0])
      assert part.min() >= low - 2e-3 and part.max() < high + 1e-6
      inside = whole[(whole >= low) & (whole < high)]
      quantiles = np.linspace(0.05, 0.95, 10)
      assert np.allclose(np.quantile(part, quantiles), np.quantile(inside, quantiles), atol=0.02)

  @pytest.mark.long
  @pytest.mark.parametrize("kind", ["ti2v", "high", "low"])
  def test_diffusers_loads_the_lora(self, checkpoint, experts, tmp_path, kind):
    """File by file the same velocity, also in the transformer of the low-noise expert."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason="needs the extra `parity`")
    pytest.importorskip("peft", reason="needs the extra `parity`")
    source = checkpoint if kind == "ti2v" else experts[1]
    preset = wan22_ti2v_5b() if kind == "ti2v" else wan22_a14b()
    expert = "only" if kind == "ti2v" else kind
    changes = {"init_from": source, "num_steps": 1, "model.expert": expert, "validation.every_steps": 0}
    train(override(preset, SMALL | changes), str(tmp_path / "run"))
    name = "lora.safetensors" if kind == "ti2v" else f"lora_{kind}.safetensors"
    convert_any(source, str(tmp_path / "theirs"), to="diffusers")
    component = "transformer_2" if kind == "low" else "transformer"
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "theirs" / component).eval()
    theirs.load_lora_adapter(_with_prefix(tmp_path / "run" / name), prefix="transformer")
    assert any("lora_" in name for name, _ in theirs.named_parameters())
    ours = univid_jax.load_pipeline(source, lora=str(tmp_path / "run" / name), dtype="float32", mesh=one_device())
    rng = np.random.default_rng(0)
    channels = theirs.config.in_channels
    latents, prompt = (
      rng.normal(size=(2, 4, 6, channels)).astype(np.float32),
      rng.normal(size=(3, 48)).astype(np.float32),
    )
    timestep = 900.0 if kind == "high" else 500.0
    padded = np.pad(prompt, [(0, 509), (0, 0)])
    with torch.no_grad():
      out = theirs(
        torch.from_numpy(np.moveaxis(latents, -1, 0)[None]),
        torch.tensor([timestep]),
        torch.from_numpy(padded[None]),
        return_dict=False,
      )[0]
    found = ours.predict_velocity(latents, timestep, prompt)
    assert relative_error(found, np.moveaxis(out[0].numpy(), 0, -1)) <= 2e-5


def _with_prefix(path):
  """Returns the tensors of a LoRA file of ours by diffusers' names."""
  safetensors_torch = pytest.importorskip("safetensors.torch")
  folder = path.with_suffix("")
  convert_any(str(path), str(folder.with_name("theirs.safetensors")), to="diffusers")
  return safetensors_torch.load_file(folder.with_name("theirs.safetensors"))


@pytest.mark.long
def test_both_experts_train_on_a_quantised_base(experts, tmp_path):
  """Converted quantised: the same run as quantised while it is loaded, and each expert has its own LoRA."""
  stored = str(tmp_path / "stored")
  convert_any(str(experts[0]), stored, quantize="int8")
  options = SMALL | {"model.expert": "both", "num_steps": 2, "eval.sentences_per_case": 0, "validation.every_steps": 0}
  losses = {}
  for name, changes in (
    ("stored", {"init_from": stored}),
    ("loaded", {"init_from": experts[1], "base.quantize": "int8"}),
  ):
    pipe = train(override(wan22_a14b(), options | changes), str(tmp_path / name)).pipeline
    assert pipe.experts.quantize == "int8" and len(pipe.experts.transformers) == 2
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    losses[name] = [json.loads(line)["loss"] for line in lines]
    assert json.loads((tmp_path / name / "config.json").read_text())["base_options"]["quantize"] == "int8"
  assert losses["stored"] == losses["loaded"]
