"""The commands as a person types them: help, real files, and one clear line for whatever is wrong."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.commands import SMALL, run_command
from univid_jax.data.video import read_clip, write_clip

CONFIG, *_ = SMALL


@pytest.mark.parametrize("module", ["univid_jax.train", "univid_jax.sample", "univid_jax.evaluate", "univid_jax.forecast"])
def test_help(module):
  done = run_command(module, "--help")
  assert done.returncode == 0
  assert module in done.stdout + done.stderr and "--" in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments, message", [
    ([CONFIG, "--config.num_step=3"], 'Did you mean "num_steps"'),
    ([CONFIG, "--config.data.foldr=x"], 'Did you mean "folder"'),
    ([CONFIG, "--config.num_steps=abc"], "invalid literal for int"),
    ([CONFIG + ":huge"], "unknown preset 'huge'; there are tiny"),
    (["--config=missing.py"], "missing.py"),
    ([CONFIG, "--confg.num_steps=3"], "Unknown command line flag"),
    ([CONFIG, "--config.num_steps=-5"], "config.num_steps must be at least 1, got -5"),
    ([CONFIG, "--config.rows.per_batch=-1"], "config.rows.per_batch must be at least 0, got -1"),
    ([CONFIG, "--config.mesh.data=3"], "mesh"),
    ([CONFIG, "--config.model.remat=half"], "config.model.remat is one of none, attention, dots, full, got 'half'"),
    ([CONFIG, "--config.optimizer.name=magic"], "unknown optimizer 'magic'"),
    ([CONFIG, "--config.model.attention=half"], "config.model.attention is full or context_causal, got 'half'"),
    ([CONFIG, "--config.model.attention_backend=magic"], "config.model.attention_backend is auto or one of"),
    ([CONFIG, "--config.data.held_out=2.0"], "config.data.held_out is a share"),
    ([CONFIG, "--config.rows.num_tokens=50"], "config.rows.num_tokens is only 50"),
    ([CONFIG + ":wan_1_3b", "--config.init_from=/does/not/exist"], "/does/not/exist"),
    ([CONFIG, "--config.data.folder=/does/not/exist"], "no such folder: /does/not/exist"),
    ([CONFIG, "--workdir=/proc/nowhere"], "/proc/nowhere"),
    ([CONFIG, "extra"], "unexpected argument 'extra'"),
])
def test_wrong_arguments_of_train(tmp_path, arguments, message):
  workdir = [] if any(a.startswith("--workdir") for a in arguments) else [f"--workdir={tmp_path}"]
  done = run_command("univid_jax.train", *arguments, *workdir)
  assert done.returncode not in (0, -6, -11)
  assert "Traceback" not in done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith("error: ") and message in last, done.stderr


def test_memory_that_is_not_there(capfd, monkeypatch):
  """What XLA says of 4 GB that it cannot have ends in one line."""
  from univid_jax import cli
  codes = []
  monkeypatch.setattr(cli, "_exit", codes.append)

  def main():
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4294967296 bytes.\nmore of it")
  cli._guarded(main, ["command"], 0)
  assert codes[0] == 1
  assert capfd.readouterr().err.startswith("error: there is not enough memory (RESOURCE_EXHAUSTED: Out of memory allocating 4")


def test_folders_that_hold_no_clip(tmp_path):
  for name, content in (("empty", None), ("texts", "hello"), ("broken", None)):
    folder = tmp_path / name
    folder.mkdir()
    if content:
      (folder / "notes.txt").write_text(content)
  (tmp_path / "broken" / "bad.mp4").write_bytes(b"nonsense")
  for name, message in (("empty", "no images or videos in"), ("texts", "no images or videos in"), ("broken", "bad.mp4")):
    done = run_command("univid_jax.train", CONFIG, f"--config.data.folder={tmp_path / name}", f"--workdir={tmp_path / 'run'}")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: ") and message in last


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A workdir with a small model, trained on eight devices and a folder of the test's own videos."""
  root = tmp_path_factory.mktemp("trained")
  rng = np.random.default_rng(0)
  for i in range(2):
    frames = rng.integers(0, 256, (8, 6, 8, 3)).astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    write_clip(root / "clips" / f"{i}.mp4", frames)
  done = run_command("univid_jax.train", *SMALL, "--config.num_steps=3", "--config.eval.sentences_per_case=1",
                     "--config.eval.num_inference_steps=2", f"--config.data.folder={root / 'clips'}",
                     f"--workdir={root / 'run'}", devices=8)
  assert done.returncode == 0, done.stderr
  return root, done


def test_a_run_says_where_everything_lies(trained):
  root, done = trained
  lines = done.stdout.strip().splitlines()
  for name in ("grid.png", "loss.png", "eval.json", "metrics.jsonl", "checkpoints"):
    assert any(f"{root / 'run' / name}" in line for line in lines[-10:])
    assert (root / "run" / name).exists()
  assert any("univid_jax.sample" in line for line in lines[-10:])
  assert Image.open(root / "run" / "grid.png").size[0] > 500


