"""What `benchmarks.against_diffsynth` gives its peers, which are stand-ins here, and what it makes of their times."""

import json
import sys

import numpy as np
import pytest

from benchmarks import against_diffsynth
from benchmarks.against_diffsynth import CHECKOUTS, Setup, build_peer, make_diffsynth, make_univid, print_rates
from benchmarks.steps import make_sentence_row
from univid_jax.models.variants import DiTConfig

SHAPE = DiTConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=1, freq_dim=8, text_dim=12)
SETUP = Setup(shape=SHAPE, lengths=[1, 1, 3, 3], height=32, width=48, prompt_tokens=5, dtype="float32")

WAN_MODEL = """
import torch

class WanModel(torch.nn.Module):
  def __init__(self, dim, in_dim, out_dim, has_image_input, **others):
    super().__init__()
    assert not has_image_input and others.keys() == {
      "ffn_dim", "text_dim", "freq_dim", "eps", "patch_size", "num_heads", "num_layers"
    }
    self.inner = torch.nn.Conv3d(in_dim, out_dim, 1)
"""

# What DiffSynth-Studio 2 has of the same names, in little.
DIFFSYNTH = {
  "diffsynth/models/wan_video_dit.py": WAN_MODEL,
  "diffsynth/diffusion/training_module.py": """
import torch

class DiffusionTrainingModule(torch.nn.Module):
  def switch_pipe_to_training_mode(self, pipe, lora_base_model, lora_target_modules, lora_rank, task):
    assert (lora_base_model, lora_target_modules, lora_rank, task) == ("dit", "q,k,v,o,ffn.0,ffn.2", 16, "sft")
    pipe.requires_grad_(False)
    pipe.dit.inner.weight.requires_grad_(True)

  def trainable_modules(self):
    return (parameter for parameter in self.parameters() if parameter.requires_grad)
""",
  "diffsynth/pipelines/wan_video.py": """
import torch

class Scheduler:
  timesteps = torch.full((1000,), 250.0)

  def add_noise(self, sample, noise, timestep):
    return torch.lerp(sample, noise, timestep / 1000)

  def training_target(self, sample, noise, timestep):
    return noise - sample

class WanVideoPipeline(torch.nn.Module):
  def __init__(self, device, torch_dtype):
    super().__init__()
    self.scheduler, self.dit = Scheduler(), None

  def model_fn(self, dit, latents, **others):
    dit.seen = {"latents": latents, **others}
    out = dit.inner(latents)
    out[:, :, :5] = float("nan")  # of the context
    return out
""",
}

# DiffSynth-Studio of March 2025 with UniVid's files.
UNIVID = {
  "diffsynth/models/wan_video_dit.py": WAN_MODEL,
  "diffsynth/pipelines/univid_wan_video.py": "",
  "diffsynth/schedulers/flow_match.py": "",
  "examples/wanvideo/train_univid.py": """
import torch

class ModelManager:
  pass

class LightningModelForTrain(torch.nn.Module):
  def __init__(
    self, dit_path, learning_rate, lora_rank, lora_alpha, lora_target_modules, use_gradient_checkpointing=True
  ):
    super().__init__()
    assert (lora_rank, lora_alpha, lora_target_modules) == (16, 16, "q,k,v,o,ffn.0,ffn.2")
    models = ModelManager(torch_dtype=torch.bfloat16, device="cpu")
    models.load_models(dit_path.split(","))
    assert models.fetch_model("wan_video_text_encoder", require_model_path=True) is None
    self.dit = models.fetch_model("wan_video_dit")

  def training_step(self, batch, batch_idx):
    self.log("train_loss", 0.0, prog_bar=True)
    batch["prompt_emb"]["context"] = batch["prompt_emb"]["context"][0]
    self.dit.batch = batch
    return self.dit.inner(batch["latents"]).square().mean()

  def configure_optimizers(self):
    return torch.optim.AdamW(self.dit.parameters(), lr=1e-4)
""",
}
FILES = {"univid": UNIVID, "diffsynth": DIFFSYNTH}


def write_checkout(flag, folder):
  for name, text in FILES[flag].items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return str(folder)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
  """Returns a function that writes a checkout, whose modules are forgotten after the test."""
  pytest.importorskip("torch", reason="needs the extra `parity`")
  monkeypatch.setattr(sys, "path", list(sys.path))
  monkeypatch.setenv("USE_FLAX", "0")
  before = set(sys.modules)
  yield lambda flag: write_checkout(flag, tmp_path / "checkout")
  for name in set(sys.modules) - before:
    if name.partition(".")[0] in ("diffsynth", "train_univid"):
      del sys.modules[name]


def test_stand_ins_have_the_files_that_are_asked_for():
  assert {flag: set(files) for flag, (_, files) in CHECKOUTS.items()} == {flag: set(FILES[flag]) for flag in FILES}


def test_diffsynth_noises_only_the_target(checkout):
  step = make_diffsynth(checkout("diffsynth"), SETUP)
  start = step.model.inner.weight.clone()
  step.run()
  seen = step.model.seen
  assert seen["latents"].shape == (1, 16, 8, 4, 6) and seen["use_gradient_checkpointing"]
  assert (seen["latents"][:, :, :5] == 1).all() and (seen["latents"][:, :, 5:] != 1).all()
  assert seen["context"].shape == (1, 512, 12)
  assert (seen["context"][:, :5] == 1).all() and (seen["context"][:, 5:] == 0).all()
  assert np.isfinite(step.loss().item()), "the context has no loss"
  assert (step.model.inner.weight != start).all()


