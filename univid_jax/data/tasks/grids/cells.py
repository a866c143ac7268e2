"""Families that move and recolour cells: permutations, translations, symmetries, gravity, cellular automata."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Integer

from univid_jax.data.tasks.grids.base import BACKGROUND, NUM_COLORS, Grid, Params, Size, draw_colors, is_held_out_value

MAX_OFFSET = 3

# The seven symmetries of a rectangle's cells besides the identity, then those that are never trained on.
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

# Elementary rules without information: all dead, the identity, all alive.
TRIVIAL_RULES = (0, 204, 255)
RULES = tuple(rule for rule in range(256) if rule not in TRIVIAL_RULES)


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
  colors = np.array([color for color, _ in mapping])
  cells = colors[rng.integers(len(colors), size=size[0] * size[1])]
  cells[rng.choice(len(cells), size=len(colors), replace=False)] = colors
  return cells.reshape(size)


def recolor(grid: Grid, *, mapping: Sequence[tuple[int, int]]) -> Grid:
  table = np.arange(NUM_COLORS)
  for color, image in mapping:
    table[color] = image
  return table[grid]


def is_held_out_permutation(params: Params) -> bool:
  return is_held_out_value([tuple(pair) for pair in params["mapping"]])


def draw_translation(rng: np.random.Generator, size: Size) -> Params:
  """Draws an offset (down, right) of up to three cells each way, and whether cells wrap around."""
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
  if wraps:  # equals np.roll, in half the time
    return grid[(np.arange(height) - down) % height][:, (np.arange(width) - right) % width]
  out = np.full_like(grid, BACKGROUND)
  out[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = grid[
    max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
  ]
  return out


def is_held_out_translation(params: Params) -> bool:
  return is_held_out_value(tuple(params["offset"]))


def other_translations(source: Grid, targets: Sequence[Grid], **params: object) -> Iterable[Params]:
  """Yields the translations from a source to a target."""
  del params
  (target,), (height, width), (down, right) = targets, source.shape, _reach(source.shape)
  # Every translation cuts a window out of the grid's surroundings, which are empty or the grid repeated.
  around = np.full((2, height + 2 * down, width + 2 * right), BACKGROUND)
  around[0, down : down + height, right : right + width] = source
  rows, columns = np.arange(-down, height + down) % height, np.arange(-right, width + right) % width
  around[1] = source[rows][:, columns]
  windows = np.lib.stride_tricks.sliding_window_view(around, target.shape, axis=(1, 2))
  agrees = (windows == target).all(axis=(3, 4))
  return (
    {"offset": (down - y, right - x), "wraps": bool(wraps)}
    for wraps, y, x in np.argwhere(agrees).tolist()
    if (y, x) != (down, right)
  )


def _reach(size: Size) -> Size:
  """Returns how far cells move at most, vertically and horizontally."""
  return min(MAX_OFFSET, size[0] - 1), min(MAX_OFFSET, size[1] - 1)


def _offsets(size: Size) -> list[tuple[int, int]]:
  down, right = _reach(size)
  both = itertools.product(range(-down, down + 1), range(-right, right + 1))
  return [offset for offset in both if offset != (0, 0)]


def draw_symmetry(rng: np.random.Generator, size: Size) -> Params:
  del size
  return {"symmetry": SYMMETRIES[rng.integers(len(SYMMETRIES))]}


def reorient(grid: Grid, *, symmetry: str) -> Grid:
  """Flips, rotates (clockwise) or transposes a grid; half of the symmetries swap height and width."""
  match symmetry:
    case "flip_horizontal":
      return grid[:, ::-1]
    case "flip_vertical":
      return grid[::-1]
    case "rotate_90":
      return grid[::-1].T
    case "rotate_180":
      return grid[::-1, ::-1]
    case "rotate_270":
      return grid[:, ::-1].T
    case "transpose":
      return grid.T
    case "anti_transpose":
      return grid[::-1, ::-1].T
  raise ValueError(f"unknown symmetry {symmetry!r}")


def is_held_out_symmetry(params: Params) -> bool:
  return params["symmetry"] in HELD_OUT_SYMMETRIES


def other_symmetries(source: Grid, targets: Sequence[Grid], **params: object) -> Iterable[Params]:
  del source, targets, params
  return ({"symmetry": symmetry} for symmetry in SYMMETRIES)


def draw_direction(rng: np.random.Generator, size: Size) -> Params:
  del size
  return {"direction": DIRECTIONS[rng.integers(len(DIRECTIONS))]}


def fall(grid: Grid, *, direction: str) -> Grid:
  """Lets all cells fall until they come to rest."""
  return fall_in_steps(grid, 1, direction=direction)[-1]


def fall_in_steps(grid: Grid, num_steps: int, *, direction: str) -> list[Grid]:
  """Lets cells fall, one cell per tick; states are evenly spaced in time, and in the last one all cells are at rest."""
  turned = _turn_down(grid, direction)
  height, filled = len(turned), turned != BACKGROUND
  # The row at which a cell comes to rest on the cells below it.
  rest = height - filled[::-1].cumsum(axis=0)[::-1]
  rows, columns = np.nonzero(filled)
  states = []
  for step in range(1, num_steps + 1):
    state = np.full_like(turned, BACKGROUND)
    ticks = round((height - 1) * step / num_steps)
    state[np.minimum(rows + ticks, rest[rows, columns]), columns] = turned[rows, columns]
    states.append(_turn_down(state, direction))
  return states


def _turn_down(grid: Grid, direction: str) -> Grid:
  """Flips or transposes a grid so that a direction points down; applying it twice restores the grid."""
  if direction in ("down", "up"):
    return grid if direction == "down" else grid[::-1]
  return grid.T if direction == "right" else grid[::-1, ::-1].T


def is_held_out_direction(params: Params) -> bool:
  return params["direction"] in HELD_OUT_DIRECTIONS


def other_directions(source: Grid, targets: Sequence[Grid], **params: object) -> Iterable[Params]:
  del source, targets, params
  return ({"direction": direction} for direction in DIRECTIONS)


def draw_rule(rng: np.random.Generator, size: Size) -> Params:
  """Draws an elementary rule by Wolfram's number, and the colour of living cells."""
  del size
  return {"rule": RULES[rng.integers(len(RULES))], "color": draw_colors(rng, 1)[0]}


