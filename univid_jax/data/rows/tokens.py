"""Converts a sentence of latents to its features: tokens, positions, text and whatever else it contributes to a row."""

import dataclasses
import enum
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Shaped

from univid_jax.core.dims import MAX_POSITION
from univid_jax.core.errors import UserError
from univid_jax.core.protocols import TransformerShape
from univid_jax.core.sentence import Clip, ClipRef, Role, Sentence

# Works on NumPy and JAX arrays.
ArrayT = TypeVar("ArrayT", Array, np.ndarray)

# CLIP's features of one image: one per patch, and the class token.
IMAGE_FEATURES = 257


class Unit(enum.Enum):
  """What a feature has one entry per; a row's capacity is counted in these units."""

  TOKEN = enum.auto()
  TEXT_TOKEN = enum.auto()
  IMAGE_FEATURE = enum.auto()
  TARGET_TOKEN = enum.auto()
  SENTENCE = enum.auto()


def _per(unit: Unit, *, default: Any = dataclasses.MISSING) -> Any:
  return dataclasses.field(default=default, metadata={"unit": unit})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
  """What a sentence contributes to a row, except what depends on its place there; fields as in `PackedRow`.

  Attributes:
    targets: indices of the target tokens in the sentence.
    condition, image_features: None for models that do not take them.
  """

  tokens: Float[np.ndarray, "l p"] = _per(Unit.TOKEN)
  positions: Int[np.ndarray, "l 3"] = _per(Unit.TOKEN)
  target_mask: Bool[np.ndarray, "l"] = _per(Unit.TOKEN)
  targets: Int[np.ndarray, "q"] = _per(Unit.TARGET_TOKEN)
  text: Float[np.ndarray, "n d"] = _per(Unit.TEXT_TOKEN)
  text_counts: Float[np.ndarray, "n"] = _per(Unit.TEXT_TOKEN)
  task_ids: Int[np.ndarray, "1"] = _per(Unit.SENTENCE)
  context_ids: Int[np.ndarray, "1"] = _per(Unit.SENTENCE)
  condition: Float[np.ndarray, "l _p"] | None = _per(Unit.TOKEN, default=None)
  image_features: Float[np.ndarray, "i e"] | None = _per(Unit.IMAGE_FEATURE, default=None)

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns the features that are not None, by name."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {name: value for name, value in values.items() if value is not None}


UNITS: Mapping[str, Unit] = {field.name: field.metadata["unit"] for field in dataclasses.fields(Features)}

# The feature of each unit whose entries get segment ids in a row, from which intervals are derived.
SEGMENTED: Mapping[Unit, str] = {Unit.TOKEN: "tokens", Unit.TEXT_TOKEN: "text", Unit.IMAGE_FEATURE: "image_features"}


def feature_names(shape: TransformerShape) -> list[str]:
  """Returns the names of the features that sentences have for a transformer."""
  left_out = {"condition": not shape.takes_condition, "image_features": not shape.takes_image_features}
  return [field.name for field in dataclasses.fields(Features) if not left_out.get(field.name)]


def patchify(latents: Shaped[ArrayT, "t y x c"], patch_size: tuple[int, int, int]) -> Shaped[ArrayT, "l p"]:
  """Cuts latents into patches, one per token, in the order t, y, x.

  Raises:
    ValueError: a dim is not a multiple of the patch.
  """
  if any(n % p for n, p in zip(latents.shape, patch_size)):
    raise ValueError(f"latents of shape {tuple(latents.shape[:3])} do not divide into patches of {tuple(patch_size)}")
  pt, py, px = patch_size
  return rearrange(latents, "(t pt) (y py) (x px) c -> (t y x) (pt py px c)", pt=pt, py=py, px=px)


