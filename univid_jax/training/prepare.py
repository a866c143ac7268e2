"""Makes data ready for training: checks it, then computes latents and prompt embeddings once."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from univid_jax import build
from univid_jax.data.cache import read_frames
from univid_jax.encoders import Encoders


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What was found and done.

  Attributes:
    data: the sources and what was dropped from them.
    caches: where latents and embeddings are; None where the model needs none.
    num_clips: different clips that sentences may have.
    num_encoded: of them, those that were encoded now.
  """

  data: build.DataSources
  caches: build.Caches | None
  num_clips: int
  num_encoded: int


def open_data(config: Mapping[str, Any], workdir: str) -> build.DataSources:
  """Opens the data of a run and says what is used and what is not.

  Raises:
    ValueError: a row cannot be used, and the config does not allow to leave it out.
  """
  data = build.data_sources(config, workdir)
  for name, source in data.sources.items():
    print(f"data: {name}, {len(source):,} sentences, drawn with weight {data.weights[name]:g}")
  for row in data.dropped:
    print(f"dropped: {row}")
  if data.dropped and not config["data"]["allow_dropped"]:
    raise ValueError(f"{len(data.dropped)} of the listed rows cannot be used, first {data.dropped[0]}; mend them, or leave them "
                     "out with --config.data.allow_dropped=True")
  return data


def prepare(config: Mapping[str, Any], workdir: str, encoders: Encoders, data: build.DataSources) -> Prepared:
  """Computes what the caches lack, one encoder in memory at a time; of several processes each does its share.

  Raises:
    ValueError: a clip cannot be read; what was computed before stays.
  """
  caches = build.caches(config, encoders, workdir)
  if caches is None:
    return Prepared(data, None, 0, 0)
  share = slice(jax.process_index(), None, jax.process_count())
  prompts = sorted({prompt for source in data.sources.values() for prompt in source.prompts()})
  for prompt in tqdm(caches.prompts.missing(prompts[share]), desc="prompts", disable=None):
    caches.prompts.put(prompt, encoders.embed_prompt(prompt))
  encoders.release()
  seen: set[str] = set()
  encoded = 0
  refs = itertools.chain.from_iterable(source.clips() for source in data.sources.values())
  with tqdm(desc="clips", unit="clip") as bar:
    for number, ref in enumerate(refs):
      if ref.key in seen:
        continue
      seen.add(ref.key)
      bar.update()
      if number % jax.process_count() == jax.process_index() and ref.key not in caches.latents:
        caches.latents.put(ref.key, encoders.codec.encode(read_frames(ref).astype(np.float32) / 127.5 - 1))
        encoded += 1
  encoders.release()
  return Prepared(data, caches, len(seen), encoded)
