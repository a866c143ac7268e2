"""The families of grid tasks by name. To add one, write its functions, an entry here and its name in `config.grids`."""

from collections.abc import Mapping

from univid_jax.data.tasks.grids import cells, puzzles, shapes
from univid_jax.data.tasks.grids.base import GridFamily

GRID_FAMILIES: Mapping[str, GridFamily] = {
  "recolor": GridFamily(
    draw=cells.draw_permutation,
    make=cells.make_colored,
    apply=cells.recolor,
    is_held_out=cells.is_held_out_permutation,
    prompt_name="version with its colours permuted",
  ),
  "translate": GridFamily(
    draw=cells.draw_translation,
    make=cells.make_sparse,
    apply=cells.translate,
    is_held_out=cells.is_held_out_translation,
    alternatives=cells.other_translations,
    prompt_name="translated version",
  ),
  "reorient": GridFamily(
    draw=cells.draw_symmetry,
    make=cells.make_sparse,
    apply=cells.reorient,
    is_held_out=cells.is_held_out_symmetry,
    alternatives=cells.other_symmetries,
    prompt_name="flipped, rotated or transposed version",
  ),
  "gravity": GridFamily(
    draw=cells.draw_direction,
    make=cells.make_sparse,
    apply=cells.fall,
    evolve=cells.fall_in_steps,
    is_held_out=cells.is_held_out_direction,
    alternatives=cells.other_directions,
    prompt_name="version in which all cells have fallen",
  ),
  "automaton": GridFamily(
    draw=cells.draw_rule,
    make=cells.make_living,
    apply=cells.next_generation,
    evolve=cells.generations,
    is_held_out=cells.is_held_out_rule,
    alternatives=cells.other_rules,
    prompt_name="next generation of a cellular automaton",
  ),
  "count": GridFamily(
    draw=shapes.draw_counting,
    make=shapes.make_countable,
    apply=shapes.count_to_bar,
    is_held_out=shapes.is_held_out_counting,
    prompt_name="count as a bar",
  ),
  "life": GridFamily(
    draw=cells.draw_color,
    make=cells.make_living,
    apply=cells.next_life,
    evolve=cells.lives,
    prompt_name="next generation of Conway's Life",
  ),
  "outline": GridFamily(
    draw=shapes.draw_outline, make=shapes.make_objects, apply=shapes.outline, prompt_name="version with outlines"
  ),
  "fill": GridFamily(
    draw=shapes.draw_filling,
    make=shapes.make_walls,
    apply=shapes.fill_enclosed,
    prompt_name="version with enclosed areas filled",
  ),
  "largest": GridFamily(
    draw=cells.draw_color, make=shapes.make_components, apply=shapes.keep_largest, prompt_name="largest component"
  ),
  "maze": GridFamily(
    draw=puzzles.draw_maze_colors,
    make=puzzles.make_maze,
    apply=puzzles.draw_path,
    evolve=puzzles.draw_path_in_steps,
    prompt_name="version with the shortest path",
  ),
  "hanoi": GridFamily(
    draw=puzzles.draw_goal_peg,
    make=puzzles.make_towers,
    apply=puzzles.move_disc,
    alternatives=puzzles.other_goal_pegs,
    size=puzzles.HANOI_SIZE,
    prompt_name="position after the next move",
  ),
  "sudoku": GridFamily(
    draw=puzzles.draw_nothing,
    make=puzzles.make_sudoku,
    apply=puzzles.solve_sudoku,
    size=puzzles.SUDOKU_SIZE,
    splits_by_target=True,
    prompt_name="solution",
  ),
}
