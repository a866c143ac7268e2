"""Samples the targets of packed rows: one compiled step, driven by a loop on the host."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from univid_jax.core.packed_row import PackedRow
from univid_jax.core.protocols import Solver, Tokens
from univid_jax.data.rows.packing import select_target_tokens, take_rows
from univid_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS
from univid_jax.diffusion.guidance import Branch, guide
from univid_jax.inference.experts import Experts
from univid_jax.inference.plan import SamplingPlan
from univid_jax.inference.residuals import Residuals, step_with_residuals
from univid_jax.parallel.mesh import row_shards
from univid_jax.parallel.sharding import shard_batch
from univid_jax.runtime.processes import gather_arrays

Progress = Callable[[int], None]

# Called with the number of steps taken and the tokens that the last step heads for.
Estimates = Callable[[int, Float[np.ndarray, "b l p"]], None]


@dataclasses.dataclass(frozen=True)
class PackedJobs:
  """Packed sentences to sample.

  Attributes:
    row: the rows with their prompts, as NumPy arrays; they list their targets.
    negative: the same rows with the negative prompts; None samples without guidance.
    places: (row, segment id) of each sentence.
    noises: the initial noise of each sentence's target, (tokens, p).
  """

  row: PackedRow
  negative: PackedRow | None
  places: Sequence[tuple[int, int]]
  noises: Sequence[Float[np.ndarray, "_q p"]]


class Sampler:
  """Compiled sampling of one model. Programs are compiled once per shape of rows and solver, for any number of steps;
  rows come in buckets of a few lengths.

  Steps without guidance, with a step cache, and those that reuse residuals are other programs.

  Args:
    mesh: the devices of the model.
  """

  def __init__(self, mesh: Mesh):
    self._mesh = mesh
    self.prepare = jax.jit(lambda graph, params, row: Branch.create(nnx.merge(graph, params), row), static_argnums=0)
    self._predict = jax.jit(
      lambda graph, params, row, timesteps: nnx.merge(graph, params)(row.tokens, timesteps, row).astype(jnp.float32),
      static_argnums=0,
    )
    self._steps: dict[Solver[Any], Callable[..., Any]] = {}
    self._cached_steps: dict[Solver[Any], Callable[..., Any]] = {}

  def predict(
    self, experts: Experts, row: PackedRow, timesteps: Float[np.ndarray, "b m"]
  ) -> Float[np.ndarray, "b l p"]:
    """Returns the velocity of a row, float32, by the expert for the largest timestep."""
    index = experts.find(float(timesteps.max()) / NUM_TRAIN_TIMESTEPS)
    with jax.set_mesh(self._mesh):
      return np.asarray(self._predict(experts.transformers[index].graph, experts.load(index), row, timesteps))

  def sample(
    self,
    experts: Experts,
    packed: PackedJobs,
    plan: SamplingPlan,
    *,
    rows_per_batch: int | None = None,
    progress: Progress | None = None,
    estimates: Estimates | None = None,
  ) -> list[Float[np.ndarray, "_q p"]]:
    """Samples the targets of all sentences.

    Args:
      experts: the transformers.
      packed: the sentences.
      plan: what each step does.
      rows_per_batch: rows computed together; by default one per data shard, or a single row.
      progress: called with the number of steps taken, from 1 again for every batch of rows.
      estimates: called likewise, before `progress`, with an estimate of the sampled tokens of the batch.

    Returns:
      The target tokens of each sentence, float32 (tokens, p), in the order of `packed.places`.

    Raises:
      UserError: see `Experts.guidance_scales`.
    """
    row, negative, noise = packed.row, packed.negative, _scatter_noise(packed)
    shards = row_shards(self._mesh)
    batch = rows_per_batch or (shards if len(noise) > 1 else 1)
    solved = []
    with jax.set_mesh(self._mesh):
      for start in range(0, len(noise), batch):
        part = jax.tree.map(lambda x, start=start: take_rows(x, start, batch), (row, negative, noise))
        if batch % shards == 0:
          part = shard_batch(part, self._mesh)
        part_row, part_negative, part_noise = part
        tokens = self._solve(
          experts,
          part_row,
          part_negative,
          part_noise,
          plan=plan,
          guidance_scales=experts.guidance_scales(plan.guidance_scale),
          progress=progress,
          estimates=estimates,
        )
        solved.append(gather_arrays(tokens))
    tokens = np.concatenate(solved)
    return [select_target_tokens(tokens, row, place) for place in packed.places]

  def _solve(
    self,
    experts: Experts,
    row: PackedRow,
    negative: PackedRow | None,
    noise: Float[Array | np.ndarray, "b l p"],
    *,
    plan: SamplingPlan,
    guidance_scales: Sequence[float],
    progress: Progress | None,
    estimates: Estimates | None,
  ) -> Tokens:
    solver, sigmas = plan.solver, plan.sigmas
    step, coefficients = self.step(solver), solver.coefficients(sigmas)
    state, chosen = solver.init(jnp.array(noise, jnp.float32)), [experts.find(float(sigma)) for sigma in sigmas]
    guided = plan.guided_steps() & (negative is not None)
    computed = plan.computed_steps(chosen, guided)
    residuals = None if computed is None else Residuals(self._cached_step(solver), computed, plan.step_cache)
    for index, steps in itertools.groupby(range(len(sigmas)), chosen.__getitem__):
      graph, params = experts.transformers[index].graph, experts.load(index)
      branch = self.prepare(graph, params, row)
      away = None if negative is None else self.prepare(graph, params, negative)
      scale = np.float32(guidance_scales[index])
      for i in steps:
        branches = branch, away if guided[i] else None
        before = None if estimates is None else gather_arrays(solver.tokens(state))
        with jax.profiler.StepTraceAnnotation("sample", step_num=i + 1):
          if residuals is None:
            state = step(graph, params, branches, state, sigmas[i], coefficients[i], scale)
          else:
            state = residuals.step(i, graph, params, branches, state, sigmas[i], coefficients[i], scale)
        if estimates is not None and before is not None:
          estimates(i + 1, extrapolate(before, gather_arrays(solver.tokens(state)), sigmas[i : i + 2]))
        if progress is not None:
          jax.block_until_ready(state)
          progress(i + 1)
      jax.block_until_ready(state)
      branches = ()
      del params, branch, away  # an offloaded expert must leave its devices before the other one comes
      if residuals is not None:
        residuals.clear()
    return solver.tokens(state)

  def step(self, solver: Solver[Any]) -> Callable[..., Any]:
    """Returns the jitted step (graph, params, (branch, negative branch), state, sigma, weights, scale) -> state."""

    def step(graph, params, branches, state, sigma, coefficients, guidance_scale):
      positive, negative = branches
      model = nnx.merge(graph, params)
      predict = guide(model, positive, negative=negative, guidance_scale=guidance_scale)
      return solver.step(predict, state, sigma, coefficients)

    return self._steps.setdefault(solver, jax.jit(step, static_argnums=0, donate_argnums=3))

  def _cached_step(self, solver: Solver[Any]) -> Callable[..., Any]:
    """Returns the jitted step that takes and returns the residuals of the branches, see `step_with_residuals`."""
    step = functools.partial(step_with_residuals, solver)
    return self._cached_steps.setdefault(solver, jax.jit(step, static_argnums=0, donate_argnums=(3, 4)))


def extrapolate(
  before: Float[np.ndarray, "b l p"], after: Float[np.ndarray, "b l p"], sigmas: Float[np.ndarray, "_i"]
) -> Float[np.ndarray, "b l p"]:
  """Returns where the last step leads at noise level 0: what an Euler step takes for the clean tokens.

  Args:
    before, after: the tokens before and after the step.
    sigmas: the noise levels before and after the step; the second is 0 if it is missing.
  """
  if len(sigmas) < 2:
    return after
  level, following = sigmas
  return after + (after - before) * (following / (level - following))


def _scatter_noise(packed: PackedJobs) -> Float[np.ndarray, "b l p"]:
  row = packed.row
  noise = np.zeros(row.tokens.shape, np.float32)
  for tokens, (index, segment) in zip(packed.noises, packed.places, strict=True):
    noise[index, (row.segment_ids[index] == segment) & row.target_mask[index]] = tokens
  return noise
