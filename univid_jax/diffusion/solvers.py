"""Solvers of the flow's ordinary differential equation. Each advances noised tokens one step at a time."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from univid_jax.core.errors import UserError
from univid_jax.core.options import MAX_STEPS, SolverName
from univid_jax.core.protocols import NoiseSchedule, Number, Solver, Tokens, VelocityFn, Weights
from univid_jax.core.text import describe_value
from univid_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS


class Euler:
  """UniVid's sampler: Euler steps over uniform times, latents in float32."""

  fixed_steps: int | None = None
  takes_sigmas = True

  def sigmas(self, schedule: NoiseSchedule, num_steps: int) -> Float[np.ndarray, "i"]:
    return schedule.sigma(_uniform_times(num_steps)).astype(np.float32)

  def coefficients(self, sigmas: Float[np.ndarray, "i"]) -> Float[np.ndarray, "i w"]:
    """Returns the change of the noise level in each step."""
    following = np.append(sigmas[1:], np.float32(0))
    return (following - sigmas)[:, None]

  def init(self, noise: Tokens) -> Tokens:
    return noise

  def step(self, predict: VelocityFn, state: Tokens, sigma: Number, coefficients: Weights) -> Tokens:
    return state + predict(state, sigma) * coefficients[0]

  def tokens(self, state: Tokens) -> Tokens:
    return state


class Distilled(Euler):
  """Euler steps over the few noise levels that step-distilled models are trained for: 1000, 750, 500 and 250.

  These are indices into the grid of 1,000 noise levels, counted from its clean end, as LightX2V publishes them
  (`WanStepDistillScheduler`, `denoising_step_list`, Apache-2.0). The published shift is 5.
  """

  places = (1000, 750, 500, 250)
  fixed_steps = len(places)
  takes_sigmas = False

  def sigmas(self, schedule: NoiseSchedule, num_steps: int) -> Float[np.ndarray, "i"]:
    if num_steps != self.fixed_steps:
      raise UserError(f"the solver distilled takes {self.fixed_steps} steps, got {num_steps}: leave the number out")
    return schedule.sigma(np.array(self.places) / NUM_TRAIN_TIMESTEPS).astype(np.float32)


class UniPCState(NamedTuple):
  """State of UniPC of order 2: the tokens, the last corrected tokens, and the last two clean estimates."""

  tokens: Tokens
  corrected: Tokens
  clean: Tokens
  earlier_clean: Tokens


class UniPC:
  """UniPC of order 2 for flows (Zhao et al. 2023), equal to diffusers' UniPCMultistepScheduler.

  Each step corrects the last one with the new prediction, then predicts the next. Both are weighted sums of known
  values; the weights depend on the noise levels alone. The model gets whole timesteps, as in diffusers. Wan's own code
  spaces the levels slightly differently, from 0.999 to 0 before the shift.
  """

  fixed_steps = None
  takes_sigmas = False

  def sigmas(self, schedule: NoiseSchedule, num_steps: int) -> Float[np.ndarray, "i"]:
    """Spaces levels like diffusers: from just below 1, where the signal is not quite 0."""
    times = np.linspace(1, 1 / NUM_TRAIN_TIMESTEPS, _check_steps(num_steps) + 1)[:-1]
    levels = np.minimum(schedule.sigma(times), 1 - 1e-6)
    rounded = levels.astype(np.float32)
    # Rounding must not change the timestep.
    change = _whole_times(rounded) - _whole_times(levels)
    return np.where(change == 0, rounded, np.nextafter(rounded, np.where(change > 0, 0, 1).astype(np.float32)))

  def coefficients(self, sigmas: Float[np.ndarray, "i"]) -> Float[np.ndarray, "i w"]:
    """Returns the weights of `unipc_weights`, and the noise level that gives the model's timestep."""
    weights = (*unipc_weights(sigmas.astype(np.float64)), _whole_times(sigmas)[:, None])
    return np.concatenate(weights, axis=1).astype(np.float32)

  def init(self, noise: Tokens) -> UniPCState:
    # Separate buffers, because a step's state is donated.
    return UniPCState(noise, noise.copy(), noise.copy(), noise.copy())

  def step(self, predict: VelocityFn, state: UniPCState, sigma: Number, coefficients: Weights) -> UniPCState:
    x, last, before, earlier = state
    c, a, level = coefficients[:5], coefficients[5:8], coefficients[8]
    clean = x - sigma * predict(x, level)
    corrected = c[0] * x + c[1] * last + c[2] * before + c[3] * earlier + c[4] * clean
    return UniPCState(a[0] * corrected + a[1] * clean + a[2] * before, corrected, clean, before)

  def tokens(self, state: UniPCState) -> Tokens:
    return state.tokens