def test_sampling_real_files(trained, tmp_path):
  root, _ = trained
  rng = np.random.default_rng(0)
  write_clip(tmp_path / "a video.mp4", rng.integers(0, 256, (7, 50, 34, 3)).astype(np.uint8), fps=25)
  Image.fromarray(rng.integers(0, 256, (51, 37, 3)).astype(np.uint8)).save(tmp_path / "a.png")
  np.save(tmp_path / "b.npy", rng.integers(0, 256, (9, 20, 60, 3)).astype(np.uint8))
  common = [f"--checkpoint={root / 'run'}", "--steps=2"]
  a, b, video = tmp_path / "a.png", tmp_path / "b.npy", tmp_path / "a video.mp4"

  done = run_command("univid_jax.sample", *common, f"--clips={a},{a},{video}", f"--out={tmp_path / 'out.mp4'}")
  assert done.returncode == 0, done.stderr
  clip = read_clip(tmp_path / "out.mp4")
  assert clip.frames.shape == (5, 16, 16, 3) and clip.fps == pytest.approx(25)

  done = run_command("univid_jax.sample", *common, f"--clips={a},{a},{a}", f"--out={tmp_path / 'out.png'}")
  assert done.returncode == 0 and read_clip(tmp_path / "out.png").frames.shape == (1, 16, 16, 3)

  done = run_command("univid_jax.sample", *common, f"--clips={a},{b},{a}", f"--out={tmp_path / 'out.npy'}",
                     "--guidance_scale=2")
  assert done.returncode == 0 and np.load(tmp_path / "out.npy").shape == (5, 16, 16, 3)


def test_many_queries_with_grids_and_records(trained, tmp_path):
  root, _ = trained
  queries = tmp_path / "queries"
  queries.mkdir()
  for name in ("x", "y"):
    Image.new("RGB", (20, 20), "red").save(queries / f"{name}.png")
  write_clip(queries / "z.mp4", np.zeros((7, 20, 20, 3), np.uint8), fps=12)
  pair = f"{queries / 'x.png'},{queries / 'y.png'}"
  common = ["univid_jax.sample", f"--checkpoint={root / 'run'}", "--steps=2", f"--clips={pair}", f"--out={tmp_path / 'out'}"]
  done = run_command(*common, f"--queries={queries}", "--grid", "--solver=unipc")
  assert done.returncode == 0, done.stderr
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
      "x.json", "x.png", "x_grid.png", "y.json", "y.png", "y_grid.png", "z.json", "z.mp4", "z_grid.mp4"]
  assert read_clip(tmp_path / "out" / "x_grid.png").frames.shape == (1, 16, 4 * 16 + 3 * 4, 3)
  assert read_clip(tmp_path / "out" / "z_grid.mp4").frames.shape[0] == 5
  record = json.loads((tmp_path / "out" / "z.json").read_text())
  assert record["num_frames"] == 5 and record["fps"] == 12 and record["solver"] == "unipc" and len(record["clips"]) == 3
  done = run_command(*common, f"--queries={queries / 'x.png'},{queries / 'x.png'}")
  assert done.returncode == 1 and "two queries are named 'x'" in done.stderr


@pytest.mark.parametrize("arguments, message", [
    (["--clips={a},{a}"], "an odd number of clips"),
    (["--clips={a},{a},{text}"], "not a clip"),
    (["--clips={a},{a},{a}", "--steps=0"], "steps"),
    (["--clips={a},{a},{a}", "--num_frames=4"], "4n + 1 frames, got 4; the nearest are 1 and 5"),
    (["--clips={a},{a},{a}", "--num_frames=5"], "is an image, but there are 5 frames"),
    (["--clips={a},{a},{a}", "--checkpoint={root}"], "neither a converted checkpoint (no checkpoint.json) nor"),
    (["--clips={a},{a},{a}", "--prompt=paint it black"], "a prompt needs a text encoder"),
    (["--clips={a},{a},{a}", "--step=77"], "no checkpoint of step 77"),
])
def test_wrong_arguments_of_sample(trained, tmp_path, arguments, message):
  root, _ = trained
  Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
  (tmp_path / "notes.txt").write_text("hello")
  names = {"a": tmp_path / "a.png", "text": tmp_path / "notes.txt", "root": tmp_path}
  arguments = [argument.format(**names) for argument in arguments]
  done = run_command("univid_jax.sample", f"--checkpoint={root / 'run'}", f"--out={tmp_path / 'out.png'}", *arguments)
  assert done.returncode != 0 and "Traceback" not in done.stderr
  assert message in done.stderr and not (tmp_path / "out.png").exists()