def test_univid_gets_a_sentence_as_from_its_cache(checkout):
  step = make_univid(checkout("univid"), SETUP)
  start = step.model.inner.weight.clone()
  for _ in range(2):  # its step changes the batch that it gets
    step.run()
  batch = step.model.batch
  assert [frames.squeeze().item() for frames in batch["count_frames"]] == [1, 1, 9, 9]
  assert batch["latents"].shape == (1, 16, 8, 4, 6) and batch["prompt_emb"]["context"].shape == (1, 512, 12)
  assert (step.model.inner.weight != start).all()


@pytest.mark.parametrize("flag", FILES)
def test_peers_are_built_by_their_flags(checkout, flag):
  run = build_peer(flag=flag, path=checkout(flag), setup=SETUP)
  assert run() is None and sys.modules["diffsynth.models.wan_video_dit"]


def test_rows_of_univid_jax_have_the_tokens_of_the_peers():
  options = dict(
    height=SETUP.height, width=SETUP.width, prompt_tokens=SETUP.prompt_tokens, with_targets=True, frames=SETUP.lengths
  )
  row = make_sentence_row(SHAPE, **options)
  assert row.tokens.shape == (1, SETUP.tokens, 64) and SETUP.tokens == 8 * 6
  assert row.targets.tolist() == [list(range(5 * 6, 8 * 6))]
  np.testing.assert_array_equal(row.positions[0, :, 0], np.repeat(np.arange(8), 6))
  assert row.text_counts.tolist() == [[1] * 5 + [507]]
  packed = make_sentence_row(SHAPE, **options, sentences=3)
  assert packed.num_slots == 3
  np.testing.assert_array_equal(packed.segment_ids[0], np.repeat([1, 2, 3], SETUP.tokens))
  np.testing.assert_array_equal(packed.positions, np.tile(row.positions, (1, 3, 1)))
  np.testing.assert_array_equal(
    packed.targets[0], np.concatenate([row.targets[0] + i * SETUP.tokens for i in range(3)])
  )


def test_rates(capsys):
  figures = {"univid_jax": {"median_s": 2.0}, "univid_jax, 3 per row": {"median_s": 5.0}, "univid": {"median_s": 2.5}}
  sentences = {"univid_jax": 1, "univid_jax, 3 per row": 3, "univid": 1, "diffsynth": 1}
  rates = print_rates(figures, sentences)  # without a program that failed
  assert rates == {"univid_jax": 0.5, "univid_jax, 3 per row": 0.6, "univid": 0.4}
  assert capsys.readouterr().out.splitlines() == [
    "univid_jax             0.5000 sentences per second, 1.25 times those of univid",
    "univid_jax, 3 per row  0.6000 sentences per second, 1.50 times those of univid",
    "univid                 0.4000 sentences per second",
  ]


@pytest.mark.parametrize(
  "flags, message",
  [
    ([], "--univid or --diffsynth must be the folder of a checkout, or both"),
    (["--diffsynth=nowhere"], "--diffsynth must be the folder of a checkout of DiffSynth-Studio 2: 'nowhere' has no"),
    (["--univid=nowhere"], "--univid must be the folder of DiffSynth-Studio of March 2025 with UniVid's files"),
    (["--context=V"], "context"),
  ],
)
def test_wrong_flags(flags, message, capfd):
  assert against_diffsynth.main(["against_diffsynth", *flags]) in (1, 2)
  out, err = capfd.readouterr()
  assert out == "" and message in err and err.count("\n") == 1


def test_univid_alone_is_no_checkout(tmp_path, capfd):
  path = write_checkout("univid", tmp_path)
  (tmp_path / "diffsynth/models/wan_video_dit.py").unlink()  # of DiffSynth-Studio, not of UniVid
  assert against_diffsynth.main(["against_diffsynth", f"--univid={path}"]) == 1
  assert f"{path!r} has no diffsynth/models/wan_video_dit.py" in capfd.readouterr().err


def test_sizes_that_are_not_whole_tokens(tmp_path, capfd):
  path = write_checkout("diffsynth", tmp_path)
  assert against_diffsynth.main(["against_diffsynth", f"--diffsynth={path}", "--height=248"]) == 1
  assert "--height and --width must be multiples of 16, got 248 and 416" in capfd.readouterr().err


@pytest.mark.long
def test_race(tmp_path, capfd):
  pytest.importorskip("torch", reason="needs the extra `parity`")
  paths = [f"--{flag}={write_checkout(flag, tmp_path / flag)}" for flag in FILES]
  size = ["--dim=128", "--layers=1", "--frames=2", "--height=32", "--width=32", "--pairs=1"]
  out = tmp_path / "figures.json"
  assert against_diffsynth.main(["against_diffsynth", *paths, *size, f"--out={out}"]) == 0
  figures, printed = json.loads(out.read_text()), capfd.readouterr().out
  assert figures["tokens"] == 24 and figures["lengths"] == [1, 1, 2, 2] and "failed" not in figures
  assert figures["sentences_per_s"].keys() == {"univid_jax", "univid_jax, 2 per row", "univid", "diffsynth"}
  assert figures["univid_jax"]["forecast_gib"] > 0
  assert "context III: 24 tokens per sentence, 1 layers" in printed and "times those of diffsynth" in printed
