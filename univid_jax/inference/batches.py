"""Many sentences of any lengths, packed into rows that spread over the mesh."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from univid_jax.core.checks import require_callables, require_list, require_text
from univid_jax.core.errors import UserError
from univid_jax.inference.arguments import list_clips
from univid_jax.inference.encoding import Sample
from univid_jax.inference.jobs import pack_jobs
from univid_jax.inference.plan import SamplingPlan
from univid_jax.inference.prompts import embed_negative
from univid_jax.inference.sampler import Progress

if TYPE_CHECKING:
  from univid_jax.inference.pipeline import Pipeline


def sample_batch(
  pipeline: "Pipeline",
  batch: Iterable[Iterable[np.ndarray]],
  prompts: Iterable[str] | None,
  num_frames: int | None,
  negative_prompt: str,
  seeds: Iterable[int] | None,
  progress: Progress | None,
  plan: SamplingPlan,
) -> list[Sample]:
  """Generates the clips that complete many sentences, see `Pipeline.sample_batch`."""
  require_callables(progress=progress)
  sentences = [list_clips("clips", clips) for clips in require_list("batch", batch, "sentences, each a list of clips")]
  texts = [""] * len(sentences) if prompts is None else require_list("prompts", prompts, "texts, one per sentence")
  numbers = range(len(sentences)) if seeds is None else require_list("seeds", seeds, "whole numbers, one per sentence")
  if not len(sentences) == len(texts) == len(numbers):
    raise UserError(f"there are {len(sentences)} sentences, {len(texts)} prompts and {len(numbers)} seeds")
  if not sentences:
    return []
  embeddings = {text: pipeline.embed(require_text("each of prompts", text)) for text in texts}
  jobs = [pipeline.make_job(clips, num_frames, seed) for clips, seed in zip(sentences, numbers, strict=True)]
  positive = [pipeline.make_features(job, embeddings[text]) for job, text in zip(jobs, texts, strict=True)]
  away = embed_negative(pipeline, plan, list(embeddings.values()), negative_prompt)
  negative = None if away is None else [pipeline.make_features(job, away) for job in jobs]
  packed = pack_jobs(positive, negative, [job.noise for job in jobs], context_mode=pipeline.context_mode)
  return pipeline.sample_rows(packed, jobs, plan, progress=progress)
