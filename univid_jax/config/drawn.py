"""Which sentences a config draws."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping

from univid_jax.config.data import TASK_MOTIONS, DataConfig, SourceWeights
from univid_jax.config.grids import FAMILY_MOTIONS
from univid_jax.core.contexts import IMAGES, Motion, possible_contexts, possible_counts
from univid_jax.core.errors import UserError
from univid_jax.core.options import PromptStyle

# A context and a number of clips.
Kind = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class DrawnSentences:
  """The sentences that a config draws, as far as they do not depend on the data.

  Pairs and tables may lack contexts because their clips are too short. Tasks that code adds count as tasks of images
  and videos; a config that names no data, as for a forecast, counts as one of pairs.

  Attributes:
    kinds: the known kinds of sentences.
    lists_contexts: whether there are records that list their clips, with contexts of their own.
    lists_counts: whether there are records with numbers of clips of their own: the same, and tasks of ARC.
    lists_prompts: whether there are records that may have prompts of their own: lines of manifests and tables, unless
      the style of prompts is null.
  """

  kinds: frozenset[Kind]
  lists_contexts: bool
  lists_counts: bool
  lists_prompts: bool

  @classmethod
  def from_config(cls, data: DataConfig) -> "DrawnSentences":
    """Returns the sentences that are drawn in training; raises UserError for an unknown context."""
    manifest, arc, table = (_is_used(data, name) for name in ("manifest", "arc", "metadata"))
    return cls(
      frozenset(_kinds(data)),
      lists_contexts=manifest,
      lists_counts=manifest or arc,
      lists_prompts=(manifest or table) and data.prompt != PromptStyle.NULL,
    )

  @property
  def contexts(self) -> tuple[str, ...]:
    """The contexts, sorted; empty if they are not known."""
    return () if self.lists_contexts else tuple(sorted({context for context, _ in self.kinds}))

  @property
  def clip_counts(self) -> tuple[int, ...]:
    """The numbers of clips, sorted; empty if they are not known."""
    return () if self.lists_counts else tuple(sorted({count for _, count in self.kinds}))


def check_weights(data: DataConfig, used: Collection[str], motions: Mapping[str, Motion]) -> None:
  """Checks that there is something to draw wherever sentences are drawn by weights.

  Args:
    data: the config.
    used: which of `SourceWeights` the sentences are from.
    motions: motion of each computed task.

  Raises:
    UserError: all weights of a key are 0.
  """
  tasks = [name for name, weight in data.tasks.items() if weight > 0 and "computed" in used]
  families = [name for name, weight in data.grids.families.items() if weight > 0 and "grids" in used]
  animating = [name for name in tasks if motions.get(name) == Motion.ANIMATES]
  moving = [name for name in families if FAMILY_MOTIONS[name] != Motion.NONE]
  needed = {
    "tasks": "computed" in used,
    "num_clips": not {"computed", "grids", "pairs", "tfds"}.isdisjoint(used),
    "contexts": len(tasks) > len(animating) or moving or not {"pairs", "tfds", "metadata"}.isdisjoint(used),
    "animating_contexts": animating,
  }
  for key, is_needed in needed.items():
    if is_needed and not any(getattr(data, key).values()):
      raise UserError(f"the weights of config.data.{key} are all 0, so no sentence can be drawn: give one of them more")


def _kinds(data: DataConfig) -> Iterator[Kind]:
  def kinds(contexts: Mapping[str, float], counts: Mapping[int, float]) -> Iterator[Kind]:
    for context, weight in contexts.items():
      if weight > 0:
        yield from ((context, count) for count in possible_counts(counts, context, data.max_video_clips))

  if _is_used(data, "computed"):
    for task, weight in data.tasks.items():
      motion = TASK_MOTIONS.get(task, Motion.OPTIONAL)
      drawn = data.animating_contexts if motion == Motion.ANIMATES else data.contexts
      yield from kinds(possible_contexts(drawn, motion) if weight > 0 else {}, data.clip_counts)
  if _is_used(data, "grids"):
    for family, weight in data.grids.families.items():
      contexts = possible_contexts(data.contexts, FAMILY_MOTIONS[family])
      yield from kinds(contexts if weight > 0 else {}, data.clip_counts)
  is_nothing_named = not any(_is_used(data, field.name) for field in dataclasses.fields(SourceWeights))
  if _is_used(data, "pairs") or _is_used(data, "tfds") or is_nothing_named:
    yield from kinds(data.contexts, data.clip_counts)
  if _is_used(data, "metadata"):
    yield from kinds(data.contexts, {4: 1.0})
  if _is_used(data, "arc"):
    yield IMAGES, 4


def _is_used(data: DataConfig, name: str) -> bool:
  """Returns whether a config trains on one of the sources of `SourceWeights`."""
  given = {
    "computed": data.has_computed,
    "metadata": data.metadata,
    "pairs": data.pairs,
    "manifest": data.manifest,
    "tfds": data.tfds.name,
    "arc": data.arc.path,
    "grids": data.grids.enabled,
  }
  return bool(given[name]) and getattr(data.weights, name) > 0
