"""Files to which benchmarks append figures as they find them, so that a stopped run can be continued."""

import json
from pathlib import Path
from typing import Any

from univid_jax.core.errors import UserError


class FigureFile:
  """Figures, one line of JSON each. A line that a kill has cut off at the end of the file is dropped.

  Args:
    path: path of the file, which is created with its folder if missing; empty for no file.

  Attributes:
    lines: the figures so far, in the file's order.

  Raises:
    UserError: the file contains something else.
  """

  def __init__(self, path: str | Path):
    self._path = Path(path) if str(path) else None
    self.lines: list[Any] = []
    if not self._path:
      return
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._path.touch()
    self.lines = read_figures(self._path)
    if not self._path.read_bytes().endswith(b"\n"):
      self._path.write_text("".join(json.dumps(figures) + "\n" for figures in self.lines))

  def add(self, figures: Any) -> None:
    """Adds a line, which is in the file even if the run is stopped right afterwards."""
    self.lines.append(figures)
    if self._path:
      with self._path.open("a") as file:
        file.write(json.dumps(figures) + "\n")


def read_figures(path: str | Path) -> list[Any]:
  """Returns the figures of a file, without a line that a kill has cut off at its end.

  Raises:
    UserError: a line is not a figure, and not the beginning of one at the file's end.
    OSError: the file cannot be read.
  """
  found = []
  *lines, last = Path(path).read_bytes().split(b"\n")
  for number, line in enumerate((*lines, last), start=1):
    try:
      found.append(json.loads(line))
    except ValueError:
      if number <= len(lines) or line[:1] not in (b"", b"{"):
        raise UserError(f"{path} is not a file of figures: line {number} is not JSON") from None
  return found
