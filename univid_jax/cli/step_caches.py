"""Step caches on the command line: their settings, and the ratios that they need."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from univid_jax import Pipeline
from univid_jax.cli.flags import UsageError
from univid_jax.cli.sampling import SamplingArguments
from univid_jax.diffusion.step_cache import RatioMeasurement, StepCache
from univid_jax.inference.plan import SamplingPlan

METHOD = "magcache"
PREVIEWED_THRESHOLDS = (0.06, 0.12, 0.24)


def parse_step_cache(text: str) -> StepCache:
  """Splits magcache[:THRESHOLD[:MAX_SKIP[:RETENTION]]]; the ratios are still missing.

  Raises:
    UsageError: it has another form.
    UserError: a value is invalid.
  """
  method, *values = text.split(":")
  names = dict(zip(("threshold", "max_skip", "retention"), values))
  settings: dict[str, Any] = {}
  try:
    if method != METHOD or len(values) > 3:
      raise ValueError
    for name, value in names.items():
      settings[name] = int(value) if name == "max_skip" else float(value)
  except ValueError as error:
    form = f"{METHOD}[:THRESHOLD[:MAX_SKIP[:RETENTION]]]"
    raise UsageError(f"--step_cache is {form}, for instance {METHOD}:0.12:2:0.2, got {text!r}") from error
  return StepCache(ratios=(), **settings)


def measure_ratios(
  pipeline: Pipeline, clips: Sequence[np.ndarray], arguments: SamplingArguments
) -> tuple[tuple[float, ...], ...]:
  """Returns the ratios of a sample, for a `StepCache`.

  Args:
    pipeline: the model.
    clips: the context.
    arguments: others of `Pipeline.sample`.
  """
  measurement = RatioMeasurement()
  steps = dataclasses.replace(arguments.steps, step_cache=measurement)
  arguments = dataclasses.replace(arguments, steps=steps)
  with tqdm(total=len(pipeline.make_plan(steps).sigmas), desc="calibrate", unit="step") as bar:

    def show(taken: int) -> None:
      bar.update(taken - bar.n)

    pipeline.sample(clips, **arguments.to_keywords(), progress=show)
  return measurement.table


def describe_schedules(pipeline: Pipeline, plan: SamplingPlan, ratios: Sequence[Sequence[float]]) -> Iterator[str]:
  """Yields a line for several thresholds: how often a sample computes the transformer's blocks."""
  experts = [pipeline.experts.find(float(sigma)) for sigma in plan.sigmas]
  guided = plan.guided_steps() & (len(ratios) > 1)
  total = len(experts) + int(guided.sum())
  thresholds: dict[int, float] = {}  # the lowest for each number
  for threshold in PREVIEWED_THRESHOLDS:
    cached = dataclasses.replace(plan, step_cache=StepCache(ratios=ratios, threshold=threshold))
    steps = cached.computed_steps(experts, guided)
    skipped = 0 if steps is None else int((~steps).sum())
    thresholds.setdefault(total - skipped, threshold)
  for computed, threshold in thresholds.items():
    yield f"--step_cache={METHOD}:{threshold:g}  computes the blocks in {computed} of {total} passes"
