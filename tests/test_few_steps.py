"""Few steps: the published noise levels of step-distilled models, given noise levels, and distillation LoRAs."""

import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import univid_jax
from tests.helpers import random_pipeline, relative_error
from univid_jax.checkpoints.lora.formats import write_lora
from univid_jax.checkpoints.lora.kinds import Difference, LoRALayer
from univid_jax.checkpoints.lora.weights import LoRAWeights
from univid_jax.checkpoints.origin import Origin
from univid_jax.checkpoints.run_parts import transformer_config
from univid_jax.config.boundary import override
from univid_jax.core.errors import UserError
from univid_jax.data.sources.open import open_data
from univid_jax.diffusion.distillations import DISTILLATIONS, infer_distillation
from univid_jax.diffusion.flow import FlowMatching
from univid_jax.diffusion.solvers import SOLVERS
from univid_jax.evaluation.run import evaluate
from univid_jax.inference.distillation_loras import add_distillation, read_distillation, split_distillation
from univid_jax.inference.experts import Experts, Transformer
from univid_jax.inference.plan import SamplingOptions, SamplingPlan
from univid_jax.parallel.mesh import make_mesh
from univid_jax.training.loop import train

CASES = Path(__file__).parent / "cases" / "lora"
PUBLISHED = [1000, 750, 500, 250]  # denoising_step_list of LightX2V's step-distilled models


@pytest.mark.parametrize("shift", [5.0, 12.0, 1.0])
def test_distilled_sigmas_are_the_published_arithmetic(shift):
  """The grid from 1 to 0 in 1,000 steps, shifted, at the places 1000 - 1000, 1000 - 750 and so on."""
  ours = SOLVERS["distilled"].sigmas(FlowMatching(shift=shift), 4)
  assert ours.dtype == np.float32
  exact = [shift * u / (1 + (shift - 1) * u) for u in (1 - (1000 - place) / 1000 for place in PUBLISHED)]
  assert np.abs(ours - exact).max() <= 1e-7
  # The release computes the grid in float32, which is as exact as that.
  grid = np.linspace(1, 0, 1001, dtype=np.float32)[:-1]
  grid = np.float32(shift) * grid / (1 + (np.float32(shift) - 1) * grid)
  assert np.abs(ours - grid[[1000 - place for place in PUBLISHED]]).max() <= 1e-7
  if shift == 5:
    assert ours.tolist() == np.array([1, 0.9375, 5 / 6, 0.625], np.float32).tolist()


@pytest.mark.parametrize("boundary", [0.875, 0.9])
def test_two_of_the_four_steps_are_of_each_expert(boundary):
  """As the release has it (boundary_step_index 2), by the noise level as always."""
  experts = Experts([Transformer(nnx.graphdef(nnx.Module()), {})] * 2, boundary)
  sigmas = SOLVERS["distilled"].sigmas(FlowMatching(), 4).tolist()
  assert [experts.find(sigma) for sigma in sigmas] == [0, 0, 1, 1]


@pytest.mark.parametrize(
  "options, message",
  [
    ({"sigmas": [1, 0.5, 0.5]}, "descend strictly"),
    ({"sigmas": [0.5, 0.0]}, "descend strictly"),
    ({"sigmas": [1.5, 0.5]}, "descend strictly"),
    ({"sigmas": [0.5, float("nan")]}, "descend strictly"),
    ({"sigmas": [1, 0.5], "solver": "unipc"}, "given to Euler's steps only"),
    ({"sigmas": [1, 0.5], "num_inference_steps": 2}, "sigmas replace num_inference_steps"),
    ({"sigmas": [1, 0.5], "shift": 3.0}, "sigmas replace shift"),
    ({"sigmas": [1, 0.5], "solver": "distilled"}, "given to Euler's steps only"),
    ({"solver": "distilled", "num_inference_steps": 8}, "distilled takes 4 steps, got 8"),
  ],
)
def test_contradictions_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    SamplingPlan.from_options(SamplingOptions(**options))


