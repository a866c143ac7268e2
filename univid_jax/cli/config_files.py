"""Loads the config that --config names: a preset, or a file."""

import os
import runpy
from pathlib import Path

import ml_collections

from univid_jax.config import presets
from univid_jax.config.boundary import to_config_dict
from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import UserError

# The file of presets in a clone; where it does not exist, its name means the packaged presets.
PRESETS_FILE = os.path.join("configs", "video_tasks.py")


def load_config(name: str) -> ml_collections.ConfigDict:
  """Loads a preset, as PRESET or configs/video_tasks.py[:PRESET], or a file with get_config(), as FILE.py[:ARGUMENT].

  Raises:
    UserError: there is no such preset or file, or the file cannot be loaded.
  """
  path, _, argument = name.partition(":")
  arguments = [argument] if argument else []
  if not path.endswith(".py"):
    return presets.get_config(name)
  if not Path(path).is_file():
    if os.path.normpath(path) == PRESETS_FILE:
      return presets.get_config(*arguments)
    raise UserError(f"no such config file: {path}; give a file, or a preset: {', '.join(presets.PRESETS)}")
  try:
    config = runpy.run_path(path)["get_config"](*arguments)
  except UserError:
    raise
  except KeyError as error:
    raise UserError(f"{path} has no function get_config()") from error
  except Exception as error:  # whatever a user's file raises
    raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
  if isinstance(config, RunConfig):
    return to_config_dict(config)
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f"get_config() of {path} must return a ConfigDict or a RunConfig, got {type(config).__name__}")
  return config.lock()
