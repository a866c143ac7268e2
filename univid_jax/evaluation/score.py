"""Scores samples and baselines against the ground truth, and averages the scores over sentences."""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import name_key
from univid_jax.core.options import TargetKind
from univid_jax.data.target_kinds import COMPUTED_KINDS, own_kinds
from univid_jax.evaluation.candidates import Candidate
from univid_jax.evaluation.controls import baselines
from univid_jax.evaluation.generate import Generated, SentenceInfo, is_repetition
from univid_jax.evaluation.kinds import KIND_METRICS, Counts, KindOptions, Metrics
from univid_jax.evaluation.metrics.clip_scores import CLIPScores
from univid_jax.evaluation.metrics.image import SSIM_SIDE, psnr, rmse, ssim

T = TypeVar("T")
KeyT = TypeVar("KeyT", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Score:
  """The scores of one clip of one sentence.

  Attributes:
    name: the variant or baseline that the clip belongs to.
    metrics: metrics of the whole clip.
    kind: what the target represents, if it has metrics of its own.
    counts: what `KIND_METRICS[kind].pool` needs; for a grid, the truth.
  """

  name: str
  metrics: Metrics
  kind: TargetKind = TargetKind.IMAGE
  counts: Counts = dataclasses.field(default_factory=dict)


def scored_clips(generated: Generated) -> dict[str, np.ndarray]:
  """Returns every clip that is compared with the ground truth: samples by variant, then baselines."""
  return {**generated.samples, **baselines(generated.clips), Candidate.CODEC: generated.codec}


def score_psnr(generated: Generated) -> dict[str, float]:
  """Returns the PSNR of every clip, the cheap part of the scores."""
  return {name: psnr(clip, generated.clips[-1]) for name, clip in scored_clips(generated).items()}


def target_kind(info: SentenceInfo, kinds: Mapping[str, TargetKind]) -> TargetKind:
  """Returns what a target represents; reversed sentences have natural images and videos, whatever the task.

  Args:
    info: the sentence's; only those of computed tasks, grids and ARC have parameters.
    kinds: kinds of the tasks of the user's own data, see `own_kinds`.
  """
  if info.reverse:
    return TargetKind.IMAGE
  return (kinds if info.params is None else COMPUTED_KINDS).get(info.task, TargetKind.IMAGE)


class Scorer:
  """Computes all metrics.

  Args:
    config: of the evaluation.

  Raises:
    FileNotFoundError: the file of the palette does not exist.
    UserError: that file is malformed, there is no such CLIP model, or the extra that CLIP scores need is not installed.
  """

  def __init__(self, config: RunConfig):
    self._kinds, self._options = own_kinds(config.data), KindOptions.from_config(config)
    with name_key("eval.clip_model"):
      self._clip_scores = CLIPScores(config.eval.clip_model) if config.eval.clip_model else None

  def __call__(self, generated: Generated) -> list[Score]:
    """Scores all clips of a sentence."""
    return [self.score(name, clip, generated) for name, clip in scored_clips(generated).items()]

  def score(self, name: str, clip: np.ndarray, generated: Generated) -> Score:
    """Scores one clip: as an image or video, then as what it represents."""
    metrics, kind = self._image_metrics(clip, generated), target_kind(generated.info, self._kinds)
    if kind not in KIND_METRICS:
      return Score(name, metrics)
    extra, counts = KIND_METRICS[kind].score(clip, generated, self._options)
    return Score(name, metrics | extra, kind, counts)

  def tabulate(self, scores: Iterable[Score]) -> dict[str, Metrics]:
    """Averages scores; returns metrics and `count` by variant or baseline.

    With repetitions (`seed_N`) the row "prediction" is the mean over all of them, and METRIC_std their standard
    deviation; the repetitions have no rows of their own.
    """
    by_name = collections.defaultdict(list)
    for score in scores:
      by_name[score.name].append(score)
    rows = {name: self._average(group) for name, group in by_name.items()}
    repeats = [rows.pop(name) for name in list(rows) if is_repetition(name)]
    if repeats and Candidate.PREDICTION in rows:
      runs = [rows[Candidate.PREDICTION], *repeats]
      for name in [name for name in rows[Candidate.PREDICTION] if name != "count"]:
        values = [run[name] for run in runs if name in run]
        rows[Candidate.PREDICTION][name] = float(np.mean(values))
        if len(values) > 1:
          rows[Candidate.PREDICTION][f"{name}_std"] = float(np.std(values, ddof=1))
    return rows

  def _image_metrics(self, clip: np.ndarray, generated: Generated) -> Metrics:
    truth, prompt = generated.clips[-1], generated.info.prompt
    metrics = {"psnr": psnr(clip, truth), "rmse": rmse(clip, truth)}
    if min(truth.shape[1:3]) >= SSIM_SIDE:
      metrics["ssim"] = ssim(clip, truth)
    if self._clip_scores is not None:
      metrics["clip_i"] = self._clip_scores.clip_i(clip, truth)
      if prompt:
        metrics["clip_t"] = self._clip_scores.clip_t(clip, prompt)
    return metrics

  def _average(self, scores: Sequence[Score]) -> Metrics:
    """Averages each metric over the sentences that have it, except those that are pooled over all sentences."""
    metrics = mean_metrics([score.metrics for score in scores])
    for kind, entry in KIND_METRICS.items():
      counts = [score.counts for score in scores if score.kind == kind]
      if entry.pool and counts:
        metrics |= entry.pool(counts, self._options)
    return metrics | {"count": len(scores)}


def group_by(
  scored: Iterable[tuple[SentenceInfo, T]], key: Callable[[SentenceInfo], KeyT]
) -> dict[KeyT, list[tuple[SentenceInfo, T]]]:
  """Groups sentences with their scores by a key, in the order in which keys first occur."""
  groups = collections.defaultdict(list)
  for info, scores in scored:
    groups[key(info)].append((info, scores))
  return dict(groups)


def mean_metrics(items: Sequence[Mapping[str, float]]) -> Metrics:
  """Averages each metric over the items in which it is defined: present and finite."""
  values = collections.defaultdict(list)
  for item in items:
    for name, value in item.items():
      if np.isfinite(value):
        values[name].append(value)
  return {name: float(np.mean(each)) for name, each in values.items()}
