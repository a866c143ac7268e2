"""Sentences drawn by joining pairs of one task, as the paper joins its 20 samples."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from univid_jax.core.contexts import CONTEXTS, limit_clips, make_sentence, video_pattern
from univid_jax.core.errors import UserError
from univid_jax.core.sentence import Sentence
from univid_jax.core.text import count_noun, is_or_are, join_words, size_text
from univid_jax.data.clips import ClipFormat, Footage
from univid_jax.data.identities import identify_all
from univid_jax.data.media.schedule import is_same_rate
from univid_jax.data.prompts import prompt_for
from univid_jax.data.sources.base import DrawOptions, Dropped, draw, group_indices, hold_out, printable

# A task and a size: the pairs that can be joined.
Group = tuple[str, tuple[int, int]]

# How far the aspect ratios of source and target may differ: cropping would misalign them.
MAX_ASPECT_DIFFERENCE = 1.02
# How far their frame rates may differ: 29.97 and 30 are the same within a clip.
MAX_RATE_DIFFERENCE = 1.01


@dataclasses.dataclass(frozen=True)
class Pair:
  """A source and its target under a task.

  Attributes:
    task: its name.
    name: of the pair; a sentence joins pairs of different names.
    source, target: what the clips are taken from.
    size: height and width of the clips.
  """

  task: str
  name: str
  source: Footage
  target: Footage
  size: tuple[int, int]

  @property
  def group(self) -> Group:
    return self.task, self.size

  def fits(self, context: str, num_frames: int) -> bool:
    """Returns whether the pair is long enough for a context, as example and as query: images make no videos."""
    return all(
      footage.num_frames >= num_frames
      for part in CONTEXTS[context]
      for footage, is_video in zip((self.source, self.target), part)
      if is_video
    )


@dataclasses.dataclass(frozen=True)
class PairSentences:
  """Sentences of pairs of one task and size and of different names, `options.variants` for each query.

  Attributes:
    pairs: example pairs, and queries if `queries` is None.
    form: of the clips.
    options: how pairs are joined.
    queries: the pairs whose targets are predicted, each with others as its examples.
  """

  pairs: Sequence[Pair]
  form: ClipFormat
  options: DrawOptions
  queries: Sequence[Pair] | None = None

  def __len__(self) -> int:
    return len(self._queries) * self.options.variants

  @property
  def _queries(self) -> Sequence[Pair]:
    return self.pairs if self.queries is None else self.queries

  @functools.cached_property
  def groups(self) -> Mapping[Group, Sequence[Pair]]:
    groups: dict[Group, list[Pair]] = {}
    for pair in self.pairs:
      groups.setdefault(pair.group, []).append(pair)
    return groups

  @functools.cached_property
  def contexts(self) -> Mapping[Group, Mapping[str, float]]:
    """The weights of the contexts for which all pairs of a group are long enough."""
    return {
      group: {
        name: weight
        for name, weight in self.options.contexts.items()
        if all(pair.fits(name, self.form.num_frames) for pair in pairs)
      }
      for group, pairs in self.groups.items()
    }

  def has_videos(self, group: Group) -> bool:
    """Returns whether any sentence of a group has videos; else first frames alone are used."""
    used = [name for name, weight in self.contexts[group].items() if weight > 0]
    return any(is_video for name in used for is_video in video_pattern(name, num_clips=4))

  def describe_left_out(self) -> Iterator[tuple[str, bool]]:
    """Yields for each group which contexts with a weight it lacks, why, and whether that may surprise."""
    for group, pairs in self.groups.items():
      weights, kept = self.options.contexts, self.contexts[group]
      left_out = [name for name, weight in weights.items() if weight > 0 and name not in kept]
      if left_out:
        reason, surprises = self._explain_left_out(pairs)
        yield f"{printable(group[0])} has no sentences of context {join_words(left_out, 'or')}{reason}", surprises

  def _explain_left_out(self, pairs: Sequence[Pair]) -> tuple[str, bool]:
    """Returns why contexts are left out; that all sources, or all targets, are images does not surprise."""
    lengths = {pair.name: (pair.source.num_frames, pair.target.num_frames) for pair in pairs}
    short = {name: count for name, both in lengths.items() for count in both if 1 < count < self.form.num_frames}
    if not short:
      parts = {
        part: sum(both[index] == 1 for both in lengths.values()) for index, part in enumerate(("sources", "targets"))
      }
      images = [part for part, count in parts.items() if count == len(lengths)]
      if images and all(part in images or not count for part, count in parts.items()):
        return f": its {'pairs' if len(images) > 1 else images[0]} are images", False
      short = {name: 1 for name, both in lengths.items() if 1 in both}
    first = max(short, key=short.__getitem__)
    of_pairs = f"{len(short)} of its {count_noun(len(pairs), 'pair')} {is_or_are(len(short))} too short"
    frames = f"{count_noun(short[first], 'frame')} instead of {self.form.num_frames}"
    return f", for whose videos {of_pairs}, such as {printable(first)} with {frames}", True

  @property
  def task_names(self) -> tuple[str, ...]:
    return tuple(sorted({task for task, _ in self.groups}))

  def indices_by_task(self) -> dict[str, Iterator[int]]:
    """See `GroupsByTask`."""
    return group_indices([pair.task for pair in self._queries], self.options.variants)

  @property
  def prompts(self) -> dict[str, str]:
    """The prompt of each task."""
    return {task: self._prompt(task) for task in self.task_names}

  def _prompt(self, task: str) -> str:
    return prompt_for(task.replace("_", " "), self.options.prompt_style)

  def identify_records(self) -> dict[str, object]:
    """See `IdentifiesRecords`: the pairs that are queried."""
    sources = identify_all([pair.source.identify for pair in self._queries])
    targets = identify_all([pair.target.identify for pair in self._queries])
    names = [f"{pair.task}/{pair.name}" for pair in self._queries]
    return dict(zip(names, zip(sources, targets, strict=True), strict=True))

  def split(self, share: float) -> tuple["PairSentences", "PairSentences"]:
    """Holds out a share of the pairs of each task and size, rounded down, but leaves at least two.

    Held-out sentences query the held-out pairs, with their prompts; their examples are training pairs.
    """
    kept, held_out = hold_out(self.pairs, share, group=lambda pair: pair.group, keep_at_least=2)
    training = dataclasses.replace(self, pairs=kept)
    return training, dataclasses.replace(training, queries=held_out, options=self.options.with_prompts())

  def with_test_set(self, test: "PairSentences") -> tuple["PairSentences", list[Dropped]]:
    """Returns sentences that query a test set with these pairs as examples, and the pairs that cannot be queried."""
    queries, dropped = [], []
    for pair in test.pairs:
      if any(weight > 0 for weight in self._contexts_of(pair).values()):
        queries.append(pair)
      else:
        reason = "the training data has no example of its task, size and length"
        dropped.append(Dropped(printable(f"{pair.task}/{pair.name}"), reason))
    return dataclasses.replace(self, queries=queries, options=self.options.with_prompts()), dropped

  def __getitem__(self, index: int) -> Sentence:
    options = self.options
    rng = np.random.default_rng((options.seed, int(index)))
    query = self._queries[int(index) % len(self._queries)]
    num_clips = int(draw(rng, options.num_clips))
    context = draw(rng, self._contexts_of(query))
    num_clips = limit_clips(num_clips, context, options.max_video_clips)
    others = [pair for pair in self.groups[query.group] if pair.name != query.name]
    count = num_clips // 2 - 1
    examples = [others[i] for i in rng.choice(len(others), size=count, replace=len(others) < count)]
    pattern = video_pattern(context, num_clips)
    lengths = [self.form.num_frames if is_video else 1 for is_video in pattern]
    pairs = [
      (pair.source.clip(source_length), pair.target.clip(target_length))
      for pair, source_length, target_length in zip((*examples, query), lengths[::2], lengths[1::2])
    ]
    dropped = rng.random() < options.prompt_dropout
    sentence = make_sentence(
      pairs,
      reverse=rng.random() < options.reverse_probability,
      prompt="" if dropped else self._prompt(query.task),
      task=query.task,
      context=context,
    )
    names = ", ".join(pair.name for pair in examples)
    return sentence.replace(record=printable(f"{query.task}/{query.name} with the examples {names}"))

  def _contexts_of(self, query: Pair) -> dict[str, float]:
    """Returns the weights of the contexts that a query and its examples can have."""
    contexts = self.contexts.get(query.group, {})
    return {name: weight for name, weight in contexts.items() if query.fits(name, self.form.num_frames)}


def check_aligned(source: Footage, target: Footage, num_frames: int) -> None:
  """Checks that the aspect ratios, frame rates and numbers of frames of source and target agree.

  Clips without a rate (folders, arrays) are never resampled: their frames match those of the other clip as long as that
  keeps its own rate. Where neither has one, they are taken frame by frame whatever `config.data.fps` says.

  Args:
    source, target: of a pair, which are brought to one size.
    num_frames: of a video clip; 1 if only first frames are used.

  Raises:
    UserError: they do not agree.
  """
  aspects = sorted(footage.size[1] / footage.size[0] for footage in (source, target))
  if aspects[1] > MAX_ASPECT_DIFFERENCE * aspects[0]:
    raise UserError(
      f"the source is {size_text(source.size)} and the target {size_text(target.size)} (width x height): cropped to "
      "one size they would not be aligned"
    )
  short, long = sorted((source.num_frames, target.num_frames))
  if min(short, num_frames) > 1:
    _check_rates(source, target, num_frames)
  if 1 < short < min(num_frames, long):
    raise UserError(
      f"the source has {count_noun(source.num_frames, 'frame')} and the target {target.num_frames}; {num_frames} of "
      "each are needed"
    )


def _check_rates(source: Footage, target: Footage, num_frames: int) -> None:
  """Raises UserError if frame n of one video is not frame n of the other."""
  resampled = source.form.fps
  if source.fps and target.fps:
    if not resampled and _differ(source.fps, target.fps):
      raise UserError(
        f"the source has {source.fps:.5g} frames per second and the target {target.fps:.5g}: set config.data.fps, to "
        "which both are resampled"
      )
    elif resampled:
      _check_drift(source, target, num_frames)
  elif source.is_resampled or target.is_resampled:
    timed, untimed = ("source", "target") if source.fps else ("target", "source")
    rate = source.fps or target.fps or resampled
    origin = "a varying rate" if is_same_rate(rate, resampled) else f"{rate:.5g}"
    raise UserError(
      f"the {timed} is resampled from {origin} to config.data.fps = {resampled:.5g} frames per second, and the "
      f"{untimed} has no rate and cannot be: set config.data.fps=0, or make a video of the {untimed}"
    )


def _check_drift(source: Footage, target: Footage, num_frames: int) -> None:
  """Raises UserError if one video keeps a rate that hardly differs from that to which the other is resampled, and the
  clips begin so late that their frames are apart all the same."""
  slow, fast = sorted((source.clip_fps or 0.0, target.clip_fps or 0.0))
  kept = slow if slow != source.form.fps else fast
  last = max(source.start, target.start) + num_frames
  if last * (1 - slow / fast) > 0.5:
    raise UserError(
      f"source and target are read at {slow:.5g} and {fast:.5g} frames per second, and frame {last} of one is "
      f"{last * (1 - slow / fast):.1f} frames from that of the other: set config.data.fps={kept:.6g}"
    )


def _differ(rate: float, other: float) -> bool:
  return max(rate, other) > MAX_RATE_DIFFERENCE * min(rate, other)


def join_pairs(
  pairs: Sequence[Pair], dropped: Sequence[Dropped], form: ClipFormat, options: DrawOptions
) -> tuple[PairSentences, list[Dropped]]:
  """Returns the sentences of pairs, without groups that cannot make one, and everything that was dropped."""
  sentences = PairSentences(pairs, form, options)
  kept, dropped = [], list(dropped)
  for group, members in sentences.groups.items():
    task, size = group
    if len({pair.name for pair in members}) < 2:
      where = f" at {size_text(size)} (width x height)" if form.buckets else ""
      dropped.append(Dropped(printable(task), f"a task needs pairs of at least two names{where}"))
    elif not any(weight > 0 for weight in sentences.contexts[group].values()):
      reason = f"its pairs are too short for {form.num_frames} frames, and contexts of images have no weight"
      dropped.append(Dropped(printable(task), reason))
    else:
      kept += members
  return dataclasses.replace(sentences, pairs=kept), dropped
