"""Checkpoints inside the package: a name stands for the folder."""

import importlib.resources

from etils import epath

BUILT_IN = ("small",)


def locate(checkpoint: epath.PathLike) -> epath.Path:
  """Returns the folder of a built-in checkpoint, or else the path itself; ./NAME is always a path."""
  if str(checkpoint) in BUILT_IN:
    return epath.Path(str(importlib.resources.files("univid_jax") / "bases" / str(checkpoint)))
  return epath.Path(checkpoint)
