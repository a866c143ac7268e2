"""The only module with experimental APIs of Grain; tests/test_grain_adapter.py fails if an upgrade changes them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Collection, Mapping
from typing import Any

import grain
import jax
from absl import flags

from univid_jax.core.options import Packing

# Smaller arrays are pickled between processes, since opening shared memory takes 0.1 ms.
MIN_SHARED_BYTES = 1 << 17

_PACKERS = {
  Packing.FIRST_FIT: grain.experimental.FirstFitPackIterDataset,
  Packing.BEST_FIT: grain.experimental.BestFitPackIterDataset,
  Packing.BALANCED: grain.experimental.BestFitPackIterDataset,
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

  Grain fills `num_bins` rows at a time and yields them in random order. To restore a saved position, it packs the same
  elements again.

  Args:
    dataset: yields the elements.
    capacities: length of each array in a row.
    segmented: names of arrays for which a row gets NAME_segment_ids: the element of each entry, from 1; 0 is padding.
    packing: which open row an element goes to.
    num_bins: rows that are open at the same time.
    seed: seed of the order of rows.
  """
  return _PACKERS[packing](
    dataset,
    length_struct=dict(capacities),
    num_packing_bins=num_bins,
    seed=seed,
    meta_features=tuple(name for name in capacities if name not in segmented),
  )


def prefetch(dataset: grain.IterDataset[Any], *, buffer_size: int) -> grain.IterDataset[Any]:
  """Makes up to `buffer_size` elements in advance, in a separate thread."""
  return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=buffer_size)


def prefetch_in_process(dataset: grain.IterDataset[Any], *, buffer_size: int) -> grain.IterDataset[Any]:
  """Makes up to `buffer_size` elements in advance, in a separate process; the dataset must be picklable.

  The process has no accelerator and uses one core. It starts along with the thread that waits for it, so that several
  processes start at the same time.
  """
  for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # only affects the worker: this process has read them already
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain reads one of its own flags
  dataset = grain.experimental.WithOptionsIterDataset(
    dataset, grain.experimental.DatasetOptions(min_shm_size=MIN_SHARED_BYTES)
  )
  options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=buffer_size)
  return prefetch(dataset.mp_prefetch(options, worker_init_fn=_start_worker), buffer_size=buffer_size)


def _start_worker(index: int, count: int) -> None:
  """Prepares a worker: it ends with its parent, and leaves signals and accelerators to it."""
  del index, count
  jax.config.update("jax_platforms", "cpu")
  for stop in (signal.SIGINT, signal.SIGTERM):
    signal.signal(stop, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)
