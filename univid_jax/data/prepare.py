"""Checks everything that training reads, and encodes it, so that no encoder is needed beside the model.

Sources give the same sentence for an index every time, so the sentences of one epoch name all clips, prompts and
conditions that training can ask for. What is cached was read when it was encoded, and is not read again.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from univid_jax.core.dims import latent_frames
from univid_jax.core.errors import UserError
from univid_jax.core.protocols import SentenceSource
from univid_jax.core.sentence import Clip, ClipRef, Role, Sentence
from univid_jax.data.cache.entries import Cache, CacheError
from univid_jax.data.features import FeatureMaker, condition_key
from univid_jax.data.progress import Progress
from univid_jax.data.rows.loader import check_lengths
from univid_jax.data.rows.packing import RowShape
from univid_jax.data.rows.tokens import feature_names
from univid_jax.data.sources.base import Dropped, TooLongError, drop, report_dropped
from univid_jax.data.sources.computed import ComputedSentences
from univid_jax.data.sources.grids import GridSentences
from univid_jax.data.sources.open import DataSources
from univid_jax.runtime.processes import wait_for_processes

# What returns the key of a value, which may read a file, and what computes and stores the value.
Item = tuple[Callable[[], str], Callable[[], object]]


@dataclasses.dataclass(frozen=True)
class PreparationReport:
  """What was done.

  Attributes:
    num_clips: different clips of all sentences, and clips of the folders that sentences are computed from.
    num_encoded: clips that this process encoded now.
    dropped: records that this process found it cannot use.
  """

  num_clips: int
  num_encoded: int = 0
  dropped: tuple[Dropped, ...] = ()


def prepare(
  features: FeatureMaker,
  data: DataSources,
  *,
  row_shape: RowShape,
  held_out: Sequence[Sentence] = (),
  allow_dropped: bool = False,
  verify: bool = False,
) -> PreparationReport:
  """Fills the caches with prompts, latents, and for I2V conditions and image features; without caches only checks.

  Every clip that is not cached is read, and every sentence must fit into a row. One encoder is in memory at a time;
  clips are encoded on all devices of this process. Of several processes each does its share, and waits for the others.

  Args:
    features: encodes the sentences.
    data: the sources of a run.
    row_shape: capacity of a row.
    held_out: further sentences that training reads, for validation.
    allow_dropped: report records that cannot be used, instead of raising.
    verify: read what is cached, and replace what is damaged now instead of when it is needed.

  Raises:
    UserError: a record cannot be used; all others are encoded first.
    CacheError: a cache cannot be written or read.
  """
  num_encoded = 0
  sentences, caches, encoders = _Sentences(data, held_out), features.caches, features.encoders
  fill = functools.partial(_fill, sentences, verify=verify)
  if caches is None:
    num_clips = fill(None, _readings(sentences), description="clips")
    num_clips += _check_folders(data, sentences)
  else:
    fill(caches.prompts, _prompts(features, sentences), description="prompts")
    encoders.release()
    encoder = _ClipEncoder(features, sentences)
    num_clips = fill(caches.latents, _clips(encoder, sentences), description="clips")
    num_encoded = encoder.num_encoded
    if features.shape.takes_condition:
      fill(caches.latents, _conditions(features, sentences), description="conditions")
    if features.shape.takes_image_features:
      encoders.release()
      fill(caches.images, _images(features, sentences), description="image features")
    wait_for_processes("caches are filled")  # or this process would encode for its checks what others are about to
  _check_rows(features, row_shape, sentences)
  encoders.release()
  dropped = tuple(sentences.dropped.values())
  report_dropped(dropped, allowed=allow_dropped)
  return PreparationReport(num_clips, num_encoded, dropped)


class _Sentences:
  """The sentences of one epoch, and why some cannot be used.

  Attributes:
    dropped: by reason, which names the file: many sentences may show one damaged clip.
    current: the record of the sentence that was yielded last.
    position: number of the sentence that was yielded last, over all sources.
  """

  def __init__(self, data: DataSources, held_out: Sequence[Sentence]):
    # Sentences that are computed at once have no clips to read or cache.
    self._sources = [source for source in data.sources.values() if not _is_computed_at_once(source)]
    self._held_out = held_out
    self.dropped: dict[str, Dropped] = {}
    self.current, self.position = "", 0

  def __len__(self) -> int:
    return sum(map(len, (*self._sources, self._held_out)))

  def __iter__(self) -> Iterator[Sentence]:
    self.position = 0
    for source in (*self._sources, self._held_out):
      for index in range(len(source)):
        self.position += 1
        self.current = f"sentence {index}"
        try:
          sentence = source[index]
        except (OSError, UserError) as error:
          self.drop(error)
          continue
        self.current = sentence.record
        yield sentence

  def drop(self, error: Exception, *, record: str = "") -> None:
    """Notes that a record, by default the current sentence's, cannot be used."""
    self.dropped.setdefault(str(error), drop(record or self.current, error))


