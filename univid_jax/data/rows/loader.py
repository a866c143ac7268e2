"""The input pipeline: from sentences to batches of packed rows. Its position is part of a checkpoint."""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import grain
import jax
import numpy as np

from univid_jax.core.errors import UserError
from univid_jax.core.json_files import parse_json
from univid_jax.core.packed_row import PackedRow
from univid_jax.core.protocols import SentenceSource, TransformerShape
from univid_jax.core.sentence import Sentence
from univid_jax.data.cache.entries import CacheError
from univid_jax.data.rows.balancing import BatchLayout
from univid_jax.data.rows.grain_adapter import prefetch, prefetch_in_process
from univid_jax.data.rows.loader_options import LoaderOptions, RowOwnership
from univid_jax.data.rows.packing import RowShape, join_rows
from univid_jax.data.rows.streams import mix_sources, pack_batches
from univid_jax.data.rows.tokens import UNITS, Features, Unit, feature_names
from univid_jax.data.sources.base import TooLongError, drop, require_source

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

DEFAULT_OPTIONS = LoaderOptions()

# Consecutive unusable sentences after which the loader gives up.
MAX_DROPPED_IN_A_ROW = 1000


@runtime_checkable
class MakeFeatures(Protocol):
  """Encodes sentences; `FeatureMaker` in a run."""

  @property
  def shape(self) -> TransformerShape:
    """Shape of the transformer that takes the features."""
    ...

  def __call__(self, sentence: Sentence, /) -> Features: ...


def make_loader(
  sources: Sequence[SentenceSource],
  make_features: MakeFeatures,
  *,
  row_shape: RowShape,
  layout: BatchLayout,
  seed: int,
  weights: Sequence[float] | None = None,
  ownership: RowOwnership | None = None,
  options: LoaderOptions = DEFAULT_OPTIONS,
) -> "Loader":
  """Returns an endless, deterministic stream of this process's rows of each batch.

  Args:
    sources: where sentences come from; several are mixed.
    make_features: encodes them.
    row_shape: capacity of a row.
    layout: layout of a batch over all processes.
    seed: seed of the order, which changes every epoch.
    weights: how often each source is drawn; equal by default.
    ownership: which rows are this process's; by default all.
    options: how sentences are read and packed.

  Raises:
    UserError: there is no source, or an empty one; the streams do not divide; or, from the iterator, a sentence cannot
      be used: one of its clips cannot be read, or it is too long for a row. The message names the record and the file.
  """
  if isinstance(sources, SentenceSource) or not sources:
    raise UserError(f"sources must be a list of one or more sources of sentences, got {type(sources).__name__}")
  for source in sources:
    require_source("a source", source)
  capacities = row_shape.capacities(feature_names(make_features.shape))
  read_options = grain.ReadOptions(num_threads=options.num_threads, prefetch_buffer_size=SENTENCE_BUFFER)
  rows = ownership or RowOwnership.whole(layout.num_rows)

  def open_stream(index: int, count: int, num_rows: int) -> grain.DatasetIterator[PackedRow]:
    is_shared = rows.is_shared or count % rows.num_owners > 0
    encoded = [
      EncodedSource(source, make_features, capacities, allow_dropped=options.allow_dropped, is_shared=is_shared)
      for source in sources
    ]
    sentences = mix_sources(encoded, weights or [1.0] * len(encoded), seed=seed, index=index, count=count)
    batches = pack_batches(
      sentences.to_iter_dataset(read_options),
      capacities=capacities,
      context_mode=row_shape.context_mode,
      layout=layout.part(num_rows),
      num_bins=options.num_packing_bins or 2 * num_rows,
      packing=options.packing,
      seed=seed,
    )
    return iter((prefetch_in_process if options.stream_processes else prefetch)(batches, buffer_size=BATCH_BUFFER))

  return Loader(open_stream, num_streams=options.num_streams, ownership=rows)


