"""The tasks whose prompts the demo page offers."""

import contextlib
from collections.abc import Mapping, Sequence

from univid_jax.checkpoints.pretrained import PretrainedCheckpoint
from univid_jax.checkpoints.run import read_run
from univid_jax.checkpoints.run_parts import open_base
from univid_jax.cli.prompts import known_prompts
from univid_jax.core.errors import UserError
from univid_jax.core.paths import to_path


def offered_tasks(checkpoints: Sequence[str], prompts: Mapping[str, str]) -> list[str] | None:
  """Returns the tasks to choose from: those a model was trained on with a prompt or, if it does not say, all known.

  Args:
    checkpoints: those offered; the first is loaded.
    prompts: of the tasks of the model that is loaded, LoRAs included.

  Returns:
    Names with spaces; None if no model takes prompts.
  """
  found = [_read(checkpoint) for checkpoint in checkpoints]
  if not any(takes_prompts for takes_prompts, _ in found):
    return None
  trained = [prompts or found[0][1], *(own or prompts for _, own in found[1:])]
  names: dict[str, None] = {}
  for (takes_prompts, _), own in zip(found, trained):
    if takes_prompts:
      names |= dict.fromkeys(name.replace("_", " ") for name, text in own.items() if text) if own else _known()
  return list(names)


def _known() -> dict[str, None]:
  """Returns a name for each prompt that is known; several names may have the same."""
  by_prompt: dict[str, str] = {}
  for name, text in known_prompts({}).items():
    by_prompt.setdefault(text, name)
  return dict.fromkeys(by_prompt.values())


def _read(checkpoint: str) -> tuple[bool, Mapping[str, str]]:
  """Returns whether a checkpoint or run takes prompts, as it does if it cannot be read, and those of its tasks."""
  with contextlib.suppress(UserError, OSError):
    if (record := read_run(to_path(checkpoint))) is not None:
      base = open_base(record.config)
      return base is not None and base.has("text_encoder"), record.prompts
    base = PretrainedCheckpoint.open(checkpoint)
    return base.has("text_encoder"), base.usage.prompts if base.usage else {}
  return True, {}
