"""How a sample is integrated: solver, noise levels and guidance, from what was asked for and how the model works."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from univid_jax.core.errors import UserError
from univid_jax.core.protocols import Solver
from univid_jax.diffusion.accelerators import Accelerator
from univid_jax.diffusion.flow import FlowMatching
from univid_jax.diffusion.solvers import check_sigmas, default_steps, find_solver


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingPlan:
  """What every step of a sample does.

  Attributes:
    solver: integrates the flow.
    sigmas: the noise level before each step, float32, descending.
    guidance_scale: see `Experts.guidance_scales`.
  """

  solver: Solver[Any]
  sigmas: Float[np.ndarray, "i"]
  guidance_scale: float | Sequence[float] = 1.0

  @classmethod
  def of(
    cls,
    accelerator: Accelerator | None = None,
    *,
    default_shift: float = 5.0,
    num_inference_steps: int | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    shift: float | None = None,
    solver: str | Solver[Any] | None = None,
    sigmas: Sequence[float] | None = None,
  ) -> "SamplingPlan":
    """Returns the plan for options of `Pipeline.sample`, of which None leaves the choice to the model.

    Args:
      accelerator: of the model, if it has one. It decides everything: other values are refused.
      default_shift: that of training.
      num_inference_steps, guidance_scale, shift, solver, sigmas: see `Pipeline.sample`.

    Raises:
      UserError: a value is invalid, or contradicts another one or the accelerator.
    """
    given = {
      "solver": solver,
      "num_inference_steps": num_inference_steps,
      "shift": shift,
      "guidance_scale": guidance_scale,
      "sigmas": sigmas,
    }
    if accelerator is not None:
      _check_accelerator(accelerator, given)
      solver, num_inference_steps = accelerator.solver, accelerator.num_inference_steps
      shift, guidance_scale = accelerator.shift, accelerator.guidance_scale
    solver = find_solver("euler" if solver is None else solver)
    guidance_scale = 1.0 if guidance_scale is None else guidance_scale
    if sigmas is not None:
      for name in ("num_inference_steps", "shift"):
        if given[name] is not None:
          raise UserError(f"sigmas replace {name}: leave one of them out")
      return cls(solver=solver, sigmas=check_sigmas(sigmas, solver), guidance_scale=guidance_scale)
    shift = default_shift if shift is None else shift
    if not shift > 0:
      raise UserError(f"the shift of the noise levels must be positive, got {shift}")
    steps = default_steps(solver) if num_inference_steps is None else num_inference_steps
    levels = solver.sigmas(FlowMatching(shift=shift), steps)
    return cls(solver=solver, sigmas=levels, guidance_scale=guidance_scale)


def _check_accelerator(accelerator: Accelerator, given: dict[str, Any]) -> None:
  for name, value in given.items():
    fixed = getattr(accelerator, name, None)
    if value is not None and value != fixed:
      uses = "its own noise levels" if fixed is None else f"{name} = {fixed}"
      raise UserError(
        f"{name} = {value} contradicts the accelerator {accelerator.name}, which has {uses}: leave it out"
      )
