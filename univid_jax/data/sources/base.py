"""What the sources share: records that cannot be used, and how sentences are drawn."""

import bisect
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from typing_extensions import Protocol, runtime_checkable

from univid_jax.config.schema import DataConfig
from univid_jax.core.contexts import video_pattern
from univid_jax.core.errors import UserError
from univid_jax.core.options import PromptStyle
from univid_jax.core.protocols import SentenceSource
from univid_jax.core.text import count_noun, is_or_are
from univid_jax.data.media.reader import is_foreign
from univid_jax.runtime.processes import sum_over_processes

log = logging.getLogger(__name__)

# Of more records that are too long for a row, only the longest is named.
NAMED_TOO_LONG = 4

T = TypeVar("T")
GroupT = TypeVar("GroupT")


def report_texts(folder: str, texts: Sequence[Path]) -> None:
  """Warns of files beside clips that look like prompts, which are not read."""
  if texts:
    log.warning(
      "%s: %s not read, such as %s: prompts are made of the names of tasks, as config.data.prompt says; those of your "
      "own are in config.data.manifest",
      folder,
      f"{count_noun(len(texts), 'text file')} {is_or_are(len(texts))}",
      printable(str(texts[0])),
    )


def report_unused_texts(name: str, num_texts: int) -> None:
  """Logs that texts of records are not used.

  Args:
    name: of the file that has them.
    num_texts: how many it has, empty ones not counted.
  """
  if num_texts:
    unused = f"{count_noun(num_texts, 'text')} {is_or_are(num_texts)}"
    log.info("%s: %s not used, as config.data.prompt is null; rough and detailed use your own", name, unused)


def is_text(path: Path) -> bool:
  """Returns whether a path beside a clip may be its prompt, as other trainers have them."""
  return path.suffix.lower() in (".txt", ".caption") and not is_foreign(path) and path.is_file()


class TooLongError(UserError):
  """A sentence does not fit into a row.

  Args:
    message: says so.
    key: of the config, that would have to be larger.
    needed: the least value with which the sentence fits.
  """

  def __init__(self, message: str, *, key: str = "", needed: int = 0):
    super().__init__(message)
    self.key, self.needed = key, needed


@dataclasses.dataclass(frozen=True)
class Dropped:
  """A record that cannot be used, and why.

  Attributes:
    record: its name.
    reason: why.
    key, needed: what it needs of the config, if nothing else is wrong; see `TooLongError`.
  """

  record: str
  reason: str
  key: str = ""
  needed: int = 0

  def __str__(self) -> str:
    named = f"{self.record}: "
    return self.reason if self.reason.startswith(named) else f"{named}{self.reason}"


def printable(name: str) -> str:
  """Returns a name with escapes, as in string literals, for what is no printable character, such as a line break."""
  return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name)


def drop(record: str, error: Exception) -> Dropped:
  """Returns a record that an error made unusable; its name and the message are one line each."""
  key, needed = (error.key, error.needed) if isinstance(error, TooLongError) else ("", 0)
  return Dropped(printable(record), printable(str(error)), key, needed)


def require_none_dropped(dropped: Sequence[Dropped], *, allowed: bool) -> None:
  """Raises UserError if records were dropped and that is not allowed."""
  if dropped and not allowed:
    them, first = ("it", ":") if len(dropped) == 1 else ("them", ", the first is")
    count = count_noun(len(dropped), "listed record")
    remedies = [f"set {key} to {group[0].needed}" for key, group in _too_long(dropped).items()]
    remedies += [f"fix {them if not remedies else 'the others'}"] if any(not each.key for each in dropped) else []
    raise UserError(
      f"{count} cannot be used{first} {dropped[0]}; {' and '.join(remedies)}, or leave {them} out with "
      "--config.data.allow_dropped=True"
    )


def _too_long(dropped: Sequence[Dropped]) -> dict[str, list[Dropped]]:
  """Returns the records that do not fit into a row by the key that would have to be larger, the longest first."""
  groups: dict[str, list[Dropped]] = {}
  for each in dropped:
    if each.key:
      groups.setdefault(each.key, []).append(each)
  return {key: sorted(group, key=lambda each: -each.needed) for key, group in groups.items()}


