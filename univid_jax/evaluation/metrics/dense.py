"""Metrics of dense predictions: depth, surface normals, labels, masks, edges.

Arrays passed to one function have the same shape, and all their pixels count. An undefined value (no valid pixel, no
class) is nan.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import KDTree
from skimage.morphology import thin

from univid_jax.core.options import DepthAlignment

# In metres.
SMALLEST_DEPTH = 1e-3
ANGLES = (5.0, 11.25, 30.0)
# Weight of precision against recall in the F-measure of salient objects (Achanta et al. 2009).
BETA_SQUARED = 0.3


def align_depth(predicted: np.ndarray, truth: np.ndarray, *, how: DepthAlignment) -> np.ndarray:
  """Aligns relative depth to the scale of the ground truth, fitted to the pixels that are valid in both.

  Args:
    predicted: a positive multiple of depth or, with least squares, any affine function of it.
    truth: depth in metres; 0, negative or not finite where it is unknown.
    how: least squares for scale and shift (Ranftl et al. 2020), or the ratio of the medians (Zhou et al. 2017).
  """
  valid = _is_known(truth) & np.isfinite(predicted)
  if how is DepthAlignment.NONE or not valid.any():
    return predicted
  x, y = predicted[valid].astype(np.float64), truth[valid].astype(np.float64)
  if how is DepthAlignment.MEDIAN:
    middle = np.median(x)
    return predicted * (np.median(y) / middle) if middle else predicted
  (scale, shift), *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], axis=1), y, rcond=None)
  return predicted * scale + shift


def depth_metrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
  """Computes depth errors (Eigen et al. 2014).

  delta1 to delta3: fraction of pixels within a factor of 1.25, 1.25^2, 1.25^3; higher is better. abs_rel, sq_rel,
  rmse_m (metres), rmse_log, silog (100 times the standard deviation of the log ratio): lower is better.

  Args:
    predicted: depth in metres; smaller values are raised to `SMALLEST_DEPTH`.
    truth: in metres; 0, negative or not finite where it is unknown.
  """
  valid = _is_known(truth)
  names = ("delta1", "delta2", "delta3", "abs_rel", "sq_rel", "rmse_m", "rmse_log", "silog")
  if not valid.any():
    return dict.fromkeys(names, math.nan)
  p, t = np.maximum(np.nan_to_num(predicted[valid].astype(np.float64)), SMALLEST_DEPTH), truth[valid].astype(np.float64)
  ratio, logs = np.maximum(p / t, t / p), np.log(p) - np.log(t)
  spread = np.mean(logs**2) - np.mean(logs) ** 2
  values = (
    *(np.mean(ratio < 1.25**k) for k in (1, 2, 3)),
    np.mean(np.abs(p - t) / t),
    np.mean((p - t) ** 2 / t),
    np.sqrt(np.mean((p - t) ** 2)),
    np.sqrt(np.mean(logs**2)),
    100 * np.sqrt(max(spread, 0)),
  )
  return dict(zip(names, map(float, values)))


def normal_metrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
  """Computes angles between surface normals (Fouhey et al. 2013).

  Mean and median in degrees: lower is better. Fraction of pixels below 5, 11.25 and 30 degrees: higher is better.

  Args:
    predicted: vectors (..., 3) of any length.
    truth: the same; zero or not finite where it is unknown.
  """
  lengths = np.linalg.norm(truth, axis=-1)
  valid = np.isfinite(lengths) & (lengths > 1e-6)
  if not valid.any():
    return dict.fromkeys(("mean", "median", *(f"below_{a:g}" for a in ANGLES)), math.nan)
  p, t = np.nan_to_num(predicted[valid].astype(np.float64)), truth[valid].astype(np.float64)
  cosine = np.sum(p * t, axis=-1) / np.maximum(np.linalg.norm(p, axis=-1) * lengths[valid], 1e-12)
  angles = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
  return {
    "mean": float(angles.mean()),
    "median": float(np.median(angles)),
    **{f"below_{a:g}": float(np.mean(angles < a)) for a in ANGLES},
  }


def nearest_labels(colors: np.ndarray, palette: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
  """Reads a label map: returns the index of the nearest colour of the palette in RGB, int (...).

  Args:
    colors: uint8 (..., 3).
    palette: the colour of each label.
  """
  _, labels = KDTree(np.asarray(palette, np.float64)).query(colors.reshape(-1, 3).astype(np.float64))
  return np.asarray(labels).reshape(colors.shape[:-1])


def confusion_matrix(predicted: np.ndarray, truth: np.ndarray, num_classes: int, *, void: int = -1) -> np.ndarray:
  """Counts the pixels of each class (row) that are predicted as each class (column): int (num_classes, num_classes).

  Args:
    predicted: labels from 0.
    truth: likewise.
    num_classes: number of labels.
    void: label of the ground truth whose pixels do not count; -1 for none.
  """
  valid = (truth >= 0) & (truth < num_classes) & (truth != void)
  pairs = truth[valid].astype(np.int64) * num_classes + predicted[valid]
  return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def match_labels(confusion: np.ndarray) -> np.ndarray:
  """Renames predicted labels one to one so that most pixels agree, since a model may permute colours."""
  rows, columns = linear_sum_assignment(confusion, maximize=True)
  return confusion[:, columns[np.argsort(rows)]]


def segmentation_metrics(confusion: np.ndarray, *, void: int = -1) -> dict[str, float]:
  """Computes miou and pixel_accuracy; higher is better.

  miou is the mean intersection over union (Everingham et al. 2010) over the classes that occur in the ground truth or
  the prediction.

  Args:
    confusion: confusion matrix of an image or, as in benchmarks, summed over a data set.
    void: label that is not a class; -1 for none.
  """
  if not confusion.any():
    return {"miou": math.nan, "pixel_accuracy": math.nan}
  agreed = np.diag(confusion)
  union = confusion.sum(0) + confusion.sum(1) - agreed
  counted = (union > 0) & (np.arange(len(union)) != void)
  return {
    "miou": float(np.mean(agreed[counted] / union[counted])),
    "pixel_accuracy": float(agreed.sum() / confusion.sum()),
  }


def saliency_metrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
  """Compares masks of salient objects; two empty masks agree.

  iou and f_measure (beta^2 = 0.3, Achanta et al. 2009) of the mask thresholded at 0.5: higher is better. mae of the
  soft mask: lower is better.

  Args:
    predicted: mask in [0, 1].
    truth: mask in [0, 1], also thresholded at 0.5.
  """
  p, t = predicted >= 0.5, truth >= 0.5
  both, either = np.sum(p & t), np.sum(p | t)
  precision, recall = (both / np.sum(x) if np.sum(x) else float(not either) for x in (p, t))
  weighted = BETA_SQUARED * precision + recall
  return {
    "iou": float(both / either) if either else 1.0,
    "f_measure": float((1 + BETA_SQUARED) * precision * recall / weighted) if weighted else 0.0,
    "mae": float(np.mean(np.abs(predicted.astype(np.float64) - truth))),
  }


def match_edges(predicted: np.ndarray, truth: np.ndarray, *, tolerance: float = 1.0) -> int:
  """Counts the edge pixels of two boolean maps (H, W) that can be paired, each once, within `tolerance` pixels.

  The matching is the largest possible (Hopcroft and Karp), as Martin et al. 2004 require.
  """
  places = [np.argwhere(edges) for edges in (predicted, truth)]
  if not all(map(len, places)):
    return 0
  near = KDTree(places[0]).query_ball_tree(KDTree(places[1]), tolerance + 1e-9)
  rows = np.repeat(np.arange(len(near)), [len(found) for found in near])
  columns = np.concatenate([np.asarray(found, np.int64) for found in near])
  graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(len(places[0]), len(places[1]))).tocsr()
  return int(np.sum(maximum_bipartite_matching(graph, perm_type="column") >= 0))


def edge_counts(strength: np.ndarray, truth: np.ndarray, *, thresholds: int = 99) -> np.ndarray:
  """Counts matched, predicted and true edge pixels of an image at each threshold: int (thresholds, 3).

  Args:
    strength: strength of predicted edges, (H, W) in [0, 1]; thinned to lines of one pixel at each threshold.
    truth: edges, boolean (H, W); thinned.
    thresholds: number of thresholds, evenly spaced in (0, 1).
  """
  lines = thin(truth.astype(bool))
  counts = np.zeros((thresholds, 3), np.int64)
  previous = None
  for i in range(thresholds):
    edges = strength >= (i + 1) / (thresholds + 1)
    if previous is not None and np.array_equal(edges, previous):  # equal maps are matched only once
      counts[i] = counts[i - 1]
      continue
    found, previous = thin(edges), edges
    counts[i] = match_edges(found, lines), found.sum(), lines.sum()
  return counts


def edge_metrics(counts: Sequence[np.ndarray]) -> dict[str, float]:
  """Computes ods, ois and ap of edges (Arbelaez et al. 2011); higher is better.

  ods and ois are F-measures, at the best threshold for the whole data set and for each image.

  Args:
    counts: counts of each image, from `edge_counts`.
  """
  if not len(counts):
    return dict.fromkeys(("ods", "ois", "ap"), math.nan)
  stacked = np.asarray(counts)
  total = stacked.sum(axis=0)
  best = stacked[np.arange(len(stacked)), [int(np.argmax(_f_measure(c))) for c in stacked]].sum(axis=0)
  precision, recall = _precision_recall(total)
  # As in the Berkeley benchmark (collect_eval_bdry.m): precision is interpolated between the recalls of the thresholds,
  # and 0 outside of them. A single recall, as of edges that are only 0 or 1, has no area.
  recalls, first = np.unique(recall, return_index=True)
  grid = np.linspace(0, 1, 101)
  area = np.interp(grid, recalls, precision[first], left=0, right=0).sum() / 100
  return {
    "ods": float(_f_measure(total).max()),
    "ois": float(_f_measure(best[None])[0]),
    "ap": float(area) if len(recalls) > 1 else math.nan,
  }


def _precision_recall(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  matched, predicted, true = counts.T
  return matched / np.maximum(predicted, 1), matched / np.maximum(true, 1)


def _f_measure(counts: np.ndarray) -> np.ndarray:
  precision, recall = _precision_recall(counts)
  return 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def _is_known(depth: np.ndarray) -> np.ndarray:
  return np.isfinite(depth) & (depth > 0)
