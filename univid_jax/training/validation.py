"""Validation during training: a loss that is comparable from step to step, and previews."""

import collections
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univid_jax.checkpoints.run_parts import context_mode, split_config, validated_sigmas
from univid_jax.config.schema import RunConfig
from univid_jax.core.contexts import CONTEXT_NAMES
from univid_jax.core.errors import UserError
from univid_jax.core.packed_row import PackedRow
from univid_jax.core.paths import atomic_write
from univid_jax.core.protocols import SentenceSource
from univid_jax.core.seeds import random_key
from univid_jax.core.sentence import NOT_COMPLETABLE, Sentence, read_frames
from univid_jax.core.text import count_noun
from univid_jax.data.cache.entries import CacheError
from univid_jax.data.features import FeatureMaker
from univid_jax.data.media.writer import write_clip
from univid_jax.data.pictures import COLUMNS, concatenate_clips, sentence_grid, shown_context
from univid_jax.data.rows.loader import MakeFeatures, make_fitting
from univid_jax.data.rows.packing import RowShape, pack_rows, take_rows
from univid_jax.data.rows.tokens import feature_names
from univid_jax.data.sources.base import Dropped, drop, indices_by_task, report_dropped
from univid_jax.data.sources.open import DataSources
from univid_jax.data.usable import read_usable
from univid_jax.diffusion.loss import sentence_losses
from univid_jax.evaluation.generate import sample_targets
from univid_jax.inference.pipeline import Pipeline
from univid_jax.inference.sampler import Progress
from univid_jax.models.lora import join
from univid_jax.parallel.mesh import row_shards
from univid_jax.parallel.sharding import shard_batch
from univid_jax.runtime.processes import sum_over_processes
from univid_jax.training.state import Params, StateSpec

log = logging.getLogger(__name__)

T = TypeVar("T")

PREVIEWS_FOLDER = "previews"
PREVIEW_FPS = 8


