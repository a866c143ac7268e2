"""Loads the model that a command samples with."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import univid_jax
from univid_jax.checkpoints.experts import split_expert
from univid_jax.checkpoints.origin import Origin
from univid_jax.checkpoints.trained import is_lora_run
from univid_jax.cli.sampling import group_loras
from univid_jax.inference.distillation_loras import DistillationLoRAs
from univid_jax.inference.pipeline import Pipeline
from univid_jax.parallel.mesh import make_mesh

log = logging.getLogger(__name__)


def load_model(
  checkpoint: str,
  *,
  step: int | str | None,
  loras: Sequence[tuple[str, float]],
  distillation: DistillationLoRAs | None,
  quantize: str | None,
  verification: Mapping[str, Any],
  **options: Any,
) -> tuple[Pipeline, Origin]:
  """Loads a model on the devices of this process, each of which has all of it and its share of the sentences.

  Args:
    checkpoint, step, quantize: see `load_pipeline`.
    loras: with their weights, as they were named; see `group_loras`.
    distillation: LoRAs that the origin records, whether the model gets them (`accelerate`) or not.
    verification: see `RunVerificationFlags`.
    **options: further ones of `load_pipeline`.
  """
  grouped = group_loras(loras)
  sources: dict[str, Any] = {"loras": loras, "quantize": quantize, **verification}
  if distillation:
    sources |= {"distillation": distillation.files, "lora_steps": distillation.steps}
  origin = Origin.resolve(checkpoint, step=step, **sources)
  paths = {split_expert(path)[1] for path, _ in loras}
  pipeline = univid_jax.load_pipeline(
    checkpoint,
    lora=grouped,
    step=origin.step,
    lora_steps={path: step for path, step in origin.lora_steps.items() if path in paths},
    quantize=quantize,
    mesh=make_mesh({"data": 1, "fsdp": -1}, jax.local_devices()),
    **verification,
    **options,
  )
  if options.get("merge_lora") and not (loras or options.get("accelerate") or is_lora_run(checkpoint)):
    log.warning("--merge_lora has no effect: the model has no LoRA")
  if options.get("offload_inactive") and len(pipeline.experts.transformers) == 1:
    log.warning("--offload_inactive has no effect: the model has only one transformer")
  return pipeline, origin
