"""The commands as a person types them: help, real files, and one clear line for whatever is wrong."""

import contextlib
import io
import json
import re
import shutil
import socket
import sys

import numpy as np
import pytest
from PIL import Image

from tests.commands import SMALL, run_command, run_here
from tests.helpers import GOLDENS, compile_plain_step, image_width, package_or_skip
from univid_jax.checkpoints.lora.formats import write_lora
from univid_jax.checkpoints.lora.kinds import Difference
from univid_jax.checkpoints.lora.weights import LoRAWeights
from univid_jax.checkpoints.run import read_run
from univid_jax.checkpoints.run_parts import transformer_config
from univid_jax.data.media.reader import read_clip
from univid_jax.data.media.writer import write_clip
from univid_jax.training import loop

CONFIG, *_ = SMALL
COMMANDS = {
  "univid_jax.train": "--workdir",
  "univid_jax.prepare": "--preview",
  "univid_jax.sample": "--clips",
  "univid_jax.evaluate": "--out",
  "univid_jax.calibrate": "--guidance_range",
  "univid_jax.forecast": "--topology",
  "univid_jax.demo": "--port",
  "univid_jax.convert": "--inspect",
  "tools.convert_weights": "--inspect",
}


def test_a_clone_that_hides_the_package_is_named(monkeypatch, capfd):
  """In the folder around a clone, Python takes the clone for the package."""
  monkeypatch.delattr("univid_jax.__version__")
  assert run_here("univid_jax.train", "--config=tiny") == 1
  assert capfd.readouterr().err.startswith("error: univid_jax/ in this folder shadows the installed package")


@pytest.mark.parametrize("module", COMMANDS)
def test_help(module):
  done = run_command(module, "--help")
  assert done.returncode == 0 and done.stderr == ""
  usage = module.replace("tools.convert_weights", "univid_jax.convert")
  assert f"python -m {usage}" in done.stdout and COMMANDS[module] in done.stdout


def test_commands_are_spelled_as_they_were_called(monkeypatch, capfd):
  """In --help, hints and errors."""
  for program, spelling in (("/venv/bin/univid-verify", "univid-verify"), ("x.py", "python -m univid_jax.verify")):
    monkeypatch.setattr(sys, "argv", [program])
    assert run_here("univid_jax.verify", "--help") == 0 and f"\n  {spelling} " in capfd.readouterr().out
    assert run_here("univid_jax.verify") == 2 and f"give a path: {spelling} PATH" in capfd.readouterr().err


def test_help_lists_flags_as_they_are_defined(capfd):
  """Those that are required are marked; what all commands have comes last."""
  assert run_here("univid_jax.sample", "--help") == 0
  flags = re.findall(r"^  --(.*)$", capfd.readouterr().out, re.MULTILINE)
  assert flags[:2] == ["checkpoint (required)", "lora"] and "out (required)" in flags
  assert flags[-2:] == ["[no]help", "verbosity"]


def test_help_says_where_the_keys_of_the_config_are(capfd):
  assert run_here("univid_jax.train", "--help") == 0
  text = " ".join(capfd.readouterr().out.split())
  assert "their meanings: python -m pydoc univid_jax.config.schema" in text
  code = re.search(r'python -c "(.*?)"', text)
  assert code
  with contextlib.redirect_stdout(io.StringIO()) as stdout:
    exec(code[1].replace("PRESET", "tiny"))
  assert "learning_rate: " in stdout.getvalue()


def test_a_workdir_that_cannot_be_created_is_named(capfd):
  assert run_here("univid_jax.train", "--workdir=/proc/foo") == 1
  assert capfd.readouterr().err == "error: cannot create the folder /proc/foo\n"


def test_the_default_config_of_an_evaluation_is_that_of_the_run(capfd):
  for module, default in (("evaluate", "that of the run in --workdir, else tiny"), ("train", "tiny")):
    assert run_here(f"univid_jax.{module}", "--help") == 0
    assert f"Default: {default}." in " ".join(capfd.readouterr().out.split())