def report_dropped(dropped: Sequence[Dropped], *, allowed: bool) -> None:
  """Logs the records that this process cannot use; all processes must call it.

  Raises:
    UserError: that is not allowed, and a process found some; only its own log names them.
  """
  many = {key: group for key, group in _too_long(dropped).items() if len(group) > NAMED_TOO_LONG}
  for each in dropped:
    if each.key not in many:
      log.warning("dropped: %s", each)
  for longest, *others in many.values():
    log.warning("dropped: %d sentences that do not fit into a row, the longest is %s", len(others) + 1, longest)
  if sum_over_processes(len(dropped)) and not dropped and not allowed:
    raise UserError("another process found records that cannot be used; its log names them")
  require_none_dropped(dropped, allowed=allowed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawOptions:
  """How sentences are drawn from records and pairs.

  Attributes:
    contexts: weights by name.
    num_clips: weights by number of clips.
    max_video_clips, reverse_probability, prompt_dropout, variants: see `DataConfig`.
    prompt_style: `DataConfig.prompt`.
    seed: of all draws.
  """

  contexts: Mapping[str, float]
  num_clips: Mapping[int, float]
  max_video_clips: int
  reverse_probability: float
  prompt_style: PromptStyle
  prompt_dropout: float
  variants: int
  seed: int

  @property
  def has_videos(self) -> bool:
    """Whether a context has videos; else only first frames are used."""
    used = [name for name, weight in self.contexts.items() if weight > 0]
    return any(is_video for name in used for is_video in video_pattern(name, num_clips=4))

  @classmethod
  def from_config(cls, config: DataConfig, *, seed: int) -> "DrawOptions":
    """Raises UserError if there is no such context."""
    for context in config.contexts:
      video_pattern(context, num_clips=4)
    return cls(
      contexts=sort_weights(config.contexts),
      num_clips=sort_weights(config.clip_counts),
      max_video_clips=config.max_video_clips,
      reverse_probability=config.reverse_probability,
      prompt_style=config.prompt,
      prompt_dropout=config.prompt_dropout,
      variants=config.variants,
      seed=seed,
    )

  def with_prompts(self) -> "DrawOptions":
    """Returns the options of held-out sentences, which are drawn alike, but all have their prompts."""
    return dataclasses.replace(self, prompt_dropout=0.0)


def sort_weights(weights: Mapping[T, float]) -> dict[T, float]:
  """Sorts weights by name, so that draws do not depend on how a config was written: flags sort their keys."""
  return dict(sorted(weights.items(), key=lambda item: str(item[0])))


def draw(rng: np.random.Generator, weights: Mapping[T, float]) -> T:
  """Draws a key by weight.

  Raises:
    UserError: a weight is negative or infinite, or none is positive.
  """
  cumulative = _cumulative_shares(tuple(weights.values()))
  if not cumulative:
    raise UserError(f"weights must be finite, not negative and not all zero, got {dict(weights)}")
  # As `rng.choice` with probabilities draws, in a twentieth of the time.
  return list(weights)[bisect.bisect_right(cumulative, rng.random())]


@functools.lru_cache(maxsize=256)
def _cumulative_shares(weights: tuple[float, ...]) -> tuple[float, ...]:
  """Returns the cumulative shares of weights, rounded as `rng.choice` does; none if a draw is impossible."""
  values = np.asarray(weights, np.float64)
  if not len(values) or (values < 0).any() or not 0 < values.sum() < np.inf:
    return ()
  cumulative = (values / values.sum()).cumsum()
  return tuple((cumulative / cumulative[-1]).tolist())


@runtime_checkable
class GroupsByTask(Protocol):
  """A source that knows the task of a sentence before it is read."""

  def indices_by_task(self) -> Mapping[str, Iterator[int]]:
    """Returns the indices of each task's sentences; those of all its records come before any record repeats."""
    ...


def group_indices(tasks: Sequence[str], variants: int) -> dict[str, Iterator[int]]:
  """Returns the indices of each task's sentences, in order, where sentence i is of record i % len(tasks).

  Args:
    tasks: of the records.
    variants: sentences of each record.
  """
  groups: dict[str, list[int]] = {}
  for record, task in enumerate(tasks):
    groups.setdefault(task, []).append(record)

  def indices(records: Sequence[int]) -> Iterator[int]:
    return (variant * len(tasks) + record for variant in range(variants) for record in records)

  return {task: indices(records) for task, records in groups.items()}


def require_source(name: str, source: object) -> None:
  """Raises UserError, which begins with `name`, unless something is a source with sentences."""
  if not isinstance(source, SentenceSource):
    raise UserError(
      f"{name} must be a source of sentences, with task_names, len(source) and source[index], got "
      f"{type(source).__name__}"
    )
  if not len(source):
    raise UserError(f"{name} is empty: {type(source).__name__} has no sentence")


def indices_by_task(source: SentenceSource) -> Mapping[str, Iterator[int]]:
  """Returns the indices of each task's sentences in order; one group where tasks are only known once they are read."""
  return source.indices_by_task() if isinstance(source, GroupsByTask) else {"": iter(range(len(source)))}


def hold_out(
  items: Sequence[T], share: float, *, group: Callable[[T], GroupT], keep_at_least: int = 1
) -> tuple[list[T], list[T]]:
  """Splits off a share of each group, rounded down: evenly spaced items, the same every time.

  Args:
    items: to split.
    share: to hold out.
    group: returns the group of an item.
    keep_at_least: items of a group that are never held out.

  Returns:
    The items that are kept, and those that are held out.
  """
  groups: dict[GroupT, list[T]] = {}
  for item in items:
    groups.setdefault(group(item), []).append(item)
  kept, held_out = [], []
  for members in groups.values():
    wanted = math.floor(share * len(members) + 1e-9)  # 0.29 times 100 is a little less than 29
    count = max(min(wanted, len(members) - keep_at_least), 0)
    chosen = {round((i + 0.5) * len(members) / count - 0.5) for i in range(count)}
    for i, item in enumerate(members):
      (held_out if i in chosen else kept).append(item)
  return kept, held_out
