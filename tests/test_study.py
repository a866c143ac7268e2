"""Evaluation from the command line: the report is what the saved frames say, however often it was interrupted."""

import json
import signal
import socket
import time

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sklearn_metrics

from configs.video_tasks import get_config
from tests import commands
from tests.commands import run_command, start_command
from univid_jax.data.kinds import label_colors, normals_picture
from univid_jax.metrics.dense import nearest_labels
from univid_jax.metrics.image import psnr
from univid_jax.report import Score, Scorer, between, task_of
from univid_jax.study import Painted

SMALL = (*commands.SMALL, "--config.data.tasks.scribble=1.0", "--config.data.tasks.salient_object=1.0")
EVALUATION = ["--config.eval.sentences_per_case=2", "--config.eval.more_steps=(1,)", "--config.eval.num_seeds=2"]


def run(module, *arguments):
  done = run_command(module, *arguments)
  return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("study") / "run"
  code, _, error = run("univid_jax.train", *SMALL, "--config.num_steps=3", "--config.eval.sentences_per_case=0",
                       "--config.validation.every_steps=0", f"--workdir={folder}")
  assert code == 0, error
  code, _, error = run("univid_jax.evaluate", *SMALL, *EVALUATION, f"--workdir={folder}")
  assert code == 0, error
  return folder


@pytest.fixture(scope="module")
def report(workdir):
  return json.loads((workdir / "evaluation" / "report.json").read_text())


def numbers(folder):
  """A report without what differs between two folders."""
  report = json.loads((folder / "report.json").read_text())
  return {key: value for key, value in report.items() if key not in ("command",)}


def test_the_report_is_what_the_frames_say(workdir, report):
  files = sorted((workdir / "evaluation" / "samples").glob("*.npz"))
  assert len(files) == len(report["sentences"]) == report["overall"]["painted"]["count"]
  by_condition = {}
  for path in files:
    with np.load(path) as file:
      truth = file[max(name for name in file if name.startswith("clip_"))]
      for name in ("painted", "swapped", "reversed", "steps_1", "seed_1"):
        by_condition.setdefault(name, []).append(psnr(file[f"condition_{name}"], truth))
  for name in ("swapped", "reversed", "steps_1"):
    assert report["overall"][name]["psnr"] == pytest.approx(np.mean(by_condition[name]))
  seeds = [np.mean(by_condition[name]) for name in ("painted", "seed_1")]
  assert report["overall"]["painted"]["psnr"] == pytest.approx(np.mean(seeds)) and "seed_1" not in report["overall"]
  assert report["overall"]["painted"]["psnr_std"] == pytest.approx(np.std(seeds, ddof=1))
  assert {"ods", "ois", "ap"} <= report["by_task"]["scribble"]["painted"].keys()
  assert report["by_task"]["scribble"]["codec"]["ods"] > report["by_task"]["scribble"]["painted"]["ods"] + 0.2
  assert report["by_task"]["salient_object"]["codec"]["iou"] > 0.9
  assert report["by_task"]["camera_movement"]["codec"]["zoom_error"] < 10
  assert set(report["by_context"]) == {"I", "II", "III", "IV"}


def test_what_people_read(workdir):
  folder = workdir / "evaluation"
  text = (folder / "report.md").read_text()
  assert "| all |" in text and "61.03 (1)" in text and "python -m univid_jax.evaluate" in text
  assert Image.open(folder / "grid.png").size[0] > 500 and Image.open(folder / "curves.png").size[0] > 500


@pytest.mark.long
def test_killed_and_run_again(workdir, tmp_path):
  arguments = [*SMALL, *EVALUATION, f"--workdir={workdir}", f"--out={tmp_path / 'out'}"]
  process = start_command("univid_jax.evaluate", *arguments)
  while process.poll() is None and len(list((tmp_path / "out").glob("samples/*.npz"))) < 10:
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (tmp_path / "out" / "report.json").exists()
  code, _, error = run("univid_jax.evaluate", *arguments)
  assert code == 0, error
  assert numbers(tmp_path / "out") == numbers(workdir / "evaluation")
  code, _, error = run("univid_jax.evaluate", *arguments, "--config.eval.seed=9")
  assert code == 1 and "holds an evaluation of another model or config" in error.strip().splitlines()[-1]


