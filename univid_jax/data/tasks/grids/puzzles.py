"""Families that ask for a solution: the shortest path in a maze, the next move of Tower of Hanoi, 4x4 sudoku."""

import functools
import itertools
import operator
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Integer

from univid_jax.data.tasks.grids.base import BACKGROUND, Grid, Params, Size, draw_colors

# Colours of the ends of a path: green and red.
START, GOAL = 3, 2

NUM_DISCS, NUM_PEGS = 4, 3
HANOI_SIZE = (NUM_DISCS, 2 * NUM_PEGS)
SUDOKU_SIZE = (4, 4)
# A sudoku as one integer of 3 bits per cell: bits per cell, mask of a cell, lowest bit of each cell.
_BITS, _DIGIT = 3, 7
_ONES = 1 << _BITS * np.arange(16)


def draw_maze_colors(rng: np.random.Generator, size: Size) -> Params:
  """Draws the colours of walls and path; start and goal have fixed ones, since examples could not tell them apart."""
  del size
  wall, path = [color for color in draw_colors(rng, 4) if color not in (START, GOAL)][:2]
  return {"wall": wall, "path": path}


def make_maze(rng: np.random.Generator, size: Size, *, wall: int, path: int) -> Grid:
  """Draws walls, a start and a goal with exactly one shortest path, which has at least one cell between them."""
  del path
  while True:
    grid = np.where(rng.random(size) < rng.uniform(0.2, 0.45), wall, BACKGROUND)
    free = np.flatnonzero(grid == BACKGROUND)
    if not len(free):
      continue
    first = _number(int(free[rng.integers(len(free))]), size)
    distances, counts = _search(grid, first, wall=wall)
    goals = [cell for cell, distance in distances.items() if distance > 1 and counts[cell] == 1]
    if goals:
      # The farther of two draws, so that long paths are not rare.
      last = max((goals[rng.integers(len(goals))] for _ in range(2)), key=lambda cell: distances[cell])
      grid[_place(first, size)], grid[_place(last, size)] = START, GOAL
      return grid


def draw_path(grid: Grid, **colors: int) -> Grid:
  """Draws the shortest path from start to goal."""
  return draw_path_in_steps(grid, 1, **colors)[-1]


def draw_path_in_steps(grid: Grid, num_steps: int, *, wall: int, path: int) -> list[Grid]:
  """Draws the shortest path from start to goal, in equal parts."""
  first, last = (_number(int(np.argmax(grid == color)), grid.shape) for color in (START, GOAL))
  distances, _ = _search(grid, first, wall=wall)
  cells = [last]
  while cells[-1] != first:
    before = distances[cells[-1]] - 1
    cells.append(next(cell for cell in _neighbors(cells[-1], grid.shape) if distances.get(cell) == before))
  between = [_place(cell, grid.shape) for cell in cells[-2:0:-1]]
  states = []
  for step in range(1, num_steps + 1):
    state = grid.copy()
    for cell in between[: round(len(between) * step / num_steps)]:
      state[cell] = path
    states.append(state)
  return states


# Cells of a maze are numbered row by row, including walls around the grid: a row before the first row, one after the
# last, and one wall after each row, which is also left of the next. So every cell has four neighbours.


def _search(grid: Grid, first: int, *, wall: int) -> tuple[dict[int, int], dict[int, int]]:
  """Returns the distance of each reachable cell, and the number of shortest paths to it."""
  height, width = grid.shape
  free = np.zeros((height + 2, width + 1), bool)
  free[1:-1, :-1] = grid != wall
  is_free = free.ravel().tolist()
  distances, counts, queue = {first: 0}, {first: 1}, [first]
  for cell in queue:
    distance = distances[cell] + 1
    for neighbor in _neighbors(cell, (height, width)):
      if is_free[neighbor]:
        if neighbor not in distances:
          distances[neighbor], counts[neighbor] = distance, 0
          queue.append(neighbor)
        if distances[neighbor] == distance:
          counts[neighbor] += counts[cell]
  return distances, counts


def _number(index: int, size: Size) -> int:
  """Returns the number of a cell, given its index in the flat grid."""
  y, x = divmod(index, size[1])
  return (y + 1) * (size[1] + 1) + x


def _place(number: int, size: Size) -> tuple[int, int]:
  """Returns row and column of the cell with a number."""
  y, x = divmod(number, size[1] + 1)
  return y - 1, x


def _neighbors(number: int, size: Size) -> tuple[int, int, int, int]:
  line = size[1] + 1
  return number - line, number - 1, number + 1, number + line


def draw_goal_peg(rng: np.random.Generator, size: Size) -> Params:
  del size
  return {"goal": int(rng.integers(NUM_PEGS))}


def make_towers(rng: np.random.Generator, size: Size, *, goal: int) -> Grid:
  """Draws a legal position of the discs in which not all are on the goal peg."""
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
  places = np.nonzero(grid)
  columns = dict(zip(grid[places].tolist(), places[1].tolist()))
  return [columns[disc + 1] // 2 for disc in range(NUM_DISCS)]


def move_disc(grid: Grid, *, goal: int) -> Grid:
  """Makes the first move of the shortest solution, which takes all discs to the goal peg."""
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


def other_goal_pegs(source: Grid, targets: Sequence[Grid], *, goal: int) -> Iterable[Params]:
  del source, targets
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
  solutions, codes = sudoku_solutions(), _sudoku_codes()
  chosen = int(rng.integers(len(solutions)))
  differences = codes ^ codes[chosen]
  missing = int(rng.integers(4, 11))
  clues = ~0
  empty: list[int] = []
  for place in rng.permutation(16).tolist():
    if len(empty) == missing:
      break
    fewer = clues & ~(_DIGIT << _BITS * place)
    # Every other solution must differ in a cell that is still filled.
    if np.count_nonzero(differences & fewer) == len(solutions) - 1:
      empty.append(place)
      clues = fewer
  grid = solutions[chosen].copy()
  grid.flat[empty] = BACKGROUND
  return grid


def solve_sudoku(grid: Grid) -> Grid:
  """Returns the only solution."""
  clues = (grid != BACKGROUND).ravel() @ (_DIGIT * _ONES)
  (solution,) = np.flatnonzero((_sudoku_codes() & clues) == grid.ravel() @ _ONES)
  return sudoku_solutions()[solution].copy()


@functools.cache
def _sudoku_codes() -> Integer[np.ndarray, "288"]:
  """Returns all solutions, each as one integer with separate bits for every cell."""
  return sudoku_solutions().reshape(-1, 16) @ _ONES
