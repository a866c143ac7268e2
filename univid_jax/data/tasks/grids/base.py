"""Defines families of grid tasks, and which of their rules and grids training never sees.

A grid is a rectangle of cells, each one of ten colours; 0 is the background. A sentence draws the parameters of its
family once, and applies them to every pair.
"""

import dataclasses
import enum
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from univid_jax.core.contexts import Motion

Grid = Integer[np.ndarray, "_h _w"]
Size = tuple[int, int]
Params = Mapping[str, Any]

NUM_COLORS = 10
BACKGROUND = 0

# The task of all sentences of the ARC benchmark, whose rules have no names.
ARC_TASK = "arc"

# One rule in this many, and one grid in this many, is held out.
HELD_OUT_ONE_IN = 4


class GridSplit(enum.StrEnum):
  """Which rules and grids a sentence shows.

  Whatever the rule, no grid is the source of a pair (for sudoku, the target) both in training and in an evaluation. A
  held-out rule changes the grids of its sentence in a way in which no trained rule changes all of them.
  """

  TRAIN = "train"  # rules and grids for training
  TRAINED_RULES = "trained_rules"  # rules for training, held-out grids
  HELD_OUT = "held_out"  # held-out rules and grids; for a family without rules, held-out grids alone

  @property
  def holds_out_rules(self) -> bool:
    return self is GridSplit.HELD_OUT

  @property
  def holds_out_grids(self) -> bool:
    return self is not GridSplit.TRAIN


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridFamily:
  """A family of grid tasks.

  Attributes:
    draw: maps (rng, size) to the parameters of a sentence, JSON-compatible.
    make: maps (rng, size, **parameters) to the source grid of a pair. An unsuitable grid is drawn again.
    apply: maps (source, **parameters) to the target grid.
    evolve: maps (source, num_steps, **parameters) to the states after each step, for videos; None if the task has no
      steps.
    is_held_out: whether a rule, given by the parameters, is never trained on; None for a family with one rule.
    alternatives: maps (source, the states that follow, **parameters) to the parameters of the family that agree with a
      pair, and possibly others. Those that agree with all examples must agree on the query, or the examples would not
      determine the answer; they must be held out if the sentence's rule is.
    size: size of all grids; None if they may have any.
    splits_by_target: whether a pair is held out by its target grid instead of its source.
    prompt_name: what the paper's detailed prompt calls the target.
  """

  draw: Callable[[np.random.Generator, Size], Params]
  make: Callable[..., Grid]
  apply: Callable[..., Grid]
  evolve: Callable[..., Sequence[Grid]] | None = None
  is_held_out: Callable[[Params], bool] | None = None
  alternatives: Callable[..., Iterable[Params]] | None = None
  size: Size | None = None
  splits_by_target: bool = False
  prompt_name: str = ""

  @property
  def motion(self) -> Motion:
    return Motion.NONE if self.evolve is None else Motion.ANIMATES

  def targets(self, source: Grid, num_steps: int, params: Params) -> list[Grid]:
    """Returns the states that follow a source: one for the target of an image, one per step for a video's.

    Raises:
      ValueError: a family without time has no videos.
    """
    if self.evolve is not None:
      return list(self.evolve(source, num_steps, **params))
    if num_steps > 1:
      raise ValueError("a family without time has no videos")
    return [self.apply(source, **params)]


def is_one_in(count: int, value: object) -> bool:
  """Returns whether a hash selects a value, as it does one in `count`; the same on every machine."""
  return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big") % count == 0


def is_held_out_grid(grid: Grid) -> bool:
  """Returns whether a grid is never trained on."""
  return is_one_in(HELD_OUT_ONE_IN, (grid.shape, grid.astype(np.int8).tobytes()))


def draw_colors(rng: np.random.Generator, count: int) -> list[int]:
  """Draws different colours other than the background."""
  return (1 + rng.choice(NUM_COLORS - 1, size=count, replace=False)).tolist()


def is_same(a: Grid, b: Grid) -> bool:
  return a.shape == b.shape and not np.count_nonzero(a != b)


def task_name(family: str, split: GridSplit) -> str:
  """Returns the name under which evaluations list a family and split."""
  return f"{family}_trained_rules" if split is GridSplit.TRAINED_RULES else family