@pytest.mark.long
def test_two_processes_write_the_same_report(workdir, tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  processes = [start_command("univid_jax.evaluate", *SMALL, *EVALUATION, f"--workdir={workdir}", f"--out={tmp_path / 'out'}",
                             f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}") for i in range(2)]
  for process in processes:
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
  assert numbers(tmp_path / "out") == numbers(workdir / "evaluation")


@pytest.mark.parametrize("arguments, message", [
    (["--workdir=nowhere"], "neither a converted checkpoint"),
    (["--config.data.kinds={'x': 'magic'}"], "got 'magic'"),
    (["--config.eval.palette=nowhere.txt"], "nowhere.txt"),
    (["--config.data.test_pairs=nowhere"], "config.data.test_pairs is a test set, and there is no training data"),
    (["--config.eval.sentences_per_case=0"], "there is nothing to evaluate on"),
])
def test_one_clear_line(workdir, arguments, message):
  code, _, error = run("univid_jax.evaluate", *SMALL, f"--workdir={workdir}", f"--out={workdir / 'other'}", *arguments)
  assert code != 0 and message in error.strip().splitlines()[-1], error


def scorer(**options):
  config = get_config()
  config.data.depth_range = (1.0, 5.0)
  config.eval.depth_alignment = "none"
  config.eval.update(options)
  return Scorer(config)


class TestKinds:
  def painted(self, truth, params=None, reverse=False, task="t"):
    return Painted(0, {"task": task, "params": params, "reverse": reverse, "prompt": ""}, (truth, truth, truth, truth), truth,
                   {"painted": truth})

  def test_pictures_of_depth(self):
    truth = np.full((1, 4, 4, 3), 255, np.uint8)
    truth[:, :2] = 127
    truth[:, 3] = 0  # unknown
    found, _ = scorer().of_kind("depth", truth, self.painted(truth))
    assert found["delta1"] == 1 and found["rmse"] == 0
    half = truth.copy()
    half[:, 2] = 51  # 4.2 m where 1 m is true
    found, _ = scorer().of_kind("depth", half, self.painted(truth))
    assert found["abs_rel"] == pytest.approx(3.2 / 3) and found["delta3"] == pytest.approx(2 / 3)

  def test_pictures_of_normals(self):
    vectors = np.random.default_rng(0).normal(size=(1, 5, 5, 3))
    truth = normals_picture(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))
    assert scorer().of_kind("normals", truth, self.painted(truth))[0]["mean"] < 1

  def test_pictures_of_labels(self, tmp_path):
    """By the nearest colour of a palette; over a data set by the sum of all pictures' pixels."""
    colors = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)
    (tmp_path / "palette.txt").write_text("\n".join(" ".join(map(str, color)) for color in colors))
    of_labels = scorer(palette=str(tmp_path / "palette.txt"))
    rng = np.random.default_rng(0)
    labels = colors[rng.integers(0, 3, (1, 6, 6))]
    noisy = np.clip(labels.astype(int) + rng.integers(-20, 21, labels.shape), 0, 255).astype(np.uint8)
    assert of_labels.of_kind("segmentation", noisy, self.painted(labels))[0]["miou"] == 1
    swapped = labels[..., [1, 0, 2]]
    found, _ = of_labels.of_kind("segmentation", swapped, self.painted(labels))
    assert found["pixel_accuracy"] < 0.6 and found["pixel_accuracy_matched"] == 1
    one, other = labels.copy(), np.zeros_like(labels)
    one[:, :3] = colors[1]
    scores = [Score(i, "painted", *of_labels.of_kind("segmentation", clip, self.painted(labels)))
              for i, clip in enumerate((one, other))]
    row = of_labels.table(scores)["painted"]
    numbers = [nearest_labels(clip, colors).ravel() for clip in (labels, labels, one, other)]
    jaccard = sklearn_metrics.jaccard_score(np.concatenate(numbers[:2]), np.concatenate(numbers[2:]), average="macro")
    assert row["miou"] == pytest.approx(jaccard) and row["miou"] != pytest.approx(np.mean([s.metrics["miou"] for s in scores]))

  def test_label_maps_of_other_colors(self):
    """As TFDS paints them no palette has to be given; a map of other colours is an error and not a score."""
    labels = np.random.default_rng(0).integers(0, 256, (1, 6, 6))
    assert scorer().of_kind("segmentation", label_colors(labels), self.painted(label_colors(labels)))[0]["miou"] == 1
    with pytest.raises(ValueError, match="of a label map of task 't' are of no label's colour: give the colours with"):
      scorer(num_labels=3).of_kind("segmentation", label_colors(labels), self.painted(label_colors(labels)))

  def test_turned_round_it_is_no_map(self):
    """The target of a scribble turned round is a photograph: it has no edges to be found."""
    truth = np.zeros((1, 16, 16, 3), np.uint8)
    params = {"paper": (0, 0, 0), "ink": (1, 1, 1)}
    (there, *_), (back, *_) = (scorer()(self.painted(truth, params, reverse, "scribble")) for reverse in (False, True))
    assert "edges" in there.counts and not back.counts
    assert task_of({"task": "scribble", "reverse": True}) == "scribble turned round"

  def test_between_two_colors(self):
    clip = np.array([[0, 0, 0], [255, 255, 255], [51, 51, 51]], np.uint8)
    np.testing.assert_allclose(between(clip, (0, 0, 0), (1, 1, 1)), [0, 1, 0.2], atol=1e-6)

  def test_only_defined_values_count(self):
    rows = scorer().table([Score(0, "painted", {"psnr": 10.0, "x": float("nan")}), Score(1, "painted", {"psnr": 20.0, "x": 3.0})])
    assert rows == {"painted": {"psnr": 15.0, "x": 3.0, "count": 2}}


