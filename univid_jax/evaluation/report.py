"""Reports of an evaluation: tables of scores by task, context and number of clips, as JSON, Markdown and pictures."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from univid_jax.config.boundary import to_json
from univid_jax.config.schema import RunConfig
from univid_jax.core.json_files import format_json
from univid_jax.core.paths import atomic_write, write_text
from univid_jax.core.text import count_noun
from univid_jax.data.pictures import COLUMNS, FPS, sentence_animation, sentence_grid, shown_context
from univid_jax.data.sources.computed import describe_held_out
from univid_jax.evaluation import exact, published
from univid_jax.evaluation.candidates import Candidate
from univid_jax.evaluation.generate import Generated, SentenceInfo, steps_variant
from univid_jax.evaluation.kinds import Metrics
from univid_jax.evaluation.metrics.image import psnr
from univid_jax.evaluation.score import Score, Scorer, group_by, mean_metrics

log = logging.getLogger(__name__)

# Pictures that report.md shows, if they exist.
PICTURES = ("grid.png", "grid.webp", "failures.png", "curves.png")

# The keys of eval.json, and the candidates whose PSNR they hold.
QUICK_KEYS = {"psnr": Candidate.PREDICTION} | {
  f"psnr_{name}": name
  for name in (Candidate.COPY_B, Candidate.COPY_A2, Candidate.MEAN_A2, Candidate.CODEC, Candidate.SWAPPED)
}

# Metrics in dB, levels of grey, degrees and hundredths; all others are shares, or errors relative to one.
TWO_DECIMALS = ("psnr", "rmse", "clip_i", "clip_t", "mean", "median")


class Gallery:
  """Keeps sentences for a picture: one of each task and context, as far as they fit, then others with another B."""

  MAX_ROWS = 8

  def __init__(self):
    self._examples: dict[tuple[str, str], list[Generated]] = {}

  def add(self, generated: Generated) -> None:
    """Keeps the first sentence of a task and context; further ones only while there are rows for them."""
    shown = self._examples.setdefault((generated.info.label, generated.info.context), [])
    if any(np.array_equal(generated.clips[-2][0], other.clips[-2][0]) for other in shown):
      return
    shown.append(generated)
    most = max(self._examples.values(), key=len)
    if sum(map(len, self._examples.values())) > self.MAX_ROWS and len(most) > 1:
      most.pop()

  def draw(self, folder: epath.Path, *, with_swapped: bool, fps: float) -> None:
    """Draws A, A', B, the prediction, the ground truth and, optionally, the prediction with swapped pairs.

    Writes grid.png, and grid.webp, an animation of the rows whose B' is a video.

    Args:
      folder: folder of the pictures; an outdated grid.webp in it is deleted.
      with_swapped: whether to show the prediction with swapped pairs.
      fps: frame rate of the animation; 0 for its default.
    """
    columns = (*COLUMNS, "with swapped pairs") if with_swapped else COLUMNS
    keys = self._choose()
    if len(keys) < len(self._examples):
      left_out = ", ".join(f"{task} in {context or '-'}" for task, context in sorted(self._examples.keys() - keys))
      count = f"{len(keys)} of {len(self._examples)}"
      log.info("grid.png shows %s combinations of task and context; not %s", count, left_out)
    shown = [generated for key in keys for generated in self._examples[key]]
    with atomic_write(folder / "grid.png") as unfinished:
      sentence_grid(unfinished, _gallery_rows(shown, with_swapped=with_swapped), columns=columns)
    if videos := [generated for generated in shown if len(generated.clips[-1]) > 1]:
      with atomic_write(folder / "grid.webp") as unfinished:
        rows = _gallery_rows(videos, with_swapped=with_swapped)
        sentence_animation(unfinished, rows, columns=columns, fps=fps or FPS)
    else:
      (folder / "grid.webp").unlink(missing_ok=True)

  def _choose(self) -> list[tuple[str, str]]:
    """Chooses combinations of task and context: the first context of every task before the second of any."""
    by_task: dict[str, list[str]] = {}
    for task, context in sorted(self._examples):
      by_task.setdefault(task, []).append(context)
    return sorted(sorted(self._examples, key=lambda key: (by_task[key[0]].index(key[1]), key[0]))[: self.MAX_ROWS])


def _gallery_rows(shown: Sequence[Generated], *, with_swapped: bool) -> list[tuple[str, list[np.ndarray]]]:
  """Returns the label and clips of each row."""
  rows = []
  for generated in shown:
    clips = [*shown_context(generated.clips[:-1]), generated.samples[Candidate.PREDICTION], generated.clips[-1]]
    score, info = psnr(generated.samples[Candidate.PREDICTION], generated.clips[-1]), generated.info
    label = f"{info.label.replace('_', ' ')}\ncontext {info.context or '-'}\n{score:.1f} dB"
    swapped = [generated.samples[name] for name in (Candidate.SWAPPED,) if with_swapped and name in generated.samples]
    rows.append((label, [*clips, *swapped]))
  return rows


def describe_count(report: Mapping[str, Any], num_sentences: int) -> str:
  """Describes how many sentences were scored and, if they are variants of fewer pairs B, B', of how many."""
  text, num_pairs = count_noun(num_sentences, "sentence"), report["held_out_pairs"]
  return f"{text} of {count_noun(num_pairs, 'held-out pair')}" if 2 * num_pairs <= num_sentences else text


