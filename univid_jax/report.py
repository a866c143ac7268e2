"""From what a study painted to its report: scores, tables, figures, beside the paper's published numbers."""

import collections
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from scipy.sparse import csr_array

from univid_jax import build
from univid_jax.data.kinds import depth_of, known, normals_of, read_palette
from univid_jax.data.tasks import camera_poses
from univid_jax.evaluation import matched
from univid_jax.files import local_file
from univid_jax.metrics.camera import camera_metrics
from univid_jax.metrics.clip_scores import CLIPScores
from univid_jax.metrics.dense import (
    align_depth,
    confusion_matrix,
    depth_metrics,
    edge_counts,
    edge_metrics,
    nearest_labels,
    normal_metrics,
    saliency_metrics,
    segmentation_metrics,
    with_matched_labels,
)
from univid_jax.metrics.figures import COLUMNS, sentence_grid
from univid_jax.metrics.image import SSIM_SIDE, psnr, rmse, ssim
from univid_jax.study import Painted, read_study

BASELINES = ("copy_b", "copy_a2", "mean_a2", "codec")
EXPLAINED = {
    "painted": "the model", "swapped": "the model, shown another task's example pairs: does it read them?",
    "reversed": "the model, shown the example pairs turned round", "copy_b": "B itself", "copy_a2": "A' itself",
    "mean_a2": "the mean colour of A'", "codec": "the truth through the codec: the most that can be reached",
}
# (task, metric, UniVid separate, UniVid co-trained), then (task, metric, LVM, UniVid), as the paper's tables have them.
PUBLISHED = (
    ("style", "CLIP-T", "18.33", "24.01"), ("camera", "GPT-4o, 0 to 10", "6.33", "6.73"),
    ("scribble", "RMSE", "61.03 (1)", "51.94"), ("depth", "RMSE", "74.16", "2.55 (2)"),
    ("segmentation", "RMSE", "126.12", "123.03"), ("salient object", "RMSE", "33.35", "30.59"),
)
PUBLISHED_BENCHMARKS = (
    ("style", "CLIP-T / CLIP-I", "16.24 / .712", "19.76 / .670"),
    ("edges (BIPED)", "ODS / OIS / AP", ".656 / .678 / .630", ".873 / .877 / .871"),
    ("segmentation (ADE20K)", "mIoU / pixel accuracy", "1.423 / 23.30", "8.712 / 53.13"),
    ("depth (NYUv2)", "delta 1 / 2 / 3", ".15 / .31 / .48", ".43 / .76 / .91"),
    ("depth (NYUv2)", "AbsRel / SqRel / RMSElog / SILog", ".53 / .18 / 1.15 / 72.91", ".27 / .28 (3) / .42 / 30.74"),
    ("normals (NYUv2)", "mean / median; below 5 / 11.25 / 30", "30.76 / 13.73; 24.70 / 45.10 / 65.98",
     "29.84 / 13.52; 25.22 / 45.57 / 67.53"),
)
DOUBTS = ("(1) the paper has this number for depth as well. (2) 29 times less than the same task trained alone. (3) worse than "
          "LVM's, while all else of depth is better. The authors' test sets are not public.")


# A colour of a label map lies at most so far, in any channel, from one of the palette in this share of the pixels.
PALETTE_DISTANCE, PALETTE_SHARE = 8, 0.9


