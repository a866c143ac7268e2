"""The miniature release, converted, opened and sampled from: all as the reference has it."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import univid_jax
from tests.helpers import GOLDENS, channels_last, golden, package_or_skip, parameters, relative_error
from tests.typecheck import unchecked
from univid_jax.checkpoints.run_parts import open_encoders, transformer_config
from univid_jax.config.boundary import override
from univid_jax.config.presets import wan_1_3b
from univid_jax.convert.commands import convert_any
from univid_jax.convert.export import write_tensors
from univid_jax.convert.layout import make_fills
from univid_jax.convert.release_configs import official_config
from univid_jax.core.conditions import i2v_condition
from univid_jax.core.errors import UserError
from univid_jax.core.options import ModelType
from univid_jax.core.sentence import read_frames
from univid_jax.data.features import FeatureMaker
from univid_jax.data.rows.tokens import patchify
from univid_jax.data.sources.open import open_data
from univid_jax.inference.partial import PartialPipeline
from univid_jax.models.variants import DiTConfig
from univid_jax.parallel.mesh import make_mesh
from univid_jax.training.loop import train

EXPECTED = GOLDENS / "tiny_wan_expected"
LORA = str(GOLDENS / "tiny_wan" / "univid_lora.ckpt")
INFO = json.loads((EXPECTED / "expected.json").read_text())
TENSORS = load_file(EXPECTED / "expected.safetensors")
CLIPS = [TENSORS[f"clip{i}"] for i in range(3)]

package_or_skip("torch", reason="the autoencoder of the release is a PyTorch file; needs the extra `convert`")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """The converted release."""
  folder = tmp_path_factory.mktemp("converted") / "tiny_wan"
  convert_any(str(GOLDENS / "tiny_wan"), str(folder))
  return str(folder)


def one_device():
  return make_mesh({}, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def pipe(checkpoint):
  return univid_jax.load_pipeline(checkpoint, dtype="float32", mesh=one_device())


def test_without_a_transformer_its_parts_are_errors(pipe):
  partial = PartialPipeline(pipe.encoders, mesh=pipe.mesh, reason="there is no transformer")
  lacking = vars(pipe).keys() - vars(partial).keys()
  assert {"config", "experts", "features"} <= lacking
  for name in lacking:
    with pytest.raises(UserError, match="there is no transformer"):
      getattr(partial, name)


def sample(pipe, **options):
  return pipe.sample(
    CLIPS,
    prompt=INFO["prompts"][0],
    num_inference_steps=INFO["steps"],
    latents=channels_last(TENSORS["noise"]),
    **options,
  )


@pytest.mark.parametrize("number", range(4))
def test_prompts(pipe, number):
  prompt, expected = INFO["prompts"][number], TENSORS[f"prompt{number}.embedding"]
  assert np.array_equal(pipe.tokenize(prompt), TENSORS[f"prompt{number}.ids"])
  embedding = pipe.encode_prompt(prompt)
  assert embedding.shape == (512, 48) and embedding.dtype == np.float32
  assert relative_error(embedding[: len(expected)], expected) <= 2e-5
  assert not embedding[len(expected) :].any()


def test_sampling(pipe):
  out = sample(pipe)
  assert relative_error(out.latents, channels_last(TENSORS["base.latent"])) <= 1e-4
  video = np.moveaxis(TENSORS["base.video"], 0, -1)
  assert relative_error(pipe.decode(out.latents), video) <= 1e-3
  assert np.abs(out.frames.astype(float) - (video + 1) * 127.5).max() <= 0.6


@pytest.mark.parametrize("merged", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize(
  "lora",
  [
    pytest.param(LORA, marks=pytest.mark.long, id="whole"),
    pytest.param([(LORA, 0.75), (LORA, 0.25)], id="in two parts"),
  ],
)
def test_sampling_with_a_lora(checkpoint, lora, merged):
  pipe = univid_jax.load_pipeline(checkpoint, lora=lora, dtype="float32", merge_lora=merged, mesh=one_device())
  out = sample(pipe)
  assert relative_error(out.latents, channels_last(TENSORS["lora.latent"])) <= 1e-4
  assert relative_error(out.latents, channels_last(TENSORS["base.latent"])) > 1e-2
  assert relative_error(pipe.decode(out.latents), np.moveaxis(TENSORS["lora.video"], 0, -1)) <= 1e-3


@pytest.mark.long
def test_eight_devices_are_one(checkpoint, pipe):
  """Parameters, adapters and the text encoder spread over a mesh: the same picture."""
  spread = univid_jax.load_pipeline(checkpoint, lora=LORA, dtype="float32", mesh=make_mesh({"fsdp": 4, "tensor": 2}))
  one = univid_jax.load_pipeline(checkpoint, lora=LORA, dtype="float32", mesh=one_device())
  assert relative_error(spread.encode_prompt("a b c"), pipe.encode_prompt("a b c")) <= 1e-5
  latents = [sample(each).latents for each in (spread, one)]
  assert relative_error(*latents) <= 1e-5


def test_guidance_and_given_embeddings(pipe):
  """The negative prompt is the null prompt; padded embeddings are the prompt itself."""
  given = pipe.encode_prompt(INFO["prompts"][0])
  out = pipe.sample(CLIPS, prompt_embeds=given, num_inference_steps=2, guidance_scale=3.0, seed=3)
  same = pipe.sample(
    CLIPS, prompt=INFO["prompts"][0], negative_prompt="", num_inference_steps=2, guidance_scale=3.0, seed=3
  )
  plain = pipe.sample(CLIPS, prompt=INFO["prompts"][0], num_inference_steps=2, seed=3)
  assert relative_error(out.latents, same.latents) <= 1e-5
  assert relative_error(plain.latents, same.latents) > 1e-2


@pytest.mark.parametrize("name", [pytest.param("sampling_video", marks=pytest.mark.long), "sampling_mixed"])
def test_whole_sampling_runs(name, tmp_path):
  """Contexts I and III, from pixels to pixels, through a checkpoint folder."""
  info, io, weights = golden(name)
  dit = info["dit"]
  config = DiTConfig(
    dim=dit["dim"],
    ffn_dim=dit["ffn"],
    num_heads=dit["heads"],
    num_layers=dit["layers"],
    freq_dim=dit["freq"],
    text_dim=dit["text"],
  )
  release = tmp_path / "release"
  release.mkdir()
  for part, file in (("dit.", "diffusion_pytorch_model.safetensors"), ("vae.", "Wan2.1_VAE.safetensors")):
    write_tensors(
      release / file, {key.removeprefix(part): value for key, value in weights.items() if key.startswith(part)}
    )
  (release / "config.json").write_text(json.dumps(official_config(config)))
  convert_any(str(release), str(tmp_path / "checkpoint"))
  pipe = univid_jax.load_pipeline(str(tmp_path / "checkpoint"), dtype="float32", mesh=one_device())
  clips = [io[f"clip{i}"] for i in range(3)]
  for i, clip in enumerate(clips):
    assert relative_error(pipe.encode(clip), channels_last(io[f"latent{i}"])) <= 1e-4
  out = pipe.sample(
    clips, num_inference_steps=info["steps"], latents=channels_last(io["noise"]), prompt_embeds=io["context"]
  )
  assert relative_error(out.latents, channels_last(io["latent3"])) <= 1e-4
  assert relative_error(pipe.decode(out.latents), np.clip(np.moveaxis(io["target_video"], 0, -1), -1, 1)) <= 1e-3
  with pytest.raises(ValueError, match="has no tokenizer"):
    pipe.encode_prompt("a")


def test_i2v_condition(pipe):
  image = np.random.default_rng(0).uniform(-1, 1, (32, 48, 3)).astype(np.float32)
  condition = i2v_condition(pipe.encoders.codec, image, 3)
  assert condition.shape == (3, 4, 6, 20)
  assert (condition[0, ..., :4] == 1).all() and not condition[1:, ..., :4].any()
  frames = np.concatenate([image[None], np.zeros((8, 32, 48, 3), np.float32)])
  assert np.array_equal(condition[..., 4:], pipe.encode(frames))


@pytest.fixture(scope="module")
def i2v_checkpoint(tmp_path_factory):
  """A miniature I2V release with random weights, converted."""
  torch = pytest.importorskip("torch")
  tmp_path = tmp_path_factory.mktemp("i2v")
  release = tmp_path / "release"
  shutil.copytree(GOLDENS / "tiny_wan", release)
  config = DiTConfig(
    dim=32,
    ffn_dim=48,
    num_heads=2,
    num_layers=2,
    freq_dim=16,
    text_dim=48,
    model_type=ModelType.I2V,
    in_dim=36,
    image_dim=48,
  )
  rng = np.random.default_rng(0)
  write_tensors(
    release / "diffusion_pytorch_model.safetensors",
    {
      name: 0.2 * rng.standard_normal(fill.original_shape, np.float32)
      for fill in make_fills("transformer", config)
      for name in fill.names
    },
  )
  (release / "config.json").write_text(json.dumps(official_config(config)))
  tower = load_file(GOLDENS / "clip_vision.weights.safetensors")
  torch.save({f"visual.{name}": torch.from_numpy(value) for name, value in tower.items()}, release / "models_clip.pth")
  convert_any(str(release), str(tmp_path / "checkpoint"))
  return str(tmp_path / "checkpoint")


@pytest.mark.long
def test_i2v_trains(i2v_checkpoint, tmp_path):
  """Two steps of LoRA on packed rows, whose conditions are those of sampling; the result samples."""
  config = override(
    wan_1_3b(),
    {
      "init_from": i2v_checkpoint,
      "num_steps": 2,
      "log_every": 1,
      "model.variant": "",
      "model.dtype": "float32",
      "model.param_dtype": "float32",
      "data.bundled": True,
      "data.height": 16,
      "data.width": 16,
      "data.num_frames": 5,
      "data.num_sentences": 4,
      "data.num_threads": 1,
      "rows.num_tokens": 24,
      "rows.num_sentences": 3,
      "rows.num_text_tokens": 1536,
      "validation.sentences": 3,
      "validation.previews": 1,
      "validation.num_inference_steps": 1,
      "lora.rank": 2,
    },
  )
  encoders, data = open_encoders(config, one_device()), open_data(config)
  make_features = FeatureMaker(encoders, shape=transformer_config(config), task_names=data.task_names)
  features = make_features(sentence := data.sources["computed"][0])
  first = read_frames(sentence.clips[0])[0].astype(np.float32) / 127.5 - 1
  total = sum(len(encoders.codec.encode(read_frames(clip).astype(np.float32) / 127.5 - 1)) for clip in sentence.clips)
  assert relative_error(features.condition, patchify(i2v_condition(encoders.codec, first, total), (1, 2, 2))) <= 1e-6
  assert relative_error(features.image_features, encoders.embed_image(first)) <= 1e-6
  result = train(config, str(tmp_path))
  out = result.pipeline.sample([np.zeros((1, 16, 16, 3), np.uint8)] * 3, prompt="a", num_inference_steps=1)
  assert np.isfinite(out.latents).all()
  # The workdir and the exported file are the same LoRA.
  by_workdir, by_file = (
    univid_jax.load_pipeline(i2v_checkpoint, lora=path, dtype="float32", mesh=one_device())
    for path in (tmp_path, tmp_path / "lora.safetensors")
  )
  for pipe in (by_workdir, by_file):
    jax.tree.map(np.testing.assert_array_equal, parameters(pipe), parameters(result.pipeline))


def test_i2v(i2v_checkpoint):
  """An I2V model sees the first frame of A by its image tower and as latents; one step of sampling is one velocity."""
  pipe = univid_jax.load_pipeline(i2v_checkpoint, dtype="float32", mesh=one_device())
  noise, prompt = channels_last(TENSORS["noise"]), pipe.encode_prompt("a")
  out = pipe.sample(CLIPS, prompt="a", num_inference_steps=1, latents=noise)
  latents = np.concatenate([*(pipe.encode(clip) for clip in CLIPS), noise])
  first = CLIPS[0][0].astype(np.float32) / 127.5 - 1
  features = pipe.encoders.embed_image(first)
  condition = i2v_condition(pipe.encoders.codec, first, len(latents))
  velocity = pipe.predict_velocity(latents, 1000.0, prompt, condition=condition, clip_features=features)
  assert features.shape == (5, 48) and relative_error(out.latents, noise - velocity[-2:]) <= 1e-5
  other = pipe.predict_velocity(
    latents, 1000.0, prompt, condition=condition, clip_features=np.roll(features, 1, axis=1)
  )
  assert relative_error(other, velocity) > 1e-4
  with pytest.raises(ValueError, match="must be given to this i2v model"):
    pipe.predict_velocity(latents, 1000.0, prompt)


class TestBadInput:
  def test_no_checkpoint(self, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a converted checkpoint"):
      univid_jax.load_pipeline(str(tmp_path))

  def test_no_lora(self, checkpoint):
    with pytest.raises(FileNotFoundError, match="no such file"):
      univid_jax.load_pipeline(checkpoint, lora="nowhere.safetensors")

  def test_damaged_weights(self, checkpoint, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    chunk = damaged / "transformer" / "blocks.ffn.up.kernel" / "1.0.0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    name = r"is damaged: transformer/blocks\.ffn\.up\.kernel/1\.0\.0"
    with pytest.raises(ValueError, match=rf"{name} \(checksum differs\)"):
      univid_jax.load_pipeline(str(damaged))
    with pytest.raises(ValueError, match="cannot read the weights in"):
      univid_jax.load_pipeline(str(damaged), verify_weights=False)
    chunk.unlink()
    with pytest.raises(ValueError, match=rf"{name} \(missing, but has a checksum\)"):
      univid_jax.load_pipeline(str(damaged))
    with pytest.raises(ValueError, match=r"has \d+ files instead of \d+"):
      univid_jax.load_pipeline(str(damaged), verify_weights=False)

  def test_sizes(self, pipe):
    with pytest.raises(ValueError, match="multiple of 16, got 40; the nearest are 32 and 48"):
      pipe.sample([np.zeros((1, 40, 48, 3), np.uint8)] * 3, prompt_embeds=np.zeros((1, 48)))
    with pytest.raises(ValueError, match="odd number"):
      pipe.sample(CLIPS[:2])

  @pytest.mark.parametrize(
    "clip, found",
    [
      (np.zeros((1, 32, 48, 3), np.float32), r"got float32 \(1, 32, 48, 3\)"),
      (np.zeros((32, 48, 3), np.uint8), r"got uint8 \(32, 48, 3\)"),
      ("a.png", "got str"),
    ],
  )
  def test_clips_are_frames(self, pipe, clip, found):
    """Numbers from 0 to 1 would be taken for grey pictures otherwise."""
    with unchecked(), pytest.raises(ValueError, match=found):
      pipe.sample([clip] * 3)
    with unchecked(), pytest.raises(ValueError, match=found):
      pipe.sample_video([clip] * 2, np.zeros((33, 32, 48, 3), np.uint8))


def test_the_package_shows_its_public_names_alone():
  names = {name for name in dir(univid_jax) if not name.startswith("__")}
  assert names == {"Pipeline", "RunConfig", "load_pipeline", "read_clip", "write_clip"}


def test_a_pipeline_says_what_it_is(checkpoint):
  shown = repr(univid_jax.load_pipeline(str(checkpoint)))
  assert shown.startswith("<Pipeline: ") and " layers of " in shown and shown.endswith(" attention>")
