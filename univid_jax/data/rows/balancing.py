"""Deals packed rows to batches and devices so that devices have equal work; see `Packing.BALANCED`."""

import dataclasses
from typing import Any

import grain
import numpy as np
from jaxtyping import Float, Int

from univid_jax.config.schema import RowsConfig
from univid_jax.core.packed_row import PackedRow
from univid_jax.data.rows.packing import join_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchLayout:
  """Which rows of a batch are computed at the same time.

  Attributes:
    num_rows: rows of a batch; consecutive ones belong to one device.
    rows_per_device: rows of a batch on each device.
    microbatches: number of microbatches; consecutive rows of a device belong to consecutive microbatches.
  """

  num_rows: int
  rows_per_device: int = 1
  microbatches: int = 1

  @classmethod
  def from_config(cls, rows: RowsConfig, num_shards: int) -> "BatchLayout":
    """Returns the layout of a run's batches.

    Args:
      rows: the run's config of rows.
      num_shards: data x fsdp devices.

    Raises:
      UserError: see `RowsConfig.batch_size`.
    """
    num_rows = rows.batch_size(num_shards)
    return cls(num_rows=num_rows, rows_per_device=num_rows // num_shards, microbatches=rows.microbatches)

  @property
  def shape(self) -> tuple[int, int, int]:
    """Number of devices, of rows of a device in a microbatch, and of microbatches."""
    return self.num_rows // self.rows_per_device, self.rows_per_device // self.microbatches, self.microbatches

  def sum_work(self, work: Float[np.ndarray, "b"]) -> Float[np.ndarray, "devices microbatches"]:
    """Returns the work of each device in each microbatch, given that of each row."""
    return work.reshape(self.shape).sum(1)

  def part(self, num_rows: int) -> "BatchLayout":
    """Returns the layout of a stream's rows of the batch, which may end within a device's rows."""
    rows_per_device = int(np.gcd(num_rows, self.rows_per_device))
    microbatches = self.microbatches if rows_per_device % self.microbatches == 0 else 1
    return BatchLayout(num_rows=num_rows, rows_per_device=rows_per_device, microbatches=microbatches)


def deal_rows(work: Float[np.ndarray, "n"], layout: BatchLayout) -> Int[np.ndarray, "k b"]:
  """Deals rows to batches so that rows of similar work are computed at the same time.

  Batches, and microbatches within them, take rows in the order of work, heaviest first. If devices have several rows of
  a microbatch, the device with the least work so far gets the heaviest of the next rows.

  Returns:
    The indices of the rows of each batch.
  """
  devices, rows_per_device, microbatches = layout.shape
  ranked = np.argsort(-work, kind="stable").reshape(-1, microbatches, rows_per_device, devices)
  dealt = np.empty((len(ranked), devices, rows_per_device, microbatches), np.int64)
  for k, m in np.ndindex(len(ranked), microbatches):
    load = np.zeros(devices)
    for r, rows in enumerate(ranked[k, m]):
      order = np.argsort(load, kind="stable")
      dealt[k, order, r, m] = rows
      load[order] += work[rows]
  return dealt.reshape(-1, layout.num_rows)


class BalancedBatches(grain.IterDataset[PackedRow]):
  """Batches of rows of similar work.

  Rows are taken a window at a time and dealt to batches by their work in attention; then the batches are shuffled. Only
  attention differs between rows: everything else is computed for padding too. The order of a window's batches, as ranks
  of work, depends only on the seed and the window's number, so that all streams have heavy batches in the same steps.

  Args:
    rows: an endless dataset of single rows (b = 1).
    layout: of a batch.
    window: number of batches in a window.
    seed: seed of the order of batches.
  """

  def __init__(self, rows: grain.IterDataset[PackedRow], *, layout: BatchLayout, window: int, seed: int):
    super().__init__(rows)
    self._rows, self._layout, self._window, self._seed = rows, layout, window, seed

  def __iter__(self) -> grain.DatasetIterator[PackedRow]:
    return _BalancedIterator(iter(self._rows), layout=self._layout, window=self._window, seed=self._seed)


class _BalancedIterator(grain.DatasetIterator[PackedRow]):
  """Its position is that of the rows before the current window, and the number of the window's batches taken.

  If a batch has another number of rows than when the position was saved, the window is dealt again from its start.
  """

  def __init__(self, rows: grain.DatasetIterator[PackedRow], *, layout: BatchLayout, window: int, seed: int):
    super().__init__(rows)
    self._source, self._layout, self._size, self._seed = rows, layout, window, seed
    self._enter_window(0)

  def _enter_window(self, number: int, taken: int = 0) -> None:
    """Enters a window that begins with the next row, and of which `taken` batches were taken already."""
    self._number, self._taken = number, taken
    self._start = self._source.get_state()
    self._rows: list[PackedRow] = []
    self._batches: Int[np.ndarray, "k b"] | None = None

  def __next__(self) -> PackedRow:
    if self._batches is None:
      self._rows = [next(self._source) for _ in range(self._size * self._layout.num_rows)]
      batches = deal_rows(np.concatenate([np.add(*count_pairs(row)) for row in self._rows]), self._layout)
      self._batches = np.random.default_rng((self._seed, self._number)).permutation(batches)
    batch = join_rows([self._rows[index] for index in self._batches[self._taken]])
    self._taken += 1
    if self._taken == self._size:
      self._enter_window(self._number + 1)
    return batch

  def get_state(self) -> dict[str, Any]:
    position = {"rows": self._start, "window": self._number, "taken": self._taken}
    return position | {"rows_per_batch": self._layout.num_rows}

  def set_state(self, state: dict[str, Any]) -> None:
    self._source.set_state(state["rows"])
    is_same = state.get("rows_per_batch", self._layout.num_rows) == self._layout.num_rows
    self._enter_window(state["window"], state["taken"] if is_same else 0)


def count_pairs(rows: PackedRow) -> tuple[Float[np.ndarray, "b"], Float[np.ndarray, "b"]]:
  """Counts in each row the pairs of a token and a token that it attends to, and likewise for text tokens."""
  assert rows.key_intervals is not None and rows.text_intervals is not None
  tokens, text = (np.diff(x)[..., 0].sum(1, dtype=np.float64) for x in (rows.key_intervals, rows.text_intervals))
  return tokens, text
