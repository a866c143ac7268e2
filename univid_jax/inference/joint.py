"""Windows of a video that take each step of the solver together, their velocities averaged where they overlap.

The noised tokens of the video are in host memory, and windows are computed a few at a time, so that device memory does
not grow with the video.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from univid_jax.core.packed_row import PackedRow
from univid_jax.data.rows.packing import join_rows
from univid_jax.diffusion.guidance import Branch, guide
from univid_jax.inference.experts import Experts
from univid_jax.inference.plan import SamplingPlan
from univid_jax.inference.progress_file import ProgressFile
from univid_jax.inference.windows import Windows
from univid_jax.parallel.mesh import row_shards
from univid_jax.parallel.sharding import shard_batch
from univid_jax.runtime.processes import gather_arrays

# Called with the number of steps of windows that were taken.
WindowProgress = Callable[[int], None]

# By step and number of the call in it: the number of windows that are computed, and the sum of their velocities.
_Begun = dict[tuple[int, int], tuple[int, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class JointWindows:
  """Rows of windows that differ in the tokens of their query.

  Attributes:
    windows: their places.
    template: the row of the first window, for the prompt and, with guidance, for the negative prompt.
    queries: the tokens of each window's query, the last clip of the context.
  """

  windows: Windows
  template: Sequence[PackedRow]
  queries: Sequence[Float[np.ndarray, "l p"]]

  def rows(self, batch: Sequence[int], *, negative: bool) -> list[PackedRow]:
    """Returns the rows of some windows, with the negative prompt too if that is asked for."""
    template = self.template if negative else self.template[:1]
    return [join_rows([self._with_query(row, self.queries[window]) for window in batch]) for row in template]

  def place(self, tokens: Float[np.ndarray, "frame token p"], batch: Sequence[int]) -> Float[np.ndarray, "b l p"]:
    """Returns the noised target tokens of some windows in their rows, given the tokens of all entries."""
    row = self.template[0]
    placed = np.zeros((len(batch), *row.tokens.shape[1:]), np.float32)
    for index, window in enumerate(batch):
      placed[index, np.asarray(row.target_mask[0])] = np.concatenate(list(tokens[self.windows.entries(window)]))
    return placed

  def add(self, window: int, velocity: Float[np.ndarray, "l p"], *, into: Float[np.ndarray, "frame token p"]) -> None:
    """Adds the velocity of a window's target tokens, weighted, to those of all entries."""
    entries = self.windows.entries(window)
    parts = velocity[np.asarray(self.template[0].target_mask[0])].reshape(len(entries), *into.shape[1:])
    into[entries] += parts * self.windows.weights[window][:, None, None]

  def _with_query(self, row: PackedRow, query: Float[np.ndarray, "l p"]) -> PackedRow:
    tokens = np.array(row.tokens)
    end = int(np.argmax(row.target_mask[0]))
    tokens[0, end - len(query) : end] = query
    return dataclasses.replace(row, tokens=tokens)