class _ClipEncoder:
  """Encodes clips of one shape together, as many as the codec encodes at the same time.

  Attributes:
    num_encoded: clips so far.
  """

  def __init__(self, features: FeatureMaker, sentences: _Sentences):
    self._features, self._sentences = features, sentences
    self._waiting: dict[tuple[int, tuple[int, int]], list[tuple[str, ClipRef]]] = {}
    self.num_encoded = 0

  def add(self, clip: ClipRef) -> None:
    """Encodes a clip of the current sentence, now or with others."""
    num_parallel = self._features.encoders.codec.num_parallel
    shape = clip.num_frames, clip.size
    waiting = self._waiting.setdefault(shape, [])
    waiting.append((self._sentences.current, clip))
    if len(waiting) == num_parallel:
      self._encode(self._waiting.pop(shape))

  def finish(self) -> None:
    """Encodes what waits for others of its shape."""
    while self._waiting:
      self._encode(self._waiting.popitem()[1])

  def _encode(self, waiting: Sequence[tuple[str, ClipRef]]) -> None:
    # Clips of one sentence may be parts of one video, which the first that is read decodes for all.
    sentences = [[clip for _, clip in clips] for _, clips in itertools.groupby(waiting, key=lambda each: each[0])]
    with ThreadPoolExecutor(len(sentences)) as pool:
      readings = list(itertools.chain.from_iterable(pool.map(_read_in_turn, sentences)))
    usable: list[tuple[str, ClipRef]] = []
    for (record, clip), reading in zip(waiting, readings, strict=True):
      if isinstance(reading, Exception):
        self._sentences.drop(reading, record=record)
      else:
        usable.append((record, clip))
    if not usable:
      return
    frames = [reading for reading in readings if not isinstance(reading, Exception)]
    try:
      self._features.cache_clips([clip for _, clip in usable], frames)
    except UserError as error:
      for record, _ in usable:
        self._sentences.drop(error, record=record)
    else:
      self.num_encoded += len(usable)


def _read_in_turn(clips: Sequence[ClipRef]) -> list[np.ndarray | Exception]:
  """Returns the frames of each clip, or why it cannot be read."""
  readings: list[np.ndarray | Exception] = []
  for clip in clips:
    try:
      readings.append(clip.read())
    except (OSError, UserError) as error:
      readings.append(error)
  return readings


def _is_computed_at_once(source: SentenceSource) -> bool:
  return isinstance(source, ComputedSentences) or (isinstance(source, GridSentences) and not source.by_reference)


def _fill(sentences: _Sentences, cache: Cache | None, items: Iterable[Item], *, verify: bool, description: str) -> int:
  """Computes the items that are missing and fall to this process; returns the number of different items."""
  seen: set[str] = set()
  computed = 0
  with Progress(description, len(sentences), unit=description, step="sentences") as progress:
    for find_key, compute in items:
      progress.update(sentences.position, computed)
      try:
        key = find_key()
      except (OSError, UserError) as error:
        seen.add(str(error))  # in place of its key, or the processes that have it would share the others differently
        sentences.drop(error)
        continue
      if key in seen:
        continue
      is_own = len(seen) % jax.process_count() == jax.process_index()
      seen.add(key)
      if is_own and not _is_cached(cache, key, verify=verify):
        try:
          compute()
          computed += 1
        except CacheError:
          raise
        except (OSError, UserError) as error:
          sentences.drop(error)
  return len(seen)


