"""The evaluate command: its report matches the stored samples, interrupted or not, with one process or two."""

import functools
import json
import shutil
import signal
import socket
import time

import numpy as np
import pytest
from PIL import Image

from tests import commands
from tests.commands import run_command, run_here, start_command
from tests.helpers import compile_plain_step, image_width
from univid_jax import evaluate
from univid_jax.cli.evaluated_config import describe_config_differences, describe_ignored_overrides
from univid_jax.config import presets
from univid_jax.config.boundary import override
from univid_jax.evaluation import kinds
from univid_jax.evaluation.metrics.image import psnr
from univid_jax.training import loop

TASKS = {"scribble": 1.0, "salient_object": 1.0, "camera_movement": 0.5, "duotone": 0.0, "swap_channels": 0.0}
SMALL = (*commands.SMALL, *(f"--config.data.tasks.{name}={weight}" for name, weight in TASKS.items()))
TRAINING = (*SMALL, "--config.eval.sentences_per_case=0", "--config.validation.every_steps=0")
EVALUATION = ["--config.eval.sentences_per_case=1", "--config.eval.more_steps=(1,)", "--config.eval.num_seeds=2"]


def run(module, *arguments):
  done = run_command(module, *arguments)
  return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("evaluate") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "compile_train_step", compile_plain_step)
    assert run_here("univid_jax.train", *TRAINING, "--config.num_steps=3", f"--workdir={folder}") == 0
  assert run_here("univid_jax.evaluate", *SMALL, *EVALUATION, f"--workdir={folder}") == 0
  return folder


@pytest.fixture(scope="module")
def report(workdir):
  return json.loads((workdir / "evaluation" / "report.json").read_text())


def read_numbers(folder):
  """Reads a report without the command, which names the folder."""
  report = json.loads((folder / "report.json").read_text())
  del report["command"]
  return report


def test_report_matches_stored_samples(workdir, report):
  files = sorted((workdir / "evaluation" / "samples").glob("*/*.npz"))
  assert len(files) == len(report["sentences"]) == report["overall"]["prediction"]["count"]
  by_variant = {}
  for path in files:
    with np.load(path) as file:
      truth = file[max(name for name in file if name.startswith("clip_"))]
      for name in ("prediction", "swapped", "inverse", "steps_1", "seed_1"):
        by_variant.setdefault(name, []).append(psnr(file[f"sample_{name}"], truth))
  for name in ("swapped", "inverse", "steps_1"):
    assert report["overall"][name]["psnr"] == pytest.approx(np.mean(by_variant[name]))
  seeds = [np.mean(by_variant[name]) for name in ("prediction", "seed_1")]
  assert report["overall"]["prediction"]["psnr"] == pytest.approx(np.mean(seeds)) and "seed_1" not in report["overall"]
  assert report["overall"]["prediction"]["psnr_std"] == pytest.approx(np.std(seeds, ddof=1))
  assert {"ods", "ois", "ap"} <= report["by_task"]["scribble"]["prediction"].keys()
  assert report["by_task"]["scribble"]["codec"]["ods"] > report["by_task"]["scribble"]["prediction"]["ods"] + 0.2
  assert report["by_task"]["salient_object"]["codec"]["iou"] > 0.9
  assert report["by_task"]["camera_movement"]["codec"]["zoom_error"] < 10
  assert set(report["by_context"]) == {"I", "II", "III", "IV"}


def test_markdown_and_figures(workdir):
  folder = workdir / "evaluation"
  text = (folder / "report.md").read_text()
  assert "| all |" in text and "61.03 (1)" in text and "python -m univid_jax.evaluate" in text
  assert image_width(folder / "grid.png") > 500 and image_width(folder / "curves.png") > 500


@pytest.fixture(scope="module")
def undisturbed(workdir, tmp_path_factory):
  """A report by a process of its own, whose number of devices may round otherwise than this one's."""
  out = tmp_path_factory.mktemp("undisturbed")
  code, _, error = run("univid_jax.evaluate", *SMALL, *EVALUATION, f"--workdir={workdir}", f"--out={out}")
  assert code == 0, error
  return read_numbers(out)


