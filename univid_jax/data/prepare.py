"""Encodes everything that training reads, so that no encoder is needed beside the model.

Sources give the same sentence for an index every time, so the sentences of one epoch name all clips, prompts and
conditions that training can ask for. None of their clips is read unless it has to be encoded.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from tqdm import tqdm

from univid_jax.core.sentence import ClipRef, Sentence
from univid_jax.data.cache import Cache
from univid_jax.data.features import FeatureMaker, condition_key
from univid_jax.data.sources.open import DataSources
from univid_jax.parallel.processes import wait_for_processes

# Frames per latent frame, after the first, of all codecs; lengths of clips (4n + 1) rely on it too. The codec is not
# asked, since that would load it even if nothing has to be encoded.
TEMPORAL_STRIDE = 4

# The key of a value, and what computes and stores it.
Item = tuple[str, Callable[[], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Prepared:
  """How many different clips the sentences have, and how many of these this process encoded now."""

  num_clips: int
  num_encoded: int


def prepare(features: FeatureMaker, data: DataSources) -> Prepared:
  """Fills the caches: prompts, latents, and for I2V conditions and image features.

  One encoder is in memory at a time. Of several processes each does its share, and waits for the others.

  Raises:
    OSError, UserError: a clip cannot be read; what was encoded before is kept.
  """
  caches, encoders = features.caches, features.encoders
  if caches is None:
    return Prepared(0, 0)
  _fill(caches.prompts, _prompts(features, data), description="prompts")
  encoders.release()
  num_clips, num_encoded = _fill(caches.latents, _clips(features, data), description="clips")
  if features.takes_image:
    _fill(caches.latents, _conditions(features, data), description="conditions")
    encoders.release()
    _fill(caches.images, _images(features, data), description="image features")
  encoders.release()
  wait_for_processes("prepare")
  return Prepared(num_clips, num_encoded)


def _fill(cache: Cache, items: Iterable[Item], *, description: str) -> tuple[int, int]:
  """Computes the items that are missing and fall to this process.

  Returns:
    The numbers of different items, and of those that were computed.
  """
  seen: set[str] = set()
  computed = 0
  with tqdm(desc=description, disable=None) as bar:
    for key, compute in items:
      if key in seen:
        continue
      is_own = len(seen) % jax.process_count() == jax.process_index()
      seen.add(key)
      if is_own and key not in cache:
        compute()
        computed += 1
      bar.update()
  return len(seen), computed


def _sentences(data: DataSources) -> Iterator[Sentence]:
  for source in data.sources.values():
    for index in range(len(source)):
      yield source[index]


def _references(sentence: Sentence) -> list[ClipRef]:
  return [clip for clip in sentence.clips if isinstance(clip, ClipRef)]


def _prompts(features: FeatureMaker, data: DataSources) -> Iterator[Item]:
  for sentence in _sentences(data):
    yield sentence.prompt, functools.partial(features.embed_prompt, sentence.prompt)


def _clips(features: FeatureMaker, data: DataSources) -> Iterator[Item]:
  for sentence in _sentences(data):
    for clip in _references(sentence):
      yield clip.key, functools.partial(features.encode_clip, clip)


def _conditions(features: FeatureMaker, data: DataSources) -> Iterator[Item]:
  for sentence in _sentences(data):
    if clips := _references(sentence):
      count = sum(1 + (clip.num_frames - 1) // TEMPORAL_STRIDE for clip in clips)
      yield condition_key(clips[0], count), functools.partial(features.encode_condition, clips[0], count)


def _images(features: FeatureMaker, data: DataSources) -> Iterator[Item]:
  for sentence in _sentences(data):
    if clips := _references(sentence):
      yield clips[0].key, functools.partial(features.embed_image, clips[0])
