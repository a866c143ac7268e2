"""Paths in command lines and configs: a leading ~ is the home folder, as shells have it only where a word begins.

Python's own functions do not expand it, and neither does the Python interface.
"""

import os
from collections.abc import Sequence
from typing import Any

from absl import flags

from univid_jax.checkpoints.experts import split_expert
from univid_jax.config.boundary import override
from univid_jax.config.schema import RunConfig

# Keys of the config that are a path or a list of paths.
PATH_KEYS = (
  "init_from",
  "data.folder",
  "data.test_folder",
  "data.metadata",
  "data.pairs",
  "data.test_pairs",
  "data.manifest",
  "data.tfds.data_dir",
  "data.arc.path",
  "data.arc.test_path",
  "data.cache",
  "validation.accelerate",
  "eval.palette",
  "eval.clip_model",
)


def expand_home(text: str) -> str:
  """Returns a path without ~ or ~USER at its beginning, before which an expert may stand: high=~/lora.safetensors."""
  expert, path = split_expert(text)
  path = os.path.expanduser(path)
  return f"{expert}={path}" if expert else path


def expand_config(config: RunConfig) -> RunConfig:
  """Returns a config in whose paths ~ is expanded."""
  changed: dict[str, Any] = {}
  for key in PATH_KEYS:
    value: Any = config
    for name in key.split("."):
      value = getattr(value, name)
    expanded = expand_home(value) if isinstance(value, str) else tuple(map(expand_home, value))
    if expanded != value:
      changed[key] = expanded
  return override(config, changed) if changed else config


class _PathParser(flags.ArgumentParser):
  def parse(self, argument: str) -> str:
    return expand_home(argument)


class _PathsParser(flags.ListParser):
  def parse(self, argument: str | list[str]) -> list[str]:
    return list(map(expand_home, super().parse(argument)))


def define_path(name: str, default: str | None, help_text: str, **options: Any) -> flags.FlagHolder[Any]:
  """Defines a flag whose value is a path; like absl's `DEFINE_string`."""
  return flags.DEFINE(_PathParser(), name, default, help_text, serializer=flags.ArgumentSerializer(), **options)


def define_paths(name: str, default: Sequence[str] | None, help_text: str, **options: Any) -> flags.FlagHolder[Any]:
  """Defines a flag whose value is a list of paths, separated by commas; like absl's `DEFINE_list`."""
  return flags.DEFINE(_PathsParser(), name, default, help_text, serializer=flags.CsvListSerializer(","), **options)