class TestOwnData:
  def pairs(self, folder, names, size=(32, 48)):
    """Noise with its depth: what is far is dark."""
    for i, name in enumerate(names):
      path = folder / "depth" / name
      path.mkdir(parents=True)
      rng = np.random.default_rng((len(names), i))
      Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path / "source.png")
      depth = np.where(np.arange(size[1]) < 16 + 8 * i, 50, 250).astype(np.uint8)
      Image.fromarray(np.broadcast_to(depth[:, None], (*size, 3))).save(path / "target.png")

  def test_a_test_set(self, workdir, tmp_path):
    """Each test pair is asked for once, with examples of the training; depth keeps its values when it is resized."""
    self.pairs(tmp_path / "train", "abcd")
    self.pairs(tmp_path / "test", "xyz")
    command = ["univid_jax.evaluate", *SMALL, f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--config.data.bundled=False",
               f"--config.data.pairs={tmp_path / 'train'}", f"--config.data.test_pairs={tmp_path / 'test'}",
               "--config.data.kinds={'depth': 'depth'}", "--config.eval.sentences_per_case=3", "--config.data.contexts.I=0.0",
               "--config.data.contexts.III=0.0"]
    code, _, error = run(*command)
    assert code == 0, error
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["by_task"]["depth"]["painted"]["count"] == 3
    assert report["overall"]["swapped"]["count"] == 3  # with an inverted photograph: there is no other task
    assert report["by_task"]["depth"]["codec"]["delta1"] > 0.9 and "abs_rel" in report["by_task"]["depth"]["painted"]
    truths = []
    for path in sorted((tmp_path / "out" / "samples").glob("*.npz")):
      with np.load(path) as file:
        assert set(np.unique(file["clip_3"])) == {50, 250}
        truths.append(file["clip_3"].tobytes())
    assert len(set(truths)) == 3
    code, _, error = run(*command, "--config.eval.depth_alignment=median")  # scored otherwise, from the same pictures
    assert code == 0, error
    median = json.loads((tmp_path / "out" / "report.json").read_text())
    assert median["by_task"]["depth"]["painted"]["psnr"] == report["by_task"]["depth"]["painted"]["psnr"]
    assert median["by_task"]["depth"]["painted"]["abs_rel"] != report["by_task"]["depth"]["painted"]["abs_rel"]
