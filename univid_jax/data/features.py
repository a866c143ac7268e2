"""The one path from clips and prompts to the features of a row, used by training, prepare, sampling and evaluation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

from univid_jax.config.schema import RunConfig
from univid_jax.core.conditions import i2v_condition
from univid_jax.core.contexts import CONTEXT_NAMES
from univid_jax.core.errors import UserError
from univid_jax.core.paths import to_path
from univid_jax.core.pixels import to_float
from univid_jax.core.protocols import Encoders, TransformerShape
from univid_jax.core.sentence import Clip, ClipRef, Sentence, read_frames
from univid_jax.core.text import size_text
from univid_jax.data.cache.entries import Cache
from univid_jax.data.rows.tokens import Features, sentence_features

# Subfolders, in the order of `FeatureCaches`.
CACHE_NAMES = ("latents", "prompts", "images")

Latents = Float[np.ndarray, "t y x c"]


@dataclasses.dataclass(frozen=True)
class FeatureCaches:
  """Where a run caches what its encoders compute.

  Attributes:
    latents: of clips and of I2V's conditions.
    prompts: embeddings of prompts.
    images: I2V's CLIP features.
  """

  latents: Cache
  prompts: Cache
  images: Cache

  @classmethod
  def open(cls, config: RunConfig, encoders: Encoders, workdir: epath.PathLike) -> "FeatureCaches | None":
    """Opens the caches of a run; None if encoders have no weights."""
    if not encoders.has_weights:
      return None
    folder = caches_folder(config, workdir)
    fingerprints = encoders.codec_fingerprint, encoders.prompt_fingerprint, encoders.image_fingerprint
    return cls(*(Cache(folder / name, fingerprint) for name, fingerprint in zip(CACHE_NAMES, fingerprints)))


def caches_folder(config: RunConfig, workdir: epath.PathLike) -> epath.Path:
  """Returns the folder with the caches of a run."""
  return to_path(config.data.cache) if config.data.cache else to_path(workdir) / "cache"


class FeatureMaker:
  """Encodes sentences. Clips that are read on demand are cached by their keys, prompts by their text.

  Args:
    encoders: the codec, and the encoders of prompts and images.
    shape: of the transformer.
    task_names: tasks by number, from 1.
    caches: where encoded clips and prompts are looked up and stored; None always encodes.
    clip_gap: positions in time that are left out between clips.
  """

  def __init__(
    self,
    encoders: Encoders,
    *,
    shape: TransformerShape,
    task_names: Sequence[str],
    caches: FeatureCaches | None = None,
    clip_gap: int = 0,
  ):
    self.encoders, self.shape, self.task_names, self.caches = encoders, shape, tuple(task_names), caches
    self.clip_gap = clip_gap

  def __call__(self, sentence: Sentence) -> Features:
    """Returns the features of a sentence whose clips are pixels.

    Raises:
      OSError, UserError: a clip cannot be read, or is no pixels, or has another size than the others.
    """
    check_pixels(sentence.clips)
    latents = tuple(self.encode_clip(clip) for clip in sentence.clips)
    condition, image_features = self.image_inputs(sentence.clips[0], sum(map(len, latents)))
    return self.assemble(
      sentence.replace(clips=latents),
      prompt_embedding=self.embed_prompt(sentence.prompt),
      condition=condition,
      image_features=image_features,
    )

  def assemble(
    self,
    sentence: Sentence,
    *,
    prompt_embedding: Float[np.ndarray, "n d"],
    condition: Float[np.ndarray, "t y x v"] | None = None,
    image_features: Float[np.ndarray, "i e"] | None = None,
    has_first_frame: bool = False,
  ) -> Features:
    """Returns the features of a sentence whose clips are latents, see `sentence_features`."""
    return sentence_features(
      sentence,
      patch_size=self.shape.patch_size,
      prompt_embedding=prompt_embedding,
      text_len=self.shape.text_len,
      clip_gap=self.clip_gap,
      task_id=_number(sentence.task, self.task_names),
      context_id=_number(sentence.context, CONTEXT_NAMES),
      condition=condition,
      image_features=image_features,
      has_first_frame=has_first_frame,
    )

  def encode_clip(self, clip: Clip) -> Latents:
    """Returns the latents of a clip: uint8 frames, float frames in [-1, 1], or a reference."""

    def encode() -> Latents:
      return self.encoders.codec.encode(to_float(read_frames(clip)))

    return _look_up(self.caches and self.caches.latents, _key(clip), encode)

  def cache_clips(self, clips: Sequence[ClipRef], frames: Sequence[UInt8[np.ndarray, "T H W 3"]]) -> None:
    """Encodes clips of one shape, at most the codec's `num_parallel`, into the cache, which there must be.

    Raises:
      CacheError: a value cannot be stored.
    """
    assert self.caches is not None
    for clip, latents in zip(clips, self.encoders.codec.encode_many(list(map(to_float, frames)))):
      self.caches.latents.put(clip.key, latents)

  def embed_prompt(self, prompt: str) -> Float[np.ndarray, "n d"]:
    """Returns the embedding of a prompt, without padding."""
    return _look_up(self.caches and self.caches.prompts, prompt, lambda: self.encoders.embed_prompt(prompt))

  def image_inputs(
    self, first_clip: Clip, num_latent_frames: int
  ) -> tuple[Float[np.ndarray, "t y x v"] | None, Float[np.ndarray, "i e"] | None]:
    """Returns I2V's condition and image features of a sentence; None for what the transformer does not take.

    Args:
      first_clip: of the sentence; its first frame is the image.
      num_latent_frames: of the whole sentence.
    """
    condition = self.encode_condition(first_clip, num_latent_frames) if self.shape.takes_condition else None
    return condition, self.embed_image(first_clip) if self.shape.takes_image_features else None

  def encode_condition(self, first_clip: Clip, num_latent_frames: int) -> Float[np.ndarray, "t y x v"]:
    """Returns I2V's mask and first-frame latents, see `image_inputs`."""

    def encode() -> np.ndarray:
      return i2v_condition(self.encoders.codec, to_float(read_frames(first_clip)[0]), num_latent_frames)

    key = condition_key(first_clip, num_latent_frames) if isinstance(first_clip, ClipRef) else None
    return _look_up(self.caches and self.caches.latents, key, encode)

  def embed_image(self, first_clip: Clip) -> Float[np.ndarray, "i e"]:
    """Returns I2V's CLIP features of the first frame of a clip."""

    def embed() -> np.ndarray:
      return self.encoders.embed_image(to_float(read_frames(first_clip)[0]))

    return _look_up(self.caches and self.caches.images, _key(first_clip), embed)


