"""Opens everything that a config names as data."""

import dataclasses
import functools
import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from typing_extensions import Protocol, runtime_checkable

from univid_jax.config.drawn import check_weights
from univid_jax.config.schema import DataConfig, RunConfig
from univid_jax.core.bucket_files import copy_to_local
from univid_jax.core.checks import require_instance, require_number
from univid_jax.core.dims import floor_clip_length
from univid_jax.core.errors import UserError, name_key
from univid_jax.core.options import TargetKind
from univid_jax.core.protocols import SentenceSource
from univid_jax.core.sentence import NOT_COMPLETABLE
from univid_jax.core.text import count_noun
from univid_jax.data.clips import ClipFormat, Footage
from univid_jax.data.sources.base import DrawOptions, Dropped, require_none_dropped, require_source
from univid_jax.data.sources.computed import (
  ComputedSentences,
  LazySentences,
  computed_identity,
  describe_held_out,
  open_computed,
)
from univid_jax.data.sources.grids import GridSentences
from univid_jax.data.sources.listed import ListedSentences, count_shown_targets
from univid_jax.data.sources.pairs import PairSentences
from univid_jax.data.sources.readers.arc import ARCSentences, open_arc
from univid_jax.data.sources.readers.jsonl import open_manifest
from univid_jax.data.sources.readers.metadata_csv import open_metadata
from univid_jax.data.sources.readers.pair_folder import open_pairs
from univid_jax.data.sources.readers.tfds import open_tfds
from univid_jax.data.sources.unused_keys import describe_unused_keys
from univid_jax.data.target_kinds import own_kinds
from univid_jax.data.tasks import TASKS

log = logging.getLogger(__name__)

# How many kinds of changes to files are reported for each source.
REPORTED_CHANGES = 5


@runtime_checkable
class HasPrompts(Protocol):
  """A source whose tasks have one prompt each."""

  @property
  def prompts(self) -> Mapping[str, str]: ...


class SplittableSource(SentenceSource, Protocol):
  """A source of which a share is held out."""

  def split(self, share: float) -> tuple[SentenceSource, SentenceSource]:
    """Returns the sentences to train on, and those held out."""
    ...


