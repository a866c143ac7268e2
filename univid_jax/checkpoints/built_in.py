"""Checkpoints inside the package: a name stands for the folder."""

import importlib.resources

from etils import epath

from univid_jax.core.paths import CACHE_FOLDER, to_path

BUILT_IN = ("small",)


def locate(checkpoint: epath.PathLike) -> epath.Path:
  """Returns the folder of a built-in checkpoint, or else the path itself.

  Names are strings: ./NAME is always a path, and so are objects of paths, which do not tell it from NAME.
  """
  if isinstance(checkpoint, str) and checkpoint in BUILT_IN:
    return epath.Path(str(importlib.resources.files("univid_jax") / "bases" / checkpoint))
  return to_path(checkpoint)


def measurements_folder(checkpoint: epath.PathLike) -> epath.Path:
  """Returns where to keep what is measured of a checkpoint: its folder, or a cache of the user for a built-in one."""
  if isinstance(checkpoint, str) and checkpoint in BUILT_IN:
    return epath.Path(CACHE_FOLDER).expanduser() / "bases" / checkpoint
  return epath.Path(checkpoint)
