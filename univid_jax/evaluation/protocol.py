"""What determines stored samples: an evaluation only continues in a folder whose samples were made the same way."""

import dataclasses
import json
from typing import Any

from etils import epath
from flax import traverse_util

import univid_jax
from univid_jax.config.boundary import to_json
from univid_jax.config.schema import EvalConfig, RunConfig
from univid_jax.core.errors import UserError
from univid_jax.core.paths import atomic_write

FILE = "protocol.json"

# Of the stored files; increased when their names or contents change.
FORMAT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
  """The weights that are evaluated, as the user named them.

  Attributes:
    checkpoint: a converted checkpoint or the workdir of a run.
    lora: LoRA files or folders on top.
    step: of the workdir's checkpoints: a number or "best"; None for the latest.
  """

  checkpoint: str
  lora: tuple[str, ...] = ()
  step: str | None = None

  def to_json(self) -> dict[str, Any]:
    return {"checkpoint": self.checkpoint, "lora": list(self.lora), "step": self.step}


def claim_folder(folder: epath.Path, config: RunConfig, origin: Origin, *, write: bool) -> None:
  """Checks that stored samples in the folder fit the model and the config, and records both for the next run.

  Args:
    folder: of the evaluation.
    config: of the evaluation.
    origin: of the model.
    write: whether this process records them.

  Raises:
    UserError: the samples were made with another model, config or version.
  """
  protocol = _describe(config, origin)
  path = folder / FILE
  if path.exists():
    stored = json.loads(path.read_text())
    if stored.get("format") != FORMAT:
      raise UserError(f"{folder} holds samples of an earlier version of univid_jax: choose another --out, or delete it")
    before, now = (traverse_util.flatten_dict(values, sep=".") for values in (stored, protocol))
    for key in sorted(before.keys() | now.keys()):
      if before.get(key) != now.get(key):
        raise UserError(
          f"{folder} holds samples with {key} = {before.get(key)!r}, not {now.get(key)!r}: choose another --out, or "
          "delete it"
        )
  elif write:
    with atomic_write(path) as unfinished:
      unfinished.write_text(json.dumps(protocol, indent=2) + "\n")


def _describe(config: RunConfig, origin: Origin) -> dict[str, Any]:
  """Everything that determines samples, as JSON-compatible values."""
  values = to_json(dataclasses.replace(config, eval=_without_scoring(config.eval)))
  return {
    "config": {"data": values["data"], "eval": values["eval"]},
    **origin.to_json(),
    "version": univid_jax.__version__,
    "format": FORMAT,
  }


def _without_scoring(options: EvalConfig) -> EvalConfig:
  """Resets the options that only affect scores, so that they can change without sampling again."""
  default = EvalConfig()
  return dataclasses.replace(
    options,
    depth_alignment=default.depth_alignment,
    palette=default.palette,
    num_labels=default.num_labels,
    void_label=default.void_label,
    clip_model=default.clip_model,
  )
