"""Scores of what pixels represent: for every kind of target, the metrics that its benchmarks use.

A new kind is an entry of `KIND_METRICS`: a function that scores one clip and, if the metric over a data set is not the
mean over its clips, a function that computes it from the counts of all clips.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import UserError, name_key
from univid_jax.core.options import DepthAlignment, TargetKind
from univid_jax.data.target_kinds import image_to_depth, image_to_normals, known_pixels, own_kinds, read_palette
from univid_jax.data.tasks.camera import camera_poses
from univid_jax.data.tasks.grids.rendering import STATE_FRAMES, Rendering
from univid_jax.evaluation.generate import Generated
from univid_jax.evaluation.metrics.camera import camera_metrics
from univid_jax.evaluation.metrics.dense import (
  align_depth,
  confusion_matrix,
  depth_metrics,
  edge_counts,
  edge_metrics,
  match_labels,
  nearest_labels,
  normal_metrics,
  saliency_metrics,
  segmentation_metrics,
)
from univid_jax.evaluation.metrics.grids import grid_metrics

# True label maps and grids must have this share of pixels within this distance, in every channel, of a colour of the
# palette.
PALETTE_SHARE, PALETTE_DISTANCE = 0.9, 8

Metrics = dict[str, float]
# Data that add up over a data set: counts by edge threshold, or sparse confusion matrices; for grids, the truth.
Counts = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class KindOptions:
  """How the pixels of targets are interpreted.

  Attributes:
    depth_range: metres that white and black represent.
    depth_alignment: how predicted depth is aligned to the scale of the ground truth.
    palette: colours of the labels, uint8 (labels, 3).
    true_palette: the same for the ground truth, with a void label beyond these labels appended.
    void_label: label of the ground truth that does not count; -1 for none.
    rendering: how grids are drawn.
  """

  depth_range: tuple[float, float]
  depth_alignment: DepthAlignment
  palette: np.ndarray
  true_palette: np.ndarray
  void_label: int
  rendering: Rendering

  @classmethod
  def from_config(cls, config: RunConfig) -> "KindOptions":
    """Reads the options from a config.

    Raises:
      FileNotFoundError: the file of the palette does not exist.
      UserError: the file is not a palette, or lacks a label.
    """
    options = config.eval
    with name_key("eval.palette"):
      colors = read_palette(options.palette)
    num_labels, void = options.num_labels or len(colors), options.void_label
    for key, needed in (("num_labels", num_labels), ("void_label", void + 1)):
      if needed > len(colors) and TargetKind.SEGMENTATION in own_kinds(config.data).values():
        raise UserError(
          f"config.eval.{key} = {getattr(options, key)}, but the palette has {len(colors)} colours: add "
          f"{'that of void' if key == 'void_label' else 'the others'}, or lower it"
        )
    is_beyond = void >= num_labels
    return cls(
      depth_range=config.data.depth_range,
      depth_alignment=options.depth_alignment,
      palette=colors[:num_labels],
      true_palette=np.concatenate([colors[:num_labels], colors[void : void + is_beyond]]),
      void_label=num_labels if is_beyond else void,
      rendering=Rendering.from_config(config.data),
    )


@dataclasses.dataclass(frozen=True)
class KindMetrics:
  """The metrics of a kind of target.

  Attributes:
    score: scores a clip against the ground truth of its sentence; returns metrics, and counts to be pooled.
    pool: computes metrics over a data set from the counts of its clips; None if they are means over clips.
  """

  score: Callable[[np.ndarray, Generated, KindOptions], tuple[Metrics, Counts]]
  pool: Callable[[Sequence[Counts], KindOptions], Metrics] | None = None


def unmix_colors(clip: np.ndarray, low: Sequence[float], high: Sequence[float]) -> np.ndarray:
  """Recovers the weights with which two colours are mixed: 0 is `low`, 1 is `high`.

  Args:
    clip: uint8 (..., 3).
    low: a colour in [0, 1].
    high: likewise.
  """
  start, way = np.asarray(low, np.float64), np.asarray(high, np.float64) - np.asarray(low, np.float64)
  return np.clip((clip / 255 - start) @ way / max(np.sum(way**2), 1e-12), 0, 1)


def _score_depth(clip: np.ndarray, generated: Generated, options: KindOptions) -> tuple[Metrics, Counts]:
  truth = generated.clips[-1]
  predicted = image_to_depth(clip, options.depth_range)
  expected = np.where(known_pixels(truth), image_to_depth(truth, options.depth_range), 0)
  return depth_metrics(align_depth(predicted, expected, how=options.depth_alignment), expected), {}


def _score_normals(clip: np.ndarray, generated: Generated, options: KindOptions) -> tuple[Metrics, Counts]:
  truth = generated.clips[-1]
  return normal_metrics(
    image_to_normals(clip), np.where(known_pixels(truth)[..., None], image_to_normals(truth), 0)
  ), {}


def _score_segmentation(clip: np.ndarray, generated: Generated, options: KindOptions) -> tuple[Metrics, Counts]:
  """Scores a label map; raises UserError if the colours of the ground truth are not the palette's."""
  truth = generated.clips[-1]
  labels, expected = nearest_labels(clip, options.palette), nearest_labels(truth, options.true_palette)
  far = np.mean(np.abs(options.true_palette[expected].astype(int) - truth).max(-1) > PALETTE_DISTANCE)
  if far > 1 - PALETTE_SHARE:
    raise UserError(
      f"{far:.0%} of the pixels in a label map of task {generated.info.task!r} have a colour that is not in the "
      "palette: set config.eval.palette to a file with the colour of each label"
    )
  confusion = confusion_matrix(labels, expected, len(options.palette), void=options.void_label)
  counts = {"labels": confusion, "labels_matched": match_labels(confusion)}
  return _segmentation_metrics(counts, options), {name: csr_array(matrix) for name, matrix in counts.items()}


