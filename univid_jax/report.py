"""From what a study painted to its report: scores, tables, figures, beside the paper's published numbers."""

import collections
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from univid_jax.data.tasks import camera_poses
from univid_jax.evaluation import matched
from univid_jax.metrics.camera import camera_metrics
from univid_jax.metrics.clip_scores import CLIPScores
from univid_jax.metrics.dense import (
    align_depth,
    depth_metrics,
    edge_counts,
    edge_metrics,
    nearest_labels,
    normal_metrics,
    saliency_metrics,
    segmentation_metrics,
)
from univid_jax.metrics.figures import COLUMNS, sentence_grid
from univid_jax.metrics.image import SSIM_SIDE, psnr, rmse, ssim
from univid_jax.study import Painted, read_study

# What the targets of computed tasks are; the config's eval.kinds says it of a user's own.
KINDS: Mapping[str, str] = {"scribble": "edges", "salient_object": "saliency", "moving_object": "saliency",
                            "camera_movement": "camera"}
KIND_NAMES = ("depth", "normals", "segmentation", "edges", "saliency", "camera")
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


@dataclasses.dataclass(frozen=True)
class Score:
  """Of one sentence under one condition: means over its frames by metric, and counts of edges by threshold, where it has any."""

  number: int
  condition: str
  metrics: Mapping[str, float]
  edges: np.ndarray | None = None


def score(painted: Painted, config: Mapping[str, Any], clip_scores: CLIPScores | None = None) -> list[Score]:
  """All conditions and baselines of a sentence."""
  truth, (_, a2, b) = painted.clips[-1], painted.clips[-4:-1]
  mean = np.broadcast_to(np.round(a2.mean(axis=(0, 1, 2))), truth.shape).astype(np.uint8)
  frames = dict(painted.painted) | {"copy_b": matched(b, len(truth)), "copy_a2": matched(a2, len(truth)), "mean_a2": mean,
                                    "codec": painted.codec}
  kind = config["eval"]["kinds"].get(painted.info["task"]) or KINDS.get(painted.info["task"])
  scores = []
  for condition, clip in frames.items():
    metrics = {"psnr": psnr(clip, truth), "rmse": rmse(clip, truth)}
    if min(truth.shape[1:3]) >= SSIM_SIDE:
      metrics["ssim"] = ssim(clip, truth)
    if clip_scores is not None:
      metrics["clip_i"] = clip_scores.clip_i(clip, truth)
      metrics |= {"clip_t": clip_scores.clip_t(clip, painted.info["prompt"])} if painted.info["prompt"] else {}
    extra, edges = of_kind(kind, clip, painted, config) if kind else ({}, None)
    scores.append(Score(painted.number, condition, metrics | extra, edges))
  return scores


def of_kind(kind: str, clip: np.ndarray, painted: Painted,
            config: Mapping[str, Any]) -> tuple[dict[str, float], np.ndarray | None]:
  """What a clip means, against what the truth means: metrics, and counts of edges.

  Raises:
    ValueError: there is no such kind.
  """
  truth, params = painted.clips[-1], painted.info["params"]
  if kind == "depth":
    near, far = config["eval"]["depth_range"]
    depth = [far - (x.astype(np.float64).mean(-1) / 255) * (far - near) for x in (clip, truth)]
    known = np.where(truth.max(-1) > 0, depth[1], 0)
    return depth_metrics(align_depth(depth[0], known, how=config["eval"]["depth_alignment"]), known), None
  if kind == "normals":
    vectors = [x.astype(np.float64) / 127.5 - 1 for x in (clip, truth)]
    return normal_metrics(vectors[0], np.where(truth.max(-1, keepdims=True) > 0, vectors[1], 0)), None
  if kind == "segmentation":
    palette = np.unique(np.concatenate([x.reshape(-1, 3) for x in (truth, painted.clips[-3])]), axis=0)
    labels = [nearest_labels(x, palette) for x in (clip, truth)]
    renamed = segmentation_metrics(*labels, len(palette), match_labels=True)
    return segmentation_metrics(*labels, len(palette)) | {f"{name}_matched": value for name, value in renamed.items()}, None
  if kind == "saliency":
    colors = (params["background"], params["object_color"]) if params else ((0, 0, 0), (1, 1, 1))
    return saliency_metrics(*(between(x, *colors) for x in (clip, truth))), None
  if kind == "edges":
    colors = (params["paper"], params["ink"]) if params else ((0, 0, 0), (1, 1, 1))
    strength, true = (between(x, *colors) for x in (clip, truth))
    return {}, sum(edge_counts(s, t >= 0.5) for s, t in zip(strength, true))
  if kind == "camera":
    poses = camera_poses(len(truth), truth.shape[1:3], **params) if params and len(truth) > 1 else None
    return (camera_metrics(clip, painted.clips[-2], poses) if poses is not None else {}), None
  raise ValueError(f"config.eval.kinds are {', '.join(KIND_NAMES)}, got {kind!r}")


