"""A picture of the data, as the model sees it."""

import itertools
from collections.abc import Iterable, Iterator

from etils import epath

from univid_jax.core.paths import atomic_write
from univid_jax.core.protocols import SentenceSource
from univid_jax.data.pictures import contact_sheet
from univid_jax.data.sources.base import indices_by_task
from univid_jax.data.sources.computed import ComputedSentences, LazySentences
from univid_jax.data.sources.open import DataSources
from univid_jax.training.validation import take_turns

# How many computed sentences are planned to find some of every task; rare tasks may have none among them.
PLANNED = 1000


def draw_preview(data: DataSources, count: int, workdir: str) -> epath.Path:
  """Draws `count` sentences to WORKDIR/preview.png; returns the path.

  They are of all kinds of data in turn, and of each of all tasks in turn.
  """
  path = epath.Path(workdir) / "preview.png"
  chosen = take_turns([zip(itertools.repeat(name), _spread(source)) for name, source in data.sources.items()])
  sentences = [(name, data.sources[name][index]) for name, index in itertools.islice(chosen, count)]
  with atomic_write(path) as unfinished:
    contact_sheet(unfinished, sentences)
  return path


def _spread(source: SentenceSource) -> Iterator[int]:
  """Yields the indices of a source, of all tasks in turn."""
  groups: Iterable[Iterable[int]] = indices_by_task(source).values()
  if isinstance(source, (ComputedSentences, LazySentences)):
    computed = source.sentences if isinstance(source, LazySentences) else source
    planned: dict[str, list[int]] = {}
    for index in range(min(PLANNED, len(computed))):
      planned.setdefault(computed.plan(index).task, []).append(index)
    groups = [planned[task] for task in sorted(planned, key=computed.task_names.index)]
    return itertools.chain(take_turns(groups), range(PLANNED, len(computed)))
  return take_turns(groups)