def check_pixels(clips: Sequence[Any]) -> None:
  """Raises UserError unless clips are pixels of one size: references, or uint8 frames."""
  sizes = []
  for number, clip in enumerate(clips, 1):
    if isinstance(clip, ClipRef):
      sizes.append(tuple(clip.size))
      continue
    is_array = isinstance(clip, np.ndarray)
    if not (is_array and clip.dtype == np.uint8 and clip.ndim == 4 and clip.shape[-1] == 3):
      got = f"{clip.dtype} {clip.shape}" if is_array else type(clip).__name__
      raise UserError(f"clip {number} of a sentence must be frames, uint8 (T, H, W, 3), or a ClipRef, got {got}")
    sizes.append(clip.shape[1:3])
  if len(set(sizes)) > 1:
    found = ", ".join(map(size_text, sizes))
    raise UserError(f"the clips of a sentence must have one size, got {found} (width x height)")


def condition_key(first_clip: ClipRef, num_latent_frames: int) -> str:
  """Returns the key of I2V's condition among the latents."""
  return f"{first_clip.key}|first frame of {num_latent_frames}"


def _key(clip: Clip) -> str | None:
  return clip.key if isinstance(clip, ClipRef) else None


def _look_up(cache: Cache | None, key: str | None, compute: Callable[[], np.ndarray]) -> np.ndarray:
  return compute() if cache is None or key is None else cache.get_or_compute(key, compute)


def _number(name: str, names: Sequence[str]) -> int:
  """Returns the number of a name, from 1; 0 if it is not in the list."""
  return 1 + names.index(name) if name in names else 0