def quick_report(
  config: RunConfig, scored: Sequence[tuple[SentenceInfo, Mapping[str, float]]], *, num_pairs: int
) -> dict[str, Any]:
  """Returns the contents of eval.json.

  Args:
    config: config of the run.
    scored: for each sentence the PSNR by variant or baseline, see `score_psnr`.
    num_pairs: number of different pairs B, B' among them.
  """

  def average(group: Sequence[tuple[SentenceInfo, Mapping[str, float]]]) -> dict[str, float]:
    means = mean_metrics([values for _, values in group])
    keys = {key: round(means[name], 3) for key, name in QUICK_KEYS.items() if name in means}
    return keys | {"count": len(group)}

  def by(key: Callable[[SentenceInfo], str]) -> dict[str, dict[str, float]]:
    return {name: average(group) for name, group in sorted(group_by(scored, key).items())}

  images = [item for item in scored if item[0].is_image]
  return {
    "overall": average(scored),
    "image": average(images) if images else None,
    "by_task": by(lambda info: info.label),
    "by_context": by(lambda info: info.context or "-"),
    "held_out_pairs": num_pairs,
    "seed": config.seed,
    "steps": config.num_steps,
    "eval": to_json(config)["eval"],
  }


def full_report(
  config: RunConfig, scorer: Scorer, scored: Sequence[tuple[SentenceInfo, Sequence[Score]]], **reproduce: Any
) -> dict[str, Any]:
  """Returns the contents of report.json.

  Args:
    config: config of the evaluation.
    scorer: the scorer that made the scores.
    scored: the scores of each sentence.
    **reproduce: whatever else is needed to repeat the evaluation, as JSON values.
  """

  def by(key: Callable[[SentenceInfo], str]) -> dict[str, dict[str, Metrics]]:
    return {
      name: scorer.tabulate(score for _, scores in group for score in scores)
      for name, group in sorted(group_by(scored, key).items())
    }

  return {
    "overall": scorer.tabulate(score for _, scores in scored for score in scores),
    "by_task": by(lambda info: info.label),
    "by_context": by(lambda info: info.context or "-"),
    "by_task_and_context": by(lambda info: f"{info.label} {info.context}"),
    "by_num_clips": by(lambda info: str(info.num_clips)),
    "sentences": [
      dataclasses.asdict(info) | {"scores": {score.name: score.metrics for score in scores}} for info, scores in scored
    ],
    "held_out_clips": describe_held_out(config.data),
    "config": to_json(config),
    **reproduce,
  }


def write_report(folder: epath.Path, report: Mapping[str, Any], gallery: Gallery, *, fps: float) -> None:
  """Writes report.json, report.md, grid.png, grid.webp (with `fps`, see `Gallery.draw`) and curves.png."""
  write_text(folder / "report.json", format_json(report) + "\n")
  gallery.draw(folder, with_swapped=True, fps=fps)
  with atomic_write(folder / "curves.png") as path:
    plot_curves(path, report)
  write_text(folder / "report.md", markdown(report, [name for name in PICTURES if (folder / name).exists()]))


def plot_curves(path: Path, report: Mapping[str, Any]) -> None:
  """Plots the PSNR of a full report by context, by number of clips and by inference steps."""
  from matplotlib.figure import Figure  # takes a third of a second to import

  overall = report["overall"]
  figure = Figure(figsize=(11, 3.5), layout="constrained")
  by_context, by_num_clips, by_steps = figure.subplots(1, 3)
  for axes, part, title in (
    (by_context, report["by_context"], "context"),
    (by_num_clips, report["by_num_clips"], "clips in a sentence"),
  ):
    for name in (Candidate.PREDICTION, Candidate.SWAPPED, Candidate.COPY_B, Candidate.MEAN_A2):
      if name in overall:
        values = [rows[name]["psnr"] if name in rows else np.nan for rows in part.values()]
        axes.plot(list(part), values, marker="o", label=name)
    axes.set(xlabel=title, ylabel="PSNR (dB)")
  by_context.legend(fontsize=8)
  options = report["config"]["eval"]
  steps = {options["num_inference_steps"]: overall[Candidate.PREDICTION]["psnr"]}
  steps |= {number: overall[steps_variant(number)]["psnr"] for number in options["more_steps"]}
  by_steps.plot(sorted(steps), [steps[n] for n in sorted(steps)], marker="o")
  by_steps.set(xlabel="inference steps", ylabel="PSNR (dB)")
  for axes in (by_context, by_num_clips, by_steps):
    axes.grid(alpha=0.3)
  figure.savefig(path, dpi=110, format="png")