def test_a_port_that_is_in_use_is_named(monkeypatch, capfd):
  """Before Gradio is imported, which takes seconds."""
  monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were missing
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
    assert run_here("univid_jax.demo", f"--port={port}") == 1
  expected = f"error: port {port} is in use: choose another one with --port, or 0 for a free one\n"
  assert capfd.readouterr().err == expected
  assert run_here("univid_jax.demo", "--port=0") == 1
  assert capfd.readouterr().err.startswith(
    "loading small; the address of the page follows\nerror: the demo needs Gradio"
  )
  assert run_here("univid_jax.demo", "--host=192.0.2.1") == 1
  assert "error: cannot listen on port 7860 of --host=192.0.2.1: " in capfd.readouterr().err


@pytest.mark.parametrize(
  "arguments, code, message",
  [
    (
      [CONFIG, "--config.num_step=3"],
      2,
      "unknown key config.num_step; did you mean config.num_steps? There are base, ",
    ),
    (["--config.learning_rate=-1"], 2, "key config.learning_rate; did you mean config.optimizer.learning_rate?"),
    (["--config.tasks.invert=1"], 2, "unknown key config.tasks; did you mean config.data.tasks?"),
    (["--config.data.pair=x"], 2, "unknown key config.data.pair; did you mean config.data.pairs?"),
    ([CONFIG, "--config.data.weights.photos=0"], 2, "key config.data.weights.photos; there are arc, computed, "),
    ([CONFIG, "--config.data.tasks.sepia=1.0"], 2, "unknown key config.data.tasks.sepia; there are camera_movement, "),
    ([CONFIG, "--config.data.kinds.mine=depth"], 2, "set all of it, as --config.data.kinds=\"{'mine': ...}\""),
    ([CONFIG, "--config.data.num_clips.4=1"], 2, "unknown key config.data.num_clips.4; there are clips_4, "),
    ([CONFIG, "--config.model.dim.x=1"], 2, "config.model.dim is a value, not a group of keys"),
    ([CONFIG, "--config.data.buckets[=1"], 2, "wrong override of the config: Could not parse 'data.buckets['"),
    ([CONFIG, "--config.data.foldr=x"], 2, "did you mean config.data.folder?"),
    ([CONFIG, "--config.num_steps=abc"], 2, "--config.num_steps must be a whole number, got 'abc'"),
    ([CONFIG, "--config.num_steps=10.5"], 2, "--config.num_steps must be a whole number, got '10.5'"),
    ([CONFIG, "--config.optimizer.learning_rate=x"], 2, "--config.optimizer.learning_rate must be a number, got 'x'"),
    ([CONFIG, "--config.data.bundled=maybe"], 2, "--config.data.bundled must be true or false, got 'maybe'"),
    ([CONFIG, "--profile=abc"], 2, "--profile must be a whole number, got 'abc'"),
    ([CONFIG + ":huge"], 2, "unknown preset 'huge'; there are tiny"),
    (["--config=huge"], 2, "unknown preset 'huge'; there are tiny"),
    (["--config=missing.py"], 2, "no such config file: missing.py"),
    ([CONFIG, "--confg.num_steps=3"], 2, "unknown flag --confg.num_steps: did you mean --config.num_steps?"),
    ([CONFIG, "--config.num_steps=-5"], 2, "config.num_steps must be at least 1, got -5"),
    ([CONFIG, f"--config.seed={2**63}"], 2, "config.seed must be from 0 to 2**63 - 2"),
    ([CONFIG, "--config.eval.num_inference_steps=1001"], 2, "config.eval.num_inference_steps must be from 1 to 1000"),
    ([CONFIG, "--config.rows.per_batch=-1"], 2, "config.rows.per_batch must be at least 0, got -1"),
    (
      [CONFIG, "--config.model.remat=half"],
      2,
      "config.model.remat must be one of none, dots, attention, full, offload, got 'half'",
    ),
    ([CONFIG, "--config.optimizer.name=magic"], 2, "config.optimizer.name must be one of adamw, muon, got 'magic'"),
    (
      [CONFIG, "--config.model.attention=half"],
      2,
      "config.model.attention must be one of full, context_causal, got 'half'",
    ),
    ([CONFIG, "--config.model.attention_backend=magic"], 2, "config.model.attention_backend must be one of auto, "),
    ([CONFIG, "--config.data.held_out=2.0"], 2, "config.data.held_out must be from 0 to 1"),
    ([CONFIG, "extra"], 2, "unexpected argument 'extra'"),
    ([CONFIG, "--config.mesh.data=3"], 1, "mesh"),
    ([CONFIG, "--config.rows.num_tokens=50"], 1, "config.rows.num_tokens is only 50"),
    (["--config=wan_1_3b", "--config.init_from=/does/not/exist"], 1, "/does/not/exist"),
    ([CONFIG, "--config.data.folder=/does/not/exist"], 1, "no such folder: /does/not/exist"),
    ([CONFIG, "--workdir=/proc/nowhere"], 1, "/proc/nowhere"),
    ([CONFIG, "--process_id=0"], 2, "--coordinator, --num_processes and --process_id must be given together"),
  ],
)
def test_wrong_arguments_of_train(tmp_path, capfd, arguments, code, message):
  workdir = [] if any(a.startswith("--workdir") for a in arguments) else [f"--workdir={tmp_path / 'run'}"]
  assert run_here("univid_jax.train", *arguments, *workdir) == code
  stderr = capfd.readouterr().err
  last = stderr.strip().splitlines()[-1]
  assert last.startswith("error: ") and message in last and "internal error" not in last, stderr
  assert "Traceback" not in stderr
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "../mine", "/mine"])
def test_the_default_workdir_is_in_runs(tmp_path, capfd, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  assert run_here("univid_jax.train", "--config=tiny", f"--config.name={name}") == 2
  assert f"config.name = {name!r} names no folder in runs/: change it, or give --workdir" in capfd.readouterr().err


def test_folders_without_clips(tmp_path, capfd):
  for name, content in (("empty", None), ("texts", "hello"), ("broken", None)):
    folder = tmp_path / name
    folder.mkdir()
    if content:
      (folder / "notes.txt").write_text(content)
  (tmp_path / "broken" / "bad.mp4").write_bytes(b"nonsense")
  for name, message in (
    ("empty", "no images or videos in"),
    ("texts", "no images or videos in"),
    ("broken", "bad.mp4"),
  ):
    arguments = [CONFIG, f"--config.data.folder={tmp_path / name}", f"--workdir={tmp_path / 'run'}"]
    assert run_here("univid_jax.train", *arguments) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last and "internal error" not in last


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A folder with a run of a small model on the test's own videos, and what the command printed."""
  root = tmp_path_factory.mktemp("trained")
  rng = np.random.default_rng(0)
  for i in range(2):
    frames = rng.integers(0, 256, (8, 6, 8, 3)).astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    write_clip(root / "clips" / f"{i}.mp4", frames)
  with contextlib.redirect_stdout(io.StringIO()) as stdout, pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "compile_train_step", compile_plain_step)
    code = run_here(
      "univid_jax.train",
      *SMALL,
      "--config.num_steps=3",
      "--config.validation.every_steps=0",
      "--config.eval.sentences_per_case=1",
      "--config.eval.num_inference_steps=2",
      "--config.data.contexts.I=0.0",
      "--config.data.contexts.III=0.0",
      f"--config.data.folder={root / 'clips'}",
      f"--workdir={root / 'run'}",
    )
  assert code == 0
  return root, stdout.getvalue()


