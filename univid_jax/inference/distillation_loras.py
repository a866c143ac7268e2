"""Distillation LoRAs next to others: read with their kind, and added to a pipeline that shares its weights."""

import copy
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from univid_jax.checkpoints.experts import check_commas, describing_texts, split_expert, split_weight
from univid_jax.checkpoints.trained import find_lora_steps
from univid_jax.core.checks import require_list, require_text
from univid_jax.core.errors import UserError
from univid_jax.core.options import Expert
from univid_jax.diffusion.distillations import Distillation, find_distillation, infer_distillation
from univid_jax.inference.added_loras import add_to_transformer
from univid_jax.inference.lora_specs import RequestedLoRA, read_loras, select_loras
from univid_jax.inference.pipeline import Pipeline

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DistillationLoRAs:
  """The LoRAs of one distillation.

  Attributes:
    kind: how the model is sampled with them.
    loras: their contents: one, or one per expert.
    files: [EXPERT=]PATH and weight of each, as the user named them.
    steps: of the checkpoints of workdirs among them, by path.
  """

  kind: Distillation
  loras: Sequence[RequestedLoRA]
  files: Sequence[tuple[str, float]]
  steps: Mapping[str, int] = dataclasses.field(default_factory=dict)


def read_distillation(items: str | Sequence[str] | DistillationLoRAs, *, verify: bool = True) -> DistillationLoRAs:
  """Reads the LoRAs of a distillation.

  Args:
    items: each `[EXPERT=]PATH[:WEIGHT][:KIND]`; kinds that are not given are inferred from names and metadata. What was
      read already is returned.
    verify: whether to compare files with their checksums.

  Raises:
    OSError, UserError: a file cannot be read, or its kind is unknown or differs from that of another one.
  """
  if isinstance(items, DistillationLoRAs):
    return items
  items = [items] if isinstance(items, str) else require_list("accelerate", items, "[EXPERT=]PATH[:WEIGHT][:KIND]")
  check_commas([require_text("each of accelerate", item) for item in items])
  files, kinds, loras, steps = [], [], [], {}
  for item in items:
    expert, text = split_expert(item)
    if not text:
      raise UserError("a LoRA of accelerate needs a path, got an empty one")
    path, weight, name = split_distillation(text)
    kind = find_distillation(name) if name else None
    own = find_lora_steps([path], verify=verify)
    read = read_loras({expert: (path, weight)} if expert else (path, weight), verify=verify, steps=own)
    steps |= own
    files.append((f"{expert}={path}" if expert else path, weight))
    # The release's folder often says more than the file.
    texts = [text for lora in read for text in describing_texts(Path(path), lora.weights.metadata)]
    kinds.append(kind or infer_distillation(path, texts))
    loras += read
  names = sorted({kind.name for kind in kinds})
  if len(names) != 1:
    raise UserError(f"the files of a distillation must be of one kind, got {', '.join(names) or 'no file'}")
  kind = kinds[0]
  log.info(
    "distillation %s: solver %s, %d steps, shift %g, guidance scale %g",
    kind.name,
    kind.solver,
    kind.num_inference_steps,
    kind.shift,
    kind.guidance_scale,
  )
  return DistillationLoRAs(kind, loras, files, steps)


def split_distillation(text: str) -> tuple[str, float, str]:
  """Splits `PATH[:WEIGHT][:KIND]`; the weight is 1 and the kind "" by default."""
  path, weight = split_weight(text)
  if path != text or os.path.exists(text):
    return path, weight, ""
  rest, colon, kind = text.rpartition(":")
  return (*split_weight(rest), kind) if colon and "/" not in kind else (text, 1.0, "")


def add_distillation(pipeline: Pipeline, distillation: DistillationLoRAs, *, skip_unmatched: bool = False) -> Pipeline:
  """Returns a pipeline with the LoRAs of a distillation on top, which shares the weights of the given one.

  Args:
    pipeline: stays as it is. Its LoRAs, of training or of files, stay in effect.
    distillation: of `read_distillation`.
    skip_unmatched: see `load_pipeline`.

  Raises:
    UserError: a LoRA does not fit.
  """
  transformers = pipeline.experts.transformers
  experts = (None,) if len(transformers) == 1 else (Expert.HIGH, Expert.LOW)
  accelerated = copy.copy(pipeline)
  accelerated.experts = dataclasses.replace(
    pipeline.experts,
    transformers=[
      add_to_transformer(
        pipeline.config, transformer, loras, mesh=pipeline.mesh, merged=False, skip_unmatched=skip_unmatched
      )
      for transformer, loras in zip(transformers, select_loras(distillation.loras, experts), strict=True)
    ],
  )
  accelerated.distillation = distillation.kind
  return accelerated
