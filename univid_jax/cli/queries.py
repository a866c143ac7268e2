"""Samples the queries of a command in batches; several processes share them."""

import dataclasses
import itertools
import logging
import math
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from tqdm import tqdm

from univid_jax.cli.requests import PreparedRequest, RequestRunner
from univid_jax.cli.sampling import Request
from univid_jax.core.text import count_noun, size_text
from univid_jax.data.clips import context_shape
from univid_jax.data.rows.packing import bucket_size
from univid_jax.inference.jobs import infer_length
from univid_jax.inference.queries import QueryProgress, QuerySampler
from univid_jax.runtime.processes import wait_for_processes

log = logging.getLogger(__name__)

T = TypeVar("T")

# Frames, height and width of a query.
Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class QueryRunner:
  """Samples requests that differ in their query, those of one shape together, and writes their results.

  Results that an earlier command has written are kept, if they were made in the same way. Videos longer than the
  model's clips are sampled one by one.

  Attributes:
    runner: reads clips and writes results.
    batch_size: most queries that are sampled together; None takes as many as suit the devices.
  """

  runner: RequestRunner
  batch_size: int | None = None

  def run(self, requests: Sequence[Request]) -> Iterator[str]:
    """Yields a line for each result of this process.

    Raises:
      UserError, OSError: see `RequestRunner.run`.
    """
    whole, short = [], []
    for request in requests:
      query = self.runner.find_whole(request)
      if query is None:
        short.append(request)
      else:
        whole.append((request, query))
    for request, query in _share(whole):
      yield self.runner.run_whole(request, query, keep=True)
    shapes = self._group(short)
    buckets: dict[tuple[int, int], list[list[Request]]] = {}
    for shape, group in shapes.items():
      buckets.setdefault(self._bucket(group[0], shape), []).append(group)
    for groups in buckets.values():
      yield from self._run_bucket(groups)
    wait_for_processes("the queries are sampled")

  def warm_up(self, requests: Sequence[Request]) -> str:
    """Compiles the programs that the queries need, see `RequestRunner.warm_up`."""
    with tempfile.TemporaryDirectory() as scratch:
      outs = [dataclasses.replace(request, out=Path(scratch) / request.out.name) for request in requests]
      lines = list(dataclasses.replace(self, runner=self.runner.shorten()).run(outs))
    return f"compiled the programs of {count_noun(len(lines), 'kind')} of queries; nothing was sampled"

  def _group(self, requests: Sequence[Request]) -> Mapping[Shape, list[Request]]:
    groups: dict[Shape, list[Request]] = {}
    for request in requests:
      groups.setdefault(context_shape(request.clips[-1], self.runner.reader.form_of(request)), []).append(request)
    return groups

  def _bucket(self, request: Request, shape: Shape) -> tuple[int, int]:
    """Returns the numbers of tokens, and of target tokens, of the rows that a sentence is padded to."""
    pipeline, arguments = self.runner.pipeline, self.runner.arguments
    examples = self.runner.reader.read_examples(request, self.runner.reader.form_of(request).for_shape(shape[1:]))
    lengths = [*(len(clip.frames) for clip in examples), shape[0]]
    lengths.append(arguments.num_frames or infer_length(lengths))
    tokens = [math.prod(pipeline.latent_shape((length, *shape[1:]))) // pipeline.config.patch_volume
              for length in lengths]  # fmt: skip
    return bucket_size(sum(tokens)), bucket_size(tokens[-1])

  def _run_bucket(self, groups: Sequence[Sequence[Request]]) -> Iterator[str]:
    """Samples groups of queries whose sentences have about the same length, with one program."""
    runner = self.runner
    sampler = QuerySampler.for_pipeline(runner.pipeline, runner.arguments.steps, **runner.arguments.sentence)
    largest = max(len(_share(group, 0)) for group in groups)
    mine = [_share(group) for group in groups]
    if runner.is_warm_up:
      mine = [group[:1] for group in mine]
    steps, size, kept = len(sampler.plan.sigmas), 0, 0
    is_hidden = _place()[0] > 0
    with tqdm(total=steps * sum(map(len, mine)), desc="sample", unit="step", disable=is_hidden) as bar:
      for group in filter(None, mine):
        waiting: deque[PreparedRequest] = deque()
        queries = self._read(group, waiting)
        first = next(queries, None)
        done = 0
        if first is not None:
          job = sampler.make_job([clip.frames for clip in waiting[0].clips[:-1]], first)
          size = size or sampler.choose_size(job, largest, most=self.batch_size)
          shown = f"{size_text(first.shape[1:3])} pixels (width x height)"
          each = count_noun(len(first), "frame") + " each" * (len(group) > 1)
          log.info("%s of %s, %s, %d at once", count_noun(len(group), "query", "queries"), shown, each, size)
          rest = itertools.chain([first], queries)
          for sample in sampler.sample(job, rest, batch_size=size, progress=_advance_from_here(bar, steps)):
            yield runner.finish(waiting.popleft(), sample.frames)
            done += 1
        kept += len(group) - done
        bar.update(steps * (len(group) - done))
    if kept:
      yield f"kept {count_noun(kept, 'result')} of an earlier command"

  def _read(self, group: Sequence[Request], waiting: deque[PreparedRequest]) -> Iterator[np.ndarray]:
    """Yields the queries whose results are missing, and appends what belongs to them to `waiting`."""
    for request in group:
      prepared = self.runner.prepare(request)
      if not self.runner.has_finished(prepared.path, prepared.record):
        waiting.append(prepared)
        yield prepared.clips[-1].frames


def _advance_from_here(bar: tqdm, steps: int) -> QueryProgress:
  """Returns what shows how many queries, of so many steps each, are sampled after those that a bar shows already."""
  shown = bar.n

  def show(sampled: float) -> None:
    bar.update(shown + round(sampled * steps) - bar.n)

  return show


def _share(items: Sequence[T], process: int | None = None) -> Sequence[T]:
  """Returns the share of a process, by default of this one; process 0 has the largest."""
  index, count = _place()
  return items[index if process is None else process :: count]


def _place() -> tuple[int, int]:
  """Returns the index of this process, and the number of processes."""
  return jax.process_index(), jax.process_count()
