"""Families about shapes: outlines, enclosed areas, components, counting. Neighbours share a side unless noted."""

import numpy as np
import scipy

from univid_jax.data.tasks.grids.base import BACKGROUND, Grid, Params, Size, draw_colors, is_held_out_value

# 4-connectivity, for `scipy.ndimage.label`.
SIDES = scipy.ndimage.generate_binary_structure(2, 1)


def draw_outline(rng: np.random.Generator, size: Size) -> Params:
  """Draws the colours of objects and of their outlines."""
  del size
  color, line = draw_colors(rng, 2)
  return {"color": color, "line": line}


def make_objects(rng: np.random.Generator, size: Size, *, color: int, **params: object) -> Grid:
  """Draws one to three filled rectangles, which may touch."""
  del params
  grid = np.full(size, BACKGROUND)
  for _ in range(rng.integers(1, 4)):
    grid[_draw_box(rng, size, smallest=1, largest=3)] = color
  return grid


def outline(grid: Grid, *, color: int, line: int) -> Grid:
  """Colours the background cells that touch an object, also at a corner."""
  objects = grid == color
  near = scipy.ndimage.binary_dilation(objects, np.ones((3, 3), bool))
  return np.where(near & ~objects, line, grid)


def draw_filling(rng: np.random.Generator, size: Size) -> Params:
  """Draws the colours of walls and of the areas that they enclose."""
  del size
  color, filling = draw_colors(rng, 2)
  return {"color": color, "filling": filling}


def make_walls(rng: np.random.Generator, size: Size, *, color: int, **params: object) -> Grid:
  """Draws one to three rectangular walls, some of them with a gap, and single cells."""
  del params
  grid = np.full(size, BACKGROUND)
  for _ in range(rng.integers(1, 4)):
    rows, columns = _draw_box(rng, size, smallest=3, largest=max(3, max(size) - 1))
    box = grid[rows, columns]
    box[0] = box[-1] = box[:, 0] = box[:, -1] = color
    if rng.random() < 0.4:
      box[0, rng.integers(1, box.shape[1] - 1)] = BACKGROUND
  return np.where(rng.random(size) < rng.uniform(0, 0.1), color, grid)


def fill_enclosed(grid: Grid, *, color: int, filling: int) -> Grid:
  """Fills the background that walls separate from the edge of the grid."""
  height, width = grid.shape
  free = np.ones((height + 2, width + 2), bool)
  free[1:-1, 1:-1] = grid != color
  # The area around the grid gets label 1, walls 0, and enclosed areas 2 and up.
  areas, _ = scipy.ndimage.label(free, SIDES)
  return np.where(areas[1:-1, 1:-1] > 1, filling, grid)


def make_components(rng: np.random.Generator, size: Size, *, color: int) -> Grid:
  """Draws cells until one component is larger than each of the others."""
  while True:
    grid = np.where(rng.random(size) < rng.uniform(0.3, 0.55), color, BACKGROUND)
    sizes = sorted(_component_sizes(grid)[1].tolist())
    if len(sizes) > 1 and sizes[-1] > sizes[-2]:
      return grid


def keep_largest(grid: Grid, *, color: int) -> Grid:
  """Keeps the largest component of cells."""
  labels, sizes = _component_sizes(grid)
  return np.where(labels == np.argmax(sizes) + 1, color, BACKGROUND)


def draw_counting(rng: np.random.Generator, size: Size) -> Params:
  """Draws the colour that is counted, and the colour of other cells."""
  del size
  color, other = draw_colors(rng, 2)
  return {"color": color, "other": other}


def make_countable(rng: np.random.Generator, size: Size, *, color: int, other: int) -> Grid:
  """Draws from one cell of the colour to as many as a bar can show, and likewise of the other colour."""
  height, width = size
  counted, others = rng.integers(1, width + 1, 2)
  cells = np.full(height * width, BACKGROUND)
  places = rng.permutation(len(cells))
  cells[places[:counted]], cells[places[counted : counted + others]] = color, other
  return cells.reshape(size)


def count_to_bar(grid: Grid, *, color: int, other: int) -> Grid:
  """Draws a bar in the first row with one cell for every cell of the colour."""
  del other
  out = np.full_like(grid, BACKGROUND)
  out[0, : np.sum(grid == color)] = color
  return out


def is_held_out_counting(params: Params) -> bool:
  return is_held_out_value((params["color"], params["other"]))


def _draw_box(rng: np.random.Generator, size: Size, *, smallest: int, largest: int) -> tuple[slice, slice]:
  """Draws the rows and columns of a rectangle with sides in a range."""
  slices = []
  for side in size:
    length = int(rng.integers(smallest, min(largest, side) + 1))
    start = int(rng.integers(0, side - length + 1))
    slices.append(slice(start, start + length))
  return slices[0], slices[1]


def _component_sizes(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
  """Returns the label of each cell, from 1 (0 is the background), and the size of each component."""
  labels, count = scipy.ndimage.label(grid != BACKGROUND, SIDES)
  return labels, np.bincount(labels.ravel(), minlength=count + 1)[1:]
