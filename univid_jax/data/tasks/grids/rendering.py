"""Draws grids as pictures, and reads them back."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer, UInt8

from univid_jax.config.schema import DataConfig
from univid_jax.core.dims import TEMPORAL_STRIDE
from univid_jax.core.numbers import ceil_div
from univid_jax.core.sentence import ClipRef
from univid_jax.data.tasks.grids.base import Grid, Size

# Frames of a video that show one state, after the first frame: one latent frame of every codec.
STATE_FRAMES = TEMPORAL_STRIDE

Color = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendering:
  """How a grid is drawn: as cells of one colour each, in the top left of a canvas with padding around it.

  Attributes:
    size: height and width of the canvas in pixels.
    cell: side of a cell in pixels.
    palette: the colours of the cells.
    padding: the colour outside the grid.
  """

  size: Size
  cell: int
  palette: tuple[Color, ...]
  padding: Color

  @classmethod
  def from_config(cls, config: DataConfig) -> "Rendering":
    grids = config.grids
    return cls(
      size=(config.height, config.width),
      cell=grids.cell,
      palette=tuple(map(_parse_color, grids.palette)),
      padding=_parse_color(grids.padding),
    )

  @property
  def canvas(self) -> Size:
    """The largest grid that fits, in cells."""
    return self.size[0] // self.cell, self.size[1] // self.cell

  def fits(self, grid_size: Size) -> bool:
    return all(side <= room for side, room in zip(grid_size, self.canvas))

  def render(self, grids: Sequence[Grid]) -> UInt8[np.ndarray, "T H W 3"]:
    """Draws states: one as an image, several as a video that shows the first for one frame, the others for four each.

    Raises:
      ValueError: a grid does not fit.
    """
    height, width = self.size
    rows, columns = ceil_div(height, self.cell), ceil_div(width, self.cell)
    cells = np.full((len(grids), rows, columns), len(self.palette))
    for inside, grid in zip(cells, grids):
      if not self.fits(grid.shape):
        raise ValueError(f"a grid of {grid.shape[0]}x{grid.shape[1]} cells does not fit into {self.canvas} cells")
      inside[: grid.shape[0], : grid.shape[1]] = grid
    # Whole lines are copied, first to the lines of a cell, then to the frames of a state.
    lines = self._cell_lines.take(cells, axis=0).reshape(len(grids), rows, -1)
    states = lines.repeat(self.cell, axis=1)[:, :height, : 3 * width]
    num_frames = [1] + [STATE_FRAMES] * (len(grids) - 1)
    return states.repeat(num_frames, axis=0).reshape(-1, height, width, 3)

  @functools.cached_property
  def _cell_lines(self) -> UInt8[np.ndarray, "_colors _bytes"]:
    """One line of a cell's pixels, for each colour, padding last."""
    return np.tile(np.array([*self.palette, self.padding], np.uint8), self.cell)

  def clip(self, grids: Sequence[Grid]) -> ClipRef:
    """Returns a clip that is drawn by `render` when it is read; its key identifies its pixels."""
    num_frames = 1 + STATE_FRAMES * (len(grids) - 1)
    return ClipRef(
      functools.partial(self._identify, grids), functools.partial(self.render, grids), num_frames, self.size
    )

  def _identify(self, grids: Sequence[Grid]) -> str:
    content = [(grid.shape, grid.astype(np.int8).tobytes()) for grid in grids]
    return "grids|" + hashlib.sha256(repr((self, content)).encode()).hexdigest()

  def decode(self, frames: UInt8[np.ndarray, "T H W 3"]) -> list[Grid]:
    """Reads the states of an image or video: inverts `render`; for any other picture, finds the most similar grid."""
    return [self._decode_frame(frame) for frame in frames[::STATE_FRAMES]]

  def _decode_frame(self, frame: UInt8[np.ndarray, "H W 3"]) -> Grid:
    """Reads each cell from the mean of its inner half, and takes the size that disagrees with the fewest cells."""
    rows, columns = self.canvas
    cell, margin = self.cell, self.cell // 4
    cells = frame[: rows * cell, : columns * cell].reshape(rows, cell, columns, cell, 3)
    colors = cells[:, margin : cell - margin, :, margin : cell - margin].mean(axis=(1, 3))
    labels = _nearest(colors, (*self.palette, self.padding))
    inside = np.where(labels == len(self.palette), -1, 1).cumsum(axis=0).cumsum(axis=1)
    height, width = np.array(np.unravel_index(np.argmax(inside), inside.shape)) + 1
    return _nearest(colors[:height, :width], self.palette)


def _nearest(colors: np.ndarray, palette: Sequence[Color]) -> Integer[np.ndarray, "h w"]:
  distances = np.sum((colors[..., None, :] - np.array(palette, np.float64)) ** 2, axis=-1)
  return np.argmin(distances, axis=-1).astype(np.int8)


def _parse_color(text: str) -> Color:
  """Parses a colour #RRGGBB, which the config has checked."""
  red, green, blue = bytes.fromhex(text.removeprefix("#"))
  return red, green, blue