@pytest.mark.parametrize(
  "arguments, code, message",
  [
    (["--steps=5", "--sigmas=1,0.5"], 2, "--sigmas replace --steps"),
    (["--prompt=x", "--task=depth map"], 2, "--prompt and --task exclude each other"),
    (["--size=1"], 2, "--size is HEIGHTxWIDTH"),
    (["--fps=-1"], 2, "error: --fps must be from 0 to 10000, got -1.0"),
    (["--fps=nan"], 2, "error: --fps must be from 0 to 10000, got nan"),
    (["--shift=1e9"], 2, "error: --shift must be at most 1000, got 1e+09"),
    (["--negative_prompt=x"], 2, "--negative_prompt needs guidance"),
    ([], 1, "missing does not exist: expected a converted checkpoint, the workdir of a training run, or one of"),
  ],
)
def test_wrong_arguments_of_calibrate(tmp_path, monkeypatch, capfd, arguments, code, message):
  monkeypatch.chdir(tmp_path)
  for name in "abc":
    Image.new("RGB", (20, 20)).save(f"{name}.png")
  missing = tmp_path / "missing"
  assert run_here("univid_jax.calibrate", f"--checkpoint={missing}", "--clips=a.png,b.png,c.png", *arguments) == code
  stderr = capfd.readouterr().err
  assert message in stderr and "Traceback" not in stderr and not missing.exists()