class Loader:
  """This process's rows of every batch; see `make_loader`.

  Each stream gives an equal number of a batch's rows. A process opens the streams that its rows come from, so that any
  number of processes can take over the streams of others. If several processes share a stream, or the tokens of a row,
  each reads the whole stream and uses its own rows.

  Args:
    open_stream: opens a stream, given its number, the number of streams, and the rows that it gives to a batch.
    num_streams: see `LoaderOptions`.
    ownership: which rows are this process's.
  """

  def __init__(
    self,
    open_stream: Callable[[int, int, int], grain.DatasetIterator[PackedRow]],
    *,
    num_streams: int,
    ownership: RowOwnership,
  ):
    self._open_stream, self._own_rows = open_stream, ownership.own
    self._open(num_streams, list(ownership.order))

  def _open(self, num_streams: int, order: list[int]) -> None:
    if len(order) % num_streams:
      raise UserError(f"config.rows.streams = {num_streams} does not divide the {len(order)} rows of a batch")
    rows_per_stream = len(order) // num_streams
    sources = [divmod(order.index(row), rows_per_stream) for row in self._own_rows]
    numbers = sorted({number for number, _ in sources})
    self._num_streams, self._order = num_streams, order
    self._taken = np.array([numbers.index(number) * rows_per_stream + place for number, place in sources])
    self._takes_all = np.array_equal(self._taken, np.arange(len(numbers) * rows_per_stream))
    self._streams = {number: self._open_stream(number, num_streams, rows_per_stream) for number in numbers}

  def __iter__(self) -> "Loader":
    return self

  def __next__(self) -> PackedRow:
    parts = [next(stream) for stream in self._streams.values()]
    rows = parts[0] if len(parts) == 1 else join_rows(parts)
    return rows if self._takes_all else jax.tree.map(lambda x: x[self._taken], rows)

  def start_prefetch(self) -> None:
    """Makes the first batches in advance."""
    for stream in self._streams.values():
      stream.start_prefetch()

  def get_state(self) -> bytes:
    """Returns the position of this process's streams, as JSON."""
    streams = {str(number): stream.get_state() for number, stream in self._streams.items()}
    return json.dumps({"num_streams": self._num_streams, "row_order": self._order, "streams": streams}).encode()

  def set_state(self, states: Sequence[bytes] | bytes) -> None:
    """Continues at a saved position.

    Args:
      states: states of all processes that saved it, in order, or the result of `get_state` if there was only one;
        states of Grain's iterators, as version 0.1 saved them, work too.

    Raises:
      UserError: they are damaged, or the number of rows of a batch has changed and does not divide over the streams.
    """
    try:
      saved = [parse_json(state) for state in ([states] if isinstance(states, bytes) else states)]
      if "num_streams" in saved[0]:
        num_streams = saved[0]["num_streams"]
        positions = {int(number): state for each in saved for number, state in each["streams"].items()}
      else:
        positions = dict(enumerate(state for each in saved for state in each.get("parents", [each])))
        num_streams = len(positions)
      order = saved[0].get("row_order", self._order)
      if len(order) != len(self._order):
        if len(self._order) % num_streams:
          raise UserError(
            f"config.rows.per_batch = 0 makes data x fsdp x microbatches = {len(self._order)} rows of a batch, which "
            f"the run's {num_streams} streams do not divide; before it made {len(order)}, as another mesh or "
            "config.rows.microbatches would"
          )
        log.warning(
          "batches have %d rows, %d before: config.rows.per_batch = 0 makes data x fsdp x microbatches rows, and the "
          "mesh or config.rows.microbatches has changed",
          len(self._order),
          len(order),
        )
        order = self._order
      if sorted(order) != sorted(self._order):
        raise ValueError(f"row_order = {order}")
      if (num_streams, order) != (self._num_streams, self._order):
        self.close()
        self._open(num_streams, order)
      for number, stream in self._streams.items():
        stream.set_state(positions[number])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
      if isinstance(error, UserError):
        raise
      raise UserError(f"the position in the data is damaged ({error!r})") from error

  def close(self) -> None:
    for stream in self._streams.values():
      stream.close()