@pytest.mark.parametrize(
  "name, value",
  [
    ("num_inference_steps", 50),
    ("guidance_scale", 5.0),
    ("solver", "unipc"),
    ("sigmas", [1.0, 0.5]),
    ("guidance_scale", (1.0, 2.0)),
  ],
)
def test_what_contradicts_a_distillation_is_refused(name, value):
  kind = DISTILLATIONS["lightx2v"]
  with pytest.raises(UserError, match=f"{name} contradicts the distillation lightx2v, which has"):
    SamplingPlan.from_options(SamplingOptions(**{name: value}), kind)
  same = SamplingOptions(num_inference_steps=4, solver="distilled", guidance_scale=[1.0])
  plan = SamplingPlan.from_options(same, kind, default_shift=12.0)
  alone = SamplingPlan.from_options(SamplingOptions(solver="distilled"))
  assert plan.sigmas.tolist() == alone.sigmas.tolist() and plan.guidance_scale == 1


@pytest.mark.parametrize(
  "name, kind",
  [
    ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors", "lightx2v"),
    ("Wan2.2-Lightning_T2V-v1.1-A14B-4steps-lora_HIGH_fp16.safetensors", "lightning"),
    ("some_lora.safetensors", "lightx2v"),
    ("wan2.2_lightning_by_lightx2v.safetensors", "lightx2v"),  # both are sampled alike
    ("Wan21_CausVid_14B_T2V_lora_rank32.safetensors", None),
    ("FastWan_T2V_14B_lora.safetensors", None),
  ],
)
def test_kinds_are_inferred_from_names(name, kind):
  if kind is None:
    with pytest.raises(UserError, match=r"which is sampled in another way: .* PATH:KIND"):
      infer_distillation(name, [name])
  else:
    assert infer_distillation(name, [name]) == DISTILLATIONS[kind]


def test_the_parts_of_a_distillation(tmp_path):
  (tmp_path / "a:b").touch()
  (tmp_path / "a:0.5").touch()
  for text, expected in {
    "x.pt": ("x.pt", 1.0, ""),
    "x.pt:0.5": ("x.pt", 0.5, ""),
    "x.pt:lightning": ("x.pt", 1.0, "lightning"),
    "x.pt:0.5:lightning": ("x.pt", 0.5, "lightning"),
    "gs://bucket/x": ("gs://bucket/x", 1.0, ""),
    f"{tmp_path}/a:b": (f"{tmp_path}/a:b", 1.0, ""),
    f"{tmp_path}/a:0.5": (f"{tmp_path}/a:0.5", 1.0, ""),
    "x.pt:0.5:0.7": ("x.pt:0.5", 0.7, ""),
  }.items():
    assert split_distillation(text) == expected
  distill = str(CASES / "distill_diff.safetensors")
  with pytest.raises(UserError, match="unknown kind of distillation 'magic'; there are lightx2v, lightning"):
    read_distillation(f"{distill}:magic")
  with pytest.raises(UserError, match="must be of one kind, got lightning, lightx2v"):
    read_distillation([f"{distill}:lightning", f"{distill}:lightx2v"])


def test_given_sigmas_are_those_of_the_schedule(tiny_config):
  pipe = random_pipeline(tiny_config, make_mesh({}, devices=jax.devices()[:1]))
  clips = [np.full((1, 16, 16, 3), value, np.uint8) for value in (10, 100, 200)]
  levels = pipe.plan(3).sigmas
  expected = pipe.sample(clips, num_inference_steps=3)
  assert np.array_equal(pipe.sample(clips, sigmas=levels.tolist()).latents, expected.latents)
  distilled = pipe.sample(clips, solver="distilled")
  assert relative_error(distilled.latents, pipe.sample(clips, num_inference_steps=4).latents) <= 1e-6