@pytest.mark.long
def test_rerun_after_kill_gives_the_same_report(workdir, undisturbed, tmp_path):
  arguments = [*SMALL, *EVALUATION, f"--workdir={workdir}", f"--out={tmp_path / 'out'}"]
  process = start_command("univid_jax.evaluate", *arguments)
  while process.poll() is None and len(list((tmp_path / "out").glob("samples/*/*.npz"))) < 10:
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert not (tmp_path / "out" / "report.json").exists()
  code, _, error = run("univid_jax.evaluate", *arguments)
  assert code == 0, error
  assert read_numbers(tmp_path / "out") == undisturbed


@pytest.mark.long
def test_evaluating_again_after_more_training(workdir, tmp_path):
  """The report is of the new model alone, though the folder has samples of the old one."""
  shutil.copytree(workdir, tmp_path / "run")
  before = read_numbers(tmp_path / "run" / "evaluation")
  code, _, error = run("univid_jax.train", *TRAINING, "--config.num_steps=6", f"--workdir={tmp_path / 'run'}")
  assert code == 0, error
  evaluate = ["univid_jax.evaluate", *SMALL, *EVALUATION, f"--workdir={tmp_path / 'run'}"]
  for out in ("run/evaluation", "fresh"):
    code, _, error = run(*evaluate, f"--out={tmp_path / out}")
    assert code == 0, error
  again, fresh = (read_numbers(tmp_path / out) for out in ("run/evaluation", "fresh"))
  assert again == fresh and again["step"] == 6 and before["step"] == 3
  assert again["overall"]["prediction"] != before["overall"]["prediction"]
  assert len(list((tmp_path / "run" / "evaluation" / "samples").iterdir())) == 2


@pytest.mark.long
def test_two_processes_give_the_same_report(workdir, undisturbed, tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  processes = [
    start_command(
      "univid_jax.evaluate",
      *SMALL,
      *EVALUATION,
      f"--workdir={workdir}",
      f"--out={tmp_path / 'out'}",
      f"--coordinator=127.0.0.1:{port}",
      "--num_processes=2",
      f"--process_id={i}",
    )
    for i in range(2)
  ]
  outputs = [process.communicate(timeout=300) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  lines = [line for output in outputs[1] for line in output.splitlines() if "[Gloo]" not in line]
  assert lines == [], "process 0 alone prints"
  assert read_numbers(tmp_path / "out") == undisturbed


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--workdir=nowhere"], "nowhere does not exist: expected a converted checkpoint"),
    (["--lora_skip_unmatched"], "no LoRA is added to the model: leave out --lora_skip_unmatched"),
    (["--step=abc"], "must be a number or \"best\", got 'abc'"),
    (["--config.data.kinds={'x': 'magic'}"], "got 'magic'"),
    (["--config.eval.palette=nowhere.txt"], "nowhere.txt"),
    (["--config.data.test_pairs=nowhere"], "config.data.test_pairs is a test set, and there is no training data"),
    (["--config.eval.sentences_per_case=0"], "there is nothing to evaluate on"),
  ],
)
def test_errors_are_one_clear_line(workdir, capfd, arguments, message):
  folders = f"--workdir={workdir}", f"--out={workdir / 'other'}"
  code = run_here("univid_jax.evaluate", *SMALL, *folders, *arguments)
  error = capfd.readouterr().err
  assert code != 0 and message in error.strip().splitlines()[-1] and "Traceback" not in error, error


def test_the_config_is_that_of_the_run(workdir, report, tmp_path, monkeypatch, capfd):
  """Unless one is given; single values of it can be changed."""
  # Edges and poses, whose scores are not compared, take longer than all the rest.
  monkeypatch.setattr(kinds, "edge_counts", lambda *_: np.ones((99, 3)))
  monkeypatch.setattr(kinds, "camera_metrics", lambda *_, **__: {})
  folders = f"--workdir={workdir}", f"--out={tmp_path}"
  single = "--config.data.kinds={'scribble': 'edges'}", "--config.data.tasks.scribble=1"  # the default has neither
  assert run_here("univid_jax.evaluate", *folders, *EVALUATION, *single) == 0
  numbers = read_numbers(tmp_path)
  assert set(numbers["by_task"]) == set(report["by_task"])
  log = capfd.readouterr().err
  assert f"evaluating {len(numbers['sentences'])} sentences, at most 1 of each of " in log
  assert "is not the config of" not in log
  for name, scores in report["overall"].items():
    assert numbers["overall"][name]["psnr"] == pytest.approx(scores["psnr"], rel=1e-4)