@dataclasses.dataclass(frozen=True)
class DataSources:
  """Where the sentences of a run come from: what a config names, or sources of your own.

  Attributes:
    sources: training sentences by kind of data: metadata, pairs, manifest, tfds, arc, computed, grids, or your names.
    weights: how often each source is drawn.
    dropped: records that cannot be used.
    held_out: sentences that training does not see, by kind of data; kinds without any are missing.
  """

  sources: Mapping[str, SentenceSource]
  weights: Mapping[str, float]
  dropped: Sequence[Dropped] = ()
  held_out: Mapping[str, SentenceSource] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for name, source in (*self.sources.items(), *self.held_out.items()):
      require_source(f"the data {name!r}", source)
    if unknown := sorted(self.weights.keys() - self.sources.keys()):
      raise UserError(f"DataSources.weights has {unknown[0]!r}, which is none of its sources")
    for name in self.sources:
      require_number(f"DataSources.weights[{name!r}]", self.weights.get(name), is_positive=True)

  @property
  def task_names(self) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for source in self.sources.values() for name in source.task_names))

  @property
  def prompts(self) -> dict[str, str]:
    """The prompt of each task; tables and manifests have prompts of their own instead."""
    sources = [source for source in self.sources.values() if isinstance(source, HasPrompts)]
    return {task: prompt for source in sources for task, prompt in source.prompts.items()}

  def report(self, config: DataConfig) -> None:
    """Logs what is used and what is dropped."""
    for name, source in self.sources.items():
      log.info("data: %s, %s sentences, drawn with weight %g", name, f"{len(source):,}", self.weights[name])
      if isinstance(source, (ComputedSentences, LazySentences)):
        for text in filter(None, (source.describe_clips(), describe_held_out(config))):
          log.info("data: %s, %s", name, text)
      for change, count in _count_changes(source).most_common(REPORTED_CHANGES):
        log.info("data: %s, %s: %s", name, count_noun(count, "clip"), change)
      for text, surprises in source.describe_left_out() if isinstance(source, PairSentences) else ():
        log.log(logging.WARNING if surprises else logging.INFO, "data: %s, %s", name, text)
      _warn_of_shown_targets(name, source, self.held_out.get(name))
      _warn_of_incompletable(name, source, self.held_out.get(name))
    for text in describe_unused_keys(config, self.sources.values()):
      log.warning("data: %s", text)
    if self.sources and not self.held_out:
      log.warning("data: nothing to validate and evaluate on: %s", self.explain_nothing_held_out(config))
    for dropped in self.dropped:
      log.info("dropped: %s", dropped)

  def explain_nothing_held_out(self, config: DataConfig) -> str:
    """Says why no sentence is held out, and how to have some."""
    largest = max(map(_largest_group, self.sources.values()), default=0)
    if not largest:
      return "DataSources.held_out is empty"
    for key, value in (("test_pairs", config.test_pairs), ("tfds.test_split", config.tfds.test_split)):
      if value:
        return f"nothing of the test set, config.data.{key}, can be used"
    if not config.held_out:
      return "config.data.held_out is 0, and there is no test set (config.data.test_pairs)"
    at = f"{count_noun(largest, 'record')} of a task are too few to hold any out at config.data.held_out = "
    needed = f"{config.held_out:.3g}, which takes {math.ceil(1 / config.held_out)}"
    share = f"train with --config.data.held_out={math.ceil(100 / largest) / 100:g}, which holds out one, or "
    return f"{at}{needed}: {share if largest > 2 else ''}name a test set (config.data.test_pairs, tfds.test_split)"

  def require_usable(self, config: DataConfig) -> None:
    """Raises UserError if training has nothing to draw from, or records were dropped without the config's leave."""
    if not self.sources:
      raise UserError("there is nothing to train on, only a test set: give config.data.arc.path or other data")
    check_weights(config, self.sources, {name: task.motion for name, task in TASKS.items()})
    require_none_dropped(self.dropped, allowed=config.allow_dropped)


def require_config(config: Any) -> None:
  """Raises UserError if what should be a config is something else, such as a ConfigDict."""
  hint = "univid_jax.config.presets has some, such as tiny(), and univid_jax.config.boundary.from_config_dict makes one"
  require_instance("config", config, RunConfig, f"{hint} of a ConfigDict")


def require_sources(data: Any) -> None:
  """Raises UserError if what should be sources of data is something else."""
  hint = "open_data of univid_jax.data.sources.open returns those of a config, DataSources(...) are your own"
  require_instance("data", data, DataSources, hint)


def open_data(config: RunConfig) -> DataSources:
  """Opens all data that a config names, and checks every record.

  Data with weight 0 is not opened at all.

  Raises:
    OSError: a file or folder is missing or unreadable.
    UserError: the config is none, or names no data, or data without a usable record.
  """
  require_config(config)
  data = config.data
  used = _used_data(data)
  opened = _open_listed(config, used)
  if "arc" in used:
    opened["arc"] = _open_arc(config)
  if "computed" in used:
    computed = open_computed(config, "train", seed=config.seed)
    held_out = open_computed(config, "held_out", seed=config.seed + 1)
    dropped = [each for folder in (*computed.folders, *held_out.folders) for each in folder.dropped]
    # Caching computed clips pays only with the encoders of a base.
    source = LazySentences(computed, computed_identity(config, computed)) if config.init_from else computed
    opened["computed"] = _Opened(source, held_out, dropped)
  if "grids" in used:
    opened["grids"] = _Opened(*GridSentences.open(config).split(data.held_out), [])
  _warn_of_unknown_tasks(data, opened)
  return DataSources(
    sources={name: each.training for name, each in opened.items() if len(each.training)},
    weights={name: getattr(data.weights, name) for name, each in opened.items() if len(each.training)},
    dropped=[dropped for each in opened.values() for dropped in each.dropped],
    held_out={name: each.held_out for name, each in opened.items() if len(each.held_out)},
  )


