"""Families that move and recolour cells: permutations, translations, symmetries, gravity, cellular automata."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import scipy

from univid_jax.data.tasks.grids.base import (
  BACKGROUND,
  HELD_OUT_ONE_IN,
  NUM_COLORS,
  Grid,
  Params,
  Size,
  draw_colors,
  is_one_in,
)

MAX_OFFSET = 3

# The seven symmetries of a rectangle's cells besides the identity; those that are never trained on.
SYMMETRIES = (
  "flip_horizontal",
  "flip_vertical",
  "rotate_90",
  "rotate_180",
  "rotate_270",
  "transpose",
  "anti_transpose",
)
HELD_OUT_SYMMETRIES = ("rotate_270", "anti_transpose")

DIRECTIONS = ("down", "left", "right", "up")
HELD_OUT_DIRECTIONS = ("up",)

# Elementary rules that show nothing: all dead, the identity, all alive.
TRIVIAL_RULES = (0, 204, 255)


def draw_permutation(rng: np.random.Generator, size: Size) -> Params:
  """Draws three to five colours and a permutation of them that moves every colour."""
  del size
  colors = rng.choice(NUM_COLORS, size=rng.integers(3, 6), replace=False)
  while True:
    images = rng.permutation(colors)
    if (images != colors).all():
      return {"mapping": sorted(zip(colors.tolist(), images.tolist()))}


def make_colored(rng: np.random.Generator, size: Size, *, mapping: Sequence[tuple[int, int]]) -> Grid:
  """Draws a grid in which every colour of the permutation occurs."""
  colors = [color for color, _ in mapping]
  cells = rng.choice(colors, size=size[0] * size[1])
  cells[rng.choice(len(cells), size=len(colors), replace=False)] = colors
  return cells.reshape(size)


def recolor(grid: Grid, *, mapping: Sequence[tuple[int, int]]) -> Grid:
  table = np.arange(NUM_COLORS)
  for color, image in mapping:
    table[color] = image
  return table[grid]


def is_held_out_permutation(params: Params) -> bool:
  return is_one_in(HELD_OUT_ONE_IN, [tuple(pair) for pair in params["mapping"]])


def draw_translation(rng: np.random.Generator, size: Size) -> Params:
  """Draws an offset (down, right) of up to three cells each way, and whether cells come back on the other side."""
  offsets = _offsets(size)
  return {"offset": list(offsets[rng.integers(len(offsets))]), "wraps": bool(rng.integers(2))}


def make_sparse(rng: np.random.Generator, size: Size, **params: object) -> Grid:
  """Draws cells of any colour on the background."""
  del params
  colors = rng.integers(1, NUM_COLORS, size)
  return np.where(rng.random(size) < rng.uniform(0.25, 0.6), colors, BACKGROUND)


def translate(grid: Grid, *, offset: Sequence[int], wraps: bool) -> Grid:
  down, right = offset
  height, width = grid.shape
  if wraps:  # as np.roll, in half the time
    return grid[(np.arange(height) - down) % height][:, (np.arange(width) - right) % width]
  out = np.full_like(grid, BACKGROUND)
  out[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = grid[
    max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
  ]
  return out


def is_held_out_translation(params: Params) -> bool:
  return is_one_in(HELD_OUT_ONE_IN, tuple(params["offset"]))


def other_translations(size: Size, **params: object) -> Iterable[Params]:
  del params
  return ({"offset": offset, "wraps": wraps} for offset in _offsets(size) for wraps in (False, True))


def _offsets(size: Size) -> list[tuple[int, int]]:
  down, right = (min(MAX_OFFSET, side - 1) for side in size)
  both = itertools.product(range(-down, down + 1), range(-right, right + 1))
  return [offset for offset in both if offset != (0, 0)]


def draw_symmetry(rng: np.random.Generator, size: Size) -> Params:
  del size
  return {"symmetry": SYMMETRIES[rng.integers(len(SYMMETRIES))]}


def reorient(grid: Grid, *, symmetry: str) -> Grid:
  """Flips, rotates (clockwise) or transposes a grid; half of the symmetries swap height and width."""
  if symmetry.startswith("rotate"):
    return np.rot90(grid, -int(symmetry.removeprefix("rotate_")) // 90)
  if symmetry.startswith("flip"):
    return grid[:, ::-1] if symmetry == "flip_horizontal" else grid[::-1]
  return grid.T if symmetry == "transpose" else grid[::-1, ::-1].T


def is_held_out_symmetry(params: Params) -> bool:
  return params["symmetry"] in HELD_OUT_SYMMETRIES


def other_symmetries(size: Size, **params: object) -> Iterable[Params]:
  del size, params
  return ({"symmetry": symmetry} for symmetry in SYMMETRIES)


def draw_direction(rng: np.random.Generator, size: Size) -> Params:
  del size
  return {"direction": DIRECTIONS[rng.integers(len(DIRECTIONS))]}


def fall(grid: Grid, *, direction: str) -> Grid:
  """Lets all cells fall until they rest."""
  return fall_in_steps(grid, 1, direction=direction)[-1]


def fall_in_steps(grid: Grid, num_steps: int, *, direction: str) -> list[Grid]:
  """Lets cells fall, one cell per tick; the states are evenly spaced in time, and in the last one all cells rest."""
  turns = {"down": 0, "left": 1, "up": 2, "right": 3}[direction]
  turned = np.rot90(grid, turns)
  height, filled = len(turned), turned != BACKGROUND
  # A cell falls until it rests on the cells below it.
  rest = height - filled[::-1].cumsum(axis=0)[::-1]
  rows, columns = np.nonzero(filled)
  states = []
  for step in range(1, num_steps + 1):
    state = np.full_like(turned, BACKGROUND)
    ticks = round((height - 1) * step / num_steps)
    state[np.minimum(rows + ticks, rest[rows, columns]), columns] = turned[rows, columns]
    states.append(np.rot90(state, -turns))
  return states


def is_held_out_direction(params: Params) -> bool:
  return params["direction"] in HELD_OUT_DIRECTIONS


def other_directions(size: Size, **params: object) -> Iterable[Params]:
  del size, params
  return ({"direction": direction} for direction in DIRECTIONS)


def draw_rule(rng: np.random.Generator, size: Size) -> Params:
  """Draws an elementary rule by Wolfram's number, and the colour of living cells."""
  del size
  rules = [rule for rule in range(256) if rule not in TRIVIAL_RULES]
  return {"rule": rules[rng.integers(len(rules))], "color": draw_colors(rng, 1)[0]}