class TestDistillations:
  """On the miniature release, with a distillation LoRA that also changes norms and biases."""

  def load(self, checkpoint, lora=(), **options):
    mesh = make_mesh({}, devices=jax.devices()[:1])
    return univid_jax.load_pipeline(checkpoint, list(lora), dtype="float32", mesh=mesh, **options)

  def velocity(self, pipe):
    rng = np.random.default_rng(0)
    latents, prompt = rng.normal(size=(2, 4, 6, 16)).astype(np.float32), np.ones((3, 48), np.float32)
    return pipe.predict_velocity(latents, 700.0, prompt)

  def test_one_is_a_lora_next_to_the_others(self, checkpoint, caplog):
    """Loaded with the model or added later, next to LoRAs of every kind."""
    task = [(str(CASES / "dora.safetensors"), 0.8), (str(CASES / "loha.safetensors"), 1.0)]
    distill = str(CASES / "distill_diff.safetensors")
    expected = self.velocity(self.load(checkpoint, [*task, (distill, 0.5)]))
    with caplog.at_level(logging.INFO, "univid_jax"):
      loaded = self.load(checkpoint, task, accelerate=f"{distill}:0.5:lightning")
    assert "distillation lightning: solver distilled, 4 steps, shift 5, guidance scale 1" in caplog.messages
    assert np.array_equal(self.velocity(loaded), expected) and loaded.plan().sigmas[1] == 0.9375
    plain = self.load(checkpoint, task)
    before = self.velocity(plain)
    added = add_distillation(plain, read_distillation(f"{distill}:0.5"))
    assert relative_error(self.velocity(added), expected) <= 1e-6
    ours, theirs = (pipe.experts.load(0)["blocks"]["ffn"]["up"]["kernel"] for pipe in (added, plain))
    assert ours is theirs, "the base is shared"
    assert np.array_equal(self.velocity(plain), before) and plain.distillation is None
    assert relative_error(before, expected) > 1e-3

  def test_the_origin_of_samples_names_them(self, checkpoint):
    distill = str(CASES / "distill_diff.safetensors")
    origins = [Origin.resolve(checkpoint, distillation=files) for files in (None, [(distill, 1.0)], [(distill, 0.5)])]
    assert len({json.dumps(dict(origin.checksums)) for origin in origins}) == 3
    assert "accelerate" not in origins[0].to_json() and origins[2].to_json()["accelerate"] == [f"{distill}:0.5"]


@pytest.mark.long
def test_previews_and_evaluation_of_a_lora_run(tiny_config, tmp_path):
  """The adapters that are trained stay in effect below the distillation's, which leaves the prediction as it was."""
  dim = tiny_config.model.dim
  rng = np.random.default_rng(0)
  down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((2, dim), (dim, 2)))
  changes = {f"blocks.{n}.self_attn.q.weight": LoRALayer(down, up, 2.0) for n in range(2)}
  channels = transformer_config(tiny_config).patch_volume * transformer_config(tiny_config).out_dim
  changes["head.head.bias"] = Difference(np.full(channels, 3, np.float32))
  path = str(tmp_path / "distilled.safetensors")
  write_lora(Path(path), LoRAWeights(changes, "jax"), "comfyui")
  config = override(
    tiny_config,
    {
      "lora.rank": 2,
      "num_steps": 1,
      "data.tasks.invert": 1.0,
      "validation.every_steps": 1,
      "validation.previews": 1,
      "validation.accelerate": (path,),
      "eval.sentences_per_case": 0,
    },
  )
  train(config, str(tmp_path / "run"))
  assert (tmp_path / "run" / "previews" / "step_000001.png").exists()

  pipe = univid_jax.load_pipeline(str(tmp_path / "run"), mesh=make_mesh({}, devices=jax.devices()[:1]))
  distillation = read_distillation(path)
  scores = {}
  for name, accelerated in {"with": add_distillation(pipe, distillation), "without": None}.items():
    report = evaluate(
      pipe,
      override(config, {"eval.sentences_per_case": 1}),
      data=open_data(config),
      folder=tmp_path / name,
      origin=Origin.resolve(str(tmp_path / "run"), distillation=distillation.files if accelerated else None),
      accelerated=accelerated,
    )
    assert ("**accelerated**" in (tmp_path / name / "report.md").read_text()) == (accelerated is not None)
    scores[name] = {row: each["psnr"] for row, each in report["overall"].items()}
  assert scores["with"]["prediction"] == scores["without"]["prediction"]
  assert abs(scores["with"]["accelerated"] - scores["with"]["prediction"]) > 0.1