def _used_data(data: DataConfig) -> list[str]:
  """Returns the names, as in `SourceWeights`, of the data that a config gives and does not switch off.

  Raises:
    UserError: there are none.
  """
  given = {"metadata": data.metadata, "pairs": data.pairs, "manifest": data.manifest, "tfds": data.tfds.name}
  named = [name for name, value in given.items() if value]
  if data.has_computed:
    named.append("computed")
  if data.arc.enabled:
    named.append("arc")
  if data.grids.enabled:
    named.append("grids")
  if not named:
    raise UserError(
      "there is no data: give config.data.folder (videos and photos, for computed tasks), or config.data.metadata, "
      "pairs, manifest, tfds.name or arc.path, or weights to config.data.grids.families"
    )
  used = [name for name in named if getattr(data.weights, name)]
  if not used:
    raise UserError(
      f"all data is switched off: config.data.weights.{' and '.join(named)} must not {'all ' * (len(named) > 1)}be 0"
    )
  return used


def _warn_of_shown_targets(name: str, source: SentenceSource, held_out: SentenceSource | None) -> None:
  """Warns of held-out lines of which other lines show the targets: lines are held out, not clips."""
  if not (isinstance(source, ListedSentences) and isinstance(held_out, ListedSentences)):
    return
  if count := count_shown_targets(held_out, source):
    log.warning(
      "data: %s, training shows the targets of %d of the %d held-out records in other records: validation and "
      "evaluation say little about others; config.data.pairs holds out pairs",
      name,
      count,
      len(held_out.records),
    )


def _warn_of_incompletable(name: str, *sources: SentenceSource | None) -> None:
  """Warns of lines that are trained on, but whose targets cannot be sampled."""
  listed = [source for source in sources if isinstance(source, ListedSentences)]
  count = sum(len(source.records) for source in listed)
  if left_out := count - sum(len(source.completable().records) for source in listed):
    text = f"{left_out} of {count_noun(count, 'record')} can be neither previewed nor evaluated"
    log.warning("data: %s, %s: %s", name, text, NOT_COMPLETABLE)


def _count_changes(source: SentenceSource) -> Counter[str]:
  """Counts what clips of the longest length differ in from their files."""
  clips: list[tuple[Footage, int]] = []
  if isinstance(source, ListedSentences):
    footage = [part for record in source.records for part in record.footage]
    clips = [(part, floor_clip_length(min(part.num_frames, part.form.num_frames))) for part in footage]
  elif isinstance(source, PairSentences):
    lengths = {group: source.form.num_frames if source.has_videos(group) else 1 for group in source.groups}
    clips = [(part, lengths[pair.group]) for pair in source.pairs for part in (pair.source, pair.target)]
  return Counter(change for part, length in clips for change in part.describe_changes(length))


def _largest_group(source: SentenceSource) -> int:
  """Returns the most records of which a share is held out together: of a task, and of pairs a size."""
  groups: list[object] = []
  if isinstance(source, PairSentences):
    groups = [pair.group for pair in source.pairs]
  elif isinstance(source, ListedSentences):
    groups = [record.task for record in source.records]
  elif isinstance(source, ARCSentences):
    groups = [task.group for task in source.tasks]
  return max(Counter(groups).values(), default=0)


@dataclasses.dataclass(frozen=True)
class _Opened:
  """One kind of data."""

  training: SentenceSource
  held_out: SentenceSource
  dropped: Sequence[Dropped]


