"""Progress of a long computation in a file next to its result, so that a killed command resumes."""

import json
import logging
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from univid_jax.core.paths import atomic_write

log = logging.getLogger(__name__)

# Seconds between two states of a sample that are saved; as many times as long as saving takes if that is more.
SAVE_SECONDS = 30.0


class ProgressFile:
  """Arrays of one request, replaced atomically.

  Args:
    path: of the file, a .npz.
    request: everything that determines the arrays, for JSON; those of another request are not used.
  """

  def __init__(self, path: Path, request: Mapping[str, Any]):
    self.path = path
    self._request = json.dumps(request, sort_keys=True, default=repr)
    self._last_saved, self._seconds = time.monotonic(), 0.0

  def is_due(self) -> bool:
    """Returns whether the last state was saved, or the file opened, a while ago."""
    return time.monotonic() - self._last_saved >= SAVE_SECONDS * max(1.0, self._seconds)

  def load(self) -> dict[str, np.ndarray]:
    """Returns the arrays; none if there is no file, or (warns) if it is damaged or of another request."""
    if not self.path.exists():
      return {}
    try:
      with np.load(self.path, allow_pickle=False) as file:
        arrays = dict(file.items())
      request = str(arrays.pop("request"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
      log.warning("%s is damaged (%s): starting from the beginning", self.path, error)
      return {}
    if request != self._request:
      log.warning("%s is the progress of another command: starting from the beginning", self.path)
      return {}
    log.info("resuming from %s", self.path)
    return arrays

  def save(self, arrays: Mapping[str, np.ndarray]) -> None:
    begin = time.monotonic()
    with atomic_write(self.path) as local, local.open("wb") as file:
      np.savez(file, **{"request": np.array(self._request), **arrays})  # pyright: ignore
    self._last_saved = time.monotonic()
    self._seconds = self._last_saved - begin

  def remove(self) -> None:
    self.path.unlink(missing_ok=True)