def test_a_run_names_all_results(trained):
  root, stdout = trained
  lines = stdout.strip().splitlines()
  for name in ("grid.png", "loss.png", "eval.json", "metrics.jsonl", "checkpoints"):
    assert any(f"{root / 'run' / name}" in line for line in lines[-10:])
    assert (root / "run" / name).exists()
  assert any("univid_jax.sample" in line for line in lines[-10:])
  assert image_width(root / "run" / "grid.png") > 500


def test_sampling_real_files(trained, tmp_path, capfd):
  root, _ = trained
  rng = np.random.default_rng(0)
  write_clip(tmp_path / "a video.mp4", rng.integers(0, 256, (7, 50, 34, 3)).astype(np.uint8), fps=25)
  Image.fromarray(rng.integers(0, 256, (51, 37, 3)).astype(np.uint8)).save(tmp_path / "a.png")
  np.save(tmp_path / "b.npy", rng.integers(0, 256, (9, 20, 60, 3)).astype(np.uint8))
  common = [f"--checkpoint={root / 'run'}", "--steps=2"]
  a, b, video = tmp_path / "a.png", tmp_path / "b.npy", tmp_path / "a video.mp4"

  whole = f"--clips={a},{a},{video}", f"--out={tmp_path / 'out.mp4'}", "--copy_audio"
  assert run_here("univid_jax.sample", *common, *whole) == 0
  assert f"there is no sound to copy: {video} has none" in capfd.readouterr().err
  clip = read_clip(tmp_path / "out.mp4")
  assert clip.frames.shape == (7, 16, 16, 3) and clip.fps == pytest.approx(25), "all of a longer video"

  flags = [f"--clips={a},{a},{a}", f"--out={tmp_path / 'out.png'}"]
  unused = {
    "carry_context": "no B is longer than the 5 frames of the model's clips",
    "merge_lora": "the model has no LoRA",
    "offload_inactive": "the model has only one transformer",
  }
  assert run_here("univid_jax.sample", *common, *flags, *(f"--{name}" for name in unused)) == 0
  log = capfd.readouterr().err
  assert all(f"--{name} has no effect: {reason}\n" in log for name, reason in unused.items()), log
  assert read_clip(tmp_path / "out.png").frames.shape == (1, 16, 16, 3)

  inputs, out = f"--clips={a},{b},{a}", f"--out={tmp_path / 'out.npy'}"
  capfd.readouterr()
  assert run_here("univid_jax.sample", *common, inputs, out, "--guidance_scale=2") == 0
  assert capfd.readouterr().err.count("guidance has no effect: the negative prompt equals the prompt") == 1
  assert np.load(tmp_path / "out.npy").shape == (5, 16, 16, 3)