def _open_listed(config: RunConfig, used: Collection[str]) -> dict[str, _Opened]:
  """Opens what is used and consists of records; the order determines how it is mixed."""
  data = config.data
  form, options = ClipFormat.from_config(data), DrawOptions.from_config(data, seed=config.seed)
  kinds = own_kinds(data)
  opened = {}
  if "metadata" in used:
    with name_key("data.metadata"):
      source, dropped = open_metadata(copy_to_local(data.metadata), form, options, kind=kinds.get("", TargetKind.IMAGE))
    opened["metadata"] = _hold_out("metadata", source, dropped, data.held_out)
  if "pairs" in used:
    with name_key("data.pairs"):
      source, dropped = open_pairs(copy_to_local(data.pairs), form, options, kinds=kinds)
    if data.test_pairs:
      with name_key("data.test_pairs"):
        test = open_pairs(copy_to_local(data.test_pairs), form, options, kinds=kinds)
      opened["pairs"] = _with_test_set("pairs", source, dropped, test)
    else:
      opened["pairs"] = _hold_out("pairs", source, dropped, data.held_out)
  if "manifest" in used:
    with name_key("data.manifest"):
      source, dropped = open_manifest(copy_to_local(data.manifest), form, options, kinds=kinds)
    opened["manifest"] = _hold_out("manifest", source, dropped, data.held_out)
  if "tfds" in used:
    open_split = functools.partial(
      open_tfds, data.tfds, form=form, options=options, depth_range=data.depth_range, kinds=kinds
    )
    source, dropped = open_split(data.tfds.split)
    if data.tfds.test_split:
      test = open_split(data.tfds.test_split)
      opened["tfds"] = _with_test_set("tfds", source, dropped, test)
    else:
      opened["tfds"] = _hold_out("tfds", source, dropped, data.held_out)
  return opened


def _warn_of_unknown_tasks(data: DataConfig, opened: Mapping[str, _Opened]) -> None:
  """Warns of kinds for tasks that no record has: a misspelt name has its labels mixed by resizing."""
  own = [opened[name] for name in ("metadata", "pairs", "manifest", "tfds") if name in opened]
  names = {name for each in own for source in (each.training, each.held_out) for name in source.task_names}
  unknown = sorted(set(data.kinds) - names - {""})
  if own and unknown:
    there_are = f"your tasks are {', '.join(sorted(names))}" if names else "your records have no task, their key is ''"
    log.warning("config.data.kinds: no usable record has the task %s; %s", " or ".join(unknown), there_are)


def _open_arc(config: RunConfig) -> _Opened:
  """Opens tasks of ARC; those of a test set need no training data, since they bring their own examples."""
  data = config.data
  with name_key("data.arc.path"):
    training, dropped = open_arc(copy_to_local(data.arc.path), config) if data.arc.path else (None, [])
  if not data.arc.test_path:
    assert training is not None
    return _hold_out("arc.path", training, dropped, data.held_out)
  with name_key("data.arc.test_path"):
    test, test_dropped = open_arc(copy_to_local(data.arc.test_path), config)
  _require_any("arc.test_path", test, test_dropped)
  return _Opened(training or dataclasses.replace(test, tasks=[]), test.as_test_set(), [*dropped, *test_dropped])


def _hold_out(name: str, source: SplittableSource, dropped: Sequence[Dropped], share: float) -> _Opened:
  _require_any(name, source, dropped)
  return _Opened(*source.split(share), dropped)


def _with_test_set(
  name: str, source: PairSentences, dropped: Sequence[Dropped], test: tuple[PairSentences, Sequence[Dropped]]
) -> _Opened:
  _require_any(name, source, dropped)
  test_source, test_dropped = test
  held_out, unusable = source.with_test_set(test_source)
  return _Opened(source, held_out, [*dropped, *test_dropped, *unusable])


def _require_any(name: str, source: SentenceSource, dropped: Sequence[Dropped]) -> None:
  if not len(source):
    reasons = "; ".join(map(str, dropped[:3])) or "it is empty"
    raise UserError(f"nothing in config.data.{name} can be used: {reasons}")