@dataclasses.dataclass(frozen=True)
class Score:
  """Of one sentence under one condition.

  Attributes:
    number: of the sentence.
    condition: its name.
    metrics: means over the frames.
    counts: what adds up over a data set: "edges" by threshold, "labels" and "labels_matched" as confusion matrices.
  """

  number: int
  condition: str
  metrics: Mapping[str, float]
  counts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Scorer:
  """Scores what was painted.

  Args:
    config: of the evaluation.

  Raises:
    ValueError: the palette's file is none.
  """

  def __init__(self, config: Mapping[str, Any]):
    options = config["eval"]
    self._kinds, self._depth_range = build.task_kinds(config), tuple(config["data"]["depth_range"])
    self._alignment, self._void = options["depth_alignment"], options["void_label"]
    self._palette = read_palette(options["palette"])[:options["num_labels"] or None]
    self._clip_scores = CLIPScores(options["clip_model"]) if options["clip_model"] else None

  def __call__(self, painted: Painted) -> list[Score]:
    """All conditions and baselines of a sentence."""
    truth, (_, a2, b) = painted.clips[-1], painted.clips[-4:-1]
    mean = np.broadcast_to(np.round(a2.mean(axis=(0, 1, 2))), truth.shape).astype(np.uint8)
    frames = dict(painted.painted) | {"copy_b": matched(b, len(truth)), "copy_a2": matched(a2, len(truth)), "mean_a2": mean,
                                      "codec": painted.codec}
    kind = None if painted.info["reverse"] else self._kinds.get(painted.info["task"])
    scores = []
    for condition, clip in frames.items():
      metrics = {"psnr": psnr(clip, truth), "rmse": rmse(clip, truth)}
      if min(truth.shape[1:3]) >= SSIM_SIDE:
        metrics["ssim"] = ssim(clip, truth)
      if self._clip_scores is not None:
        metrics["clip_i"] = self._clip_scores.clip_i(clip, truth)
        metrics |= {"clip_t": self._clip_scores.clip_t(clip, painted.info["prompt"])} if painted.info["prompt"] else {}
      extra, counts = self.of_kind(kind, clip, painted) if kind else ({}, {})
      scores.append(Score(painted.number, condition, metrics | extra, counts))
    return scores

  def of_kind(self, kind: str, clip: np.ndarray, painted: Painted) -> tuple[dict[str, float], dict[str, Any]]:
    """What a clip means, against what the truth means: metrics, and counts of which they are made over a data set.

    Raises:
      ValueError: the truth's colours are not the palette's.
    """
    truth, params = painted.clips[-1], painted.info["params"]
    if kind == "depth":
      predicted, true = depth_of(clip, self._depth_range), np.where(known(truth), depth_of(truth, self._depth_range), 0)
      return depth_metrics(align_depth(predicted, true, how=self._alignment), true), {}
    if kind == "normals":
      return normal_metrics(normals_of(clip), np.where(known(truth)[..., None], normals_of(truth), 0)), {}
    if kind == "segmentation":
      labels, true = nearest_labels(clip, self._palette), nearest_labels(truth, self._palette)
      far = np.abs(self._palette[true].astype(int) - truth).max(-1) > PALETTE_DISTANCE
      if np.mean(far) > 1 - PALETTE_SHARE:
        raise ValueError(f"{np.mean(far):.0%} of a label map of task {painted.info['task']!r} are of no label's colour: give the "
                         "colours with config.eval.palette")
      confusion = confusion_matrix(labels, true, len(self._palette), void=self._void)
      counts = {"labels": confusion, "labels_matched": with_matched_labels(confusion)}
      return self._of_labels(counts), {name: csr_array(matrix) for name, matrix in counts.items()}
    if kind == "saliency":
      colors = (params["background"], params["object_color"]) if params else ((0, 0, 0), (1, 1, 1))
      return saliency_metrics(*(between(x, *colors) for x in (clip, truth))), {}
    if kind == "edges":
      colors = (params["paper"], params["ink"]) if params else ((0, 0, 0), (1, 1, 1))
      strength, true = (between(x, *colors) for x in (clip, truth))
      return {}, {"edges": sum(edge_counts(s, t >= 0.5) for s, t in zip(strength, true))}
    poses = camera_poses(len(truth), truth.shape[1:3], **params) if params and len(truth) > 1 else None
    return (camera_metrics(clip, painted.clips[-2], poses) if poses is not None else {}), {}

  def _of_labels(self, counts: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name + suffix: value for key, suffix in (("labels", ""), ("labels_matched", "_matched"))
            for name, value in segmentation_metrics(counts[key], void=self._void).items()}

  def table(self, scores: Iterable[Score]) -> dict[str, dict[str, float]]:
    """Means by condition and metric over the sentences that have the metric, and their count; edges and labels over all together.

    Conditions seed_N are not rows of their own: with them `painted` has the mean over seeds, and `METRIC_std` their deviation.
    """
    by_condition = collections.defaultdict(list)
    for item in scores:
      by_condition[item.condition].append(item)
    rows = {name: self._means(items) for name, items in by_condition.items()}
    repeats = [rows.pop(name) for name in list(rows) if name.startswith("seed_")]
    if repeats and "painted" in rows:
      runs = [rows["painted"], *repeats]
      for name in set(rows["painted"]) - {"count"}:
        values = [run[name] for run in runs]
        rows["painted"] |= {name: float(np.mean(values)), f"{name}_std": float(np.std(values, ddof=1))}
    return rows

  def _means(self, items: Sequence[Score]) -> dict[str, float]:
    names = dict.fromkeys(name for item in items for name in item.metrics)
    means = {}
    for name in names:
      values = [value for item in items if np.isfinite(value := item.metrics.get(name, np.nan))]
      if values:
        means[name] = float(np.mean(values))
    counts = collections.defaultdict(list)
    for item in items:
      for name, value in item.counts.items():
        counts[name].append(value)
    if "edges" in counts:
      means |= edge_metrics(counts["edges"])
    if "labels" in counts:
      means |= self._of_labels({name: sum(counts[name]).toarray() for name in ("labels", "labels_matched")})
    return means | {"count": len(items)}


def between(clip: np.ndarray, low: Sequence[float], high: Sequence[float]) -> np.ndarray:
  """Where each colour lies on the way from one colour (0) to another (1); colours in [0, 1]."""
  low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
  return np.clip((clip / 255 - low) @ (high - low) / max(np.sum((high - low) ** 2), 1e-12), 0, 1)