def _is_cached(cache: Cache | None, key: str, *, verify: bool) -> bool:
  if cache is None:
    return False
  return cache.get(key) is not None if verify else key in cache


def _key(clip: ClipRef) -> str:
  return clip.key


def _references(sentence: Sentence) -> list[ClipRef]:
  return [clip for clip in sentence.clips if isinstance(clip, ClipRef)]


def _readings(sentences: _Sentences) -> Iterator[Item]:
  for sentence in sentences:
    for clip in _references(sentence):
      yield functools.partial(_key, clip), clip.read


def _prompts(features: FeatureMaker, sentences: _Sentences) -> Iterator[Item]:
  for sentence in sentences:
    prompt = sentence.prompt
    yield functools.partial(str, prompt), functools.partial(features.embed_prompt, prompt)


def _clips(encoder: _ClipEncoder, sentences: _Sentences) -> Iterator[Item]:
  for sentence in sentences:
    for clip in _references(sentence):
      yield functools.partial(_key, clip), functools.partial(encoder.add, clip)
  encoder.finish()


def _conditions(features: FeatureMaker, sentences: _Sentences) -> Iterator[Item]:
  for sentence in sentences:
    if clips := _references(sentence):
      stride = features.encoders.codec_shape.temporal_stride
      count = sum(latent_frames(clip.num_frames, temporal_stride=stride) for clip in clips)
      key = functools.partial(condition_key, clips[0], count)
      yield key, functools.partial(features.encode_condition, clips[0], count)


def _images(features: FeatureMaker, sentences: _Sentences) -> Iterator[Item]:
  for sentence in sentences:
    if clips := _references(sentence):
      yield functools.partial(_key, clips[0]), functools.partial(features.embed_image, clips[0])


def _check_folders(data: DataSources, sentences: _Sentences) -> int:
  """Decodes the files from which sentences are computed at once; returns how many clips they are."""
  num_intact = 0
  for source in (*data.sources.values(), *data.held_out.values()):
    if isinstance(source, ComputedSentences):
      for folder in source.folders:
        num_intact += len(folder)
        for dropped in folder.find_damaged():
          num_intact -= 1
          sentences.drop(UserError(dropped.reason), record=dropped.record)
  return num_intact


def _check_rows(features: FeatureMaker, row_shape: RowShape, sentences: _Sentences) -> None:
  """Checks that every sentence fits into a row, encoding one clip of each shape."""
  capacities = row_shape.capacities(feature_names(features.shape))
  tokens: dict[tuple[int, tuple[int, int]], int] = {}
  texts: dict[str, int] = {}

  def count_tokens(clip: Clip) -> int:
    """Raises OSError or UserError if the clip cannot be read."""
    assert isinstance(clip, ClipRef)
    shape = clip.num_frames, clip.size
    if shape not in tokens:
      tokens[shape] = features.encode_clip(clip)[..., 0].size // features.shape.patch_volume
    return tokens[shape]

  for sentence in sentences:
    if len(_references(sentence)) < len(sentence.clips):
      continue  # computed for this config, so of lengths that it has room for
    try:
      if sentence.prompt not in texts:
        texts[sentence.prompt] = min(len(features.embed_prompt(sentence.prompt)) + 1, features.shape.text_len)
      lengths = [count_tokens(clip) for clip in sentence.clips]
      targets = sum(length for length, role in zip(lengths, sentence.roles) if role == Role.TARGET)
      counts = {"tokens": sum(lengths), "targets": targets, "text": texts[sentence.prompt]}
      check_lengths(sentence, counts, capacities)
    except CacheError:
      raise
    except TooLongError as error:
      sentences.drop(TooLongError(f"{sentence.record}: {error}", key=error.key, needed=error.needed))
    except (OSError, UserError) as error:
      sentences.drop(UserError(f"{sentence.record}: {error}"))
