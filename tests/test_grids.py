"""Grid tasks: pictures of grids and back, every family against an independent implementation, splits, sentences."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st

from univid_jax.codecs.dct import DCTCodec
from univid_jax.config.boundary import override
from univid_jax.config.grids import GRID_FAMILY_NAMES
from univid_jax.config.presets import tiny
from univid_jax.core.errors import UserError
from univid_jax.core.pixels import to_float, to_uint8
from univid_jax.core.sentence import ClipRef, read_frames
from univid_jax.data.prepare import _Sentences
from univid_jax.data.sources.grids import GridSentences
from univid_jax.data.sources.open import open_data
from univid_jax.data.tasks.grids import GRID_FAMILIES, cells, puzzles
from univid_jax.data.tasks.grids.base import GridSplit, is_held_out_grid, is_same
from univid_jax.data.tasks.grids.rendering import Rendering

CONFIG = override(
  tiny(),
  {f"data.grids.families.{name}": 1.0 for name in GRID_FAMILIES}
  | {"data.bundled": False, "data.num_frames": 9, "data.contexts.IV": 0.3, "data.num_clips.clips_6": 0.3},
)
RENDERING = Rendering.from_config(CONFIG.data)
WITH_TIME = [name for name, family in GRID_FAMILIES.items() if family.evolve]
WITH_RULES = [name for name, family in GRID_FAMILIES.items() if family.is_held_out]


def only(name, split=GridSplit.TRAIN, **options):
  """Returns the sentences of one family."""
  return dataclasses.replace(GridSentences.open(CONFIG), families={name: 1.0}, split_name=split, **options)


def rendering(size, cell):
  return dataclasses.replace(RENDERING, size=(size, size), cell=cell)


def draw_pair(name, seed, size=None):
  """Draws (parameters, source grid) of a family."""
  rng, family = np.random.default_rng(seed), GRID_FAMILIES[name]
  size = family.size or size or tuple(rng.integers(3, 13, 2).tolist())
  params = family.draw(rng, size)
  return params, family.make(rng, size, **params)


@st.composite
def grids(draw, count=1, largest=30):
  height, width = draw(st.tuples(st.integers(1, largest), st.integers(1, largest)))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  # Few colours too, so that flat grids occur.
  return [rng.integers(0, draw(st.integers(1, 10)), (height, width)) for _ in range(count)]


class TestRendering:
  @given(grids(), st.integers(1, 6), st.integers(0, 5))
  @settings(deadline=None)
  def test_decoding_inverts_rendering(self, states, cell, rest):
    draws = rendering(30 * cell + min(rest, cell - 1), cell)
    frames = draws.render(states)
    assert frames.shape[0] == 1 and is_same(draws.decode(frames)[0], states[0])

  @given(grids(count=3, largest=8))
  @settings(max_examples=25, deadline=None)
  def test_decoding_inverts_rendering_of_videos(self, states):
    frames = RENDERING.render(states)
    assert len(frames) == 9 and all(is_same(a, b) for a, b in zip(RENDERING.decode(frames), states, strict=True))

  @given(grids(count=3, largest=8), st.sampled_from([(16, 4, 4), (16, 4, 8), (48, 4, 2), (12, 2, 2), (64, 8, 4)]))
  @settings(max_examples=25, deadline=None)
  def test_through_the_codec(self, states, case):
    """(channels, stride, cell): cells that are multiples of the codec's blocks, or smaller ones with more channels."""
    channels, stride, cell = case
    codec, draws = DCTCodec(latent_channels=channels, spatial_stride=stride), rendering(8 * cell, cell)
    for shown in (states[:1], states):
      read = draws.decode(to_uint8(codec.decode(codec.encode(to_float(draws.render(shown))))))
      assert all(is_same(a, b) for a, b in zip(read, shown, strict=True))

  @given(grids(largest=8), st.integers(8, 24))
  @settings(max_examples=25, deadline=None)
  def test_blurred_and_noisy_cells_are_read(self, states, cell):
    """What an autoencoder leaves of a picture: edges blurred over a quarter of a cell, noise of 20 dB."""
    draws = rendering(8 * cell, cell)
    blurred = scipy.ndimage.gaussian_filter(draws.render(states).astype(float), (0, cell / 8, cell / 8, 0))
    noisy = blurred + np.random.default_rng(0).normal(0, 25, blurred.shape)
    assert is_same(draws.decode(np.clip(noisy, 0, 255).astype(np.uint8))[0], states[0])

  def test_only_the_inner_half_of_a_cell_counts(self):
    """Around it, a quarter of the cell on each side may have any colour."""
    draws, grid = rendering(32, 8), np.arange(16).reshape(4, 4) % 10
    frame = draws.render([grid])
    rest = np.arange(32) % 8
    is_inner = (rest >= 2) & (rest < 6)
    frame[:, ~(is_inner[:, None] & is_inner)] = draws.palette[3]
    assert is_same(draws.decode(frame)[0], grid)

  def test_any_picture_is_read(self):
    for seed in range(10):
      noise = np.random.default_rng(seed).integers(0, 256, (1, 32, 32, 3), np.uint8)
      (grid,) = RENDERING.decode(noise)
      assert min(grid.shape) >= 1 and max(grid.shape) <= 8 and grid.min() >= 0 and grid.max() <= 9
    assert RENDERING.decode(np.full((1, 32, 32, 3), 255, np.uint8))[0].shape == (1, 1)

  def test_a_grid_must_fit(self):
    with pytest.raises(ValueError, match="9x3 cells does not fit into"):
      RENDERING.render([np.zeros((9, 3), int)])


