"""Exact matches: how many grids are right in every cell, by family and split, and the score of the ARC benchmark."""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from univid_jax.core.options import TargetKind
from univid_jax.core.paths import atomic_write
from univid_jax.core.text import count_noun
from univid_jax.data.pictures import sentence_grid, shown_context
from univid_jax.data.tasks.grids.base import Grid
from univid_jax.data.tasks.grids.rendering import Rendering
from univid_jax.evaluation.candidates import Candidate
from univid_jax.evaluation.generate import Generated, SentenceInfo, is_repetition
from univid_jax.evaluation.kinds import score_grid
from univid_jax.evaluation.metrics.grids import bootstrap_interval, counted_states, grid_metrics, wilson_interval
from univid_jax.evaluation.score import Score, group_by, scored_clips, target_kind

# Candidates for grids, in the order of the table's columns.
COLUMNS = (
  Candidate.PREDICTION,
  Candidate.ACCELERATED,
  Candidate.SWAPPED,
  Candidate.COPY_B,
  Candidate.COPY_A2,
  Candidate.MOST_FREQUENT,
  Candidate.CODEC,
)
INTERVALS = (
  "95 % intervals: Wilson's for grids, of as many trials as sentences whatever the seeds; bootstrap over sentences for "
  "cells."
)
# The benchmark's number of attempts per test, one of which must be right.
ARC_ATTEMPTS = 2
FAILURES_PER_GROUP = 2

Scored = Sequence[tuple[SentenceInfo, Sequence[Score]]]


def score_grids(generated: Generated, kinds: Mapping[str, TargetKind], rendering: Rendering) -> list[Score]:
  """Scores all clips of a sentence as grids only, at little cost; returns [] if its target is not a grid.

  Args:
    generated: the sentence and its samples.
    kinds: see `target_kind`.
    rendering: how grids are drawn.
  """
  if target_kind(generated.info, kinds) is not TargetKind.GRID:
    return []
  scores = []
  for name, clip in scored_clips(generated).items():
    metrics, counts = score_grid(clip, generated, rendering)
    scores.append(Score(name, metrics, TargetKind.GRID, counts))
  return scores


def exact_report(scored: Scored, *, num_arc_tests: int = 0, num_left_out: int = 0) -> dict[str, Any] | None:
  """Returns the shares of exact grids and of right cells by family and split; None if no target is a grid.

  Args:
    scored: the scores of each sentence.
    num_arc_tests: number of held-out tests of ARC; there is a score only if all of them were sampled.
    num_left_out: number of tasks of ARC that do not fit the canvas; they count as unsolved.
  """
  grids = [(info, [score for score in scores if score.kind is TargetKind.GRID]) for info, scores in scored]
  grids = [(info, scores) for info, scores in grids if scores]
  if not grids:
    return None
  rows = [
    {"family": family, "split": split, "count": len(group), "scores": dict(_compare(group))}
    for (family, split), group in group_by(grids, _group_name).items()
  ]
  report: dict[str, Any] = {"intervals": INTERVALS, "rows": rows}
  if arc := [(info, scores) for info, scores in grids if _params(info).get("arc_task")]:
    without = ("solved", "tasks", "left_out", "attempts", "score", "interval")
    report["arc"] = {"tests": num_arc_tests, "sampled": len(arc), **dict.fromkeys(without)}
    if len(arc) == num_arc_tests:
      report["arc"] |= _score_arc(arc, num_left_out)
  return report


def _params(info: SentenceInfo) -> Mapping[str, Any]:
  return info.params or {}


def _group_name(info: SentenceInfo) -> tuple[str, str]:
  """Returns family and split; for grids that are not computed here, the task instead."""
  return _params(info).get("family", info.label), _params(info).get("split", "held out")