def make_living(rng: np.random.Generator, size: Size, *, color: int, **params: object) -> Grid:
  """Draws a grid of which a third to two thirds of the cells live."""
  del params
  return np.where(rng.random(size) < rng.uniform(1 / 3, 2 / 3), color, BACKGROUND)


def next_generation(grid: Grid, *, rule: int, color: int) -> Grid:
  """Applies an elementary rule to every row, each of which is a ring of cells."""
  return ((rule >> _neighborhoods(grid)) & 1) * color


def _neighborhoods(grid: Integer[np.ndarray, "... _h _w"]) -> Integer[np.ndarray, "... _h _w"]:
  """Returns for each cell which of its left neighbour, itself and its right neighbour live, as bits 4, 2 and 1."""
  alive = grid != BACKGROUND
  ring = np.concatenate([alive[..., -1:], alive, alive[..., :1]], axis=-1, dtype=np.int64)
  return 4 * ring[..., :-2] + 2 * ring[..., 1:-1] + ring[..., 2:]


def generations(grid: Grid, num_steps: int, **params) -> list[Grid]:
  """Applies an elementary rule repeatedly; returns each generation."""
  states = itertools.accumulate(range(num_steps), lambda state, _: next_generation(state, **params), initial=grid)
  return list(states)[1:]


def is_held_out_rule(params: Params) -> bool:
  return is_held_out_value(params["rule"])


def other_rules(source: Grid, targets: Sequence[Grid], *, rule: int, color: int) -> Iterable[Params]:
  """Yields the other rules, which differ only in neighbourhoods that the pair does not show."""
  shown = set(_neighborhoods(np.stack([source, *targets[:-1]])).ravel().tolist())
  changes = [0]
  for bit in set(range(8)) - shown:
    changes += [change | 1 << bit for change in changes]
  return ({"rule": rule ^ change, "color": color} for change in changes[1:])


def draw_color(rng: np.random.Generator, size: Size) -> Params:
  del size
  return {"color": draw_colors(rng, 1)[0]}


def next_life(grid: Grid, *, color: int) -> Grid:
  """Applies Conway's rule, B3/S23, on a torus."""
  alive = grid != BACKGROUND
  torus = np.concatenate([alive[-1:], alive, alive[:1]], dtype=np.int64)
  lines = torus[:-2] + torus[1:-1] + torus[2:]
  lines = np.concatenate([lines[:, -1:], lines, lines[:, :1]], axis=1)
  living = lines[:, :-2] + lines[:, 1:-1] + lines[:, 2:]  # in the 3x3 cells around each cell
  return ((living == 3) | ((living == 4) & alive)) * color


def lives(grid: Grid, num_steps: int, *, color: int) -> list[Grid]:
  """Applies Conway's rule repeatedly; returns each generation."""
  states = itertools.accumulate(range(num_steps), lambda state, _: next_life(state, color=color), initial=grid)
  return list(states)[1:]