class TestConfig:
  def test_names(self):
    assert tuple(GRID_FAMILIES) == GRID_FAMILY_NAMES

  @pytest.mark.parametrize(
    "key, value, message",
    [
      ("families.chess", 1.0, "unknown family config.data.grids.families.chess; there are recolor, "),
      ("families.maze", -1.0, "config.data.grids.families.maze must be at least 0"),
      ("min_side", 2, "config.data.grids.min_side must be from 3 to 30 cells, got 2"),
      ("max_side", 5, "config.data.grids.max_side must be from min_side = 6 to 30 cells, got 5"),
      ("max_side", 9, "max_side = 9 cells of 4 pixels do not fit into config.data.height and width = 32x32: at most 8"),
      ("cell", 0, "config.data.grids.cell must be at least 1, got 0"),
      ("palette", ["#000000"], "config.data.grids.palette must be ten colours #RRGGBB"),
      ("palette", ["#00000" + "0123456789"[i] for i in range(9)] + ["red"], "palette must be ten colours #RRGGBB"),
      ("padding", "#ffdc00", "config.data.grids.palette must be different colours, also from padding"),
    ],
  )
  def test_errors(self, key, value, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
      override(CONFIG, {f"data.grids.{key}": value})

  def test_a_family_of_one_size_must_fit(self):
    config = override(CONFIG, {"data.grids.min_side": 3, "data.grids.max_side": 4, "data.grids.cell": 8})
    with pytest.raises(UserError, match=r"families\.hanoi: its grids of 4x6 cells of 8 pixels do not fit"):
      GridSentences.open(config)

  def test_grids_are_off_by_default_and_go_with_other_data(self):
    assert set(open_data(tiny()).sources) == {"computed"}
    assert set(open_data(override(tiny(), {"data.grids.families.maze": 1.0})).sources) == {"computed", "grids"}
    assert set(open_data(CONFIG).sources) == {"grids"}


class TestFamilies:
  """Against implementations that share nothing with those of the package."""

  @pytest.mark.parametrize("seed", range(8))
  def test_recolor(self, seed):
    params, grid = draw_pair("recolor", seed)
    mapping = dict(params["mapping"])
    assert set(mapping) == set(mapping.values()) == set(np.unique(grid)) and all(a != b for a, b in mapping.items())
    expected = [[mapping[cell] for cell in row] for row in grid.tolist()]
    assert cells.recolor(grid, **params).tolist() == expected

  @pytest.mark.parametrize("seed", range(8))
  def test_translate(self, seed):
    params, grid = draw_pair("translate", seed)
    (height, width), (down, right) = grid.shape, params["offset"]
    expected = np.zeros_like(grid)
    for y, x in itertools.product(range(height), range(width)):
      to = (y + down, x + right)
      if params["wraps"]:
        expected[to[0] % height, to[1] % width] = grid[y, x]
      elif 0 <= to[0] < height and 0 <= to[1] < width:
        expected[to] = grid[y, x]
    assert is_same(cells.translate(grid, **params), expected)

  @pytest.mark.parametrize("symmetry", cells.SYMMETRIES)
  def test_reorient(self, symmetry):
    """Where the cell (y, x) goes; seven different symmetries."""
    _, grid = draw_pair("reorient", 0, (3, 5))
    height, width = grid.shape
    goes_to = {
      "flip_horizontal": lambda y, x: (y, width - 1 - x),
      "flip_vertical": lambda y, x: (height - 1 - y, x),
      "rotate_90": lambda y, x: (x, height - 1 - y),
      "rotate_180": lambda y, x: (height - 1 - y, width - 1 - x),
      "rotate_270": lambda y, x: (width - 1 - x, y),
      "transpose": lambda y, x: (x, y),
      "anti_transpose": lambda y, x: (width - 1 - x, height - 1 - y),
    }[symmetry]
    out = cells.reorient(grid, symmetry=symmetry)
    for place in itertools.product(range(height), range(width)):
      assert out[goes_to(*place)] == grid[place]

  @pytest.mark.parametrize("direction", cells.DIRECTIONS)
  def test_gravity(self, direction):
    """Each line keeps its cells in order, at its end; steps fall evenly and end at rest."""
    _, grid = draw_pair("gravity", 1, (7, 5))
    vertical, to_start = direction in ("up", "down"), direction in ("up", "left")
    lines = [[cell for cell in line if cell] for line in (grid.T if vertical else grid).tolist()]
    length = grid.shape[0] if vertical else grid.shape[1]
    settled = [line + [0] * (length - len(line)) if to_start else [0] * (length - len(line)) + line for line in lines]
    expected = np.array(settled).T if vertical else np.array(settled)
    assert is_same(cells.fall(grid, direction=direction), expected)
    states = cells.fall_in_steps(grid, 3, direction=direction)
    assert len(states) == 3 and is_same(states[-1], expected)
    assert all(sorted(state.flat) == sorted(grid.flat) for state in states)

  def test_states_of_a_fall_are_evenly_spaced(self):
    column = np.array([[1], [0], [0], [0], [0]])
    for count, places in ((4, [1, 2, 3, 4]), (2, [2, 4]), (1, [4])):
      states = cells.fall_in_steps(column, count, direction="down")
      assert [int(state.argmax()) for state in states] == places

  def test_falling_cells_move_one_cell_per_tick(self):
    column = np.array([[1], [0], [2], [0], [0]])
    states = cells.fall_in_steps(column, 4, direction="down")
    assert [state.ravel().tolist() for state in states] == [
      [0, 1, 0, 2, 0],
      [0, 0, 1, 0, 2],
      [0, 0, 0, 1, 2],
      [0, 0, 0, 1, 2],
    ]

  @pytest.mark.parametrize("seed", range(6))
  def test_automaton(self, seed):
    params, grid = draw_pair("automaton", seed)
    bits, color = f"{params['rule']:08b}", params["color"]
    states = GRID_FAMILIES["automaton"].evolve(grid, 3, **params)
    for before, after in itertools.pairwise([grid, *states]):
      for y, x in itertools.product(*map(range, grid.shape)):
        triple = [int(before[y, (x + i) % grid.shape[1]] > 0) for i in (-1, 0, 1)]
        position = ["111", "110", "101", "100", "011", "010", "001", "000"].index("".join(map(str, triple)))
        assert after[y, x] == color * int(bits[position])

  def test_rule_30_from_one_cell(self):
    grid = np.zeros((1, 7), int)
    grid[0, 3] = 1
    rows = [state[0].tolist() for state in cells.generations(grid, 2, rule=30, color=1)]
    assert rows == [[0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1, 0]]

  @pytest.mark.parametrize("seed", range(6))
  def test_life(self, seed):
    params, grid = draw_pair("life", seed)
    (height, width), alive = grid.shape, grid > 0
    expected = np.zeros_like(grid)
    for y, x in itertools.product(range(height), range(width)):
      steps = [step for step in itertools.product((-1, 0, 1), repeat=2) if step != (0, 0)]
      neighbors = sum(alive[(y + dy) % height, (x + dx) % width] for dy, dx in steps)
      expected[y, x] = params["color"] if neighbors == 3 or (alive[y, x] and neighbors == 2) else 0
    assert is_same(cells.next_life(grid, **params), expected)
    glider = np.zeros((8, 8), int)
    glider[[0, 1, 2, 2, 2], [1, 2, 0, 1, 2]] = 1
    assert is_same(cells.lives(glider, 4, color=1)[-1], np.roll(glider, (1, 1), axis=(0, 1)))

  @pytest.mark.parametrize("seed", range(6))
  def test_outline(self, seed):
    params, grid = draw_pair("outline", seed)
    expected = grid.copy()
    for y, x in itertools.product(*map(range, grid.shape)):
      near = grid[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
      if grid[y, x] == 0 and (near == params["color"]).any():
        expected[y, x] = params["line"]
    assert is_same(GRID_FAMILIES["outline"].apply(grid, **params), expected)

  @pytest.mark.parametrize("seed", range(8))
  def test_fill(self, seed):
    """By flooding from outside."""
    params, grid = draw_pair("fill", seed)
    outside = np.pad(grid, 1)
    flood(outside, (0, 0), 99)
    expected = np.where((outside[1:-1, 1:-1] == 0), params["filling"], grid)
    assert is_same(GRID_FAMILIES["fill"].apply(grid, **params), expected)

  @pytest.mark.parametrize("seed", range(6))
  def test_largest(self, seed):
    params, grid = draw_pair("largest", seed)
    left, components = grid.copy(), []
    while left.any():
      before = left.copy()
      flood(left, tuple(np.argwhere(left)[0]), 0)
      components.append(before != left)
    sizes = sorted(component.sum() for component in components)
    assert len(sizes) > 1 and sizes[-1] > sizes[-2]
    expected = np.where(max(components, key=np.sum), params["color"], 0)
    assert is_same(GRID_FAMILIES["largest"].apply(grid, **params), expected)

  @pytest.mark.parametrize("seed", range(6))
  def test_count(self, seed):
    params, grid = draw_pair("count", seed)
    count = collections.Counter(grid.flat)[params["color"]]
    out = GRID_FAMILIES["count"].apply(grid, **params)
    assert 1 <= count <= grid.shape[1] and params["other"] in grid, "the rule is which colour is counted, and which not"
    assert out[0].tolist() == [params["color"]] * count + [0] * (grid.shape[1] - count) and not out[1:].any()

  @pytest.mark.parametrize("seed", range(8))
  def test_maze(self, seed):
    """The path is as short as SciPy's, and removing any of its cells makes the way longer: there is no other path."""
    params, grid = draw_pair("maze", seed)
    out = GRID_FAMILIES["maze"].apply(grid, **params)
    path = np.argwhere(out != grid)
    assert (out[out != grid] == params["path"]).all() and (grid[out != grid] == 0).all()
    length = maze_length(grid, params["wall"])
    assert len(path) == length - 1 >= 1
    for cell in path:
      without = grid.copy()
      without[tuple(cell)] = params["wall"]
      assert maze_length(without, params["wall"]) > length
    states = puzzles.draw_path_in_steps(grid, 3, **params)
    counts = [int(np.sum(state == params["path"])) for state in states]
    assert counts == [round(len(path) * step / 3) for step in (1, 2, 3)] and is_same(states[-1], out)
    if counts[0]:  # the path grows from the start
      ends = [np.abs(np.argwhere(grid == color) - np.argwhere(states[0] == params["path"])).sum(1) for color in (3, 2)]
      assert ends[0].min() == 1 and (ends[1].min() > 1 or counts[0] == len(path))

  def test_hanoi(self):
    """Every move is the first of a shortest solution, by breadth-first search over all positions."""
    start = [0] * puzzles.NUM_DISCS
    positions = list(itertools.product(range(3), repeat=puzzles.NUM_DISCS))
    assert puzzles.read_towers(puzzles.draw_towers(start)) == start
    for goal in range(3):
      distances = hanoi_distances(goal)
      assert len(distances) == len(positions) == 81 and max(distances.values()) == 15
      for position in positions:
        if distances[position]:
          moved = puzzles.read_towers(puzzles.move_disc(puzzles.draw_towers(list(position)), goal=goal))
          assert tuple(moved) in hanoi_moves(position) and distances[tuple(moved)] == distances[position] - 1

  @pytest.mark.parametrize("seed", range(6))
  def test_sudoku(self, seed):
    """The only solution, by trying all digits."""
    _, grid = draw_pair("sudoku", seed)
    assert 4 <= np.sum(grid == 0) <= 10
    solutions = list(solve_by_trying(grid))
    assert len(solutions) == 1 and is_same(GRID_FAMILIES["sudoku"].apply(grid), solutions[0])

  def test_there_are_288_sudokus(self):
    assert len(puzzles.sudoku_solutions()) == len(list(solve_by_trying(np.zeros((4, 4), int)))) == 288

  @pytest.mark.parametrize("name", GRID_FAMILIES)
  def test_targets_fit_and_videos_end_as_images_may(self, name):
    family = GRID_FAMILIES[name]
    for seed, size in enumerate([(3, 3), (3, 5), (8, 6), (30, 30)]):
      params, grid = draw_pair(name, seed, size)
      (target,) = family.targets(grid, 1, params)
      assert target.min() >= 0 and target.max() <= 9 and sorted(target.shape) == sorted(grid.shape)
      assert is_same(target, family.apply(grid, **params))
      if family.evolve:
        assert len(family.targets(grid, 4, params)) == 4
      else:
        with pytest.raises(ValueError, match="without time"):
          family.targets(grid, 2, params)


def flood(grid, start, color):
  """Recolours a component, whose cells share sides, in place."""
  old, todo = grid[start], [start]
  while todo:
    y, x = todo.pop()
    if 0 <= y < grid.shape[0] and 0 <= x < grid.shape[1] and grid[y, x] == old:
      grid[y, x] = color
      todo += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]


def maze_length(grid, wall):
  """Returns the number of steps from start (3) to goal (2), infinite if there is no way."""
  height, width = grid.shape
  free = (grid != wall).ravel()
  index = np.arange(height * width).reshape(height, width)
  edges = np.concatenate(
    [np.stack([index[1:], index[:-1]], -1).reshape(-1, 2), np.stack([index[:, 1:], index[:, :-1]], -1).reshape(-1, 2)]
  )
  edges = edges[free[edges].all(axis=1)]
  graph = scipy.sparse.coo_array((np.ones(len(edges)), edges.T), shape=(height * width,) * 2).tocsr()
  start, goal = (int(np.flatnonzero(grid.ravel() == color)[0]) for color in (3, 2))
  return scipy.sparse.csgraph.dijkstra(graph, directed=False, indices=start, unweighted=True)[goal]


def hanoi_moves(position):
  """Yields the positions after one allowed move."""
  for disc, peg in enumerate(position):
    if peg not in position[:disc]:
      for other in {0, 1, 2} - {peg} - set(position[:disc]):
        yield (*position[:disc], other, *position[disc + 1 :])


def hanoi_distances(goal):
  solved = (goal,) * puzzles.NUM_DISCS
  distances, queue = {solved: 0}, collections.deque([solved])
  while queue:
    position = queue.popleft()
    for after in hanoi_moves(position):
      if after not in distances:
        distances[after] = distances[position] + 1
        queue.append(after)
  return distances


def solve_by_trying(grid):
  """Yields all solutions of a sudoku."""
  empty = np.argwhere(grid == 0)
  if not len(empty):
    yield grid.copy()
    return
  y, x = empty[0]
  box = grid[y // 2 * 2 : y // 2 * 2 + 2, x // 2 * 2 : x // 2 * 2 + 2]
  for digit in {1, 2, 3, 4} - set(grid[y]) - set(grid[:, x]) - set(box.flat):
    trial = grid.copy()
    trial[y, x] = digit
    yield from solve_by_trying(trial)


def all_rules(name):
  """Returns all rules of a family with alternatives; of elementary rules in one colour."""
  offsets = [offset for offset in itertools.product(range(-3, 4), repeat=2) if offset != (0, 0)]
  return {
    "translate": [{"offset": offset, "wraps": wraps} for offset in offsets for wraps in (False, True)],
    "reorient": [{"symmetry": symmetry} for symmetry in cells.SYMMETRIES],
    "gravity": [{"direction": direction} for direction in cells.DIRECTIONS],
    "automaton": [{"rule": rule, "color": 1} for rule in range(256)],
    "hanoi": [{"goal": goal} for goal in range(3)],
  }[name]


def states_of(sentence):
  return [RENDERING.decode(read_frames(clip)) for clip in sentence.clips]


class TestSentences:
  @pytest.mark.parametrize("name", GRID_FAMILIES)
  def test_all_pairs_share_the_rule_of_the_split(self, name):
    family = GRID_FAMILIES[name]
    for split in GridSplit:
      source = only(name, split)
      for index in range(8):
        sentence = source[index]
        params = {key: value for key, value in sentence.params.items() if key not in ("family", "split")}
        clips = states_of(sentence)
        for before, after in zip(clips[::2], clips[1::2]):
          grid, states = before[0], after[1:] if len(after) > 1 else after
          assert all(is_same(grid, state) for state in before) and (len(after) == 1 or is_same(after[0], grid))
          expected = family.targets(grid, len(states), params)
          assert all(is_same(a, b) for a, b in zip(states, expected, strict=True))
          held_out = family.apply(grid, **params) if family.splits_by_target else grid
          assert is_held_out_grid(held_out) == split.holds_out_grids
          assert not is_same(family.apply(grid, **params), grid), "a copy of the source would be right"
        assert len({clip[0].tobytes() for clip in clips[::2]}) == len(clips) // 2
        assert not any(is_same(clip[-1], clips[-1][-1]) for clip in clips[1:-1:2]), "a copy of A' would be right"
        if family.is_held_out:
          assert family.is_held_out(params) == split.holds_out_rules

  @pytest.mark.parametrize("name", GRID_FAMILIES)
  def test_splits_are_disjoint(self, name):
    """Nothing of an evaluation is trained on: no grid, and of families with rules no rule."""

    def seen(split, count):
      rules, answers, source = set(), set(), only(name, split)
      for index in range(count):
        sentence = source[index]
        rule = {
          key: sentence.params[key]
          for key in ("mapping", "offset", "symmetry", "direction", "rule")
          if key in sentence.params
        }
        rule |= {key: sentence.params[key] for key in ("color", "other") if name == "count"}
        rules.add(repr(rule))
        answers.add(read_frames(sentence.clips[-1]).tobytes())
      return rules, answers

    rules, answers = seen(GridSplit.TRAIN, 100)
    few_answers = ("count", "hanoi", "largest", "life", "automaton", "gravity")
    for split in (GridSplit.HELD_OUT, GridSplit.TRAINED_RULES):
      other_rules, other_answers = seen(split, 25)
      assert not rules & other_rules or name not in WITH_RULES or split is GridSplit.TRAINED_RULES
      assert not answers & other_answers or name in few_answers
    assert (only(name)[0].task, only(name, GridSplit.HELD_OUT)[0].params["split"]) == (
      name,
      "held-out rules" if name in WITH_RULES else "held-out grids",
    )

  @pytest.mark.parametrize("name", [name for name, family in GRID_FAMILIES.items() if family.alternatives])
  def test_examples_determine_the_answer(self, name):
    """Of all rules of the family, those that agree with the examples agree on the query, and are of the same split."""
    family = GRID_FAMILIES[name]
    sources = [only(name, split, sides=sides) for split in GridSplit for sides in ((3, 5), (6, 8))]
    for sentence in (source[index] for source in sources for index in range(5)):
      clips = states_of(sentence)
      rules = all_rules(name)
      if name == "automaton":
        rules = [{**rule, "color": sentence.params["color"]} for rule in rules]
      *examples, (query, truth) = [(a[0], b[1:] if len(b) > 1 else b) for a, b in zip(clips[::2], clips[1::2])]

      def follows(rule, grid, states):
        return all(is_same(a, b) for a, b in zip(family.targets(grid, len(states), rule), states))

      answers, splits = set(), set()
      for rule in rules:
        if all(follows(rule, *example) for example in examples):
          found = family.targets(query, len(truth), rule)
          answers.add(b"".join(state.astype(np.int8).tobytes() for state in found))
          splits.add(family.is_held_out is not None and family.is_held_out(rule))
      assert len(answers) == 1 and len(splits) == 1

  @pytest.mark.parametrize("name", [name for name, family in GRID_FAMILIES.items() if family.alternatives])
  def test_alternatives_are_all_rules_that_agree_with_a_pair(self, name):
    """Small and repetitive grids agree with many."""
    family = GRID_FAMILIES[name]
    for seed in range(12):
      params, grid = draw_pair(name, seed, (4, 5))
      if name != "hanoi" and seed % 2:
        grid = np.tile(grid[:2, :1], (2, 5))
      steps = 1 + seed % 3 if family.evolve else 1
      targets = family.targets(grid, steps, params)
      rules = all_rules(name)
      if name == "automaton":
        rules = [{**rule, "color": params["color"]} for rule in rules]
      agree = [rule for rule in rules if all(map(is_same, family.targets(grid, steps, rule), targets))]
      found = list(family.alternatives(grid, targets, **params))
      assert all(rule in found for rule in agree if rule != params) and all(rule in rules for rule in found)
      if name in ("translate", "automaton"):
        assert len(found) == len(agree) - (name == "automaton")

  def test_sources_of_a_sentence_differ(self):
    """What equals an earlier one or its own target is drawn again."""
    trained = (np.full((2, 2), n % 9, np.int8) + (np.arange(4).reshape(2, 2) == n // 9) for n in range(36))
    first, still, other = itertools.islice((grid for grid in trained if not is_held_out_grid(grid)), 3)
    drawn = iter([first, still, other])
    family = dataclasses.replace(
      GRID_FAMILIES["recolor"],
      make=lambda rng, size: next(drawn),
      apply=lambda grid: grid if is_same(grid, still) else grid + 1,
    )
    found = only("recolor")._draw_pair(np.random.default_rng(0), family, (2, 2), {}, [first])
    assert found is not None and is_same(found[0], other)

  def test_an_index_always_gives_the_same_sentence(self):
    source = GridSentences.open(CONFIG)
    for index in range(20):
      first, again = source[index], GridSentences.open(CONFIG)[index]
      assert first.task == again.task and first.params == again.params and first.record == f"grid sentence {index}"
      assert all(np.array_equal(a, b) for a, b in zip(first.clips, again.clips, strict=True))
    other = dataclasses.replace(source, seed=5)
    assert [other[i].params for i in range(5)] != [source[i].params for i in range(5)]

  def test_contexts(self):
    """Families without time are images; others have every context with a weight."""
    found = collections.defaultdict(set)
    for name in GRID_FAMILIES:
      source = only(name)
      for index in range(20 if name in WITH_TIME else 3):
        sentence = source[index]
        found[name].add(sentence.context)
        assert [len(clip) > 1 for clip in sentence.clips[-2:]] == list(
          {"I": (True, True), "II": (False, False), "III": (True, True), "IV": (False, True)}[sentence.context]
        )
    for name in GRID_FAMILIES:
      assert found[name] == ({"I", "II", "III", "IV"} if name in WITH_TIME else {"II"})

  def test_clips_for_the_cache_are_drawn_when_read_and_named_by_content(self):
    by_reference, at_once = (
      dataclasses.replace(GridSentences.open(CONFIG), by_reference=flag) for flag in (True, False)
    )
    keys = {}
    for index in range(20):
      for lazy, clip in zip(by_reference[index].clips, at_once[index].clips, strict=True):
        assert isinstance(lazy, ClipRef) and (lazy.num_frames, *lazy.size) == clip.shape[:3]
        assert np.array_equal(lazy.read(), clip)
        assert keys.setdefault(lazy.key, clip.tobytes()) == clip.tobytes()
    assert len(keys) == len(set(keys.values())) > 60
    cells = np.arange(6)
    assert rendering(64, 8).clip([cells.reshape(2, 3)]).key != rendering(64, 8).clip([cells.reshape(3, 2)]).key
    larger = dataclasses.replace(by_reference, rendering=rendering(64, 8))
    assert larger[0].clips[0].key != by_reference[0].clips[0].key
    assert GridSentences.open(override(CONFIG, {"init_from": "base"})).by_reference

  def test_prepare_skips_what_is_computed_at_once(self):
    config = override(CONFIG, {"data.num_sentences": 3})
    assert len(list(_Sentences(open_data(config), []))) == 0
    assert len(list(_Sentences(open_data(override(config, {"init_from": "base"})), []))) == 3
