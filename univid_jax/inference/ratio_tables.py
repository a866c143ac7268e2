"""Ratios of step caches, in a file next to the weights that they were measured on: CHECKPOINT/step_cache.json.

Those of a built-in checkpoint are in ~/.cache/univid_jax/bases/NAME, as its folder belongs to the package.
A table is used for exactly the weights, noise levels, solver and guidance that it was measured with.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from univid_jax.checkpoints.built_in import measurements_folder
from univid_jax.checkpoints.info import STEP_CACHE_FILE
from univid_jax.checkpoints.origin import Origin
from univid_jax.core.errors import UserError
from univid_jax.core.json_files import parse_json, write_json
from univid_jax.core.paths import exists, read_bytes
from univid_jax.diffusion.solvers import SOLVERS
from univid_jax.inference.pipeline import Pipeline
from univid_jax.inference.plan import SamplingPlan

VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableKey:
  """What ratios depend on, as JSON values.

  Attributes:
    weights: checksums by component, LoRAs included.
    solver: by name.
    sigmas: the noise level before each step.
    guidance_scales: by expert.
    guidance_range: noise levels with guidance.
    attention, context_timestep: of the context.
  """

  weights: Mapping[str, str]
  solver: str
  sigmas: Sequence[float]
  guidance_scales: Sequence[float]
  guidance_range: Sequence[float]
  attention: str
  context_timestep: str

  @classmethod
  def for_plan(cls, pipeline: Pipeline, origin: Origin, plan: SamplingPlan) -> "TableKey":
    names = {id(solver): str(name) for name, solver in SOLVERS.items()}
    return cls(
      weights=origin.weights,
      solver=names.get(id(plan.solver), type(plan.solver).__name__),
      sigmas=plan.sigmas.tolist(),
      guidance_scales=list(pipeline.experts.guidance_scales(plan.guidance_scale)),
      guidance_range=list(plan.guidance_range),
      attention=str(pipeline.attention),
      context_timestep=str(pipeline.context_mode.timestep),
    )

  def describe(self) -> str:
    sigmas, scales = self.sigmas, ", ".join(f"{scale:g}" for scale in dict.fromkeys(self.guidance_scales))
    limits = "" if list(self.guidance_range) == [0, 1] else " in {:g} to {:g}".format(*self.guidance_range)
    levels = f"from noise level {sigmas[0]:.4g} to {sigmas[-1]:.4g}"
    return f"{len(sigmas)} steps of {self.solver} {levels}, guidance {scales}{limits}"


def write_table(checkpoint: epath.PathLike, key: TableKey, ratios: Sequence[Sequence[float]]) -> epath.Path:
  """Adds a table to the file of a checkpoint, or replaces the one of the same key; returns the file's path.

  Raises:
    OSError: the file cannot be written.
    UserError: the file that exists is damaged.
  """
  path = measurements_folder(checkpoint) / STEP_CACHE_FILE
  table = {"key": dataclasses.asdict(key), "ratios": [list(part) for part in ratios]}
  tables = [each for each in _read_tables(path) if each["key"] != table["key"]]
  write_json(path, {"version": VERSION, "tables": [*tables, table]})
  return path


def require_tables(checkpoint: epath.PathLike) -> None:
  """Raises UserError if nothing was measured for the models of a checkpoint, or the file is damaged."""
  path = measurements_folder(checkpoint) / STEP_CACHE_FILE
  if not _read_tables(path):
    raise UserError(f"the step cache needs ratios, but there is no {path}: run univid-calibrate with the same flags")


def read_table(checkpoint: epath.PathLike, key: TableKey) -> list[list[float]]:
  """Returns the ratios that were measured for a key.

  Raises:
    UserError: there are none, or the file is damaged.
  """
  path = measurements_folder(checkpoint) / STEP_CACHE_FILE
  tables = _read_tables(path)
  for table in tables:
    if table["key"] == dataclasses.asdict(key):
      return table["ratios"]
  same_weights = [TableKey(**table["key"]) for table in tables if table["key"]["weights"] == dict(key.weights)]
  found = "; ".join(each.describe() for each in same_weights[:3]) or "nothing for these weights"
  raise UserError(
    f"the step cache needs ratios of {key.describe()}: measure them once by running univid-calibrate with the same "
    f"flags; {path} has {found}"
  )


def _read_tables(path: epath.Path) -> list[dict[str, Any]]:
  """Returns the tables in a file; none if there is no file."""
  if not exists(path):
    return []
  contents = read_bytes(path)
  try:
    values = parse_json(contents)
    for table in values["tables"]:
      TableKey(**table["key"]).describe()
      if not all(isinstance(ratio, float | int) and ratio >= 0 for part in table["ratios"] for ratio in part):
        raise ValueError("a ratio is not a number")
    if values["version"] != VERSION:
      raise ValueError(f"its version is {values['version']}, not {VERSION}")
  except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
    raise UserError(f"{path} is damaged: {error}; remove it and calibrate again") from error
  return values["tables"]
