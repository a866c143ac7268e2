"""Exact matches of grids: metrics, intervals, groups, baselines, the score of ARC, reports."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from tests.commands import run_command
from tests.helpers import image_width, random_pipeline
from tests.test_arc import pair, task, write_tasks
from tests.test_evaluation import ORIGIN
from univid_jax.config.boundary import override
from univid_jax.config.presets import grids
from univid_jax.core.errors import UserError
from univid_jax.core.options import TargetKind
from univid_jax.data.sources.open import open_data
from univid_jax.data.tasks.grids import GRID_FAMILIES
from univid_jax.data.tasks.grids.rendering import Rendering
from univid_jax.evaluation import run
from univid_jax.evaluation.exact import (
  Failures,
  _answer_always,
  describe_arc,
  exact_report,
  score_grids,
  summary,
  table_rows,
)
from univid_jax.evaluation.generate import Generated, SentenceInfo
from univid_jax.evaluation.kinds import KIND_METRICS, KindOptions
from univid_jax.evaluation.metrics.grids import bootstrap_interval, grid_metrics, wilson_interval
from univid_jax.evaluation.sentences import plan_other_pairs, plan_sentences
from univid_jax.parallel.mesh import make_mesh

RENDERING = Rendering.from_config(grids().data)
GRID = np.arange(12).reshape(3, 4) % 10


class TestMetrics:
  def test_all_cells_and_the_size_must_be_right(self):
    wrong = GRID.copy()
    wrong[0, 0] = 5
    assert grid_metrics([GRID], [GRID]) == {"grid_accuracy": 1, "cell_accuracy": 1}
    assert grid_metrics([wrong], [GRID]) == {"grid_accuracy": 0, "cell_accuracy": 11 / 12}
    assert grid_metrics([GRID[:2]], [GRID]) == {"grid_accuracy": 0, "cell_accuracy": 8 / 12}
    assert grid_metrics([np.pad(GRID, (0, 1))], [GRID]) == {"grid_accuracy": 0, "cell_accuracy": 1}

  def test_the_first_state_of_a_video_does_not_count(self):
    other = GRID + 1
    assert grid_metrics([other, GRID, GRID], [GRID, GRID, GRID]) == {"grid_accuracy": 1, "cell_accuracy": 1}
    assert grid_metrics([GRID, GRID, other], [GRID, GRID, GRID]) == {"grid_accuracy": 0, "cell_accuracy": 0.5}
    with pytest.raises(ValueError, match="as many states"):
      grid_metrics([GRID], [GRID, GRID])

  @given(st.integers(1, 500), st.data())
  def test_wilson_equals_scipy(self, count, data):
    successes = data.draw(st.integers(0, count))
    expected = scipy.stats.binomtest(successes, count).proportion_ci(method="wilson")
    assert wilson_interval(successes / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)

  def test_bootstrap(self):
    values = np.random.default_rng(0).normal(0.5, 0.1, 400)
    low, high = bootstrap_interval(values.tolist())
    reach = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=1e-3)
    assert bootstrap_interval([0.25] * 3) == (0.25, 0.25) and bootstrap_interval(values.tolist()) == (low, high)


def generated(truth, predictions, *, task="maze", **params):
  """A sentence whose samples are grids; B is black."""
  black, answer = (RENDERING.render([grid]) for grid in (np.zeros_like(truth), truth))
  samples = {name: RENDERING.render([grid]) for name, grid in predictions.items()}
  info = SentenceInfo(task, "II", 4, [1] * 4, "", reverse=False, params=params or None)
  return Generated(info, [black, answer, black, answer], answer, samples)


def report_of(sentences, **options):
  kinds = {"maze": TargetKind.GRID, "arc": TargetKind.GRID}
  return exact_report([(each.info, score_grids(each, kinds, RENDERING)) for each in sentences], **options)


class TestReport:
  def test_shares_by_family_and_split(self):
    right = generated(GRID, {"prediction": GRID, "swapped": GRID[::-1]}, family="maze", split="held-out grids")
    wrong = generated(GRID, {"prediction": GRID[::-1], "swapped": GRID}, family="maze", split="held-out grids")
    other = generated(GRID, {"prediction": GRID, "swapped": GRID}, family="count", split="trained rules")
    report = report_of([right, wrong, right, other])
    maze, count = report["rows"]
    assert (maze["family"], maze["split"], maze["count"]) == ("maze", "held-out grids", 3)
    assert maze["scores"]["prediction"]["grid_accuracy"] == pytest.approx(2 / 3)
    assert maze["scores"]["prediction"]["grid_interval"] == wilson_interval(2 / 3, 3)
    assert maze["scores"]["swapped"]["grid_accuracy"] == pytest.approx(1 / 3)
    assert maze["scores"]["copy_b"]["grid_accuracy"] == 0 and maze["scores"]["codec"]["grid_accuracy"] == 1
    assert (count["family"], count["split"]) == ("count", "trained rules")
    head, rows = table_rows(report, "grid")
    columns = ["prediction", "wrong examples", "copy of B", "copy of A'", "most frequent answer", "codec"]
    assert head == ["family", "split", "sentences", *columns]
    assert rows[0][:4] == ["maze", "held-out grids", "3", "66.7% (21% to 94%)"]

  def test_the_most_frequent_answer_is_the_best_constant_one(self):
    truths = [GRID, GRID, GRID[::-1], GRID.T]
    report = report_of([generated(truth, {"prediction": truth}) for truth in truths])
    assert report["rows"][0]["scores"]["most_frequent"]["grid_accuracy"] == 0.5
    assert (report["rows"][0]["family"], report["rows"][0]["split"]) == ("maze", "held out")  # without parameters

  def test_the_most_frequent_answer_is_what_a_video_shows_after_its_source(self):
    sources = [np.full_like(GRID, color) for color in (1, 2, 3)]
    answers = [GRID[::-1], GRID, GRID]
    scores = _answer_always([*([source, answer] for source, answer in zip(sources, answers)), [GRID[::-1]]])
    assert [score["grid_accuracy"] for score in scores] == [0, 1, 1, 1]

  def test_seeds_are_averaged(self):
    samples = {"prediction": GRID, "seed_1": GRID[::-1], "seed_2": GRID[::-1], "steps_5": GRID}
    report = report_of([generated(GRID, samples)] * 4)
    scores = report["rows"][0]["scores"]
    assert scores["prediction"]["grid_accuracy"] == pytest.approx(1 / 3) and "seed_1" not in scores
    assert scores["prediction"]["grid_interval"] == wilson_interval(1 / 3, 4)

  def test_other_targets_are_no_grids(self):
    sentence = generated(GRID, {"prediction": GRID}, task="invert")
    assert report_of([sentence]) is None
    reverse = dataclasses.replace(sentence.info, task="maze", reverse=True)
    assert report_of([dataclasses.replace(sentence, info=reverse)]) is None

  def test_kind_metrics_agree(self):
    sentence = generated(GRID, {"prediction": GRID})
    options = KindOptions.from_config(grids())
    metrics, _ = KIND_METRICS[TargetKind.GRID].score(RENDERING.render([GRID[:, ::-1]]), sentence, options)
    assert metrics == grid_metrics([GRID[:, ::-1]], [GRID])

  def test_a_target_that_is_drawn_otherwise_is_an_error(self):
    sentence = generated(GRID, {"prediction": GRID})
    larger = dataclasses.replace(RENDERING, cell=2).render([GRID])
    for truth in (larger, np.full_like(larger, 100)):
      other = dataclasses.replace(sentence, clips=[*sentence.clips[:-1], truth])
      message = (
        "of the pixels in a target of task 'maze' are not those of a grid with cells of config.data.grids.cell = 4"
      )
      with pytest.raises(UserError, match=message):
        report_of([other])


class TestARC:
  def arc(self, name, test, num_tests, *attempts):
    samples = dict(zip(("prediction", "seed_1", "seed_2"), (GRID if right else GRID[::-1] for right in attempts)))
    return generated(GRID, samples, task="arc", family="arc", arc_task=name, test=test, num_tests=num_tests, split="s")

  def test_every_test_must_be_right_in_one_of_two_attempts(self):
    sentences = [
      self.arc("first attempt", 0, 1, True, False, False),
      self.arc("second attempt", 0, 1, False, True, False),
      self.arc("third attempt", 0, 1, False, False, True),
      self.arc("one of two tests", 0, 2, True, True, True),
      self.arc("one of two tests", 1, 2, False, False, True),
      self.arc("both tests", 0, 2, True, False, False),
      self.arc("both tests", 1, 2, False, True, False),
    ]
    arc = report_of(sentences, num_arc_tests=7)["arc"]
    assert (arc["solved"], arc["tasks"], arc["attempts"], arc["score"]) == (3, 5, 2, 0.6)
    assert arc["interval"] == wilson_interval(0.6, 5)
    arc = report_of(sentences, num_arc_tests=7, num_left_out=5)["arc"]
    assert (arc["solved"], arc["tasks"], arc["score"]) == (3, 10, 0.3)
    assert describe_arc(arc) == (
      "ARC: 3 of 10 tasks solved, 30.0% (10.8% to 60.3%): every test is right in one of 2 attempts; 5 of the tasks "
      "do not fit the canvas and count as unsolved."
    )

  def test_the_score_is_of_all_tests(self):
    """A part of them, beside the tasks that do not fit, says nothing about the others."""
    sentences = [self.arc(f"task {number}", 0, 1, True) for number in range(32)]
    arc = report_of(sentences, num_arc_tests=250, num_left_out=150)["arc"]
    without = dict.fromkeys(("solved", "tasks", "left_out", "attempts", "score", "interval"))
    assert arc == {"tests": 250, "sampled": 32, **without}
    assert describe_arc(arc) == (
      "ARC: 32 of 250 tests were sampled, but the benchmark's score needs all of them: "
      "--config.eval.sentences_per_case=250 samples those that can be used."
    )

  def test_wrong_examples_are_of_another_task(self, tmp_path):
    path = write_tasks(tmp_path, {name: task(seed) for seed, name in enumerate("abc")})
    config = override(grids(), {"data.arc.test_path": path, "data.weights.grids": 0.0})
    sentences = plan_sentences(config, open_data(config).held_out)
    assert [sentence.case.task for sentence in sentences] == ["a", "b", "c"]
    for sentence, read_other in zip(sentences, plan_other_pairs(config, sentences), strict=True):
      other = read_other()
      assert other.task == "arc" and other.params["arc_task"] != sentence.case.task


SMALL = {
  "model.dim": 32,
  "model.ffn_dim": 32,
  "model.num_layers": 1,
  "eval.sentences_per_case": 2,
  "eval.num_inference_steps": 1,
  "eval.num_seeds": 2,
}


class TestCases:
  def test_every_family_split_and_context(self):
    config = override(grids(), {"eval.sentences_per_case": 2})
    sentences = plan_sentences(config, open_data(config).held_out)
    found = {}
    for planned in sentences:
      sentence = planned.read()
      key = (sentence.params["family"], sentence.params["split"], sentence.context)
      found[key] = found.get(key, 0) + 1
      assert planned.case == (sentence.params["family"], sentence.context, len(sentence.clips))
    expected = set()
    for name, family in GRID_FAMILIES.items():
      for context in ("I", "II", "III", "IV") if family.evolve else ("II",):
        splits = ("held-out rules", "trained rules") if family.is_held_out else ("held-out grids",)
        expected |= {(name, split, context) for split in splits}
    assert found == dict.fromkeys(expected, 2)

  def test_every_case_has_its_own_seed(self):
    """Reports depend on the numbers."""
    config = override(grids(), {"eval.sentences_per_case": 2, "eval.seed": 7, "data.contexts": {"II": 1.0}})
    cases = [planned.read.func.__self__ for planned in plan_sentences(config, open_data(config).held_out)]
    assert [case.seed for case in cases] == [7000 + number // 2 for number in range(len(cases))] and len(cases) > 20


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
  """(folder, eval.json, report.json, report.md) of a model with random weights, on two families and ARC."""
  folder = tmp_path_factory.mktemp("exact")
  large = {"train": [pair(1, 9, 9)], "test": [pair(2)]}
  tasks = write_tasks(folder / "tasks", {"a": task(1), "b": task(2), "large": large})
  families = {f"data.grids.families.{name}": float(name in ("recolor", "maze")) for name in GRID_FAMILIES}
  config = override(grids(), families | SMALL | {"data.arc.test_path": tasks, "data.contexts": {"II": 1.0}})
  pipeline = random_pipeline(config, make_mesh({"data": -1}))
  quick = run.evaluate_quick(pipeline, config, folder)
  run.evaluate(pipeline, config, data=open_data(config), folder=folder / "full", origin=ORIGIN)
  full = json.loads((folder / "full" / "report.json").read_text())
  return folder, quick, full, (folder / "full" / "report.md").read_text()


class TestEvaluation:
  def test_quick_and_full_agree(self, reports):
    folder, quick, full, _ = reports
    assert json.loads((folder / "eval.json").read_text())["exact"] == json.loads(json.dumps(quick["exact"]))
    rows = [(row["family"], row["split"], row["count"]) for row in quick["exact"]["rows"]]
    assert rows == [(row["family"], row["split"], row["count"]) for row in full["exact"]["rows"]]
    assert sorted(rows) == [
      ("arc", "held-out tasks", 2),
      ("maze", "held-out grids", 2),
      ("recolor", "held-out rules", 2),
      ("recolor", "trained rules", 2),
    ]
    for mine, theirs in zip(quick["exact"]["rows"], json.loads(json.dumps(full["exact"]["rows"]))):
      for name in ("swapped", "copy_b", "codec", "most_frequent"):
        assert json.loads(json.dumps(mine["scores"][name])) == theirs["scores"][name]
      assert mine["scores"]["codec"]["grid_accuracy"] == 1, "the codec keeps every cell"
      assert mine["scores"]["copy_b"]["grid_accuracy"] == 0
    assert quick["exact"]["arc"]["attempts"] == 1 and full["exact"]["arc"]["attempts"] == 2
    assert full["exact"]["arc"]["tasks"] == 3 and full["exact"]["arc"]["left_out"] == 1

  def test_report_shows_tables_and_failures(self, reports):
    folder, _, full, text = reports
    assert "## Exact matches" in text and "| maze | held-out grids | 2 | 0.0% (0% to 66%) |" in text
    assert "ARC: 0 of 3 tasks solved, 0.0% (0.0% to 56.1%): every test is right in one of 2 attempts; 1 of the " in text
    lines = summary(full["exact"])
    assert "exact grids, held-out rules: recolor 0%" in lines and lines[-1].startswith("ARC: 0 of 3 tasks solved")
    assert "grid_accuracy" in full["by_task"]["maze"]["prediction"]
    assert "grid_accuracy" in full["by_task"]["recolor_trained_rules"]["prediction"]
    for path in (folder / "failures.png", folder / "full" / "failures.png"):
      assert image_width(path) > 500

  def test_without_failures_there_is_no_picture(self, tmp_path):
    (tmp_path / "failures.png").write_bytes(b"of an earlier evaluation")
    failures = Failures(RENDERING)
    sentence = generated(GRID, {"prediction": GRID})
    failures.add(sentence, score_grids(sentence, {"maze": TargetKind.GRID}, RENDERING))
    failures.draw(epath.Path(tmp_path) / "failures.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_commands_report_exact_matches(tmp_path):
  small = [f"--config.{key}={value}" for key, value in SMALL.items()] + ["--config=grids", f"--workdir={tmp_path}"]
  trained = run_command("univid_jax.train", *small, "--config.num_steps=4", "--config.validation.every_steps=0")
  assert trained.returncode == 0, trained.stderr
  assert (
    "PSNR of B' on held-out sentences:" in trained.stdout and "exact grids, held-out grids: life " in trained.stdout
  )
  evaluated = run_command("univid_jax.evaluate", *small)
  assert evaluated.returncode == 0, evaluated.stderr
  assert "exact grids, held-out rules: recolor " in evaluated.stdout
  assert "## Exact matches" in (tmp_path / "evaluation" / "report.md").read_text()
