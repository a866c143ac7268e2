"""Exact comparisons of grids, with confidence intervals."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri

from univid_jax.data.tasks.grids.base import Grid, is_same

CONFIDENCE = 0.95
BOOTSTRAP_SAMPLES = 2000

Interval = tuple[float, float]


def grid_metrics(predicted: Sequence[Grid], truth: Sequence[Grid]) -> dict[str, float]:
  """Compares the states of two clips.

  grid_accuracy: 1 if all states have the right size and cells, else 0. cell_accuracy: share of the true cells that have
  the right colour at their place, averaged over states; the first state of a video, which shows the source, does not
  count.
  """
  if len(predicted) != len(truth):
    raise ValueError(f"clips must show as many states, got {len(predicted)} and {len(truth)}")
  states = list(zip(counted_states(predicted), counted_states(truth)))
  return {
    "grid_accuracy": float(all(is_same(a, b) for a, b in states)),
    "cell_accuracy": float(np.mean([_share_of_cells(a, b) for a, b in states])),
  }


def counted_states(states: Sequence[Grid]) -> Sequence[Grid]:
  """Returns the states that are compared: those of a video without its first, which shows the source."""
  return states[1:] if len(states) > 1 else states


def _share_of_cells(predicted: Grid, truth: Grid) -> float:
  height, width = (min(a, b) for a, b in zip(predicted.shape, truth.shape))
  return float(np.sum(predicted[:height, :width] == truth[:height, :width]) / truth.size)


def wilson_interval(share: float, count: int) -> Interval:
  """Returns the interval of a share of `count` independent trials (Wilson 1927); never empty or outside [0, 1].

  With several seeds `share` may be a mean over seeds and `count` the number of sentences: seeds of a sentence are not
  independent, so the interval is, if anything, too wide.
  """
  z = float(ndtri((1 + CONFIDENCE) / 2))
  center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
  reach = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
  return max(center - reach, 0.0), min(center + reach, 1.0)


def bootstrap_interval(values: Sequence[float]) -> Interval:
  """Returns the interval of a mean by resampling values with replacement; the same every time."""
  rng = np.random.default_rng(0)
  means = np.mean(rng.choice(np.asarray(values), (BOOTSTRAP_SAMPLES, len(values))), axis=1)
  low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
  return float(low), float(high)
