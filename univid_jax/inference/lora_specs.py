"""The LoRAs that a pipeline is asked to load: files with weights, for one transformer or for one of two experts."""

import dataclasses
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from univid_jax.checkpoints.experts import LORA_EXPERTS, named_expert, split_weight, surely_named_expert
from univid_jax.checkpoints.lora.reading import read_lora
from univid_jax.checkpoints.lora.weights import LoRAWeights
from univid_jax.checkpoints.trained import is_lora_run, read_run_loras
from univid_jax.checkpoints.usage import Usage, describe_mismatch, merge_usages
from univid_jax.core.checks import require_number
from univid_jax.core.errors import UserError
from univid_jax.core.options import Attention, ContextTimestep, Expert, Quantize, TrainedExpert
from univid_jax.core.text import describe_value

LoRASpec = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]
LoRASpecs = LoRASpec | Sequence[LoRASpec]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RequestedLoRA:
  """A LoRA to load.

  Attributes:
    weights: its contents.
    weight: w; where it alone makes W' of a tensor W, it adds w (W' - W).
    expert: one of `LORA_EXPERTS` if that was asked for.
  """

  weights: LoRAWeights
  weight: float = 1.0
  expert: TrainedExpert | None = None


def read_loras(
  lora: LoRASpecs | Mapping[str, LoRASpecs] | None, *, verify: bool, steps: Mapping[str, int] | None = None
) -> list[RequestedLoRA]:
  """Reads LoRAs.

  Args:
    lora: see `load_pipeline`.
    verify: whether to compare files with their checksums.
    steps: of the checkpoints of workdirs, by path; by default the latest.

  Raises:
    OSError, UserError: a file cannot be read, `lora` has another form, or a step is of none of its workdirs.
  """
  by_expert = lora if isinstance(lora, Mapping) else {None: lora}
  if unknown := set(by_expert) - {None, *LORA_EXPERTS}:
    raise UserError(f"LoRAs by expert have the keys {', '.join(LORA_EXPERTS)}, got {', '.join(map(str, unknown))}")
  wanted = [(expert, *each) for expert, specs in by_expert.items() if specs is not None for each in _parse(specs)]
  steps = _check_steps(steps, [path for _, path, _ in wanted])
  requests: list[RequestedLoRA] = []
  for expert, path, weight in wanted:
    loras = _read(path, verify=verify, step=steps.get(path))
    requests += (
      [RequestedLoRA(each, weight) for each in loras]
      if expert is None
      else _request(loras, weight, TrainedExpert(expert))
    )
  return requests


def _check_steps(steps: Any, paths: Sequence[str]) -> Mapping[str, int]:
  """Returns steps by path; raises UserError if one of them is of no LoRA, or no step."""
  if steps is None:
    return {}
  if not isinstance(steps, Mapping):
    raise UserError(f"lora_steps must be a mapping from workdirs in lora to steps, got {describe_value(steps)}")
  if unknown := [str(path) for path in steps if str(path) not in paths]:
    raise UserError(
      f"lora_steps has {', '.join(unknown)}, which is not in lora ({', '.join(paths) or 'there is none'})"
    )
  return {str(path): step for path, step in steps.items()}


def _request(loras: Sequence[LoRAWeights], weight: float, expert: TrainedExpert) -> list[RequestedLoRA]:
  """Requests a LoRA for an expert; of a run that trained both, only that expert's."""
  if len(loras) == 1:
    return [RequestedLoRA(loras[0], weight, expert)]
  return [RequestedLoRA(lora, weight) for lora in loras if lora.usage and lora.usage.expert in expert.experts]


def _read(path: str, *, verify: bool, step: int | None) -> list[LoRAWeights]:
  """Reads a LoRA, or those of both experts that a run has trained."""
  is_run = is_lora_run(path)
  if step is not None and not is_run:
    raise UserError(f"lora_steps has a step of {path}, which is not the workdir of a run with LoRA")
  loras = read_run_loras(path, step=step, verify=verify) if is_run else [read_lora(path, verify=verify)]
  for lora in loras:
    for note in lora.notes:
      log.warning("%s: %s", path, note)
  return loras


def _parse(lora: object) -> list[tuple[str, float]]:
  """Returns the paths in a `LoRASpec` or a sequence of them, with their weights.

  Raises:
    UserError: it is neither, or a weight is not finite.
  """
  match lora:
    case str() as text if text:
      return [_check_weight(*split_weight(text))]
    case os.PathLike() as path:
      return [(os.fspath(path), 1.0)]
    case (str() | os.PathLike() as path, weight) if not _is_spec(weight):
      return [_check_weight(os.fspath(path), weight)]
    case list() | tuple() as specs:
      return [pair for spec in specs for pair in _parse(spec)]
  raise UserError(f"a LoRA is a path, with a weight path:weight or (path, weight), got {describe_value(lora)}")


def _is_spec(value: object) -> bool:
  """Returns whether the second of two items is a LoRA too, not a weight, be it one in quotes."""
  try:
    return isinstance(value, os.PathLike | list | tuple) or (isinstance(value, str) and math.isnan(float(value)))
  except ValueError:
    return True


def _check_weight(path: str, weight: Any) -> tuple[str, float]:
  if not math.isfinite(number := require_number(f"the weight of the LoRA {path}", weight)):
    raise UserError(f"the weight of the LoRA {path} must be a finite number, got {weight}")
  return path, number


