"""How a sample is integrated: solver, noise levels and guidance, from what was asked for and how the model works."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from univid_jax.core.checks import require_integer, require_list, require_number
from univid_jax.core.errors import UserError
from univid_jax.core.options import MAX_SHIFT, MAX_STEPS, SolverName
from univid_jax.core.protocols import Solver
from univid_jax.core.text import describe_value
from univid_jax.diffusion.distillations import Distillation
from univid_jax.diffusion.flow import FlowMatching
from univid_jax.diffusion.solvers import check_sigmas, find_solver
from univid_jax.diffusion.step_cache import RatioMeasurement, StepCache

# Raise it when the same weights, options and clips give other samples, or the files of these change.
SAMPLING_VERSION = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
  """How a sample is to be integrated, see `Pipeline.sample`; None leaves the choice to the model.

  Raises:
    UserError: a value is of another type, or out of range.
  """

  num_inference_steps: int | None = None
  shift: float | None = None
  solver: str | Solver[Any] | None = None
  sigmas: Sequence[float] | None = None
  guidance_scale: float | Sequence[float] | None = None
  guidance_range: Sequence[float] | None = None
  step_cache: StepCache | RatioMeasurement | None = None

  def __post_init__(self):
    steps, levels, scale = self.num_inference_steps, self.sigmas, self.guidance_scale
    if steps is not None:
      self._set("num_inference_steps", require_integer("num_inference_steps", steps, 1, MAX_STEPS))
    if self.shift is not None:
      self._set("shift", shift := require_number("shift", self.shift, is_positive=True))
      if shift > MAX_SHIFT:
        raise UserError(f"shift must be at most {MAX_SHIFT:g}, got {shift:g}")
    if levels is not None:
      self._set("sigmas", _numbers("sigmas", levels, "noise levels"))
    if scale is not None:
      self._set("guidance_scale", _number_or_numbers("guidance_scale", scale))
    if self.guidance_range is not None:
      self._set("guidance_range", _numbers("guidance_range", self.guidance_range, "two noise levels"))
    if not isinstance(self.step_cache, StepCache | RatioMeasurement | None):
      raise UserError(
        "step_cache must be a StepCache with the ratios of a RatioMeasurement, or such a measurement (see "
        f"univid_jax.diffusion.step_cache), got {describe_value(self.step_cache)}; names are for the command"
      )

  @classmethod
  def from_keywords(cls, **options: Any) -> "SamplingOptions":
    """Returns the options of a caller's keywords; raises UserError that lists all if there is no such option."""
    names = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(options) - set(names)):
      raise UserError(f"there is no option {', '.join(unknown)}; options of sampling here are {', '.join(names)}")
    return cls(**options)

  def _set(self, name: str, value: Any) -> None:
    object.__setattr__(self, name, value)

  @property
  def num_steps(self) -> int | None:
    """The number of steps that was asked for."""
    return len(self.sigmas) if self.sigmas is not None else self.num_inference_steps

  def to_keywords(self) -> dict[str, Any]:
    """Returns the options as keywords of `Pipeline.sample`."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingPlan:
  """What every step of a sample does.

  Attributes:
    solver: integrates the flow.
    sigmas: the noise level before each step, float32, descending.
    guidance_scale: see `Experts.guidance_scales`.
    guidance_range: noise levels with guidance, from and to; in other steps the negative prompt is not computed.
    step_cache: which steps reuse the residual of an earlier one; None and a measurement compute all.
  """

  solver: Solver[Any]
  sigmas: Float[np.ndarray, "i"]
  guidance_scale: float | Sequence[float] = 1.0
  guidance_range: tuple[float, float] = (0.0, 1.0)
  step_cache: StepCache | RatioMeasurement | None = None

  @classmethod
  def from_options(
    cls,
    options: SamplingOptions,
    distillation: Distillation | None = None,
    *,
    default_shift: float = 5.0,
    default_steps: int = 50,
  ) -> "SamplingPlan":
    """Returns the plan for what was asked for and how the model works.

    Args:
      options: what was asked for.
      distillation: of the model, if it has one. It decides everything: other values are refused.
      default_shift, default_steps: those of training and its evaluation; some solvers have steps of their own.

    Raises:
      UserError: a value is invalid, or contradicts another one or the distillation.
    """
    if distillation is not None:
      options = _apply_distillation(options, distillation)
    solver = find_solver(SolverName.EULER if options.solver is None else options.solver)
    if options.sigmas is not None:
      for name in ("num_inference_steps", "shift"):
        if getattr(options, name) is not None:
          raise UserError(f"sigmas replace {name}: leave one of them out")
      levels = check_sigmas(options.sigmas, solver)
    else:
      steps = options.num_inference_steps
      if steps is None:
        steps = getattr(solver, "fixed_steps", None) or default_steps  # your own may lack it
      levels = _make_sigmas(solver, steps, default_shift if options.shift is None else options.shift)
    return cls(
      solver=solver,
      sigmas=levels,
      guidance_scale=1.0 if options.guidance_scale is None else options.guidance_scale,
      guidance_range=_check_range(options.guidance_range, options.guidance_scale),
      step_cache=options.step_cache,
    )

  def guided_steps(self) -> Bool[np.ndarray, "i"]:
    """Returns whether each step is guided, if there is guidance."""
    low, high = map(np.float32, self.guidance_range)
    return (low <= self.sigmas) & (self.sigmas <= high)

  def computed_steps(self, experts: Sequence[int], guided: Bool[np.ndarray, "i"]) -> Bool[np.ndarray, "w i"] | None:
    """Returns whether each branch computes the blocks in each step; None if all do and no residual is needed.

    Args:
      experts: the expert of each step.
      guided: whether the negative prompt is used in each step.

    Raises:
      UserError: the step cache is of another plan.
    """
    if self.step_cache is None:
      return None
    if isinstance(self.step_cache, RatioMeasurement):
      return np.ones((2, len(experts)), bool)
    segments, start = [], 0
    for _, group in itertools.groupby(experts):
      segments.append(range(start, start + len(list(group))))
      start = segments[-1].stop
    always = np.ones(len(experts), bool)
    computed = [self.step_cache.computed_steps(0, segments, always), always]
    if guided.any():
      computed[1] = self.step_cache.computed_steps(1, segments, guided)
    return None if np.all(computed) else np.stack(computed)


def _make_sigmas(solver: Solver[Any], num_steps: int, shift: float) -> Float[np.ndarray, "i"]:
  return solver.sigmas(FlowMatching(shift=shift), num_steps)


def _numbers(name: str, values: Any, what: str) -> tuple[float, ...]:
  return tuple(require_number(f"each of {name}", value) for value in require_list(name, values, what))


def _number_or_numbers(name: str, value: Any) -> float | tuple[float, ...]:
  is_list = isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0
  numbers = _numbers(name, value, "numbers") if is_list else require_number(name, value)
  if not np.all(np.isfinite(numbers)):
    raise UserError(f"{name} must be finite, got {', '.join(map(str, np.ravel(numbers)))}")
  return numbers


def _check_range(levels: Sequence[float] | None, scale: float | Sequence[float] | None) -> tuple[float, float]:
  if levels is None:
    return 0.0, 1.0
  if len(levels) != 2 or not 0 <= levels[0] < levels[1] <= 1:
    raise UserError(f"guidance_range is two noise levels from 0 to 1, ascending, got {', '.join(map(str, levels))}")
  if scale is None or np.all(np.asarray(scale) == 1):
    raise UserError("guidance_range needs guidance: give a guidance_scale other than 1")
  return float(levels[0]), float(levels[1])


def _apply_distillation(options: SamplingOptions, distillation: Distillation) -> SamplingOptions:
  """Returns the options that a distillation decides; raises UserError if others were asked for."""
  for name, value in options.to_keywords().items():
    fixed = getattr(distillation, name, None)
    if value is not None and (fixed is None or not np.all(np.asarray(value) == fixed)):
      has = str(fixed) if fixed is not None else "a few steps of its own"
      raise UserError(f"{name} contradicts the distillation {distillation.name}, which has {has}: leave it out")
  return SamplingOptions(
    solver=distillation.solver,
    num_inference_steps=distillation.num_inference_steps,
    shift=distillation.shift,
    guidance_scale=distillation.guidance_scale,
  )
