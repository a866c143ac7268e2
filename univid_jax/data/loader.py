"""The input pipeline: from sentences to batches of packed rows. Its position is part of a checkpoint."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int

from univid_jax.core.errors import UserError
from univid_jax.core.options import Packing
from univid_jax.core.packed_row import PackedRow
from univid_jax.core.protocols import SentenceSource
from univid_jax.core.sentence import Sentence
from univid_jax.data.grain_adapter import pack_dataset, prefetch
from univid_jax.data.packing import RowShape, finish_rows
from univid_jax.data.tokens import SEGMENTED, UNITS, Features, Unit, feature_names

log = logging.getLogger(__name__)

# Sentences that are encoded in advance in each stream, and batches.
SENTENCE_BUFFER = 64
BATCH_BUFFER = 2

# The keys of config.rows that limit a single sentence.
_LIMITS: Mapping[Unit, str] = {
  Unit.TOKEN: "num_tokens",
  Unit.TEXT_TOKEN: "num_text_tokens",
  Unit.TARGET_TOKEN: "num_target_tokens",
}


# After so many sentences in a row that cannot be used, there is no point in trying more.
MAX_DROPPED_IN_A_ROW = 1000


@runtime_checkable
class MakeFeatures(Protocol):
  """Encodes sentences; `FeatureMaker` in a run."""

  @property
  def takes_image(self) -> bool:
    """Whether the features contain I2V's condition and image features."""
    ...

  def __call__(self, sentence: Sentence, /) -> Features: ...


def make_loader(
  sources: Sequence[SentenceSource],
  make_features: MakeFeatures,
  *,
  row_shape: RowShape,
  rows_per_batch: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 1,
  num_packing_bins: int | None = None,
  packing: Packing = Packing.FIRST_FIT,
  num_streams: int | None = None,
  weights: Sequence[float] | None = None,
  allow_dropped: bool = False,
) -> grain.DatasetIterator[PackedRow]:
  """Returns an endless, deterministic stream of this process's rows of each batch.

  Args:
    sources: where sentences come from; several are mixed.
    make_features: encodes them.
    row_shape: capacity of a row.
    rows_per_batch: of this process.
    seed: of the order, which changes every epoch.
    process_index, process_count: of this process; each gets its own share of the sentences.
    num_threads: threads per stream that read and encode sentences.
    num_packing_bins: rows that are filled at the same time; by default two batches.
    packing: which of them a sentence goes to.
    num_streams: independent streams of rows; by default (or 0) one per process. With a fixed number, batches do not
      depend on the number of processes.
    weights: how often each source is drawn; equal by default.
    allow_dropped: leave out sentences that cannot be used, and log each once, instead of stopping.

  Raises:
    UserError: the streams do not divide; or, from the iterator, a sentence has a clip that cannot be read, or is too
      long for a row. The message names the record and the file.
  """
  num_streams = num_streams or process_count
  count = _divide_streams(num_streams, process_count, rows_per_batch)
  capacities = row_shape.capacities(feature_names(takes_image=make_features.takes_image))
  encode = functools.partial(EncodedSource, allow_dropped=allow_dropped)
  sentences = _mix([encode(source, make_features, capacities) for source in sources], weights, seed=seed)
  read_options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=SENTENCE_BUFFER)
  streams = [
    pack_dataset(
      sentences[index::num_streams].to_iter_dataset(read_options),
      capacities=capacities,
      segmented=SEGMENTED.values(),
      packing=packing,
      num_bins=num_packing_bins or 2 * rows_per_batch // count,
      seed=seed,
    )
    for index in range(process_index * count, (process_index + 1) * count)
  ]
  rows = streams[0] if count == 1 else grain.IterDataset.mix(streams)
  # Rows of one stream are adjacent, as they are if each stream belongs to a process.
  order = np.arange(rows_per_batch).reshape(-1, count).T.ravel()
  finish = functools.partial(_finish, order, capacities, row_shape.context_causal)
  return iter(prefetch(rows.batch(rows_per_batch, drop_remainder=True).map(finish), buffer_size=BATCH_BUFFER))


def _divide_streams(num_streams: int, process_count: int, rows_per_batch: int) -> int:
  """Returns the streams of each process; raises UserError if they do not divide."""
  if num_streams % process_count or rows_per_batch % (num_streams // process_count):
    shares = f"{process_count} processes and their {rows_per_batch} rows"
    raise UserError(f"config.rows.streams = {num_streams} does not divide over {shares}")
  return num_streams // process_count


class EncodedSource:
  """The features of a source's sentences; None, which Grain leaves out, for those that cannot be used.

  Args:
    source: of the sentences.
    make_features: encodes them.
    capacities: of a row, by feature.
    allow_dropped: see `make_loader`.
  """

  def __init__(
    self, source: SentenceSource, make_features: MakeFeatures, capacities: Mapping[str, int], *, allow_dropped: bool
  ):
    self._source, self._make_features, self._capacities = source, make_features, capacities
    self._allow_dropped = allow_dropped
    self._reported: set[str] = set()
    self._dropped_in_a_row = 0

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, np.ndarray] | None:
    sentence = None
    try:
      sentence = self._source[index]
      arrays = self._make_features(sentence).arrays()
      check_lengths(sentence, {name: len(values) for name, values in arrays.items()}, self._capacities)
    except (UserError, OSError) as error:
      record = sentence.record if sentence else f"sentence {index}"
      self._dropped_in_a_row += 1
      if not self._allow_dropped or self._dropped_in_a_row > MAX_DROPPED_IN_A_ROW:
        raise UserError(f"{record} cannot be used: {error}") from error
      if str(error) not in self._reported:  # once for each file, not for each sentence with it
        self._reported.add(str(error))
        log.warning("dropped: %s: %s", record, error)
      return None
    self._dropped_in_a_row = 0
    return arrays


def _mix(
  sources: Sequence[EncodedSource], weights: Sequence[float] | None, *, seed: int
) -> grain.MapDataset[dict[str, np.ndarray] | None]:
  """Repeats each source endlessly, shuffled anew each time, and mixes them."""
  shuffled = [grain.MapDataset.source(source).seed(seed).shuffle().repeat() for source in sources]
  return shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, weights)


def _finish(
  order: Int[np.ndarray, "b"], capacities: Mapping[str, int], context_causal: bool, batch: Mapping[str, np.ndarray]
) -> PackedRow:
  """Turns a batch of packed features into rows, in another order."""
  packed = {name: batch[name][order] for name in capacities}
  segment_ids = {unit: batch[f"{name}_segment_ids"][order] for unit, name in SEGMENTED.items() if name in capacities}
  return finish_rows(packed, segment_ids, context_causal=context_causal)


def check_lengths(sentence: Sentence, lengths: Mapping[str, int], capacities: Mapping[str, int]) -> None:
  """Checks that a sentence fits into a row.

  Args:
    sentence: for the message.
    lengths: of its features, by name.
    capacities: of a row, by name.

  Raises:
    UserError: it does not fit; the message names the config's key.
  """
  for name, capacity in capacities.items():
    key = _LIMITS.get(UNITS[name])
    if key and lengths.get(name, 0) > capacity:
      raise UserError(
        f"a sentence (task {sentence.task or 'unnamed'}, context {sentence.context or 'unnamed'}) has "
        f"{lengths[name]} {name}, but a row holds only config.rows.{key} = {capacity}"
      )