class Validation:
  """Measures the loss of the same sentences at fixed noise levels with fixed noise.

  Args:
    config: config of the run; `validation.sigmas` are the noise levels, of which only those that are trained count.
    spec: description of the training state.
    sentences: the sentences to measure on.
    make_features: encodes them.
    mesh: the devices.

  Raises:
    UserError: none of the noise levels is trained.
  """

  def __init__(
    self, config: RunConfig, spec: StateSpec, sentences: Sequence[Sentence], make_features: FeatureMaker, mesh: Mesh
  ):
    self._mesh, self._tasks = mesh, tuple(make_features.task_names)
    self._expert = config.model.expert
    self._sigmas = [validated_sigmas(part) for part in split_config(config)]
    rows, _ = pack_rows(
      [make_features(sentence) for sentence in sentences], RowShape.from_config(config.rows, context_mode(config))
    )
    noise = np.asarray(jax.random.normal(random_key(config.seed), rows.tokens.shape, jnp.float32))
    size = config.rows.batch_size(row_shards(mesh)) // config.rows.microbatches
    self._batches = [
      shard_batch(jax.tree.map(lambda x, start=start: take_rows(x, start, size), (rows, noise)), mesh)
      for start in range(0, len(noise), size)
    ]

    def sum_losses(
      params: Params, frozen: Params, row: PackedRow, noise: jax.Array, sigma: jax.Array
    ) -> list[jax.Array]:
      """Sums losses and sentences, each by task and by context; entry 0 is for sentences without one."""
      model = nnx.merge(spec.graph, join(frozen, params))
      losses, counts = sentence_losses(model, row, noise, jnp.full((len(row.tokens), row.num_slots), sigma))
      groups = [
        jax.nn.one_hot(row.task_ids, 1 + len(self._tasks)),
        jax.nn.one_hot(row.context_ids, 1 + len(CONTEXT_NAMES)),
      ]
      return [jnp.einsum("bs,bsk->k", values, group) for values in (losses, counts) for group in groups]

    self._sum_losses = jax.jit(sum_losses, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def __call__(self, params: Params, frozen: Params, *, progress: Progress | None = None) -> dict[str, float]:
    """Returns val_loss, and the same by noise level, task, context and expert: means over sentences and levels.

    Args:
      params, frozen: parameters of the model.
      progress: called after each batch with its number, from 1 again for every noise level.
    """
    metrics, sums = {}, []
    models = zip(self._expert.split_tree(params), self._expert.split_tree(frozen), strict=True)
    with jax.set_mesh(self._mesh):
      for name, sigmas, model in zip(self._expert.parts, self._sigmas, models, strict=True):
        for sigma in sigmas:
          parts = []
          for number, batch in enumerate(self._batches, 1):
            parts.append(jax.device_get(self._sum_losses(*model, *batch, jnp.float32(sigma))))
            if progress is not None:
              progress(number)
          sums.append([sum(values) for values in zip(*parts, strict=True)])
          metrics[f"val_loss/sigma_{sigma:g}"] = _mean(sums[-1:])
        if len(self._expert.parts) > 1:
          metrics[f"val_loss/expert_{name}"] = _mean(sums[-len(sigmas) :])
    tasks, contexts, task_counts, context_counts = (np.sum(values, axis=0) for values in zip(*sums, strict=True))
    for names, group, totals, counts in (
      (self._tasks, "task", tasks, task_counts),
      (CONTEXT_NAMES, "context", contexts, context_counts),
    ):
      for name, total, count in zip(names, totals[1:], counts[1:], strict=True):
        if count:
          metrics[f"val_loss/{group}_{name}"] = float(total / count)
    return {"val_loss": _mean(sums)} | metrics


def _mean(sums: Sequence[Sequence[np.ndarray]]) -> float:
  """Returns the mean loss per sentence, from sums of losses and counts by task and by context at each noise level."""
  losses, _, counts, _ = (np.sum(values, axis=0).sum() for values in zip(*sums, strict=True))
  return float(losses / counts)


def select_sentences(data: DataSources, config: RunConfig) -> list[Sentence]:
  """Selects sentences to validate on: held-out ones or, if nothing is held out, training sentences.

  Kinds of data take turns, and within each kind tasks take turns; see `read_usable`.
  """
  sources = data.held_out or data.sources

  def readers(source: SentenceSource) -> Iterator[Callable[[], Sentence]]:
    indices = take_turns(indices_by_task(source).values())
    return (functools.partial(source.__getitem__, index) for index in indices)

  chosen = take_turns([readers(source) for source in sources.values()])
  selected = list(itertools.islice(chosen, config.validation.sentences))
  return read_usable(selected, "held-out" if data.held_out else "training", allow_dropped=config.data.allow_dropped)


def select_previews(sentences: Sequence[Sentence], config: RunConfig) -> list[Sentence]:
  """Selects the sentences of previews: the first of those to validate on, without those that cannot be sampled."""
  completable = [sentence for sentence in sentences if sentence.is_completable]
  if config.validation.previews and len(completable) < len(sentences):
    count = f"{len(sentences) - len(completable)} of {count_noun(len(sentences), 'sentence')} to validate on"
    log.warning("previews leave out %s: %s", count, NOT_COMPLETABLE)
  return completable[: config.validation.previews]


def leave_out_unusable(
  sentences: Sequence[Sentence], make_features: MakeFeatures, row_shape: RowShape, *, allow_dropped: bool
) -> list[Sentence]:
  """Returns the sentences that can be encoded and fit into a row; all processes must call it.

  Args:
    sentences: the sentences, the same in every process.
    make_features: encodes them.
    row_shape: capacity of a row.
    allow_dropped: leave out and log those that a process cannot use.

  Raises:
    CacheError: a cache cannot be written or read.
    UserError: a sentence cannot be used and may not be dropped, or none can be used.
  """
  capacities = row_shape.capacities(feature_names(make_features.shape))
  usable, dropped = [], dict[Dropped, None]()
  for sentence in sentences:
    failed = False
    try:
      make_fitting(sentence, make_features, capacities)
    except CacheError:
      raise
    except (OSError, UserError) as error:
      dropped[drop(sentence.record, error)] = None  # once per record, which may yield several sentences
      failed = True
    if not sum_over_processes(failed):
      usable.append(sentence)
  report_dropped(list(dropped), allowed=allow_dropped)
  if sentences and not usable:
    raise UserError(f"none of the {len(sentences)} sentences to validate on can be used; the log names them")
  return usable


def take_turns(iterables: Iterable[Iterable[T]]) -> Iterator[T]:
  """Yields items from all iterables in turn, until all are exhausted."""
  waiting = collections.deque(iter(each) for each in iterables)
  while waiting:
    iterator = waiting.popleft()
    try:
      item = next(iterator)
    except StopIteration:
      continue
    yield item
    waiting.append(iterator)


def write_previews(
  folder: epath.Path,
  step: int,
  pipeline: Pipeline,
  sentences: Sequence[Sentence],
  *,
  num_inference_steps: int | None,
  progress: Progress | None,
) -> None:
  """Samples the sentences' targets and writes step_NNNNNN.png with all of them, and a video for each video.

  Every process samples; the first one writes. `progress` is passed to `Pipeline.sample_batch`.
  """
  sentences = [sentence.with_frames() for sentence in sentences]
  predictions = sample_targets(
    pipeline, dict(enumerate(sentences)), num_inference_steps=num_inference_steps, progress=progress
  )
  if jax.process_index() > 0:
    return
  rows = []
  for index, sentence in enumerate(sentences):
    *context, truth = (read_frames(clip) for clip in sentence.clips)
    row = (*shown_context(context), predictions[index], truth)
    rows.append((f"{sentence.task.replace('_', ' ')}\ncontext {sentence.context or '-'}", row))
    if len(truth) > 1:
      with atomic_write(folder / f"step_{step:06d}_{index}.mp4") as path:
        write_clip(path, concatenate_clips(row), fps=PREVIEW_FPS)
  with atomic_write(folder / f"step_{step:06d}.png") as path:
    sentence_grid(path, rows, columns=COLUMNS)