def test_many_queries_with_grids_and_records(trained, tmp_path, capfd):
  root, _ = trained
  queries = tmp_path / "queries"
  queries.mkdir()
  for name in ("x", "y"):
    Image.new("RGB", (20, 20), "red").save(queries / f"{name}.png")
  write_clip(queries / "z.mp4", np.zeros((7, 20, 20, 3), np.uint8), fps=12)
  pair = f"{queries / 'x.png'},{queries / 'y.png'}"
  common = [
    "univid_jax.sample",
    f"--checkpoint={root / 'run'}",
    "--steps=2",
    f"--clips={pair}",
    f"--out={tmp_path / 'out'}",
  ]
  assert run_here(*common, f"--queries={queries}", "--grid", "--solver=unipc") == 0
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
    "x.json",
    "x.png",
    "x_grid.png",
    "y.json",
    "y.png",
    "y_grid.png",
    "z.json",
    "z.mp4",
    "z_grid.mp4",
  ]
  assert read_clip(tmp_path / "out" / "x_grid.png").frames.shape == (1, 16, 4 * 16 + 3 * 4, 3)
  assert read_clip(tmp_path / "out" / "z_grid.mp4").frames.shape[0] == 7
  record = json.loads((tmp_path / "out" / "z.json").read_text())
  assert record["num_frames"] == 7 and record["fps"] == 12 and record["solver"] == "unipc" and len(record["clips"]) == 3
  assert run_here(*common, f"--queries={queries / 'x.png'},{queries / 'x.png'}") == 2
  x = queries / "x.png"
  assert f"the results of {x} and {x} would both be named 'x'" in capfd.readouterr().err


def test_sampling_with_a_distillation(trained, tmp_path):
  """The record says how the sample was made; other noise levels can be given without a distillation."""
  root, _ = trained
  Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
  record = read_run(root / "run")
  assert record is not None
  bias = Difference(np.ones(transformer_config(record.config).dim, np.float32))
  write_lora(tmp_path / "few_steps.safetensors", LoRAWeights({"blocks.0.ffn.2.bias": bias}, "jax"), "comfyui")
  common = [f"--checkpoint={root / 'run'}", "--clips={0},{0},{0}".format(tmp_path / "a.png")]
  accelerate = f"--accelerate={tmp_path / 'few_steps.safetensors'}:0.5:lightning"
  records = []
  for name, flags in {"one": [accelerate], "two": ["--sigmas=1,0.5"]}.items():
    assert run_here("univid_jax.sample", *common, f"--out={tmp_path / name}.png", *flags) == 0
    records.append(json.loads((tmp_path / f"{name}.json").read_text()))
  one, two = records
  assert one["solver"] == "distilled" and one["num_inference_steps"] == 4 and one["shift"] == 5
  assert one["accelerate"] == [f"{tmp_path / 'few_steps.safetensors'}:0.5"] and "accelerator 0" in one["checksums"]
  assert two["solver"] == "euler" and two["sigmas"] == [1, 0.5] and "accelerate" not in two


@pytest.mark.long
def test_step_caching(trained, tmp_path, capfd):
  """Ratios are found for what they were measured with, and for nothing else."""
  root, _ = trained
  workdir = tmp_path / "run"
  shutil.copytree(root / "run", workdir)
  for name, color in (("a", "red"), ("b", "blue")):
    Image.new("RGB", (20, 20), color).save(tmp_path / f"{name}.png")
  a, b = tmp_path / "a.png", tmp_path / "b.png"
  common = [f"--checkpoint={workdir}", f"--clips={a},{b},{a}"]
  steps = ["--steps=6", "--guidance_scale=2", "--guidance_range=0.6,1"]

  def sample(name, *flags):
    return run_here("univid_jax.sample", *common, f"--out={tmp_path / name}.npy", *flags)

  assert sample("none", *steps, "--step_cache=magcache") == 1
  assert f"there is no {workdir}/step_cache.json: run univid-calibrate" in capfd.readouterr().err
  assert run_here("univid_jax.calibrate", *common, *steps, "--seed=5") == 0
  out = capfd.readouterr().out
  assert re.search(r"magcache:0.06  computes the blocks in \d+ of 11 passes\n", out), out
  assert out.splitlines()[-1] == f"ratios: {workdir}/step_cache.json"

  assert sample("dense", *steps) == sample("zero", *steps, "--step_cache=magcache:0") == 0
  assert sample("cached", *steps, "--step_cache=magcache:9:1:0.3") == 0
  dense, zero, cached = (np.load(tmp_path / f"{name}.npy") for name in ("dense", "zero", "cached"))
  assert np.array_equal(dense, zero) and cached.shape == dense.shape
  record = json.loads((tmp_path / "cached.json").read_text())
  assert record["step_cache"] == {"threshold": 9, "max_skip": 1, "retention": 0.3}
  assert record["guidance_range"] == [0.6, 1]

  capfd.readouterr()
  assert sample("other", *steps, "--solver=unipc", "--step_cache=magcache") == 1
  error = capfd.readouterr().err.strip().splitlines()[-1]
  assert "needs ratios of 6 steps of unipc" in error and "has 6 steps of euler from noise level 1 to 0.5" in error