def make_living(rng: np.random.Generator, size: Size, *, color: int, **params: object) -> Grid:
  """Draws a third to two thirds of living cells."""
  del params
  return np.where(rng.random(size) < rng.uniform(1 / 3, 2 / 3), color, BACKGROUND)


def next_generation(grid: Grid, *, rule: int, color: int) -> Grid:
  """Applies an elementary rule to every row, each a ring of cells of its own."""
  alive = (grid != BACKGROUND).astype(np.int64)
  neighborhood = 4 * np.roll(alive, 1, axis=1) + 2 * alive + np.roll(alive, -1, axis=1)
  return np.where(rule >> neighborhood & 1, color, BACKGROUND)


def generations(grid: Grid, num_steps: int, **params) -> list[Grid]:
  """Applies an elementary rule again and again."""
  states = itertools.accumulate(range(num_steps), lambda state, _: next_generation(state, **params), initial=grid)
  return list(states)[1:]


def is_held_out_rule(params: Params) -> bool:
  return is_one_in(HELD_OUT_ONE_IN, params["rule"])


def other_rules(size: Size, *, rule: int, color: int) -> Iterable[Params]:
  """Yields the rules that differ in one neighbourhood: if each shows in the examples or not in the query, all do."""
  del size
  return ({"rule": rule ^ 1 << bit, "color": color} for bit in range(8))


def draw_color(rng: np.random.Generator, size: Size) -> Params:
  del size
  return {"color": draw_colors(rng, 1)[0]}


def next_life(grid: Grid, *, color: int) -> Grid:
  """Applies Conway's rule, B3/S23, on a torus."""
  alive = (grid != BACKGROUND).astype(np.int64)
  neighbors = scipy.ndimage.convolve(alive, np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]]), mode="wrap")
  return np.where((neighbors == 3) | ((neighbors == 2) & (alive == 1)), color, BACKGROUND)


def lives(grid: Grid, num_steps: int, *, color: int) -> list[Grid]:
  """Applies Conway's rule again and again."""
  states = itertools.accumulate(range(num_steps), lambda state, _: next_life(state, color=color), initial=grid)
  return list(states)[1:]