def _pool_segmentation(counts: Sequence[Counts], options: KindOptions) -> Metrics:
  names = ("labels", "labels_matched")
  totals = {name: functools.reduce(operator.add, (each[name] for each in counts)).toarray() for name in names}
  return _segmentation_metrics(totals, options)


def _segmentation_metrics(counts: Mapping[str, np.ndarray], options: KindOptions) -> Metrics:
  metrics: Metrics = {}
  for key, suffix in (("labels", ""), ("labels_matched", "_matched")):
    values = segmentation_metrics(counts[key], void=options.void_label)
    metrics |= {name + suffix: value for name, value in values.items()}
  return metrics


def _score_saliency(clip: np.ndarray, generated: Generated, options: KindOptions) -> tuple[Metrics, Counts]:
  params = generated.info.params
  colors = (params["background"], params["object_color"]) if params else ((0, 0, 0), (1, 1, 1))
  return saliency_metrics(unmix_colors(clip, *colors), unmix_colors(generated.clips[-1], *colors)), {}


def _score_edges(clip: np.ndarray, generated: Generated, options: KindOptions) -> tuple[Metrics, Counts]:
  params = generated.info.params
  colors = (params["paper"], params["ink"]) if params else ((0, 0, 0), (1, 1, 1))
  strength, expected = unmix_colors(clip, *colors), unmix_colors(generated.clips[-1], *colors)
  return {}, {"edges": sum(edge_counts(frame, edges >= 0.5) for frame, edges in zip(strength, expected))}


def _pool_edges(counts: Sequence[Counts], options: KindOptions) -> Metrics:
  return edge_metrics([each["edges"] for each in counts])


def _score_camera(clip: np.ndarray, generated: Generated, options: KindOptions) -> tuple[Metrics, Counts]:
  """Scores videos of the computed task, whose camera path is known; other clips get no metrics."""
  params = generated.info.params
  if not params or len(clip) == 1:
    return {}, {}
  poses = camera_poses(len(clip), (clip.shape[1], clip.shape[2]), **params)
  return camera_metrics(clip, generated.clips[-2], poses), {}


def _score_grid(clip: np.ndarray, generated: Generated, options: KindOptions) -> tuple[Metrics, Counts]:
  return score_grid(clip, generated, options.rendering)


def score_grid(clip: np.ndarray, generated: Generated, rendering: Rendering) -> tuple[Metrics, Counts]:
  """Scores a clip of grids; raises UserError if the ground truth is not rendered as grids."""
  predicted, truth = (rendering.decode(frames) for frames in (clip, generated.clips[-1]))
  shown = generated.clips[-1][::STATE_FRAMES].astype(int)
  drawn = np.concatenate([rendering.render([state]) for state in truth])
  inside = (drawn != rendering.padding).any(-1) | (shown != rendering.padding).any(-1)
  far = np.mean(np.abs(drawn - shown).max(-1)[inside] > PALETTE_DISTANCE)
  if far > 1 - PALETTE_SHARE:
    raise UserError(
      f"{far:.0%} of the pixels in a target of task {generated.info.task!r} are not those of a grid with cells of "
      f"config.data.grids.cell = {rendering.cell} pixels in the colours of config.data.grids.palette"
    )
  return grid_metrics(predicted, truth), {"truth": truth}


KIND_METRICS: Mapping[TargetKind, KindMetrics] = {
  TargetKind.DEPTH: KindMetrics(_score_depth),
  TargetKind.NORMALS: KindMetrics(_score_normals),
  TargetKind.EDGES: KindMetrics(_score_edges, _pool_edges),
  TargetKind.SEGMENTATION: KindMetrics(_score_segmentation, _pool_segmentation),
  TargetKind.SALIENCY: KindMetrics(_score_saliency),
  TargetKind.CAMERA: KindMetrics(_score_camera),
  TargetKind.GRID: KindMetrics(_score_grid),
}
