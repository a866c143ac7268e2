"""Sentences of grid tasks."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from univid_jax.config.schema import RunConfig
from univid_jax.core.contexts import limit_clips, possible_contexts, possible_counts, video_pattern
from univid_jax.core.errors import UserError
from univid_jax.core.options import PromptStyle
from univid_jax.core.sentence import Sentence, reference_roles
from univid_jax.data.prompts import prompt_for
from univid_jax.data.sources.base import draw, sort_weights
from univid_jax.data.tasks.grids import GRID_FAMILIES
from univid_jax.data.tasks.grids.base import (
  Grid,
  GridFamily,
  GridSplit,
  Params,
  Size,
  is_held_out_grid,
  is_same,
  task_name,
)
from univid_jax.data.tasks.grids.rendering import STATE_FRAMES, Rendering

# Draws until grids are suitable; more than a hundredth of this was never seen.
MAX_TRIES = 10_000

# The states that a clip shows.
States = Sequence[Grid]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridSentences:
  """Sentences of grid tasks; the seed and the index determine a sentence, whose examples determine its answer.

  Attributes:
    families: weights by name.
    contexts: weights by name, for families in which time plays a part.
    num_clips: weights by number of clips in a sentence.
    max_video_clips: see `DataConfig`.
    num_frames: of a video clip, 4n + 1.
    sides: range of a grid's height and width in cells.
    rendering: how grids are drawn.
    num_sentences: how many there are.
    seed: of all draws.
    split_name: which rules and grids they show.
    by_reference: whether clips are drawn when they are read, and have keys under which latents are cached.
    prompt_style: of the prompts.
    prompt_dropout: share of sentences with the null prompt.
  """

  families: Mapping[str, float]
  contexts: Mapping[str, float]
  num_clips: Mapping[int, float]
  max_video_clips: int
  num_frames: int
  sides: tuple[int, int]
  rendering: Rendering
  num_sentences: int
  seed: int
  split_name: GridSplit = GridSplit.TRAIN
  by_reference: bool = False
  prompt_style: PromptStyle = PromptStyle.NULL
  prompt_dropout: float = 0.0

  @classmethod
  def open(cls, config: RunConfig) -> "GridSentences":
    """Opens the training sentences of a config.

    Raises:
      UserError: the grids of a family do not fit.
    """
    data, rendering = config.data, Rendering.from_config(config.data)
    for name, weight in data.grids.families.items():
      size = GRID_FAMILIES[name].size
      if weight > 0 and size and not rendering.fits(size):
        raise UserError(
          f"config.data.grids.families.{name}: its grids of {size[0]}x{size[1]} cells of {rendering.cell} pixels do "
          f"not fit into config.data.height and width = {data.height}x{data.width}"
        )
    return cls(
      families=sort_weights(data.grids.families),
      contexts=sort_weights(data.contexts),
      num_clips=sort_weights(data.clip_counts),
      max_video_clips=data.max_video_clips,
      num_frames=data.num_frames,
      sides=(data.grids.min_side, data.grids.max_side),
      rendering=rendering,
      num_sentences=data.num_sentences,
      seed=config.seed,
      by_reference=bool(config.init_from),
      prompt_style=data.prompt,
      prompt_dropout=data.prompt_dropout,
    )

  @property
  def task_names(self) -> tuple[str, ...]:
    return tuple(name for name, weight in self.families.items() if weight > 0)

  @property
  def prompts(self) -> dict[str, str]:
    """The prompt of each task."""
    return {name: self._prompt(name) for name in self.task_names}

  def _prompt(self, family: str) -> str:
    return prompt_for(GRID_FAMILIES[family].prompt_name, self.prompt_style)

  def __len__(self) -> int:
    return self.num_sentences

  def split(self, share: float) -> "tuple[GridSentences, GridSentences]":
    """Returns these sentences, and those of held-out rules and grids, with prompts, whatever the share."""
    del share
    return self, dataclasses.replace(self, split_name=GridSplit.HELD_OUT, prompt_dropout=0.0)

  def cases(self) -> Iterator["GridSentences"]:
    """Yields the evaluation's sentences of every family, split, context and number of clips with a positive weight."""
    for name, family in GRID_FAMILIES.items():
      splits = [GridSplit.HELD_OUT, *([GridSplit.TRAINED_RULES] if family.is_held_out else [])]
      for split in splits if self.families.get(name, 0) > 0 else []:
        for context in self.contexts_of(name):
          for count in possible_counts(self.num_clips, context, self.max_video_clips):
            yield dataclasses.replace(
              self, families={name: 1.0}, contexts={context: 1.0}, num_clips={count: 1.0}, split_name=split
            )

  def contexts_of(self, family: str) -> Mapping[str, float]:
    """Returns the contexts of a family with a positive weight."""
    possible = possible_contexts(self.contexts, GRID_FAMILIES[family].motion)
    return {name: weight for name, weight in sorted(possible.items()) if weight > 0}

  def __getitem__(self, index: int) -> Sentence:
    rng = np.random.default_rng((self.seed, int(index)))
    name = draw(rng, self.families)
    context = draw(rng, self.contexts_of(name))
    num_clips = limit_clips(int(draw(rng, self.num_clips)), context, self.max_video_clips)
    dropped = rng.random() < self.prompt_dropout
    params, clips = self._draw_clips(rng, GRID_FAMILIES[name], video_pattern(context, num_clips))
    draw_clip = self.rendering.clip if self.by_reference else self.rendering.render
    return Sentence(
      clips=tuple(map(draw_clip, clips)),
      roles=reference_roles(len(clips)),
      prompt="" if dropped else self._prompt(name),
      task=task_name(name, self.split_name),
      context=context,
      params={**params, "family": name, "split": describe_split(name, self.split_name)},
      record=f"grid sentence {int(index)}",
    )

  def _draw_clips(
    self, rng: np.random.Generator, family: GridFamily, pattern: Sequence[bool]
  ) -> tuple[Params, list[States]]:
    """Draws the parameters and the states of every clip until the examples determine the answer, and none shows it."""
    steps = [(self.num_frames - 1) // STATE_FRAMES if is_video else 0 for is_video in pattern]
    for _ in range(MAX_TRIES):
      size = family.size or tuple(rng.integers(self.sides[0], self.sides[1] + 1, 2).tolist())
      params = family.draw(rng, size)
      if family.is_held_out and family.is_held_out(params) != self.split_name.holds_out_rules:
        continue
      pairs: list[tuple[Grid, Grid]] = []
      for _ in pattern[::2]:
        pair = self._draw_pair(rng, family, size, params, [source for source, _ in pairs])
        if pair is None:
          break
        pairs.append(pair)
      if len(pairs) < len(pattern) // 2:
        continue
      sources = [source for source, _ in pairs]
      targets = [
        family.targets(source, count, params) if count > 1 else [target]
        for (source, target), count in zip(pairs, steps[1::2])
      ]
      *others, answer = (target[-1] for target in targets)
      if any(is_same(other, answer) for other in others):
        continue
      if _is_determined(family, params, list(zip(sources, targets))):
        clips: list[States] = []
        for source, target, source_steps, target_steps in zip(sources, targets, steps[::2], steps[1::2]):
          clips.append([source] * (1 + source_steps))
          clips.append([source, *target] if target_steps else target)
        return params, clips
    raise AssertionError(f"no suitable grids of {self.sides} cells in {MAX_TRIES} draws")

  def _draw_pair(
    self, rng: np.random.Generator, family: GridFamily, size: Size, params: Params, others: Sequence[Grid]
  ) -> tuple[Grid, Grid] | None:
    """Draws a source of the split that differs from the others and from its target; None if that takes too long."""
    for _ in range(100):
      source = family.make(rng, size, **params)
      target = family.apply(source, **params)
      held_out = is_held_out_grid(target if family.splits_by_target else source)
      if (
        held_out == self.split_name.holds_out_grids
        and not is_same(source, target)
        and not any(is_same(source, other) for other in others)
      ):
        return source, target
    return None


def describe_split(family: str, split: GridSplit) -> str:
  """Returns the split of a family in words, for reports; grids of all but training are held out."""
  if split is GridSplit.HELD_OUT:
    return "held-out rules" if GRID_FAMILIES[family].is_held_out else "held-out grids"
  return "trained rules" if split is GridSplit.TRAINED_RULES else "training"


def _is_determined(family: GridFamily, params: Params, pairs: Sequence[tuple[Grid, Sequence[Grid]]]) -> bool:
  """Returns whether all rules that agree with the examples give the query's target, and are held out if this one is."""

  def agrees(other: Params, source: Grid, target: Sequence[Grid]) -> bool:
    return all(is_same(a, b) for a, b in zip(family.targets(source, len(target), other), target))

  *examples, query = pairs
  others = family.alternatives(*pairs[0], **params) if family.alternatives else ()
  others = [other for other in others if all(agrees(other, *example) for example in examples)]
  splits = {family.is_held_out(each) for each in (params, *others)} if family.is_held_out else ()
  return len(splits) <= 1 and all(agrees(other, *query) for other in others)
