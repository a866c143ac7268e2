"""Many queries after the same example pairs, sampled together in batches of rows."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from univid_jax.core.checks import require_callables, require_integer
from univid_jax.core.errors import UserError
from univid_jax.core.seeds import check_seed
from univid_jax.core.sentence import read_frames
from univid_jax.core.text import describe_value
from univid_jax.data.rows.packing import join_rows
from univid_jax.inference.arguments import check_frames, list_clips
from univid_jax.inference.batch_size import choose_batch_size, spread
from univid_jax.inference.encoding import Sample
from univid_jax.inference.jobs import Job
from univid_jax.inference.plan import SamplingOptions, SamplingPlan
from univid_jax.inference.sampler import PackedJobs
from univid_jax.parallel.mesh import row_shards

if TYPE_CHECKING:
  from univid_jax.inference.pipeline import Pipeline

# Called with the number of queries that are sampled, with fractions for steps.
QueryProgress = Callable[[float], None]


@dataclasses.dataclass(frozen=True)
class QuerySampler:
  """Samples queries one batch after the other; every query starts from the same noise.

  Attributes:
    pipeline: the model.
    embeds: of the prompt and, with guidance, of the negative prompt.
    plan: what each step does.
    num_frames: of the results; None infers it as contexts I to IV do.
    seed: of the noise.
  """

  pipeline: "Pipeline"
  embeds: Sequence[np.ndarray]
  plan: SamplingPlan
  num_frames: int | None = None
  seed: int = 0

  @classmethod
  def for_pipeline(
    cls,
    pipeline: "Pipeline",
    options: SamplingOptions,
    *,
    prompt: str = "",
    negative_prompt: str = "",
    num_frames: int | None = None,
    seed: int = 0,
  ) -> "QuerySampler":
    """Returns what samples with these arguments of `Pipeline.sample`."""
    plan = pipeline.make_plan(options)
    return cls(pipeline, pipeline.embed_branches(plan, prompt, negative_prompt), plan, num_frames, seed)

  def make_job(self, examples: Sequence[np.ndarray], query: np.ndarray) -> Job:
    """Encodes the example pairs and a query.

    Raises:
      UserError: see `Pipeline.sample`, or there is no example pair.
    """
    check_examples(examples)
    return self.pipeline.make_job([*examples, query], self.num_frames, self.seed)

  def choose_size(self, job: Job, count: int, most: int | None) -> int:
    """Returns how many queries like that of a job are sampled together, if there are `count`.

    Args:
      job: of any of them.
      count: of the queries.
      most: that are sampled together; None takes as many as keep the devices busy and fit in their memory.
    """
    if most is not None:
      return spread(count, most, row_shards(self.pipeline.mesh))
    return choose_batch_size(self.pipeline, self.pipeline.pack_job(job, self.embeds), self.plan, count=count)

  def sample(
    self, first: Job, queries: Iterable[np.ndarray], *, batch_size: int, progress: QueryProgress | None = None
  ) -> Iterator[Sample]:
    """Yields the results in order.

    Args:
      first: of any query of the same shape; the example pairs are taken from it, encoded.
      queries: uint8 (T, H, W, 3); as many are read at once as are sampled together.
      batch_size: how many are sampled together; the last batch is filled up, so that one program serves all.
      progress: called after each step.
    """
    done, rest = 0, iter(queries)
    while batch := [self._replace_query(first, query) for query in itertools.islice(rest, batch_size)]:
      yield from self._sample_batch(batch, size=batch_size, done=done, progress=progress)
      done += len(batch)

  def _sample_batch(
    self, batch: Sequence[Job], *, size: int, done: int, progress: QueryProgress | None
  ) -> list[Sample]:
    def show(taken: int) -> None:
      if progress is not None:
        progress(done + len(batch) * taken / len(self.plan.sigmas))

    rows = [self.pipeline.pack_job(job, self.embeds) for job in batch]
    positive, *negative = (join_rows(branch) for branch in zip(*rows))
    places = [(index, 1) for index in range(len(batch))]
    packed = PackedJobs(positive, negative[0] if negative else None, places, [job.noise for job in batch])
    return self.pipeline.sample_rows(packed, batch, self.plan, rows_per_batch=size, progress=show)

  def _replace_query(self, job: Job, query: np.ndarray) -> Job:
    *examples, other, target = job.sentence.clips
    encoded, expected = self.pipeline.encode(query), read_frames(other).shape
    if encoded.shape != expected:
      raise UserError(
        f"queries are sampled together at one size and length: got latents {encoded.shape}, not {expected}"
      )
    return dataclasses.replace(job, sentence=job.sentence.replace(clips=(*examples, encoded, target)))


def check_examples(examples: Sequence[np.ndarray]) -> None:
  """Raises UserError unless there are example pairs."""
  if not examples:
    raise UserError("queries need the example pairs A, A'")
  if len(examples) % 2:
    raise UserError(f"queries need example pairs A, A', an even number of clips, got {len(examples)}")
  for clip in examples:
    check_frames(clip)


def sample_queries(
  pipeline: "Pipeline",
  examples: Iterable[np.ndarray],
  queries: Iterable[np.ndarray],
  prompt: str = "",
  *,
  negative_prompt: str = "",
  num_frames: int | None = None,
  seed: int = 0,
  batch_size: int | None = None,
  progress: QueryProgress | None = None,
  **options: Any,
) -> Iterator[Sample]:
  """Samples queries after the same example pairs, which are encoded once.

  Results equal those of `Pipeline.sample` with the same arguments, up to rounding.

  Args:
    pipeline: the model.
    examples: A, A' and so on, uint8 (T, H, W, 3).
    queries: of one shape; read as they are needed.
    prompt, negative_prompt, num_frames, seed: of all sentences, see `Pipeline.sample`.
    batch_size: how many are sampled together, rounded up to a multiple of the devices that share them; None takes as
      many as keep the devices busy and fit in their memory.
    progress: called after each step with the number of queries that are sampled, with fractions for steps.
    **options: of `Pipeline.plan`.

  Returns:
    An iterator over the results in order.

  Raises:
    UserError: there is no example pair, or see `Pipeline.sample`; of a query when it is read.
  """
  pairs = list_clips("examples", examples)
  check_examples(pairs)
  require_callables(progress=progress)
  if not isinstance(queries, Iterable) or isinstance(queries, str | Mapping):
    raise UserError(f"queries must be clips, uint8 arrays (T, H, W, 3), got {describe_value(queries)}")
  if batch_size is not None:
    batch_size = require_integer("batch_size", batch_size, 1)
  if num_frames is not None:
    num_frames = require_integer("num_frames", num_frames, 1)
  sampler = QuerySampler.for_pipeline(
    pipeline,
    SamplingOptions.from_keywords(**options),
    prompt=prompt,
    negative_prompt=negative_prompt,
    num_frames=num_frames,
    seed=check_seed(seed),
  )
  return _sample_queries(sampler, pairs, queries, batch_size=batch_size, progress=progress)


def _sample_queries(
  sampler: QuerySampler,
  examples: Sequence[np.ndarray],
  queries: Iterable[np.ndarray],
  *,
  batch_size: int | None,
  progress: QueryProgress | None,
) -> Iterator[Sample]:
  rest = iter(queries)
  known = list(itertools.islice(rest, 1)) if batch_size else list(rest)
  if not known:
    return
  job = sampler.make_job(examples, known[0])
  size = sampler.choose_size(job, batch_size or len(known), most=batch_size)
  yield from sampler.sample(job, itertools.chain(known, rest), batch_size=size, progress=progress)
