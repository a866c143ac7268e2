"""The input pipeline: sentences to batches of packed rows, through grain; its state is part of a checkpoint."""

import dataclasses
from collections.abc import Callable, Sequence

import grain
import numpy as np

from univid_jax.data.clips import ClipRef
from univid_jax.data.packing import FEATURES, SEGMENTED, Features, RowShape, finish_rows, sentence_features
from univid_jax.data.sentences import CONTEXTS
from univid_jax.types import PackedRow, Sentence

CONTEXT_NAMES = tuple(CONTEXTS)

# The config's name of what a row holds at most of a feature.
LIMIT_NAMES = {"tokens": "num_tokens", "text": "num_text_tokens", "targets": "num_target_tokens"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureMaker:
  """Encodes the clips of a sentence and turns it into features.

  Attributes:
    encode: a clip, pixels uint8 (T, H, W, 3) or what is still to be read, to latents (t, y, x, c), in NumPy.
    embed_prompt: a prompt to its embedding (tokens, text_dim).
    patch_size: of the transformer.
    text_len: length to which the original pads a prompt.
    task_names: tasks by number, from 1.
    condition: for I2V models: a sentence's first clip and its number of latent frames to `condition` and `image_features` of
      `sentence_features`; None for T2V.
  """

  encode: Callable[[np.ndarray | ClipRef], np.ndarray]
  embed_prompt: Callable[[str], np.ndarray]
  patch_size: tuple[int, int, int]
  text_len: int
  task_names: Sequence[str]
  condition: Callable[[np.ndarray | ClipRef, int], tuple[np.ndarray, np.ndarray]] | None = None

  @property
  def names(self) -> tuple[str, ...]:
    """Of the features."""
    everything = tuple(name for names in FEATURES.values() for name in names)
    return tuple(name for name in everything if self.condition or name not in ("condition", "image_features"))

  def __call__(self, sentence: Sentence) -> Features:
    latents = tuple(self.encode(clip) for clip in sentence.clips)
    condition = features = None
    if self.condition is not None:
      condition, features = self.condition(sentence.clips[0], sum(len(clip) for clip in latents))
    return sentence_features(
        sentence.replace(clips=latents),
        patch_size=self.patch_size,
        prompt_embedding=self.embed_prompt(sentence.prompt),
        text_len=self.text_len,
        task_id=1 + self.task_names.index(sentence.task) if sentence.task in self.task_names else 0,
        context_id=1 + CONTEXT_NAMES.index(sentence.context) if sentence.context in CONTEXT_NAMES else 0,
        condition=condition,
        image_features=features,
    )


def make_loader(sources: Sequence, make_features: FeatureMaker, *, row_shape: RowShape, rows_per_batch: int, seed: int,
                process_index: int = 0, process_count: int = 1, num_threads: int = 1,
                num_packing_bins: int | None = None, packing: str = "first_fit",
                num_streams: int | None = None, weights: Sequence[float] | None = None) -> grain.DatasetIterator:
  """An endless, deterministic stream of batches (this process's rows of each) of packed rows.

  Args:
    sources: random-access sentences; several are mixed.
    make_features: see FeatureMaker.
    row_shape: what fits into a row.
    rows_per_batch: rows of this process in a batch.
    seed: of the order, which changes every epoch.
    process_index: of this process.
    process_count: processes, each of which sees its own share of the sentences.
    num_threads: threads that make sentences.
    num_packing_bins: rows that are filled at the same time; twice a batch by default.
    packing: "first_fit" puts a sentence into the first of these rows with room for it, "best_fit" into the fullest.
    num_streams: independent streams of rows, as many as processes by default; with the same number of streams one process and
      several give the same batches.
    weights: how often each source is drawn; all alike by default.

  Raises:
    ValueError: the streams do not divide; or, from the iterator, a sentence fits into no row.
  """
  mixed = [grain.MapDataset.source(source).seed(seed).shuffle().repeat() for source in sources]
  everything = mixed[0] if len(mixed) == 1 else grain.MapDataset.mix(mixed, weights)
  num_streams = num_streams or process_count
  if num_streams % process_count or rows_per_batch % (num_streams // process_count):
    raise ValueError(f"{num_streams} streams of rows do not divide over {process_count} processes and {rows_per_batch} rows")
  count = num_streams // process_count
  lengths = row_shape.limits(make_features.names)
  pack = {"first_fit": grain.experimental.FirstFitPackIterDataset, "best_fit": grain.experimental.BestFitPackIterDataset}[packing]

  def fitting(sentence: Sentence) -> Features:
    features = make_features(sentence)
    for name, key in LIMIT_NAMES.items():
      if name in lengths and len(features[name]) > lengths[name]:
        raise ValueError(f"a sentence ({sentence.task or 'no task'}, context {sentence.context or 'unnamed'}) has "
                         f"{len(features[name])} {name}, and config.rows.{key} = {lengths[name]} is all that a row holds")
    return features

  def stream(index: int):
    features = everything[index::num_streams].map(fitting)
    features = features.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=64))
    return pack(features, length_struct=lengths, num_packing_bins=num_packing_bins or 2 * rows_per_batch // count, seed=seed,
                meta_features=tuple(name for name in lengths if name not in SEGMENTED))

  streams = [stream(index) for index in range(process_index * count, (process_index + 1) * count)]
  rows = streams[0] if count == 1 else grain.IterDataset.mix(streams)
  # The rows of one stream stand together, as they do where each is a process's.
  order = np.arange(rows_per_batch).reshape(-1, count).T.ravel()

  def finish(batch: Features) -> PackedRow:
    return finish_rows({name: value[order] for name, value in batch.items()}, context_causal=row_shape.context_causal)

  batches = rows.batch(rows_per_batch, drop_remainder=True).map(finish)
  return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2))
