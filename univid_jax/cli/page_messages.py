"""What the demo prints: names instead of temporary paths, and one line for an error that the page shows."""

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = logging.getLogger("univid_jax")


class _ShortPaths(logging.Filter):
  """Removes folders of requests from messages."""

  def __init__(self, folder: Path):
    super().__init__()
    self._pattern = re.compile(rf"{re.escape(str(folder))}/[^/\s]+/")

  def filter(self, record: logging.LogRecord) -> bool:
    record.msg, record.args = self._pattern.sub("", record.getMessage()), ()
    return True


@contextlib.contextmanager
def short_paths(folder: Path) -> Iterator[None]:
  """Names files in subfolders of a folder by their names alone in this package's messages."""
  handlers, shorten = PACKAGE.handlers, _ShortPaths(folder)
  for handler in handlers:
    handler.addFilter(shorten)
  try:
    yield
  finally:
    for handler in handlers:
      handler.removeFilter(shorten)