def make_report(folder: epath.Path, count: int, config: Mapping[str, Any], reproduce: Mapping[str, Any]) -> dict[str, Any]:
  """Scores the files of a study and writes report.json, report.md, grid.png and curves.png.

  Args:
    folder: of the study.
    count: of its sentences.
    config: of the evaluation.
    reproduce: what else it takes to do it again.
  """
  scorer = Scorer(config)
  infos, scores, examples = [], [], {}
  for painted in read_study(folder, count):
    infos.append(painted.info)
    scores.append(scorer(painted))
    examples.setdefault((task_of(painted.info), painted.info["context"]), painted)

  def grouped(key: Callable[[Mapping[str, Any]], str]) -> dict[str, Any]:
    groups = collections.defaultdict(list)
    for info, items in zip(infos, scores):
      groups[key(info)] += items
    return {name: scorer.table(items) for name, items in sorted(groups.items())}

  report = {
      "overall": scorer.table(item for items in scores for item in items),
      "by_task": grouped(task_of),
      "by_context": grouped(lambda info: info["context"] or "-"),
      "by_task_and_context": grouped(lambda info: f"{task_of(info)} {info['context']}"),
      "by_num_clips": grouped(lambda info: str(info["num_clips"])),
      "sentences": [info | {"scores": {item.condition: item.metrics for item in items}} for info, items in zip(infos, scores)],
      "config": config, **reproduce,
  }
  (folder / "report.json").write_text(json.dumps(report, indent=2, default=list) + "\n")
  (folder / "report.md").write_text(markdown(report))
  rows = [(f"{task.replace('_', ' ')}\ncontext {context or '-'}",
           (*painted.clips[-4:-1], painted.painted["painted"], painted.clips[-1],
            painted.painted.get("swapped", np.zeros_like(painted.clips[-1]))))
          for (task, context), painted in sorted(examples.items())]
  with local_file(folder / "grid.png") as path:
    sentence_grid(path, rows, columns=(*COLUMNS, "with a swapped pair"))
  with local_file(folder / "curves.png") as path:
    plot_curves(path, report)
  return report


def task_of(info: Mapping[str, Any]) -> str:
  """A sentence's task, as the tables name it."""
  return info["task"] + (" turned round" if info["reverse"] else "")


def markdown(report: Mapping[str, Any]) -> str:
  """The report as people read it."""
  out = ["# Evaluation", "", f"{len(report['sentences'])} held-out sentences; {report['command']}", "",
         *(f"- **{name}**: {text}" for name, text in EXPLAINED.items() if name in report["overall"]), ""]
  for title, part in (("All", {"all": report["overall"]}), ("By task", report["by_task"]), ("By context", report["by_context"]),
                      ("By number of clips", report["by_num_clips"])):
    if title != "By number of clips" or len(part) > 1:
      out += [f"## {title}", "", "PSNR in dB (higher is better).", "", *_psnr_table(part), ""]
  out += ["## Each task by its own metrics", ""]
  for task, rows in report["by_task"].items():
    names = [name for name in rows["painted"] if name != "count" and not name.endswith("_std")]
    cells = [(condition, *(_cell(values, name) for name in names)) for condition, values in rows.items()]
    out += [f"**{task}** ({rows['painted']['count']} sentences)", "", *_table(("", *names), cells), ""]
  out += ["## Published numbers", "",
          "Of the paper (arXiv 2509.21760), on its authors' data: not comparable number by number.", "",
          *_table(("", "", "UniVid, separate", "UniVid, co-trained"), PUBLISHED), "",
          *_table(("", "", "LVM", "UniVid"), PUBLISHED_BENCHMARKS), "", DOUBTS, ""]
  return "\n".join(out)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _psnr_table(part: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
  names = list(dict.fromkeys(name for rows in part.values() for name in rows))
  return _table(("", *names, "sentences"), [(key, *(_cell(rows.get(name, {}), "psnr") for name in names),
                                             str(rows["painted"]["count"])) for key, rows in part.items()])


def _cell(values: Mapping[str, float], name: str) -> str:
  if name not in values:
    return "-"
  spread = f" ± {values[f'{name}_std']:.2g}" if f"{name}_std" in values else ""
  return f"{values[name]:.4g}{spread}"


def plot_curves(path: Path, report: Mapping[str, Any]) -> None:
  """PSNR by context, by number of clips and by steps of the sampler."""
  steps = {report["config"]["eval"]["num_inference_steps"]: report["overall"]["painted"]["psnr"]}
  steps |= {int(name.removeprefix("steps_")): rows["psnr"] for name, rows in report["overall"].items() if "steps_" in name}
  figure = Figure(figsize=(11, 3.5), layout="constrained")
  contexts, shots, curve = figure.subplots(1, 3)
  for axes, part, title in ((contexts, report["by_context"], "context"), (shots, report["by_num_clips"], "clips in a sentence")):
    for name in ("painted", "swapped", "copy_b", "mean_a2"):
      if name in report["overall"]:
        axes.plot(list(part), [rows[name]["psnr"] for rows in part.values()], marker="o", label=name)
    axes.set(xlabel=title, ylabel="PSNR (dB)")
    axes.grid(alpha=0.3)
  contexts.legend(fontsize=8)
  curve.plot(sorted(steps), [steps[n] for n in sorted(steps)], marker="o")
  curve.set(xlabel="steps of the sampler", ylabel="PSNR (dB)")
  curve.grid(alpha=0.3)
  figure.savefig(path, dpi=110)
