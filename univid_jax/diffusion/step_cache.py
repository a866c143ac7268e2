"""Step caching: steps reuse the residual, what the transformer's blocks added to the hidden states in an earlier step.

MagCache (Ma et al. 2025, arXiv 2506.09045), as diffusers' `MagCacheConfig` does it, which also skips a step whose error
is exactly the threshold. The residual's magnitude changes from step to step by ratios that hardly depend on the sample.
They are measured once, so it is known before sampling which steps are computed, and no program contains a decision.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from univid_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCache:
  """Which steps may be skipped.

  Attributes:
    ratios: by branch (the prompt, then the negative prompt if there is guidance) and step: the mean over target tokens
      of the residual's magnitude, relative to the step before; from `RatioMeasurement`.
    threshold: bound on the sum of estimated errors since the last computed step; 0 skips nothing.
    max_skip: the most steps that are skipped in a row, K in the paper.
    retention: share of each expert's steps, from its first on, that are always computed.
  """

  ratios: Sequence[Sequence[float]]
  threshold: float = 0.12
  max_skip: int = 2
  retention: float = 0.2

  def __post_init__(self):
    check_step_cache(self.threshold, self.max_skip, self.retention)

  def computed_steps(
    self, branch: int, segments: Sequence[range], active: Bool[np.ndarray, "i"]
  ) -> Bool[np.ndarray, "i"]:
    """Returns whether each step computes the blocks; steps in which the branch is not used count as computed.

    Args:
      branch: 0 for the prompt, 1 for the negative prompt.
      segments: the steps of each expert; residuals of one are not reused by the other.
      active: steps in which the branch is used. Residuals from before a gap are not reused.

    Raises:
      UserError: there are no ratios for the branch, or they are for another number of steps.
    """
    if branch >= len(self.ratios) or len(self.ratios[branch]) != len(active):
      found = f"{len(self.ratios)} branches of {len(self.ratios[0]) if self.ratios else 0} steps"
      raise UserError(f"the step cache has ratios of {found}, but the sample needs {branch + 1} of {len(active)}")
    computed = np.ones(len(active), bool)
    for steps in segments:
      first = steps.start + int(self.retention * len(steps) + 0.5)
      product, error, skipped, has_residual = 1.0, 0.0, 0, False
      for i in steps:
        if i >= first and active[i]:
          product *= self.ratios[branch][i]
          error += abs(1 - product)
          skipped += 1
          computed[i] = not (has_residual and error < self.threshold and skipped <= self.max_skip)
          if computed[i]:
            product, error, skipped = 1.0, 0.0, 0
        has_residual = bool(active[i])
    return computed


class RatioMeasurement:
  """Takes the place of a `StepCache` in a sample that computes every step, and measures its ratios.

  Attributes:
    ratios: those of the prompt and of the negative prompt, complete when the sample is; only those of the last of
      several samples, or batches of rows.
    is_guided: whether the negative prompt was used in a step.
  """

  def __init__(self):
    self.ratios: tuple[list[float], list[float]] = ([], [])
    self.is_guided = False

  def clear(self) -> None:
    self.is_guided = False
    for ratios in self.ratios:
      ratios.clear()

  @property
  def table(self) -> tuple[tuple[float, ...], ...]:
    """The ratios of the branches that were used, for a `StepCache`."""
    prompt, negative = map(tuple, self.ratios)
    return (prompt, negative) if self.is_guided else (prompt,)


def check_step_cache(threshold: float, max_skip: int, retention: float) -> None:
  """Raises UserError if a setting of `StepCache` is invalid."""
  if not 0 <= threshold < math.inf:
    raise UserError(f"the threshold of the step cache must be at least 0, got {threshold}")
  if max_skip < 1:
    raise UserError(f"the step cache must be allowed to skip at least 1 step in a row, got {max_skip}")
  if not 0 <= retention <= 1:
    raise UserError(f"the retention of the step cache must be from 0 to 1, got {retention}")
