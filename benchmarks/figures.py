"""Files to which benchmarks add figures as they find them, so that a run that was stopped can be continued."""

import json
from pathlib import Path
from typing import Any

from univid_jax.core.errors import UserError


class FigureFile:
  """Figures, one line of JSON each. What a kill has cut off at the end of the file is dropped.

  Args:
    path: of the file, made with its folder if there is none; empty keeps no file.

  Attributes:
    lines: the figures so far, in the file's order.

  Raises:
    UserError: the file has something else.
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
    """Adds a line; a run that ends after this has it."""
    self.lines.append(figures)
    if self._path:
      with self._path.open("a") as file:
        file.write(json.dumps(figures) + "\n")


def read_figures(path: str | Path) -> list[Any]:
  """Returns the figures of a file, without what a kill has cut off at its end.

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