class EncodedSource:
  """The features of a source's sentences; None, which Grain leaves out, for those that cannot be used.

  Args:
    source: of the sentences.
    make_features: encodes them.
    capacities: capacity of a row, by feature.
    allow_dropped: see `LoaderOptions`.
    is_shared: whether other processes read the same stream.
  """

  def __init__(
    self,
    source: SentenceSource,
    make_features: MakeFeatures,
    capacities: Mapping[str, int],
    *,
    allow_dropped: bool,
    is_shared: bool,
  ):
    self._source, self._make_features, self._capacities = source, make_features, capacities
    self._allow_dropped, self._is_shared = allow_dropped, is_shared
    self._reported: set[str] = set()
    self._dropped_in_a_row = 0

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, np.ndarray] | None:
    found = self._encode(index)
    if isinstance(found, _Unusable) and self._is_shared:
      found = self._encode(index)
    if isinstance(found, _Unusable) and isinstance(found.error, CacheError):
      raise found.error  # the sentence is not to blame
    if not isinstance(found, _Unusable):
      self._dropped_in_a_row = 0
      return found
    self._dropped_in_a_row += 1
    record, error = found.record, found.error
    if not self._allow_dropped or self._dropped_in_a_row > MAX_DROPPED_IN_A_ROW:
      remedy = f"; set {error.key} to at least {error.needed}" if isinstance(error, TooLongError) else ""
      raise UserError(f"{record} cannot be used: {error}{remedy}") from error
    if self._is_shared and not isinstance(error, TooLongError):
      raise UserError(
        f"{record} cannot be used: {error}; it is not dropped, as another process that reads the same stream may have "
        "read it"
      ) from error
    reason = (error.key if isinstance(error, TooLongError) else "") or str(error)
    if reason not in self._reported:  # once per file or limit, not per sentence
      self._reported.add(reason)
      log.warning("dropped: %s", drop(record, error))
    return None

  def _encode(self, index: int) -> "dict[str, np.ndarray] | _Unusable":
    sentence = None
    try:
      sentence = self._source[index]
      return make_fitting(sentence, self._make_features, self._capacities).arrays()
    except (UserError, OSError) as error:
      return _Unusable(sentence.record if sentence and sentence.record else f"sentence {index}", error)


@dataclasses.dataclass(frozen=True)
class _Unusable:
  """A sentence that cannot be used, and why."""

  record: str
  error: UserError | OSError


def make_fitting(sentence: Sentence, make_features: MakeFeatures, capacities: Mapping[str, int]) -> Features:
  """Encodes a sentence that fits into a row.

  Args:
    sentence: a sentence whose clips are pixels.
    make_features: encodes it.
    capacities: of a row, by feature.

  Raises:
    CacheError: a cache cannot be written or read, for which the sentence is not to blame.
    OSError, UserError: a clip cannot be read.
    TooLongError: the sentence does not fit.
  """
  features = make_features(sentence)
  check_lengths(sentence, {name: len(values) for name, values in features.arrays().items()}, capacities)
  return features


def check_lengths(sentence: Sentence, lengths: Mapping[str, int], capacities: Mapping[str, int]) -> None:
  """Checks that a sentence fits into a row.

  Args:
    sentence: named in the message.
    lengths: lengths of its features, by name.
    capacities: capacity of a row, by name.

  Raises:
    TooLongError: it does not fit; the message names the config key.
  """
  for name, capacity in capacities.items():
    key = _LIMITS.get(UNITS[name])
    if key and lengths.get(name, 0) > capacity:
      raise TooLongError(
        f"a sentence (task {sentence.task or 'unnamed'}, context {sentence.context or 'unnamed'}) has "
        f"{lengths[name]} {name}, but a row holds only config.rows.{key} = {capacity}",
        key=f"config.rows.{key}",
        needed=lengths[name],
      )
