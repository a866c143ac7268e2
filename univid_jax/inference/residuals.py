"""Residuals of the transformer's blocks that stay on the devices from step to step, for `diffusion.step_cache`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from univid_jax.core.errors import UserError
from univid_jax.core.packed_row import PackedRow, take_tokens
from univid_jax.core.protocols import Solver
from univid_jax.diffusion.guidance import Branch, VelocityModel, guide
from univid_jax.diffusion.step_cache import RatioMeasurement, StepCache

# Those of the prompt and of the negative prompt; None where there are none.
BranchResiduals = tuple[Array | None, Array | None]
# As in diffusers; keeps the ratio finite where a token's residual was 0.
_EPSILON = 1e-8


def step_with_residuals(
  solver: Solver[Any],
  graph: nnx.GraphDef,
  params: Any,
  branches: tuple[Branch, Branch | None],
  residuals: BranchResiduals,
  state: Any,
  sigma: Float[Array, ""],
  coefficients: Float[Array, "w"],
  guidance_scale: Float[Array, ""],
) -> tuple[Any, BranchResiduals]:
  """Takes a step in which a branch with a residual reuses it, and one without computes it.

  Returns:
    The next state, and the residual of each branch that was used.

  Raises:
    UserError: the solver calls the model more than once.
  """
  model = nnx.merge(graph, params)
  kept: list[Array | None] = [None, None]

  def branch_model(number: int) -> VelocityModel:
    def predict(tokens, timesteps, row, cache=None):
      if kept[number] is not None:
        raise UserError("a step cache needs a solver that calls the model once per step")
      velocity, kept[number] = model.with_residual(tokens, timesteps, row, cache, residual=residuals[number])
      return velocity

    return predict

  positive, negative = branches
  predict = guide(
    branch_model(0), positive, negative=negative, negative_model=branch_model(1), guidance_scale=guidance_scale
  )
  state = solver.step(predict, state, sigma, coefficients)
  return state, (kept[0], kept[1])


class Residuals:
  """Takes steps, and keeps their residuals for later ones.

  Args:
    step: the compiled `step_with_residuals`.
    computed: whether each branch computes the blocks in each step.
    step_cache: that decided so; a measurement receives the ratios of the residuals' magnitudes.
  """

  def __init__(
    self, step: Callable[..., Any], computed: Bool[np.ndarray, "w i"], step_cache: StepCache | RatioMeasurement | None
  ):
    self._step, self._computed = step, computed
    self._measurement = step_cache if isinstance(step_cache, RatioMeasurement) else None
    if self._measurement is not None:
      self._measurement.clear()
    self._kept: BranchResiduals = (None, None)

  def step(self, i: int, graph: nnx.GraphDef, params: Any, branches: tuple[Branch, Branch | None], *rest: Any) -> Any:
    """Takes step i; returns the next state."""
    given = tuple(None if computed else kept for computed, kept in zip(self._computed[:, i], self._kept, strict=True))
    earlier = self._kept if self._measurement is not None else (None, None)
    self._kept = (None, None)  # makes room for those of this step
    state, self._kept = self._step(graph, params, branches, given, *rest)
    if self._measurement is not None:
      self._measurement.is_guided |= branches[1] is not None
      for number, branch in enumerate(branches):
        self._measure(number, branch, earlier[number])
    return state

  def _measure(self, number: int, branch: Branch | None, earlier: Array | None) -> None:
    """Appends the ratio of a branch; it is 1 in the first step, of each expert, and where the branch is not used."""
    assert self._measurement is not None
    ratios, kept = self._measurement.ratios[number], self._kept[number]
    if branch is None or kept is None or earlier is None:
      ratios.append(1.0)
    else:
      ratios.append(float(_magnitude_ratio(kept, earlier, branch.row)))

  def clear(self) -> None:
    """Forgets the residuals, which are those of one expert."""
    self._kept = (None, None)


@jax.jit
def _magnitude_ratio(now: Float[Array, "b q d"], before: Float[Array, "b q d"], row: PackedRow) -> Float[Array, ""]:
  """Returns the mean over target tokens of the magnitude of their residual, relative to that of the step before."""
  assert row.targets is not None
  is_target = take_tokens(row.target_mask, row.targets)
  now, before = (jnp.linalg.norm(each.astype(jnp.float32), axis=-1) for each in (now, before))
  return jnp.sum(now / (before + _EPSILON), where=is_target) / jnp.sum(is_target)