def markdown(report: Mapping[str, Any], pictures: Iterable[str]) -> str:
  """Formats a full report as Markdown, with pictures next to it."""
  lines = ["# Evaluation", "", f"Held out: {describe_count(report, len(report['sentences']))}; {report['command']}", ""]
  if report["held_out_clips"]:
    lines += [f"Of computed tasks, {report['held_out_clips']}.", ""]
  lines += [*_descriptions(report), "", *(f"![{name}]({name})\n" for name in pictures)]
  for title, part in (
    ("All", {"all": report["overall"]}),
    ("By task", report["by_task"]),
    ("By context", report["by_context"]),
    ("By number of clips", report["by_num_clips"]),
  ):
    if title != "By number of clips" or len(part) > 1:
      lines += [f"## {title}", "", "PSNR in dB (higher is better).", "", *_psnr_table(part), ""]
  if report.get("exact"):
    lines += _exact_section(report["exact"])
  lines += ["## All metrics by task", ""]
  for task, rows in report["by_task"].items():
    averages = rows[Candidate.PREDICTION]
    names = [name for name in averages if name != "count" and not name.endswith("_std")]
    cells = [(row, *(_cell(values, name) for name in names)) for row, values in rows.items()]
    lines += [f"**{task}** ({count_noun(averages['count'], 'sentence')})", "", *_table(("", *names), cells), ""]
  return "\n".join([*lines, *_published_section(report)])


def _published_section(report: Mapping[str, Any]) -> list[str]:
  """Formats the paper's results on the tasks of a report; empty if it has none."""
  data = report["config"]["data"]
  kinds = {data["tfds"]["task"]: data["tfds"]["kind"], **data["kinds"]}
  names = [*report["by_task"], *(kind for task, kind in kinds.items() if task in report["by_task"])]
  tables = []
  for columns, results in (
    (published.TRAINING_COLUMNS, published.TRAINING),
    (published.BENCHMARK_COLUMNS, published.BENCHMARKS),
  ):
    if rows := published.select_results(results, names):
      tables += [*_table(("", "", *columns), [(row.task, row.metric, *row.values) for row in rows]), ""]
  return ["## Published results", "", published.SOURCE, "", *tables, published.FOOTNOTES, ""] if tables else []


def _descriptions(report: Mapping[str, Any]) -> list[str]:
  """Explains the rows of the tables, one list item each."""
  texts: dict[str, str] = {name: name.description for name in Candidate if name in report["overall"]}
  options = report["config"]["eval"]
  if options["num_seeds"] > 1:
    texts[Candidate.PREDICTION] += f"; mean ± standard deviation over {options['num_seeds']} seeds"
  texts |= {steps_variant(n): f"the prediction with {count_noun(n, 'inference step')}" for n in options["more_steps"]}
  return [f"- **{name}**: {text}" for name, text in texts.items()]


def _exact_section(report: Mapping[str, Any]) -> list[str]:
  """Formats the exact matches of grids."""
  lines = ["## Exact matches", "", report["intervals"], ""]
  if "arc" in report:
    lines += [exact.describe_arc(report["arc"]), ""]
  for key, title in (("grid", "Grids that are right in every cell:"), ("cell", "Cells that are right:")):
    lines += [title, "", *_table(*exact.table_rows(report, key)), ""]
  return [*lines, "The first wrong predictions of each family are in failures.png.", ""]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _psnr_table(part: Mapping[str, Mapping[str, Metrics]]) -> list[str]:
  names = list(dict.fromkeys(name for rows in part.values() for name in rows))
  return _table(
    ("", *names, "sentences"),
    [
      (key, *(_cell(rows.get(name, {}), "psnr") for name in names), str(rows[Candidate.PREDICTION]["count"]))
      for key, rows in part.items()
    ],
  )


def _cell(values: Mapping[str, float], name: str) -> str:
  if name not in values:
    return "-"
  spread = f" ± {values[f'{name}_std']:.2g}" if f"{name}_std" in values else ""
  return f"{values[name]:.{2 if name in TWO_DECIMALS else 4}f}{spread}"
