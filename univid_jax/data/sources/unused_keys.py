"""Keys of the config on which none of the sources of a run depends."""

from collections.abc import Iterable, Iterator

from univid_jax.config.schema import DataConfig
from univid_jax.core.protocols import SentenceSource
from univid_jax.data.sources.computed import ComputedSentences, LazySentences
from univid_jax.data.sources.grids import GridSentences
from univid_jax.data.sources.listed import ListedSentences
from univid_jax.data.sources.readers.arc import ARCSentences

# Sources whose clips are made at the size of the config, and those whose records list their clips.
_OF_ONE_SIZE = (ComputedSentences, LazySentences, GridSentences, ARCSentences)
_LISTING = (ListedSentences, ARCSentences)


def adapt_clips(sources: Iterable[SentenceSource]) -> bool:
  """Returns whether any of the sources has clips that are brought to one of the config's sizes, cropped or padded."""
  return not all(isinstance(source, _OF_ONE_SIZE) for source in sources)


def describe_unused_keys(config: DataConfig, sources: Iterable[SentenceSource]) -> Iterator[str]:
  """Yields lines about keys that differ from their defaults and have no effect on any of the sources."""
  sources, default = list(sources), DataConfig()
  keys = [key for key in ("buckets", "fit") if getattr(config, key) != getattr(default, key)]
  if keys and sources and not adapt_clips(sources):
    what = "computed tasks, grids and ARC have clips of one size, and are not padded"
    yield f"config.data.{' and '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect: {what}"
  if sources and all(isinstance(source, _LISTING) for source in sources) and {*_counts(config)} != {*_counts(default)}:
    yield "config.data.num_clips has no effect: records of tables, manifests and ARC have numbers of clips of their own"


def _counts(config: DataConfig) -> Iterator[int]:
  """Yields the numbers of clips that sentences may have."""
  return (count for count, weight in config.clip_counts.items() if weight > 0)
