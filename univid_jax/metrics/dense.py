"""Metrics of what pictures mean: depth, surface normals, labels, masks, edges.

All take arrays of one shape and count over all their pixels; nan stands for what is not defined (no valid pixel, no class).
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import cKDTree
from skimage.morphology import thin

ANGLES = (5.0, 11.25, 30.0)
# Weight of precision against recall in the F-measure of salient objects (Achanta et al. 2009).
BETA_SQUARED = 0.3


def align_depth(predicted: np.ndarray, truth: np.ndarray, *, how: str) -> np.ndarray:
  """Brings relative depth onto the truth's scale, over pixels valid in both.

  Args:
    predicted: any positive multiple, or with "least_squares" any affine function, of depth.
    truth: in metres; 0, negative or not finite where it is unknown.
    how: "least_squares" (scale and shift, Ranftl et al. 2020), "median" (scale alone, Zhou et al. 2017) or "none".
  """
  valid = _valid(truth) & np.isfinite(predicted)
  if how == "none" or not valid.any():
    return predicted
  x, y = predicted[valid].astype(np.float64), truth[valid].astype(np.float64)
  if how == "median":
    middle = np.median(x)
    return predicted * (np.median(y) / middle) if middle else predicted
  if how != "least_squares":
    raise ValueError(f"depth is aligned by least_squares, median or none, got {how!r}")
  (scale, shift), *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], axis=1), y, rcond=None)
  return predicted * scale + shift


def depth_metrics(predicted: np.ndarray, truth: np.ndarray, *, smallest: float = 1e-3) -> dict[str, float]:
  """Depth errors (Eigen et al. 2014).

  delta1 to delta3: shares of pixels within a factor of 1.25, 1.25^2, 1.25^3 (higher is better). abs_rel, sq_rel, rmse (metres),
  rmse_log, silog (100 times the deviation of the log ratio): lower is better.

  Args:
    predicted: in metres; below `smallest` it counts as `smallest`.
    truth: in metres; 0, negative or not finite where it is unknown.
    smallest: in metres.
  """
  valid = _valid(truth)
  names = ("delta1", "delta2", "delta3", "abs_rel", "sq_rel", "rmse", "rmse_log", "silog")
  if not valid.any():
    return dict.fromkeys(names, math.nan)
  p, t = np.maximum(np.nan_to_num(predicted[valid].astype(np.float64)), smallest), truth[valid].astype(np.float64)
  ratio, logs = np.maximum(p / t, t / p), np.log(p) - np.log(t)
  spread = np.mean(logs**2) - np.mean(logs) ** 2
  values = (*(np.mean(ratio < 1.25**k) for k in (1, 2, 3)), np.mean(np.abs(p - t) / t), np.mean((p - t) ** 2 / t),
            np.sqrt(np.mean((p - t) ** 2)), np.sqrt(np.mean(logs**2)), 100 * np.sqrt(max(spread, 0)))
  return dict(zip(names, map(float, values)))


def normal_metrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
  """Angles between surface normals (Fouhey et al. 2013): mean and median in degrees (lower is better), and shares of pixels below
  5, 11.25 and 30 degrees (higher is better).

  Args:
    predicted: vectors (..., 3) of any length.
    truth: likewise; zero or not finite where it is unknown.
  """
  lengths = np.linalg.norm(truth, axis=-1)
  valid = np.isfinite(lengths) & (lengths > 1e-6)
  if not valid.any():
    return dict.fromkeys(("mean", "median", *(f"below_{a:g}" for a in ANGLES)), math.nan)
  p, t = np.nan_to_num(predicted[valid].astype(np.float64)), truth[valid].astype(np.float64)
  cosine = np.sum(p * t, axis=-1) / np.maximum(np.linalg.norm(p, axis=-1) * lengths[valid], 1e-12)
  angles = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
  return {"mean": float(angles.mean()), "median": float(np.median(angles)),
          **{f"below_{a:g}": float(np.mean(angles < a)) for a in ANGLES}}


def nearest_labels(colors: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
  """The index of the palette's nearest colour (in RGB), int (...): what a painted label map says.

  Args:
    colors: uint8 (..., 3).
    palette: colours by label.
  """
  _, labels = cKDTree(np.asarray(palette, np.float64)).query(colors.reshape(-1, 3).astype(np.float64))
  return labels.reshape(colors.shape[:-1])


def confusion_matrix(predicted: np.ndarray, truth: np.ndarray, num_classes: int, *, void: int = -1) -> np.ndarray:
  """How many pixels of each class (row) are taken for each (column), int (num_classes, num_classes).

  Args:
    predicted: labels from 0.
    truth: likewise.
    num_classes: labels that there are.
    void: a label of the truth whose pixels do not count; -1 is none.
  """
  valid = (truth >= 0) & (truth < num_classes) & (truth != void)
  pairs = truth[valid].astype(np.int64) * num_classes + predicted[valid]
  return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def with_matched_labels(confusion: np.ndarray) -> np.ndarray:
  """With predicted labels renamed, one to one, so that most pixels agree: a model may permute colours."""
  rows, columns = linear_sum_assignment(confusion, maximize=True)
  return confusion[:, columns[np.argsort(rows)]]


def segmentation_metrics(confusion: np.ndarray, *, void: int = -1) -> dict[str, float]:
  """miou, the mean of intersection over union (Everingham et al. 2010) over the classes that occur in truth or prediction, and
  pixel_accuracy; higher is better.

  Args:
    confusion: of a picture, or the sum over a data set, as benchmarks have it.
    void: the label that is no class; -1 is none.
  """
  if not confusion.any():
    return {"miou": math.nan, "pixel_accuracy": math.nan}
  agreed = np.diag(confusion)
  union = confusion.sum(0) + confusion.sum(1) - agreed
  counted = (union > 0) & (np.arange(len(union)) != void)
  return {"miou": float(np.mean(agreed[counted] / union[counted])), "pixel_accuracy": float(agreed.sum() / confusion.sum())}


def saliency_metrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
  """Of a mask of salient objects: iou and f_measure (beta^2 = 0.3, Achanta et al. 2009) of the mask cut at 0.5, higher is better,
  and mae of the soft mask, lower is better. Two empty masks agree.

  Args:
    predicted: in [0, 1].
    truth: likewise, cut at 0.5.
  """
  p, t = predicted >= 0.5, truth >= 0.5
  both, either = np.sum(p & t), np.sum(p | t)
  precision, recall = (both / np.sum(x) if np.sum(x) else float(not either) for x in (p, t))
  weighed = BETA_SQUARED * precision + recall
  return {"iou": float(both / either) if either else 1.0,
          "f_measure": float((1 + BETA_SQUARED) * precision * recall / weighed) if weighed else 0.0,
          "mae": float(np.mean(np.abs(predicted.astype(np.float64) - truth)))}


def match_edges(predicted: np.ndarray, truth: np.ndarray, *, tolerance: float = 1.0) -> int:
  """How many edge pixels of two boolean maps (H, W) can be paired, each once, no further apart than `tolerance` pixels.

  The largest such number (Hopcroft and Karp), as the matching of Martin et al. 2004 wants it.
  """
  places = [np.argwhere(edges) for edges in (predicted, truth)]
  if not all(map(len, places)):
    return 0
  near = cKDTree(places[0]).query_ball_tree(cKDTree(places[1]), tolerance + 1e-9)
  rows = np.repeat(np.arange(len(near)), [len(found) for found in near])
  columns = np.concatenate([np.asarray(found, np.int64) for found in near])
  graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=tuple(map(len, places))).tocsr()
  return int(np.sum(maximum_bipartite_matching(graph, perm_type="column") >= 0))


def edge_counts(strength: np.ndarray, truth: np.ndarray, *, thresholds: int = 99, tolerance: float = 1.0) -> np.ndarray:
  """For each threshold (evenly in (0, 1)): matched, predicted and true edge pixels, int (thresholds, 3), of one picture.

  Args:
    strength: of predicted edges, (H, W) in [0, 1]; thinned to lines of one pixel at each threshold.
    truth: edges, boolean (H, W); thinned.
    thresholds: how many.
    tolerance: pixels.
  """
  truth = thin(truth.astype(bool))
  counts, last, result = np.zeros((thresholds, 3), np.int64), None, None
  for i in range(thresholds):
    edges = strength >= (i + 1) / (thresholds + 1)
    if last is None or not np.array_equal(edges, last):  # maps of few levels are matched once a level
      lines = thin(edges)
      result, last = (match_edges(lines, truth, tolerance=tolerance), int(lines.sum()), int(truth.sum())), edges
      counts[i] = result
    counts[i] = result
  return counts


def edge_metrics(counts: Sequence[np.ndarray]) -> dict[str, float]:
  """ods, ois (F at the best threshold of the data set, and of each picture) and ap of edges (Arbelaez et al. 2011); higher is
  better.

  Args:
    counts: of each picture, from `edge_counts`.
  """
  if not len(counts):
    return dict.fromkeys(("ods", "ois", "ap"), math.nan)
  counts = np.asarray(counts)
  total = counts.sum(axis=0)
  best = counts[np.arange(len(counts)), [int(np.argmax(_f(c))) for c in counts]].sum(axis=0)
  precision, recall = _rates(total)
  # As in the Berkeley benchmark: precision is interpolated between the thresholds' recalls, nothing beyond the largest.
  recalls, first = np.unique(recall, return_index=True)
  grid = np.linspace(0, 1, 101)
  found = np.interp(grid, recalls, precision[first], left=precision[first][0], right=0)
  return {"ods": float(_f(total).max()), "ois": float(_f(best[None])[0]), "ap": float(found.mean())}


def _rates(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  matched, predicted, true = counts.T
  return matched / np.maximum(predicted, 1), matched / np.maximum(true, 1)


def _f(counts: np.ndarray) -> np.ndarray:
  precision, recall = _rates(counts)
  return 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def _valid(depth: np.ndarray) -> np.ndarray:
  return np.isfinite(depth) & (depth > 0)