def unpatchify(
  tokens: Shaped[ArrayT, "l p"], shape: tuple[int, int, int], patch_size: tuple[int, int, int]
) -> Shaped[ArrayT, "t y x c"]:
  """Joins patches into latents of shape (t, y, x): the inverse of `patchify`."""
  (t, y, x), (pt, py, px) = (tuple(n // m for n, m in zip(shape, patch_size)), patch_size)
  return rearrange(tokens, "(t y x) (pt py px c) -> (t pt) (y py) (x px) c", t=t, y=y, x=x, pt=pt, py=py, px=px)


def sentence_features(
  sentence: Sentence,
  *,
  patch_size: tuple[int, int, int],
  prompt_embedding: Float[np.ndarray, "n d"],
  text_len: int,
  clip_gap: int = 0,
  task_id: int = 0,
  context_id: int = 0,
  condition: Float[np.ndarray, "t y x v"] | None = None,
  image_features: Float[np.ndarray, "i e"] | None = None,
  has_first_frame: bool = False,
) -> Features:
  """Returns the features of a sentence of latents.

  Args:
    sentence: a sentence whose clips are latents.
    patch_size: patch size of the transformer.
    prompt_embedding: embedding of the prompt, without padding.
    text_len: length to which the original pads a prompt.
    clip_gap: positions in time that are left out between clips.
    task_id, context_id: numbers from 1; 0 for neither.
    condition: I2V's mask and first-frame latents over the whole sentence.
    image_features: I2V's CLIP features of the first frame.
    has_first_frame: whether the last clip but one is the first frame of the last clip, without a gap between them.

  Raises:
    UserError: the prompt is longer than `text_len`, or gaps move clips further than positions reach.
  """
  clips = [_check_encoded(clip) for clip in sentence.clips]
  tokens = [patchify(clip, patch_size) for clip in clips]
  gaps = [clip_gap] * (len(clips) - 1)
  if has_first_frame:
    gaps[-1] = 0
  padding = text_len - len(prompt_embedding)
  if padding < 0:
    raise UserError(f"a prompt of {len(prompt_embedding)} tokens is longer than {text_len}")
  text = np.concatenate([prompt_embedding, np.zeros((min(padding, 1), prompt_embedding.shape[1]))])
  counts = np.concatenate([np.ones(len(prompt_embedding)), np.full(min(padding, 1), padding)])
  target_mask = np.repeat([role == Role.TARGET for role in sentence.roles], [len(part) for part in tokens])
  return Features(
    tokens=np.concatenate(tokens).astype(np.float32),
    positions=_positions([clip.shape for clip in clips], patch_size, gaps),
    target_mask=target_mask,
    targets=np.flatnonzero(target_mask).astype(np.int32),
    text=text.astype(np.float32),
    text_counts=counts.astype(np.float32),
    task_ids=np.array([task_id], np.int32),
    context_ids=np.array([context_id], np.int32),
    condition=None if condition is None else patchify(condition, patch_size).astype(np.float32),
    image_features=None if image_features is None else image_features.astype(np.float32),
  )


def _check_encoded(clip: Clip) -> np.ndarray:
  if isinstance(clip, ClipRef):
    raise TypeError("the clips of the sentence must be latents, got one that has not been read")
  return clip


def _positions(
  shapes: Sequence[tuple[int, ...]], patch_size: tuple[int, int, int], gaps: Sequence[int]
) -> Int[np.ndarray, "l 3"]:
  """Returns (t, y, x) of each token of a sentence; time continues from clip to clip, with gaps between them.

  Raises:
    UserError: the model has no positions for so long a sentence or so large a frame.
  """
  positions, start = [], 0
  for shape, gap in zip(shapes, (0, *gaps), strict=True):
    t, y, x = (n // p for n, p in zip(shape, patch_size))
    if max(y, x) > MAX_POSITION:
      raise UserError(f"a frame of {y} x {x} tokens is too large: the model has positions for {MAX_POSITION} each way")
    positions.append(_clip_positions(t, y, x) + np.array([start + gap, 0, 0], np.int32))
    start += gap + t
  if start > MAX_POSITION:
    clip_gap = max(gaps, default=0)
    reason = f" with config.model.clip_gap = {clip_gap}" if clip_gap else ""
    raise UserError(
      f"a sentence of {len(shapes)} clips{reason} is too long: it takes {start} latent frames, and the model has "
      f"positions for {MAX_POSITION}"
    )
  return np.concatenate(positions)


@functools.lru_cache(maxsize=64)
def _clip_positions(t: int, y: int, x: int) -> Int[np.ndarray, "l 3"]:
  """Returns (t, y, x) of each token of a clip by itself; cached, so it must not be modified."""
  positions = np.ascontiguousarray(np.indices((t, y, x), np.int32).reshape(3, -1).T)
  positions.flags.writeable = False
  return positions
