"""Families that ask for a solution: the shortest path in a maze, the next move of Tower of Hanoi, 4x4 sudoku."""

import collections
import functools
import itertools
import operator
from collections.abc import Iterable

import numpy as np

from univid_jax.data.tasks.grids.base import BACKGROUND, Grid, Params, Size, draw_colors

Cell = tuple[int, int]

# Colours of the ends of a path: green and red.
START, GOAL = 3, 2

NUM_DISCS, NUM_PEGS = 4, 3
HANOI_SIZE = (NUM_DISCS, 2 * NUM_PEGS)
SUDOKU_SIZE = (4, 4)


def draw_maze_colors(rng: np.random.Generator, size: Size) -> Params:
  """Draws the colours of walls and path; start and goal have fixed ones, as examples do not tell them apart."""
  del size
  wall, path = [color for color in draw_colors(rng, 4) if color not in (START, GOAL)][:2]
  return {"wall": wall, "path": path}


def make_maze(rng: np.random.Generator, size: Size, *, wall: int, path: int) -> Grid:
  """Draws walls, a start and a goal with exactly one shortest path, of which at least one cell is between them."""
  del path
  while True:
    grid = np.where(rng.random(size) < rng.uniform(0.2, 0.45), wall, BACKGROUND)
    free = np.argwhere(grid == BACKGROUND)
    if not len(free):
      continue
    first = _cell(free[rng.integers(len(free))])
    distances, counts = _search(grid, first, wall=wall)
    goals = [cell for cell, distance in distances.items() if distance > 1 and counts[cell] == 1]
    if goals:
      # Of two draws the farther one, so that long paths are not rare.
      last = max((goals[rng.integers(len(goals))] for _ in range(2)), key=lambda cell: distances[cell])
      grid[first], grid[last] = START, GOAL
      return grid


def draw_path(grid: Grid, **colors: int) -> Grid:
  """Draws the shortest path from start to goal."""
  return draw_path_in_steps(grid, 1, **colors)[-1]


def draw_path_in_steps(grid: Grid, num_steps: int, *, wall: int, path: int) -> list[Grid]:
  """Draws the shortest path from start to goal, in equal parts."""
  first, last = (_cell(np.argwhere(grid == color)[0]) for color in (START, GOAL))
  distances, _ = _search(grid, first, wall=wall)
  cells = [last]
  while cells[-1] != first:
    cells.append(next(cell for cell in _neighbors(cells[-1]) if distances.get(cell) == distances[cells[-1]] - 1))
  between = cells[-2:0:-1]
  states = []
  for step in range(1, num_steps + 1):
    state = grid.copy()
    for cell in between[: round(len(between) * step / num_steps)]:
      state[cell] = path
    states.append(state)
  return states


def _search(grid: Grid, first: Cell, *, wall: int) -> tuple[dict[Cell, int], dict[Cell, int]]:
  """Returns for each cell that can be reached its distance, and the number of shortest paths to it."""
  height, width = grid.shape
  distances, counts, queue = {first: 0}, collections.Counter({first: 1}), collections.deque([first])
  while queue:
    cell = queue.popleft()
    for y, x in _neighbors(cell):
      if not (0 <= y < height and 0 <= x < width) or grid[y, x] == wall:
        continue
      if (y, x) not in distances:
        distances[y, x] = distances[cell] + 1
        queue.append((y, x))
      if distances[y, x] == distances[cell] + 1:
        counts[y, x] += counts[cell]
  return distances, counts


def _neighbors(cell: Cell) -> list[Cell]:
  y, x = cell
  return [(y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x)]


def _cell(place: np.ndarray) -> Cell:
  return int(place[0]), int(place[1])


def draw_goal_peg(rng: np.random.Generator, size: Size) -> Params:
  del size
  return {"goal": int(rng.integers(NUM_PEGS))}


def make_towers(rng: np.random.Generator, size: Size, *, goal: int) -> Grid:
  """Draws an allowed position of the discs in which not all are on the goal peg."""
  del size
  while True:
    pegs = rng.integers(NUM_PEGS, size=NUM_DISCS).tolist()
    if pegs != [goal] * NUM_DISCS:
      return draw_towers(pegs)


def draw_towers(pegs: list[int]) -> Grid:
  """Draws towers in every other column; the colour of a disc is its size, from 1.

  Args:
    pegs: the peg of each disc, smallest first.
  """
  grid = np.full(HANOI_SIZE, BACKGROUND)
  for peg in range(NUM_PEGS):
    discs = [disc + 1 for disc in range(NUM_DISCS) if pegs[disc] == peg]
    grid[NUM_DISCS - len(discs) :, 2 * peg] = discs
  return grid


def read_towers(grid: Grid) -> list[int]:
  """Returns the peg of each disc, smallest first."""
  return [int(np.argwhere(grid == disc + 1)[0][1]) // 2 for disc in range(NUM_DISCS)]


def move_disc(grid: Grid, *, goal: int) -> Grid:
  """Makes the first move of the shortest solution, which brings all discs to the goal peg."""
  pegs = read_towers(grid)
  for disc in reversed(range(NUM_DISCS)):
    if pegs[disc] != goal:
      # The smaller discs must first go to the third peg.
      spare = NUM_PEGS - goal - pegs[disc]
      if all(peg == spare for peg in pegs[:disc]):
        pegs[disc] = goal
        break
      goal = spare
  return draw_towers(pegs)


def other_goal_pegs(size: Size, *, goal: int) -> Iterable[Params]:
  del size
  return ({"goal": peg} for peg in range(NUM_PEGS) if peg != goal)


def draw_nothing(rng: np.random.Generator, size: Size) -> Params:
  del rng, size
  return {}


@functools.cache
def sudoku_solutions() -> np.ndarray:
  """Returns all 288 solutions, int (288, 4, 4)."""
  rows = list(itertools.permutations(range(1, 5)))
  latin: list[tuple[tuple[int, ...], ...]] = [()]
  for _ in range(4):
    latin = [(*grid, row) for grid in latin for row in rows if all(map(operator.ne, itertools.chain(*grid), row * 4))]
  grids = np.array(latin)
  boxes = grids.reshape(-1, 2, 2, 2, 2).swapaxes(2, 3).reshape(-1, 4, 4)
  return grids[(np.sort(boxes, axis=-1) == np.arange(1, 5)).all(axis=(1, 2))]


def make_sudoku(rng: np.random.Generator, size: Size) -> Grid:
  """Draws a sudoku with one solution: 4 to 10 of the 16 cells are empty."""
  del size
  solutions = sudoku_solutions()
  grid = solutions[rng.integers(len(solutions))].copy()
  missing = rng.integers(4, 11)
  for place in rng.permutation(16):
    if np.sum(grid == BACKGROUND) == missing:
      break
    trial = grid.copy()
    trial.flat[place] = BACKGROUND
    if np.sum(_agrees(trial)) == 1:
      grid = trial
  return grid


def solve_sudoku(grid: Grid) -> Grid:
  """Returns the only solution."""
  (solution,) = sudoku_solutions()[_agrees(grid)]
  return solution


def _agrees(grid: Grid) -> np.ndarray:
  """Returns which of the solutions agree with the cells that are not empty."""
  return ((sudoku_solutions() == grid) | (grid == BACKGROUND)).all(axis=(1, 2))
