"""What univid_jax relies on of Grain's experimental APIs.

If one of these tests fails after an upgrade of Grain, `data/rows/grain_adapter.py` has to be adapted. If only the order
of rows has changed, a seed gives other batches than before and runs of earlier versions cannot be resumed bit-exactly:
say so in CHANGELOG.md and update the expected order.
"""

import inspect
import os
import signal
import subprocess
import sys
import time

import grain
import numpy as np
import pytest

from univid_jax.core.options import Packing
from univid_jax.data.rows.grain_adapter import pack_dataset, prefetch, prefetch_in_process

LENGTHS = (4, 4, 6, 5, 4, 4, 4, 6, 2, 5, 5, 1)


def rows(packing=Packing.FIRST_FIT):
  elements = [{"x": np.full(length, 1 + index), "y": np.full(1, 1 + index)} for index, length in enumerate(LENGTHS)]
  dataset = grain.MapDataset.source(elements).repeat().to_iter_dataset()
  return pack_dataset(dataset, capacities={"x": 8, "y": 3}, segmented=["x"], packing=packing, num_bins=3, seed=0)


@pytest.mark.parametrize("name", ["FirstFitPackIterDataset", "BestFitPackIterDataset"])
def test_packing_takes_these_arguments(name):
  parameters = inspect.signature(getattr(grain.experimental, name)).parameters
  assert {"length_struct", "num_packing_bins", "seed", "meta_features"} <= set(parameters)


def test_prefetching_takes_these_arguments():
  assert "prefetch_buffer_size" in inspect.signature(grain.experimental.ThreadPrefetchIterDataset).parameters


def test_iterators_start_save_restore_and_close():
  """The loop starts prefetching while the step compiles; the position is saved with every checkpoint."""
  assert all(hasattr(grain.DatasetIterator, name) for name in ("start_prefetch", "get_state", "set_state", "close"))
  assert hasattr(grain.checkpoint, "CheckpointSave") and hasattr(grain.checkpoint, "CheckpointRestore")


def test_rows_number_their_elements():
  """Only segmented arrays get segment ids; other arrays are packed in the same order."""
  row = next(iter(rows()))
  assert set(row) >= {"x", "y", "x_segment_ids"} and "y_segment_ids" not in row
  elements = row["y"][row["y"] > 0]
  for number, element in enumerate(elements, 1):
    assert (row["x"] == element).sum() == LENGTHS[element - 1]
    assert np.array_equal(row["x"] == element, row["x_segment_ids"] == number)
  assert np.array_equal(row["x_segment_ids"] == 0, row["x"] == 0)


@pytest.mark.parametrize(
  "packing, expected",
  [
    (Packing.FIRST_FIT, [[4, 0, 0], [1, 2, 0], [3, 0, 0], [8, 0, 0], [7, 9, 0], [5, 6, 0]]),
    (Packing.BEST_FIT, [[4, 0, 0], [1, 2, 0], [3, 0, 0], [8, 9, 0], [7, 0, 0], [5, 6, 0]]),
  ],
)
def test_the_order_of_rows_is_that_of_earlier_versions(packing, expected):
  iterator = iter(rows(packing))
  assert [next(iterator)["y"].tolist() for _ in range(6)] == expected


@pytest.mark.parametrize("in_advance", [prefetch, prefetch_in_process])
def test_a_prefetching_iterator_resumes_where_it_was(in_advance):
  iterator, plain = iter(in_advance(rows(), buffer_size=2)), iter(rows())
  assert [next(iterator)["x"].tolist() for _ in range(4)] == [next(plain)["x"].tolist() for _ in range(4)]
  state = iterator.get_state()
  expected = [next(iterator)["x"].tolist() for _ in range(5)]
  iterator.close()
  again = iter(in_advance(rows(), buffer_size=2))
  again.set_state(state)
  assert [next(again)["x"].tolist() for _ in range(5)] == expected
  again.close()


def test_worker_processes_leave_accelerators_alone_and_end_with_their_parent():
  """Also if the parent is killed; signals, which a terminal sends to all of them, are the parent's to handle."""
  with subprocess.Popen([sys.executable, "-c", WORKERS], stdout=subprocess.PIPE, text=True) as parent:
    assert parent.stdout is not None
    platforms, handler, worker = parent.stdout.readline().split()
    assert (platforms, handler) == ("cpu", str(signal.SIG_IGN.value))
    os.kill(int(worker), 0)
    parent.kill()
  for _ in range(100):
    try:
      os.kill(int(worker), 0)
    except ProcessLookupError:
      return
    time.sleep(0.1)
  pytest.fail("the worker outlived its parent")


WORKERS = """
import os, signal, time
import grain, jax
from univid_jax.data.rows.grain_adapter import prefetch_in_process

def describe(index):
  return f"{jax.config.jax_platforms} {signal.getsignal(signal.SIGTERM).value} {os.getpid()}"

if __name__ == "__main__":
  dataset = grain.MapDataset.range(10).map(describe).to_iter_dataset()
  iterator = iter(prefetch_in_process(dataset, buffer_size=1))
  print(next(iterator), flush=True)
  time.sleep(60)
"""
