"""The only module with experimental APIs of Grain; tests/test_grain_adapter.py fails if an upgrade changes them."""

from collections.abc import Collection, Mapping
from typing import Any

import grain

from univid_jax.core.options import Packing

_PACKERS = {
  Packing.FIRST_FIT: grain.experimental.FirstFitPackIterDataset,
  Packing.BEST_FIT: grain.experimental.BestFitPackIterDataset,
}


def pack_dataset(
  dataset: grain.IterDataset[Any],
  *,
  capacities: Mapping[str, int],
  segmented: Collection[str],
  packing: Packing,
  num_bins: int,
  seed: int,
) -> grain.IterDataset[Any]:
  """Packs elements, which are dicts of arrays, into rows.

  Grain fills `num_bins` rows at a time and gives them out in random order. Its position can be saved and restored: it
  packs the same elements again.

  Args:
    dataset: of the elements.
    capacities: length of each array in a row.
    segmented: arrays NAME for which a row gets NAME_segment_ids: the element of each entry, from 1; 0 is padding.
    packing: which open row an element goes to.
    num_bins: rows that are open at the same time.
    seed: of the order.
  """
  return _PACKERS[packing](
    dataset,
    length_struct=dict(capacities),
    num_packing_bins=num_bins,
    seed=seed,
    meta_features=tuple(name for name in capacities if name not in segmented),
  )


def prefetch(dataset: grain.IterDataset[Any], *, buffer_size: int) -> grain.IterDataset[Any]:
  """Makes up to `buffer_size` elements in advance, in a thread of its own."""
  return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=buffer_size)