def between(clip: np.ndarray, low: Sequence[float], high: Sequence[float]) -> np.ndarray:
  """Where each colour lies on the way from one colour (0) to another (1); colours in [0, 1]."""
  low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
  return np.clip((clip / 255 - low) @ (high - low) / max(np.sum((high - low) ** 2), 1e-12), 0, 1)


def table(scores: Iterable[Score]) -> dict[str, dict[str, float]]:
  """Means by condition and metric over the sentences that have the metric, and their count; edges over all together.

  Conditions seed_N are not rows of their own: with them `painted` has the mean over seeds, and `METRIC_std` their deviation.
  """
  by_condition = collections.defaultdict(list)
  for item in scores:
    by_condition[item.condition].append(item)
  rows = {name: _means(items) for name, items in by_condition.items()}
  repeats = [rows.pop(name) for name in list(rows) if name.startswith("seed_")]
  if repeats and "painted" in rows:
    runs = [rows["painted"], *repeats]
    for name in set(rows["painted"]) - {"count"}:
      values = [run[name] for run in runs]
      rows["painted"] |= {name: float(np.mean(values)), f"{name}_std": float(np.std(values, ddof=1))}
  return rows


def _means(items: Sequence[Score]) -> dict[str, float]:
  names = dict.fromkeys(name for item in items for name in item.metrics)
  means = {}
  for name in names:
    values = [value for item in items if np.isfinite(value := item.metrics.get(name, np.nan))]
    if values:
      means[name] = float(np.mean(values))
  edges = [item.edges for item in items if item.edges is not None]
  return means | (edge_metrics(edges) if edges else {}) | {"count": len(items)}


def make_report(folder: Path, count: int, config: Mapping[str, Any], reproduce: Mapping[str, Any]) -> dict[str, Any]:
  """Scores the files of a study and writes report.json, report.md, grid.png and curves.png.

  Args:
    folder: of the study.
    count: of its sentences.
    config: of the evaluation.
    reproduce: what else it takes to do it again.
  """
  clip_scores = CLIPScores(config["eval"]["clip_model"]) if config["eval"]["clip_model"] else None
  infos, scores, examples = [], [], {}
  for painted in read_study(folder, count):
    infos.append(painted.info)
    scores.append(score(painted, config, clip_scores))
    examples.setdefault((painted.info["task"], painted.info["context"]), painted)

  def grouped(key: Callable[[Mapping[str, Any]], str]) -> dict[str, Any]:
    groups = collections.defaultdict(list)
    for info, items in zip(infos, scores):
      groups[key(info)] += items
    return {name: table(items) for name, items in sorted(groups.items())}

  report = {
      "overall": table(item for items in scores for item in items),
      "by_task": grouped(lambda info: info["task"]),
      "by_context": grouped(lambda info: info["context"] or "-"),
      "by_task_and_context": grouped(lambda info: f"{info['task']} {info['context']}"),
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
  sentence_grid(folder / "grid.png", rows, columns=(*COLUMNS, "with a swapped pair"))
  plot_curves(folder / "curves.png", report)
  return report


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
