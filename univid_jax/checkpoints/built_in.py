"""Checkpoints inside the package, which are given by name instead of folder."""

import importlib.resources
import os
from typing import Any

from etils import epath

from univid_jax.core.errors import UserError
from univid_jax.core.paths import CACHE_FOLDER, to_path
from univid_jax.core.text import describe_value

BUILT_IN = ("small",)


def require_checkpoint(checkpoint: Any) -> None:
  """Raises UserError unless a checkpoint is a name or a path."""
  if not isinstance(checkpoint, str | os.PathLike) or not os.fspath(checkpoint):
    names = ", ".join(BUILT_IN)
    raise UserError(f"checkpoint must be a path, or a built-in base ({names}), got {describe_value(checkpoint)}")


def locate(checkpoint: epath.PathLike) -> epath.Path:
  """Returns the folder of a built-in checkpoint, or else the path itself.

  Names are strings. ./NAME is always a path, and so are path objects, which normalise it to NAME.
  """
  if isinstance(checkpoint, str) and checkpoint in BUILT_IN:
    return epath.Path(str(importlib.resources.files("univid_jax") / "bases" / checkpoint))
  return to_path(checkpoint)


def measurements_folder(checkpoint: epath.PathLike) -> epath.Path:
  """Returns where to keep measurements of a checkpoint: its folder, or the user's cache for a built-in one."""
  if isinstance(checkpoint, str) and checkpoint in BUILT_IN:
    return epath.Path(CACHE_FOLDER).expanduser() / "bases" / checkpoint
  return epath.Path(checkpoint)
