"""The prompt of a sentence and, with guidance, the negative prompt."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from univid_jax.core.text import count_noun, list_first
from univid_jax.diffusion.step_cache import RatioMeasurement
from univid_jax.inference.plan import SamplingPlan

if TYPE_CHECKING:
  from univid_jax.inference.pipeline import Pipeline


def warn_of_null_prompt(pipeline: "Pipeline") -> None:
  """Warns, once, that a sentence has no prompt, if those of training had."""
  trained, own = pipeline.usage.prompts, pipeline.usage.own_prompts
  if (not trained and not own) or not all(trained.values()):
    return
  remedies = []
  if trained:
    tasks = f"{count_noun(len(trained), 'task')} ({list_first(sorted(trained), 4)})"
    remedies.append(f"it had {tasks}: --task=NAME, or prompt=pipeline.usage.prompts[NAME], takes that of a task")
  if own:
    remedies.append("lines of its manifest or table may have had their own: --prompt=TEXT takes one like theirs")
  pipeline.warn_once(f"the prompt is empty, and those of training were not; {'; '.join(remedies)}")


def embed_negative(
  pipeline: "Pipeline", plan: SamplingPlan, prompts: Sequence[np.ndarray], negative_prompt: Any
) -> np.ndarray | None:
  """Returns the embedding of the negative prompt; None if there is no guidance or, with a warning, no effect of it.

  Where all prompts are the negative prompt there is nothing to move away from. A measurement of ratios for step caches
  computes it nevertheless, as they serve other prompts too.

  Args:
    pipeline: the model.
    plan: what each step does.
    prompts: embeddings of the prompts of all sentences.
    negative_prompt: text, or an embedding.
  """
  if not pipeline.experts.are_guided(plan.guidance_scale):
    return None
  away = pipeline.embed(negative_prompt, "negative_prompt")
  if isinstance(plan.step_cache, RatioMeasurement) or not all(np.array_equal(prompt, away) for prompt in prompts):
    return away
  pipeline.warn_once("guidance has no effect: the negative prompt equals the prompt, so it is not computed")
  return None