@pytest.mark.parametrize(
  "arguments, code, message",
  [
    (["--clips={a},{a}"], 2, "an odd number of clips"),
    (["--clips={a},{a},{a}", "--grid=x.png"], 2, "--grid must be true or false, got 'x.png'"),
    (["--clips={a},{a},{a}", "--checkpoint=small", "--step=2"], 1, "small is a converted checkpoint, which has no s"),
    (["--clips={a},{a},{text}", "--step=77"], 1, "not a clip"),
    (
      ["--clips={a},{a}", "--queries={root}/q", "--step=77", "--out={root}/results"],
      1,
      "2 clips cannot be read ({root}/q/bad.mp4, {root}/q/empty.mp4): cannot read {root}/q/bad.mp4: not an intact MP4",
    ),
    # Before the model is loaded, of which step 77 is missing.
    (["--clips={a},{a},{root}/no.png", "--step=77"], 1, "no such clip"),
    (["--clips={a},{a},{root}/A.png", "--step=77"], 1, "/A.png; {root} has a.png, in other upper and lower case"),
    (["--clips={a},{a}", "--queries={a},{root}/no.png", "--step=77", "--out={root}/results"], 1, "no such clip"),
    (["--clips={a},{a},{root}/a, b.png", "--step=77"], 1, "a name with a comma is written in double quotes within"),
    (['--clips={a},{a},"{root}/a, b.png"', "--step=77"], 1, "no checkpoint of step 77"),
    (
      ["--clips={a},{a},{a}", "--step=77", "--size=32x33"],
      2,
      "--size=32x33: the width must be a multiple of 8, got 33",
    ),
    (["--clips={a},{a},{a}", "--step=77", "--size=4x32"], 2, "multiple of 8, got 4; the nearest are 8"),
    (["--clips={a},{a},{a}", "--step=77", "--guidance_scale=2,3"], 2, "--guidance_scale must be one number, got 2"),
    (
      ["--clips={a},{a},{a}", "--checkpoint=small", "--step=2", "--size=32x33"],
      2,
      "--size=32x33: the width must be a ",
    ),
    (["--clips={a},{a},{a}", "--steps=0"], 2, "steps"),
    (["--clips={a},{a},{a}", "--solver=magic"], 2, "euler|unipc"),
    (["--clips={a},{a},{a}", "--size=480"], 2, "--size is HEIGHTxWIDTH"),
    (["--clips={a},{a},{a}", "--size=0x16"], 2, "--size is HEIGHTxWIDTH"),
    (["--clips={a},{a},{a}", "--size=100000x100000"], 2, "--size=100000x100000 is more than 134,217,728 pixels"),
    (["--clips={a},{a},{a}", "--steps=1000000000"], 2, "--steps"),
    (["--clips={a},{a},{a}", f"--seed={2**63}"], 2, "--seed"),
    (["--clips={a},{a},{a}", "--sigmas=1,x"], 2, "--sigmas are numbers, separated by commas, got '1,x'"),
    (["--clips={a},{a},{a}", "--sigmas=0.5,1"], 2, "--sigmas are noise levels that descend strictly"),
    (["--clips={a},{a},{a}", "--sigmas=1,0.5", "--steps=2"], 2, "--sigmas replace --steps"),
    (["--clips={a},{a},{a}", "--solver=distilled", "--steps=9"], 2, "the solver distilled takes 4 steps, got 9"),
    (["--clips={a},{a},{a}", "--accelerate={a}:magic"], 1, "unknown kind of distillation 'magic'; there are lightx2v"),
    (
      ["--clips={a},{a},{a}", "--accelerate={lora}", "--steps=9"],
      2,
      "--steps contradicts the distillation lightx2v, which has 4: leave it out",
    ),
    (["--clips={a},{a},{a}", "--step_cache=teacache"], 2, "--step_cache is magcache[:THRESHOLD[:MAX_SKIP[:RETENT"),
    (["--clips={a},{a},{a}", "--step_cache=magcache:x"], 2, "--step_cache is magcache[:THRESHOLD[:MAX_SKIP[:RETENT"),
    (["--clips={a},{a},{a}", "--step_cache=magcache:-1"], 1, "the threshold of the step cache must be at least 0"),
    (["--clips={a},{a},{a}", "--guidance_range=1"], 2, "--guidance_range is two noise levels FROM,TO, got '1'"),
    (["--clips={a},{a},{a}", "--guidance_range=0,1"], 2, "--guidance_range needs guidance"),
    (["--clips={a},{a},{a}", "--negative_prompt=x"], 2, "--negative_prompt needs guidance: give a --guidance_scale"),
    (["--clips={a},{a},{a}", "--accelerate={lora}", "--negative_prompt=x"], 2, "guidance: leave it out with --accel"),
    (
      ["--clips={a},{a},{a}", "--accelerate={lora}", "--step_cache=magcache"],
      2,
      "--step_cache contradicts the distill",
    ),
    (["--clips={a},{a},{a}", "--shift=0"], 2, "error: --shift must be a positive number, got 0.0"),
    (["--clips={a},{a},{a}", "--guidance_scale=nan"], 2, "--guidance_scale must be finite, got nan"),
    (["--clips={a},{a},{a}", "--out="], 2, "--out must name a file or folder"),
    (["--clips={a},{a},{a}", "--out=.."], 2, "--out must name a file or folder"),
    (["--clips={a},{a},{a}", "--out=-"], 2, "--out must name a file or folder"),
    (["--clips={a},{a},{a}", "--out=/dev/null"], 2, "--out must name a file or folder"),
    (["--clips={a},{a},"], 1, "a clip needs a name"),
    (["--clips={a},{a},{a}", "--prompt=x", "--task=depth map"], 2, "--prompt and --task exclude each other"),
    (["--clips={a},{a},{a}", "--queries={a},{a}"], 2, "with --queries, --clips are example pairs"),
    (
      ["--clips={a},{a}", "--queries={a}", "--batch_size=0"],
      2,
      "--batch_size must be auto or a positive integer, got '0'",
    ),
    (
      ["--clips={a},{a},{a}", "--coordinator=x:1"],
      2,
      "several processes share the queries of --queries, and there are",
    ),
    (
      ["--clips={a},{a},{a}", "--num_processes=2"],
      2,
      "several processes share the queries of --queries, and there are",
    ),
    (["--clips={a},{a},{a}", "--warm_up", "--profile=2"], 2, "--warm_up samples nothing: leave out --profile"),
    (["--clips={a},{a},{a}", "--batch_size=3"], 2, "no --queries to sample in batches: leave out --batch_size"),
    (["--clips={a},{a},{a}", "--carry_context", "--num_frames=1"], 2, "with --num_frames, no whole video is sampled"),
    (["--clips={a},{a},{a}", "--copy_audio"], 2, "out.png has no sound, .mp4 and other videos have: leave out --copy"),
    (["--first_frame={a}", "--copy_audio", "--out={root}/out.mp4"], 2, "there are no --clips: leave out --copy_audio"),
    (["--clips={a},{a},{a}", "--lora_skip_unmatched"], 2, "no LoRA is added to the model: leave out --lora_skip"),
    (["--clips={a},{a},{a}", "--num_frames=4"], 2, "--num_frames must be 4n + 1 (1 or 5), got 4"),
    (["--clips={a},{a},{a}", "--num_frames=5"], 1, "cannot write 5 frames to the image"),
    (["--clips={a},{a},{a}", "--checkpoint={root}"], 1, "neither a converted checkpoint (no checkpoint.json) nor"),
    (["--clips={a},{a},{a}", "--prompt=make it black"], 1, "a prompt needs a text encoder"),
    (["--clips={a},{a},{a}", "--step=77"], 1, "no checkpoint of step 77"),
    (["--clips={a},{a},{a}", "--step=abc"], 1, "must be a number or \"best\", got 'abc'"),
  ],
)
def test_wrong_arguments_of_sample(trained, tmp_path, capfd, arguments, code, message):
  root, _ = trained
  for name in ("a.png", "a, b.png"):
    Image.new("RGB", (20, 20)).save(tmp_path / name)
  (tmp_path / "notes.txt").write_text("hello")
  (tmp_path / "q").mkdir()
  Image.new("RGB", (20, 20)).save(tmp_path / "q" / "a.png")
  (tmp_path / "q" / "bad.mp4").write_text("nonsense")
  (tmp_path / "q" / "empty.mp4").touch()
  lora = GOLDENS / "tiny_wan" / "univid_lora.ckpt"
  if "--accelerate={lora}" in arguments:
    package_or_skip("torch", reason="a .ckpt is a PyTorch file; needs the extra `convert`")
  names = {"a": tmp_path / "a.png", "text": tmp_path / "notes.txt", "root": tmp_path, "lora": lora}
  common = [f"--checkpoint={root / 'run'}", f"--out={tmp_path / 'out.png'}"]
  assert run_here("univid_jax.sample", *common, *(argument.format(**names) for argument in arguments)) == code
  stderr = capfd.readouterr().err
  assert message.format(**names) in stderr and "Traceback" not in stderr and "internal error" not in stderr, stderr
  assert not (tmp_path / "out.png").exists() and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
  "module, arguments, message",
  [
    ("sample", [], "give --checkpoint and --out; see --help"),
    ("sample", ["--checkpoint", "small"], "give --out; see --help"),
    ("calibrate", ["--checkpoint=small"], "give --clips; see --help"),
    (
      "sample",
      ["--num_inference_steps=4"],
      "unknown flag --num_inference_steps: did you mean --steps? --help lists all",
    ),
    ("sample", ["--ckpt=small"], "unknown flag --ckpt: did you mean --checkpoint? --help lists all"),
    ("sample", ["--checkpoint=small", "--zzz", "--out=x.png"], "unknown flag --zzz: --help lists all"),
  ],
)
def test_missing_flags_are_named_together(capfd, module, arguments, message):
  assert run_here(f"univid_jax.{module}", *arguments) == 2
  assert capfd.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
  "flags, message",
  [
    ("--verify --dtype=bfloat16 --quantize=int8", "compares what is there already: leave out --dtype and --quantize"),
    ("--verify --to=diffusers --force --lora_skip_unmatched", ": leave out --to, --force and --lora_skip_unmatched"),
    ("--inspect --verify --to=musubi", "--inspect only describes SRC: leave out --verify and --to"),
    ("--inspect --allow_missing=x --allow_missing=y", "--inspect only describes SRC: leave out --allow_missing"),
  ],
)
def test_flags_without_effect_on_convert(capfd, flags, message):
  assert run_here("univid_jax.convert.__main__", *(["a"] if "--inspect" in flags else ["a", "b"]), *flags.split()) == 2
  assert message in capfd.readouterr().err


def test_computed_data_need_no_preparation(tmp_path, capfd):
  assert run_here("univid_jax.prepare", *SMALL, f"--workdir={tmp_path}") == 0
  assert capfd.readouterr().out == "the data is computed while training: there is nothing to prepare\n"
