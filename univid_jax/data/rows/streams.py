"""A stream of rows: its share of the sentences, packed into its rows of every batch."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from univid_jax.core.options import Packing
from univid_jax.core.packed_row import ContextMode, PackedRow
from univid_jax.data.rows.balancing import BalancedBatches, BatchLayout
from univid_jax.data.rows.grain_adapter import pack_dataset
from univid_jax.data.rows.packing import finish_rows
from univid_jax.data.rows.tokens import SEGMENTED


def mix_sources(
  sources: Sequence[grain.sources.RandomAccessDataSource[Any]],
  weights: Sequence[float],
  *,
  seed: int,
  index: int,
  count: int,
) -> grain.MapDataset[dict[str, np.ndarray] | None]:
  """Repeats each source endlessly, reshuffled each time, and mixes one stream's share of each.

  Every `count`-th sentence of a mixture would be from few sources only, as it alternates between them. Streams begin
  with different sources, since otherwise all would reach the same one at the same time.
  """
  shares = [grain.MapDataset.source(source).seed(seed).shuffle().repeat()[index::count] for source in sources]
  if len(shares) == 1:
    return shares[0]
  first = index % len(shares)
  return grain.MapDataset.mix([*shares[first:], *shares[:first]], [*weights[first:], *weights[:first]])


def pack_batches(
  sentences: grain.IterDataset[dict[str, np.ndarray] | None],
  *,
  capacities: Mapping[str, int],
  context_mode: ContextMode,
  packing: Packing,
  layout: BatchLayout,
  num_bins: int,
  seed: int,
) -> grain.IterDataset[PackedRow]:
  """Packs a stream's sentences into its rows of every batch."""
  finish = functools.partial(_finish, capacities, context_mode)
  window = max(num_bins // layout.num_rows, 1)
  balances = packing == Packing.BALANCED
  rows = pack_dataset(
    sentences,
    capacities=capacities,
    segmented=SEGMENTED.values(),
    packing=packing,
    num_bins=window * layout.num_rows if balances else num_bins,
    seed=seed,
  )
  if not balances:
    return rows.batch(layout.num_rows, drop_remainder=True).map(finish)
  return BalancedBatches(rows.map(_add_row_dim).map(finish), layout=layout, window=window, seed=seed)


def _add_row_dim(row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {name: value[None] for name, value in row.items()}


def _finish(capacities: Mapping[str, int], context_mode: ContextMode, batch: Mapping[str, np.ndarray]) -> PackedRow:
  """Turns a batch of packed features into rows."""
  packed = {name: batch[name] for name in capacities}
  segment_ids = {unit: batch[f"{name}_segment_ids"] for unit, name in SEGMENTED.items() if name in capacities}
  return finish_rows(packed, segment_ids, context_mode=context_mode)