def select_loras(loras: Sequence[RequestedLoRA], experts: Sequence[Expert | None]) -> list[list[RequestedLoRA]]:
  """Returns the LoRAs of each transformer.

  Args:
    loras: those to load.
    experts: which experts the transformers are; None for one that serves all noise levels.

  Raises:
    UserError: nothing says which of two experts a LoRA is for, or it is for one that the model lacks.
  """
  selected: list[list[RequestedLoRA]] = [[] for _ in experts]
  for lora in loras:
    own = find_lora_expert(lora.weights)
    wanted = lora.expert.experts if lora.expert else (own,) if own else ()
    if len(experts) > 1 and not wanted:
      raise UserError(
        f"nothing says whether {lora.weights.source} is for the high-noise or the low-noise expert: put high or low in "
        "its name, or give LoRAs by expert (high=PATH, low=PATH, both=PATH)"
      )
    if lora.expert and list(experts) == [None]:
      raise UserError(
        f"{lora.weights.source} is meant for an expert ({lora.expert}), but the model has only one transformer"
      )
    trained_for = lora.weights.usage and lora.weights.usage.expert
    if trained_for and list(experts) == [None]:
      log.warning("%s was trained for the %s-noise expert, but the model has no experts", lora.weights.source, own)
    said = trained_for or surely_named_expert(lora.weights.source)
    if lora.expert and said and said not in wanted:
      says = "was trained for" if trained_for else "has the name of one for"
      log.warning("%s %s the %s-noise expert, not for the %s-noise one", lora.weights.source, says, said, lora.expert)
    places = [
      index
      for index, expert in enumerate(experts)
      if not wanted or expert in wanted or expert in (None, Expert.UNKNOWN)
    ]
    if not places:
      raise UserError(
        f"{lora.weights.source} is for the {lora.expert or own}-noise expert, but the model is the "
        f"{experts[0]}-noise one"
      )
    for index in places:
      selected[index].append(lora)
      if len(experts) > 1:
        log.info("%s: for the %s-noise expert", lora.weights.source, experts[index])
  return selected


def warn_of_repetitions(loras: Sequence[RequestedLoRA]) -> None:
  """Warns of LoRAs that change the same tensors by the same values, such as a run's own and the file that it wrote."""
  for number, lora in enumerate(loras):
    for earlier in loras[:number]:
      if _is_same(earlier.weights, lora.weights):
        log.warning("%s and %s are the same LoRA: it is applied twice", earlier.weights.source, lora.weights.source)


def _is_same(a: LoRAWeights, b: LoRAWeights) -> bool:
  """Returns whether two LoRAs change the same tensors by equal arrays."""
  if not a.changes or a.changes.keys() != b.changes.keys():
    return False
  for name, change in a.changes.items():
    parts, others = change.parts(), b.changes[name].parts()
    if parts.keys() != others.keys() or not all(np.array_equal(parts[part], others[part]) for part in parts):
      return False
  return True


def find_lora_expert(lora: LoRAWeights) -> Expert | None:
  """Returns which expert a LoRA was trained for, by its metadata or its name; None if neither says it."""
  if lora.usage is not None and lora.usage.expert:
    return lora.usage.expert
  return named_expert(lora.source)


def warn_of_other_context(
  source: str, usage: Usage, *, attention: Attention | None, context_timestep: ContextTimestep | None
) -> None:
  """Warns if something was trained with other options of the context than were asked for."""
  asked = {"attention": attention, "context_timestep": context_timestep}
  others = [
    f"{name} {trained}, not {value}"
    for name, value in asked.items()
    if value and (trained := getattr(usage, name)) not in (value, ContextTimestep.AUTO)
  ]
  if others:
    log.warning("%s was trained with %s: expect worse results", source, " and ".join(others))


def lora_usage(
  loras: Sequence[tuple[RequestedLoRA, str]],
  *,
  attention: Attention | None,
  context_timestep: ContextTimestep | None,
  quantize: Quantize,
  run: tuple[str, Usage] | None = None,
) -> Usage | None:
  """Returns how LoRAs on a base are run, and logs where they disagree with each other or with the base.

  Args:
    loras: some of which may not say how they were trained; each with the checksum of its transformer, "" if that is not
      a base.
    attention, context_timestep: what was asked for instead of what the LoRAs say.
    quantize: how the base is quantised.
    run: whose model they are added to, its name and how it was trained, which they have to agree with.

  Raises:
    UserError: they were trained with different attention, or timesteps of the context.
  """
  known = [(lora.weights.source, usage, checksum) for lora, checksum in loras if (usage := lora.weights.usage)]
  notes = [describe_mismatch(usage, checksum, source=source) for source, usage, checksum in known]
  notes += [
    f"{source} was trained on a base in {usage.base_quantize}, this one is in {quantize}: --quantize= chooses"
    for source, usage, _ in known
    if usage.base_quantize not in (Quantize.NONE, quantize)
  ]
  usages = [*([run] if run else []), *((source, usage) for source, usage, _ in known)]
  for source, usage in usages:
    warn_of_other_context(source, usage, attention=attention, context_timestep=context_timestep)
  if attention:  # of those that were trained with another one, the timestep says nothing
    alike = [usage.context_timestep for _, usage in usages if usage.attention == attention]
    other = {"attention": attention, "context_timestep": alike[0] if alike else ContextTimestep.AUTO}
    usages = [
      (source, usage if usage.attention == attention else dataclasses.replace(usage, **other))
      for source, usage in usages
    ]
  if context_timestep:
    usages = [(source, dataclasses.replace(usage, context_timestep=context_timestep)) for source, usage in usages]
  usage, differences = merge_usages(usages)
  for note in (*filter(None, notes), *differences):
    log.warning("%s", note)
  return usage