class JointSampler:
  """Compiled sampling of windows that advance together.

  Args:
    mesh: the devices of the model.
  """

  def __init__(self, mesh: Mesh):
    self._mesh = mesh

    def velocity(graph, params, rows, tokens, sigma, guidance_scale):
      model = nnx.merge(graph, params)
      branches = [Branch(row) for row in rows]  # with its context: windows take turns in every step
      negative = branches[1] if len(branches) > 1 else None
      return guide(model, branches[0], negative=negative, guidance_scale=guidance_scale)(tokens, sigma)

    self._velocity = jax.jit(velocity, static_argnums=0)

  def sample(
    self,
    experts: Experts,
    joint: JointWindows,
    noise: Float[np.ndarray, "frame token p"],
    plan: SamplingPlan,
    *,
    saved: ProgressFile | None = None,
    progress: WindowProgress | None = None,
  ) -> Float[np.ndarray, "frame token p"]:
    """Samples the tokens of all entries, see `Windows.entries`.

    Args:
      experts: the transformers.
      joint: the windows.
      noise: of all entries.
      plan: what each step does.
      saved: where the state is saved now and then, and found again.
      progress: see `WindowProgress`.
    """
    solver, sigmas = plan.solver, plan.sigmas
    scales, coefficients = experts.guidance_scales(plan.guidance_scale), solver.coefficients(sigmas)
    guided = plan.guided_steps() & (len(joint.template) > 1)
    shape = noise.shape

    def take_step(i: int, before: Any, call: Callable[..., Any], scale: np.float32) -> Any:
      calls = itertools.count()

      def predict(tokens, sigma):
        number = next(calls)
        begin, out = begun.pop((i, number), None) or (0, np.zeros(shape, np.float32))
        velocities = self._predict(
          joint,
          tokens.reshape(shape),
          lambda rows, noised: gather_arrays(call(rows, noised, sigma, scale)),
          guided=bool(guided[i]),
          begin=begin,
        )
        for window, velocity in velocities:
          joint.add(window, velocity, into=out)
          if progress is not None:
            progress(i * len(joint.queries) + window + 1)
          if saved is not None and saved.is_due():
            place = np.array([number, window + 1])
            saved.save({"step": np.array(i), "place": place, "velocity": out, **_name_leaves(before)})
        return out.reshape(tokens.shape)

      after = solver.step(predict, before, np.asarray(sigmas[i]), coefficients[i])
      if saved is not None and i + 1 == len(sigmas):
        saved.save({"step": np.array(i + 1), **_name_leaves(after)})
      return after

    def advance(state: Any, steps: Iterable[int], index: int) -> Any:
      # The parameters must have no other reference: an offloaded expert leaves its devices when this returns.
      call = functools.partial(self._velocity, experts.transformers[index].graph, experts.load(index))
      for i in steps:
        state = take_step(i, state, call, np.float32(scales[index]))
      return state

    first, begun, state = _restore(saved, solver.init(noise.reshape(1, -1, shape[-1])))
    for index, steps in itertools.groupby(range(first, len(sigmas)), lambda i: experts.find(float(sigmas[i]))):
      state = advance(state, steps, index)
    return np.asarray(solver.tokens(state)).reshape(shape)

  def _predict(
    self,
    joint: JointWindows,
    tokens: Float[np.ndarray, "frame token p"],
    call: Callable[..., np.ndarray],
    *,
    guided: bool,
    begin: int,
  ) -> Iterator[tuple[int, Float[np.ndarray, "l p"]]]:
    """Yields the velocity of each window from `begin` on, in the same batches; the last window fills the last one."""
    count = len(joint.queries)
    size = row_shards(self._mesh) if count > 1 else 1
    for start in range(begin - begin % size, count, size):
      batch = [min(window, count - 1) for window in range(start, start + size)]
      part = joint.rows(batch, negative=guided), joint.place(tokens, batch)
      with jax.set_mesh(self._mesh):
        if size > 1 or row_shards(self._mesh) == 1:
          part = shard_batch(part, self._mesh)
        velocities = call(*part)
      yield from zip(range(max(start, begin), min(start + size, count)), velocities[max(begin - start, 0) :])


def _name_leaves(state: Any) -> dict[str, np.ndarray]:
  return {f"state{index}": np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(state))}


def _restore(saved: ProgressFile | None, state: Any) -> tuple[int, _Begun, Any]:
  """Returns the number of steps taken, what has been computed of the next one, and the state before it."""
  arrays = saved.load() if saved is not None else {}
  if "step" not in arrays:
    return 0, {}, state
  step, (leaves, structure) = int(arrays["step"]), jax.tree.flatten(state)
  begun: _Begun = {}
  if "place" in arrays:
    number, windows = arrays["place"].tolist()
    begun[step, number] = windows, arrays["velocity"]
  return step, begun, jax.tree.unflatten(structure, [arrays[f"state{index}"] for index in range(len(leaves))])
