"""Overrides of a config in a command line: --config.KEY=VALUE, before ml_collections parses them."""

import ast
import dataclasses
import re
import typing
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from univid_jax.config.boundary import find_keys
from univid_jax.config.schema import RunConfig
from univid_jax.config.section import describe_unknown
from univid_jax.core.errors import UserError

# Brackets around a whole list, in whose items there may be brackets: [[qk],v]. [qk] without a comma is a pattern.
_ITEMS = r"(?:[^][]|\[[^][]*\])*"
_BRACKETED = re.compile(rf"\s*(?:\(([^()]*)\)|\[({_ITEMS},{_ITEMS})\])\s*")


def check_overrides(config: ConfigDict, argv: Sequence[str]) -> None:
  """Raises UserError if a command line overrides a key that the config lacks."""
  for word in argv:
    if word == "--":
      break
    match = re.match(r"--?(?:no)?config\.([^=[]*)", word)  # [...] is up to ml_collections
    group, value = "config", config
    if match is None:
      continue
    for name in match[1].split("."):
      if not isinstance(value, ConfigDict):
        raise UserError(f"unknown key config.{match[1]}; {group} is a value, not a group of keys")
      if name not in value:
        raise UserError(describe_unknown(group, name, value, elsewhere=find_keys(name)))
      group, value = f"{group}.{name}", value[name]


def quote_lists(argv: Sequence[str]) -> list[str]:
  """Returns a command line in which A,B for a list of text in the config is ('A', 'B'), as ml_collections wants it; so
  are (A,B) and [A,B]."""
  quoted = list(argv)
  for index, word in enumerate(argv):
    if word == "--":
      break
    flag, equals, text = word.partition("=")
    if not re.match("--?config[.]", flag) or not _is_list_of_text(flag.split(".")[1:]):
      continue
    if equals:
      quoted[index] = f"{flag}={_quote_list(text)}"
    elif index + 1 < len(argv):
      quoted[index + 1] = _quote_list(argv[index + 1])
  return quoted


def _is_list_of_text(names: Sequence[str]) -> bool:
  """Returns whether a key of the config, by its names from the outermost group on, is a tuple of text."""
  kind: Any = RunConfig
  for name in names:
    kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
  return kind == tuple[str, ...]


def _quote_list(text: str) -> str:
  """Returns a text, a list or a tuple as Python writes it unchanged, and other text as a tuple of its parts."""
  try:
    if isinstance(ast.literal_eval(text), str | list | tuple) and not re.fullmatch(r"[\d.,_e ]*", text):
      return text
  except (ValueError, SyntaxError):
    pass
  if bracketed := _BRACKETED.fullmatch(text):
    text = bracketed[1] or bracketed[2]
  parts = (part.strip().strip("'\"") for part in text.split(","))
  return str(tuple(part for part in parts if part))