def _compare(group: Scored) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields the names of candidates, and their shares with intervals."""
  yield Candidate.PREDICTION, _summarize([_mean_of_seeds(scores) for _, scores in group])
  for name in dict.fromkeys(score.name for _, scores in group for score in scores):
    if name != Candidate.PREDICTION and not is_repetition(name):
      yield name, _summarize([score.metrics for _, scores in group for score in scores if score.name == name])
  truths = [scores[0].counts["truth"] for _, scores in group]
  yield Candidate.MOST_FREQUENT, _summarize(_answer_always(truths))


def _attempts(scores: Sequence[Score]) -> list[Score]:
  """Returns the prediction, then its repetitions with other noise."""
  return [score for score in scores if score.name == Candidate.PREDICTION or is_repetition(score.name)]


def _mean_of_seeds(scores: Sequence[Score]) -> dict[str, float]:
  runs = [score.metrics for score in _attempts(scores)]
  return {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}


def _summarize(metrics: Sequence[Mapping[str, float]]) -> dict[str, Any]:
  grids, cells = ([each[f"{name}_accuracy"] for each in metrics] for name in ("grid", "cell"))
  return {
    "grid_accuracy": float(np.mean(grids)),
    "grid_interval": wilson_interval(float(np.mean(grids)), len(grids)),
    "cell_accuracy": float(np.mean(cells)),
    "cell_interval": bootstrap_interval(cells),
  }


def _answer_always(truths: Sequence[Sequence[Grid]]) -> list[dict[str, float]]:
  """Scores the answer that is right most often, images and videos separately: no constant answer does better."""
  keys = [(len(truth), *((grid.shape, grid.tobytes()) for grid in counted_states(truth))) for truth in truths]
  best = {}
  for length in set(map(len, truths)):
    most_frequent, _ = collections.Counter(key for key in keys if key[0] == length).most_common(1)[0]
    best[length] = truths[keys.index(most_frequent)]
  return [grid_metrics(best[len(truth)], truth) for truth in truths]


def _score_arc(scored: Scored, num_left_out: int) -> dict[str, Any]:
  """Returns the score of the benchmark: a task is solved if one of two attempts is right in each of its tests."""
  tests: dict[str, list[bool]] = collections.defaultdict(list)
  num_attempts = 0
  for info, scores in scored:
    attempts = _attempts(scores)[:ARC_ATTEMPTS]
    num_attempts = len(attempts)
    tests[_params(info)["arc_task"]].append(any(score.metrics["grid_accuracy"] == 1 for score in attempts))
  solved, count = sum(map(all, tests.values())), len(tests) + num_left_out
  return {
    "solved": solved,
    "tasks": count,
    "left_out": num_left_out,
    "attempts": num_attempts,
    "score": solved / count,
    "interval": wilson_interval(solved / count, count),
  }


def table_rows(report: Mapping[str, Any], key: str) -> tuple[list[str], list[list[str]]]:
  """Returns the head and the rows of a table.

  Args:
    report: result of `exact_report`.
    key: "grid" or "cell".
  """
  names = [name for name in COLUMNS if any(name in row["scores"] for row in report["rows"])]
  head = ["family", "split", "sentences", *(name.label for name in names)]
  rows = [
    [row["family"], row["split"], str(row["count"]), *(_percent(row["scores"].get(name), key) for name in names)]
    for row in report["rows"]
  ]
  return head, rows


def summary(report: Mapping[str, Any]) -> list[str]:
  """Returns a line per split with the share of exact grids of each family, and one for ARC."""
  lines = []
  for split in dict.fromkeys(row["split"] for row in report["rows"]):
    rows = [row for row in report["rows"] if row["split"] == split]
    shares = [f"{row['family']} {row['scores'][Candidate.PREDICTION]['grid_accuracy']:.0%}" for row in rows]
    lines.append(f"exact grids, {split}: {', '.join(shares)}")
  return lines + ([describe_arc(report["arc"])] if "arc" in report else [])


def describe_arc(arc: Mapping[str, Any]) -> str:
  """Describes the score of the ARC benchmark in a sentence, or says why there is none."""
  if arc["score"] is None:
    return (
      f"ARC: {arc['sampled']} of {arc['tests']} tests were sampled, but the benchmark's score needs all of them: "
      f"--config.eval.sentences_per_case={arc['tests']} samples those that can be used."
    )
  low, high = arc["interval"]
  left_out = f"; {arc['left_out']} of the tasks do not fit the canvas and count as unsolved" if arc["left_out"] else ""
  return (
    f"ARC: {arc['solved']} of {arc['tasks']} tasks solved, {arc['score']:.1%} ({low:.1%} to {high:.1%}): every test is "
    f"right in one of {count_noun(arc['attempts'], 'attempt')}{left_out}."
  )


def _percent(values: Mapping[str, Any] | None, key: str) -> str:
  if values is None:
    return "-"
  low, high = values[f"{key}_interval"]
  return f"{values[f'{key}_accuracy']:.1%} ({low:.0%} to {high:.0%})"


class Failures:
  """Keeps the first wrong predictions of each family and split, for a picture.

  Args:
    rendering: how grids are drawn.
  """

  def __init__(self, rendering: Rendering):
    self._rendering = rendering
    self._examples: dict[tuple[str, str], list[tuple[Generated, float]]] = collections.defaultdict(list)

  def add(self, generated: Generated, scores: Sequence[Score]) -> None:
    for score in scores:
      if score.name == Candidate.PREDICTION and score.kind is TargetKind.GRID and score.metrics["grid_accuracy"] < 1:
        examples = self._examples[_group_name(generated.info)]
        if len(examples) < FAILURES_PER_GROUP:
          examples.append((generated, score.metrics["cell_accuracy"]))

  def draw(self, path: epath.Path) -> None:
    """Draws A, A', B, the prediction, the grid it is read as, and the ground truth; without any removes the file."""
    rows = []
    for (family, split), examples in self._examples.items():
      for generated, cells in examples:
        predicted = generated.samples[Candidate.PREDICTION]
        clips = [
          *shown_context(generated.clips[:-1]),
          predicted,
          self._rendering.render(self._rendering.decode(predicted)),
        ]
        rows.append((f"{family}\n{split}\n{cells:.0%} of the cells", [*clips, generated.clips[-1]]))
    if not rows:
      path.unlink(missing_ok=True)
    else:
      with atomic_write(path) as unfinished:
        sentence_grid(unfinished, rows, columns=("A", "A'", "B", "B' predicted", "B' as read", "B' true"))
