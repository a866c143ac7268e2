"""Prompts by the names of tasks, and the prompt of training."""

import difflib
import logging
from collections.abc import Mapping

from univid_jax.checkpoints.usage import Usage
from univid_jax.core.errors import UserError
from univid_jax.core.options import PromptStyle
from univid_jax.data.prompts import PAPER_TARGETS, prompt_for
from univid_jax.data.tasks import TASKS

log = logging.getLogger(__name__)


def task_prompt(task: str, trained: Mapping[str, str]) -> str:
  """Returns the prompt that a model was trained with for a task, or the paper's detailed prompt of a known task.

  Args:
    task: its name, with spaces or underscores.
    trained: prompts of the tasks that the model was trained on.

  Raises:
    UserError: there is no such task; the message names the nearest.
  """
  name, known = task.strip().replace("_", " "), known_prompts(trained)
  if name in known:
    return known[name]
  nearest = difflib.get_close_matches(name, known, n=1)
  hint = f": did you mean {nearest[0]!r}?" if nearest else "."
  tasks = ", ".join(sorted(known))
  raise UserError(f"--task={task} is not known{hint} Use --prompt for a text of your own. Tasks: {tasks}")


def only_prompt(usage: Usage) -> str:
  """Returns the prompt that all sentences of training had; "" if they had none, or perhaps several."""
  prompts = set(usage.prompts.values())
  if len(prompts) != 1 or prompts == {""} or usage.own_prompts:
    return ""
  (prompt,) = prompts
  log.info("prompt: %r, that of training; --prompt= samples without one", prompt)
  return prompt


def known_prompts(trained: Mapping[str, str]) -> dict[str, str]:
  """Returns the prompts of all tasks by name, those of training first; names have spaces."""
  targets = {key: value.prompt_name for key, value in TASKS.items()}
  targets |= {target: target for target in (*targets.values(), *PAPER_TARGETS)}
  prompts = {name.replace("_", " "): text for name, text in trained.items()}
  for name, target in targets.items():
    prompts.setdefault(name.replace("_", " "), prompt_for(target, PromptStyle.DETAILED))
  return prompts
