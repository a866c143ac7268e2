"""Compares the config of an evaluation with that of the run that is evaluated."""

from collections.abc import Collection

from univid_jax.config.boundary import differences
from univid_jax.config.schema import RunConfig
from univid_jax.core.text import list_first
from univid_jax.evaluation.stored_samples import READING, SECTIONS

_NAMED = 4
# Options in these sections on which no held-out sentence depends; records that are left out are not evaluated.
_OF_TRAINING = frozenset(f"data.{name}" for name in (*READING, "jitter", "num_sentences")) - {"data.allow_dropped"}


def _matters(key: str) -> bool:
  """Returns whether an evaluation depends on a key of the config; sentences of listed records are drawn by the seed."""
  return key == "seed" or (key.partition(".")[0] in SECTIONS and key not in _OF_TRAINING)


def describe_ignored_overrides(overrides: Collection[str]) -> str | None:
  """Returns a line that names the keys, given on the command line, on which no evaluation depends; None without any."""
  if not (ignored := [f"config.{key}" for key in overrides if not _matters(key)]):
    return None
  return f"ignored: {', '.join(ignored)}; evaluation does not need them, or uses the run's own"


def describe_config_differences(
  config: RunConfig, trained: RunConfig, *, name: str, workdir: str, overrides: Collection[str]
) -> str | None:
  """Returns a line that says where a named config differs from that of a run; None if it does not.

  Args:
    config: of the evaluation.
    trained: of the run.
    name: of the config, as it was given.
    workdir: of the run.
    overrides: keys of `config` that were given on the command line, which are meant to differ.
  """
  changes = [
    f"{key} is {now!r} instead of {before!r}"
    for key, before, now in differences(trained, config)
    if _matters(key) and key not in overrides
  ]
  if not changes:
    return None
  return (
    f"--config={name} is not the config of {workdir}, by which it is evaluated without --config: "
    f"{list_first(changes, _NAMED)}"
  )
