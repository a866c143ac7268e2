"""Selects the sentences of an evaluation: held-out ones, the same number for every case."""

import dataclasses
import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from univid_jax.config.schema import DataConfig, RunConfig
from univid_jax.core.contexts import CONTEXTS, possible_counts
from univid_jax.core.protocols import SentenceSource
from univid_jax.core.sentence import NOT_COMPLETABLE, Clip, ClipRef, Sentence
from univid_jax.core.text import count_noun
from univid_jax.data.sources.base import indices_by_task
from univid_jax.data.sources.computed import ComputedSentences, open_computed
from univid_jax.data.sources.grids import GridSentences
from univid_jax.data.sources.listed import ListedSentences
from univid_jax.data.usable import read_usable
from univid_jax.evaluation.controls import Case, choose_other_tasks, has_pairs

log = logging.getLogger(__name__)

# Computed tasks whose example pairs serve as control if the data has a single task.
FALLBACK_TASKS = ("invert", "swap_channels")


@dataclasses.dataclass(frozen=True)
class PlannedSentence:
  """A sentence whose clips have not been read.

  Attributes:
    case: its task, context and number of clips.
    group: of the sentences that `eval.sentences_per_case` counts together.
    read: returns the sentence with its frames.
    identify: returns what identifies its content besides the config: the keys of its clips and its prompt.
  """

  case: Case
  group: tuple[str, object]
  read: Callable[[], Sentence]
  identify: Callable[[], object] = lambda: None


def plan_sentences(config: RunConfig, held_out: Mapping[str, SentenceSource]) -> list[PlannedSentence]:
  """Plans `eval.sentences_per_case` held-out sentences per case; the result is empty if nothing is held out.

  A case of computed data is a combination of task, context and number of clips, for grids also of split; a case of
  other data is a task, or the whole source where tasks are only known once sentences are read (ARC). Every held-out
  record or pair is used once before any is repeated. Sentences that sampling cannot complete are left out, and counted
  in the log.
  """
  per_case = config.eval.sentences_per_case
  sentences: list[PlannedSentence] = []
  for name, source in held_out.items():
    if isinstance(source, ComputedSentences):
      identify = functools.cache(functools.partial(_identify_computed, source))
      for number, (case, only) in enumerate(_split_cases(config, source)):
        only = dataclasses.replace(only, seed=_case_seed(config.eval.seed, number))
        readers = [functools.partial(only.__getitem__, i) for i in range(per_case)]
        sentences += [PlannedSentence(case, (name, number), read, identify) for read in readers]
    elif isinstance(source, GridSentences):
      for number, only in enumerate(source.cases()):
        only = dataclasses.replace(only, seed=_case_seed(config.eval.seed, number), by_reference=False)
        (family,), (context,), (count,) = only.families, only.contexts, only.num_clips
        case = Case(family, context, count)
        readers = [functools.partial(only.__getitem__, i) for i in range(per_case)]
        sentences += [PlannedSentence(case, (name, number), read) for read in readers]
    else:
      sentences += [_plan(sentence, (name, task)) for task, sentence in _read_completable(config, source)]
  return sentences


def _identify_computed(source: ComputedSentences) -> object:
  """Identifies what the config does not: files, and tasks that are not the package's with their prompts."""
  files = source.identify_files() if source.folders else None
  if not (own := source.identify_own_tasks()):
    return files
  return files, own, {task: source.prompts[task] for task in own}


def _read_completable(config: RunConfig, source: SentenceSource) -> list[tuple[str, Sentence]]:
  """Reads the first sentences of each task that sampling can complete; returns each with its group of indices."""
  kept = source.completable() if isinstance(source, ListedSentences) else source
  sentences: list[tuple[str, Sentence]] = []
  for task, indices in indices_by_task(kept).items():
    first = itertools.islice(indices, config.eval.sentences_per_case)
    readers = [functools.partial(kept.__getitem__, index) for index in first]
    usable = read_usable(readers, "held-out", allow_dropped=config.data.allow_dropped)
    sentences += [(task, sentence) for sentence in usable]
  completable = [(task, sentence) for task, sentence in sentences if sentence.is_completable]
  total, left_out = len(sentences), len(sentences) - len(completable)
  if isinstance(source, ListedSentences) and isinstance(kept, ListedSentences):
    total, left_out = len(source.records), len(source.records) - len(kept.records)
  if left_out and config.eval.sentences_per_case:
    log.warning("evaluation leaves out %d of %s: %s", left_out, count_noun(total, "held-out record"), NOT_COMPLETABLE)
  return completable


def plan_other_pairs(config: RunConfig, sentences: Sequence[PlannedSentence]) -> list[Callable[[], Sentence]]:
  """Returns, for each sentence, a function that reads one of another task, see `choose_other_tasks`.

  If the data has no other task, it reads a held-out sentence of a computed task. It is not called for sentences
  without example pairs.
  """
  seed = config.eval.seed
  others = choose_other_tasks([sentence.case for sentence in sentences], np.random.default_rng(seed))
  held_out = functools.cache(functools.partial(open_computed, config, "held_out", seed=seed))

  def computed(index: int) -> Callable[[], Sentence]:
    case = sentences[index].case
    task = next(task for task in FALLBACK_TASKS if task != case.task)
    source = dataclasses.replace(
      held_out(),
      tasks={task: 1.0},
      contexts={case.context if case.context in CONTEXTS else "II": 1.0},
      num_clips={case.num_clips: 1.0},
      max_video_clips=0,
    )
    return functools.partial(source.__getitem__, index)

  return [
    computed(i)
    if other is None and has_pairs(sentence.case.num_clips)
    else sentences[i if other is None else other].read
    for i, (other, sentence) in enumerate(zip(others, sentences))
  ]


def _plan(sentence: Sentence, group: tuple[str, object]) -> PlannedSentence:
  def identify() -> object:
    return sentence.prompt, [_identify_clip(clip) for clip in sentence.clips]

  # Each task of ARC counts as a task of its own.
  task = (sentence.params or {}).get("arc_task", sentence.task)
  case = Case(task, sentence.context, len(sentence.clips))
  return PlannedSentence(case, group, sentence.with_frames, identify)


def _identify_clip(clip: Clip) -> str:
  return clip.key if isinstance(clip, ClipRef) else hashlib.sha256(np.ascontiguousarray(clip).tobytes()).hexdigest()


def _split_cases(config: RunConfig, source: ComputedSentences) -> Iterator[tuple[Case, ComputedSentences]]:
  """Yields every case with a positive weight, and the source restricted to it.

  The order, on which seeds depend, is always that of the default config, because flags sort their keys.
  """
  order = list(DataConfig().tasks)
  tasks = [task for task, weight in source.tasks.items() if weight > 0]
  for task in sorted(tasks, key=lambda task: order.index(task) if task in order else len(order)):
    for context, weight in sorted(source.contexts_of(task).items()):
      if weight > 0:
        for count in possible_counts(config.data.clip_counts, context, config.data.max_video_clips):
          only = {context: 1.0}
          restricted = dataclasses.replace(
            source, tasks={task: 1.0}, contexts=only, animating_contexts=only, num_clips={count: 1.0}
          )
          yield Case(task, context, count), restricted


def _case_seed(seed: int, number: int) -> int:
  """Returns the seed of a case's sentences, distinct for up to 1,000 cases. Changing these numbers changes reports."""
  return seed * 1000 + number