SOLVERS: Mapping[SolverName, Solver[Any]] = {
  SolverName.EULER: Euler(),
  SolverName.UNIPC: UniPC(),
  SolverName.DISTILLED: Distilled(),
}


def check_sigmas(sigmas: Sequence[float], solver: Solver[Any]) -> Float[np.ndarray, "i"]:
  """Checks noise levels that replace those of a schedule; returns them in float32.

  Raises:
    UserError: they do not descend strictly within (0, 1], or the solver cannot use them.
  """
  if not getattr(solver, "takes_sigmas", False):  # a user's solver may lack it
    raise UserError("sigmas are given to Euler's steps only: use the solver euler")
  levels = np.asarray(sigmas, np.float32)
  is_valid = levels.ndim == 1 and levels.size > 0 and levels[-1] > 0 and levels[0] <= 1 and (np.diff(levels) < 0).all()
  if not is_valid:
    raise UserError(
      "sigmas are noise levels that descend strictly, above 0 and at most 1 (the final 0 is implied), got "
      + ", ".join(map(str, sigmas))
    )
  if len(levels) > MAX_STEPS:
    raise UserError(f"there are at most {MAX_STEPS} sigmas, got {len(levels)}")
  return levels


def find_solver(solver: str | Solver[Any]) -> Solver[Any]:
  """Returns a solver by name, or the solver itself.

  Raises:
    UserError: there is no solver of that name, or the object is not a solver.
  """
  if not isinstance(solver, str):
    if isinstance(solver, type) or not all(callable(getattr(solver, name, None)) for name in ("sigmas", "step")):
      raise UserError(f"solver must be one of {', '.join(SOLVERS)}, or your own, got {describe_value(solver)}")
    return solver
  if solver not in SOLVERS:
    raise UserError(f"unknown solver {solver!r}; there are {', '.join(SOLVERS)}")
  return SOLVERS[SolverName(solver)]


def _check_steps(num_steps: int) -> int:
  if num_steps < 1:
    raise UserError(f"sampling takes at least 1 step, got {num_steps}")
  return num_steps


def _whole_times(sigmas: Float[np.ndarray, "i"]) -> Float[np.ndarray, "i"]:
  """Returns the noise levels of diffusers' timesteps, which are whole numbers, float64."""
  return np.floor(sigmas.astype(np.float64) * NUM_TRAIN_TIMESTEPS) / NUM_TRAIN_TIMESTEPS


def _uniform_times(num_steps: int) -> Float[np.ndarray, "i"]:
  return np.linspace(1, 0, _check_steps(num_steps) + 1)[:-1]


def unipc_weights(sigmas: Float[np.ndarray, "i"]) -> tuple[Float[np.ndarray, "i 5"], Float[np.ndarray, "i 3"]]:
  """Returns the weights of every UniPC step, float64.

  Args:
    sigmas: the noise level before each step, below 1; it is 0 after the last step.

  Returns:
    The corrector's weights for (tokens, last corrected, last clean, earlier clean, this clean), and the predictor's for
    (corrected, this clean, last clean).
  """
  count = len(sigmas)
  levels = np.append(sigmas, 0.0)
  with np.errstate(divide="ignore"):
    half_log_snr = np.log(1 - levels) - np.log(levels)

  def first_order(start: int, end: int) -> tuple[float, float, float]:
    """Returns the weights of the tokens and of the clean estimate at order 1, and the factor of all differences."""
    growth = np.expm1(-(half_log_snr[end] - half_log_snr[start]))
    return levels[end] / levels[start], -(1 - levels[end]) * growth, -(1 - levels[end]) * growth

  correct, advance = np.zeros((count, 5)), np.zeros((count, 3))
  correct[0, 0] = 1
  order = 1
  for i in range(count):
    if i > 0:
      keep, clean, factor = first_order(i - 1, i)
      h = half_log_snr[i] - half_log_snr[i - 1]
      if order == 1:
        correct[i, 1:] = keep, clean - 0.5 * factor, 0, 0.5 * factor
      else:
        ratio = (half_log_snr[i - 2] - half_log_snr[i - 1]) / h
        first = np.expm1(-h) / -h - 1
        second = first / -h - 0.5
        b = np.array([first, 2 * second]) / np.expm1(-h)
        rho = np.linalg.solve(np.array([[1, 1], [ratio, 1]]), b)
        correct[i, 1:] = keep, clean - factor * (rho[0] / ratio + rho[1]), factor * rho[0] / ratio, factor * rho[1]
    order = min(2, count - i, i + 1)
    keep, clean, factor = first_order(i, i + 1)
    advance[i] = keep, clean, 0
    if order == 2:
      ratio = (half_log_snr[i - 1] - half_log_snr[i]) / (half_log_snr[i + 1] - half_log_snr[i])
      advance[i] = keep, clean - 0.5 * factor / ratio, 0.5 * factor / ratio
  return correct, advance