def test_a_checkpoint_is_evaluated_on_a_config_that_was_named(capfd):
  assert evaluate.main(["evaluate", "--checkpoint=small"]) == 2
  assert "--checkpoint needs --config, which says what to evaluate on" in capfd.readouterr().err


def write_pairs(folder, names, size=(32, 48)):
  """Writes noise with depth; dark is far."""
  for i, name in enumerate(names):
    path = folder / "depth" / name
    path.mkdir(parents=True)
    rng = np.random.default_rng((len(names), i))
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path / "source.png")
    depth = np.where(np.arange(size[1]) < 16 + 8 * i, 50, 250).astype(np.uint8)
    Image.fromarray(np.broadcast_to(depth[:, None], (*size, 3))).save(path / "target.png")


def test_every_test_pair_is_used_with_training_examples(workdir, tmp_path):
  """Every test pair is used once; resizing keeps the values of depth; another alignment does not sample again."""
  write_pairs(tmp_path / "train", "abcd")
  write_pairs(tmp_path / "test", "xyz")
  command = [
    "univid_jax.evaluate",
    *SMALL,
    f"--workdir={workdir}",
    f"--out={tmp_path / 'out'}",
    "--config.data.bundled=False",
    f"--config.data.pairs={tmp_path / 'train'}",
    f"--config.data.test_pairs={tmp_path / 'test'}",
    "--config.data.kinds={'depth': 'depth'}",
    "--config.eval.sentences_per_case=3",
    "--config.data.contexts.I=0.0",
    "--config.data.contexts.III=0.0",
  ]
  assert run_here(*command) == 0
  report = json.loads((tmp_path / "out" / "report.json").read_text())
  assert report["by_task"]["depth"]["prediction"]["count"] == 3
  assert report["overall"]["swapped"]["count"] == 3  # inverted photographs, because there is no other task
  assert report["by_task"]["depth"]["codec"]["delta1"] > 0.9 and "abs_rel" in report["by_task"]["depth"]["prediction"]
  truths = []
  for path in sorted((tmp_path / "out" / "samples").glob("*/*.npz")):
    with np.load(path) as file:
      assert set(np.unique(file["clip_3"])) == {50, 250}
      truths.append(file["clip_3"].tobytes())
  assert len(set(truths)) == 3
  assert run_here(*command, "--config.eval.depth_alignment=median") == 0  # other scores of the same samples
  median = json.loads((tmp_path / "out" / "report.json").read_text())
  assert median["by_task"]["depth"]["prediction"]["psnr"] == report["by_task"]["depth"]["prediction"]["psnr"]
  assert median["by_task"]["depth"]["prediction"]["abs_rel"] != report["by_task"]["depth"]["prediction"]["abs_rel"]


def test_a_missing_run_is_not_created(tmp_path, capfd):
  assert run_here("univid_jax.evaluate", f"--workdir={tmp_path / 'nope'}") == 1
  assert "nope does not exist" in capfd.readouterr().err and not list(tmp_path.iterdir())


def test_another_config_than_that_of_the_run_is_named():
  trained, other = presets.small_lora(), presets.small()
  assert describe_ignored_overrides(["data.height", "eval.seed", "seed"]) is None
  line = describe_ignored_overrides(["flow.shift", "data.height", "model.dtype"])
  assert line == "ignored: config.flow.shift, config.model.dtype; evaluation does not need them, or uses the run's own"
  reading = ["data.num_threads", "data.cache", "data.stream_processes", "data.prompt_dropout", "data.jitter"]
  line = describe_ignored_overrides([*reading, "data.allow_dropped", "data.num_sentences"])
  ignored = ", ".join(f"config.{key}" for key in (*reading, "data.num_sentences"))
  assert line == f"ignored: {ignored}; evaluation does not need them, or uses the run's own"
  describe = functools.partial(describe_config_differences, name="small", workdir="runs/mine")
  line = describe(other, trained, overrides=[])
  assert line.startswith(
    "--config=small is not the config of runs/mine, by which it is evaluated without --config: "
    "data.bundled is True instead of False, "
  )
  assert line.endswith(" more")
  assert describe(trained, trained, overrides=[]) is None
  changed = override(trained, {"eval.batch_size": 3, "num_steps": 7})
  assert describe(changed, trained, overrides=[]).endswith(": eval.batch_size is 3 instead of 8")
  assert describe(changed, trained, overrides=["eval.batch_size"]) is None
