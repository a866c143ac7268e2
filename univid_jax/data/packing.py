"""From sentences of latents to packed rows: whole sentences side by side, with all that the model needs to know of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from einops import rearrange

from univid_jax.types import PackedRow, Role, Sentence

Features = Mapping[str, np.ndarray]

# What a sentence brings, by what it is counted in; and those of each kind that say which sentence stands where.
FEATURES = {
    "tokens": ("tokens", "positions", "target_mask", "condition"),
    "text": ("text", "text_counts"),
    "image_features": ("image_features",),
    "targets": ("targets",),
    "slots": ("task_ids", "context_ids"),
}
SEGMENTED = ("tokens", "text", "image_features")

# CLIP's features of one image: its patches and their class.
IMAGE_FEATURES = 257


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShape:
  """What a row holds at most.

  Attributes:
    num_tokens: tokens.
    num_text_tokens: text tokens, each sentence's padding counted as one.
    num_slots: sentences.
    num_targets: tokens of targets; None is any number, and rows that do not say where their targets are.
    context_causal: whether context tokens see only context, see `PackedRow`.
  """

  num_tokens: int
  num_text_tokens: int
  num_slots: int
  num_targets: int | None = None
  context_causal: bool = False

  def limits(self, features: Mapping[str, Any]) -> dict[str, int]:
    """How long each of the features of a row may be."""
    counts = {"tokens": self.num_tokens, "text": self.num_text_tokens, "targets": self.num_targets, "slots": self.num_slots,
              "image_features": IMAGE_FEATURES * self.num_slots}
    return {name: counts[kind] for kind, names in FEATURES.items() if counts[kind] for name in names if name in features}


def patchify(latents: np.ndarray, patch_size: tuple[int, int, int]) -> np.ndarray:
  """(t, y, x, c) latents to (tokens, values), tokens in the order t, y, x; works on NumPy and JAX arrays.

  Raises:
    ValueError: a dim is not a multiple of the patch.
  """
  if any(n % p for n, p in zip(latents.shape, patch_size)):
    raise ValueError(f"latents of shape {tuple(latents.shape[:3])} do not divide into patches of {tuple(patch_size)}")
  p, q, r = patch_size
  return rearrange(latents, "(t p) (y q) (x r) c -> (t y x) (p q r c)", p=p, q=q, r=r)


def unpatchify(tokens: np.ndarray, shape: tuple[int, int, int], patch_size: tuple[int, int, int]) -> np.ndarray:
  """The inverse of `patchify` for latents of shape (t, y, x)."""
  (t, y, x), (p, q, r) = (tuple(n // m for n, m in zip(shape, patch_size)), patch_size)
  return rearrange(tokens, "(t y x) (p q r c) -> (t p) (y q) (x r) c", t=t, y=y, x=x, p=p, q=q, r=r)


def sentence_features(sentence: Sentence, *, patch_size: tuple[int, int, int], prompt_embedding: np.ndarray, text_len: int,
                      task_id: int = 0, context_id: int = 0, condition: np.ndarray | None = None,
                      image_features: np.ndarray | None = None) -> Features:
  """What a sentence puts into a row, without what depends on its place there.

  Args:
    sentence: its clips are latents.
    patch_size: of the transformer.
    prompt_embedding: (tokens, text_dim), without padding.
    text_len: length to which the original pads a prompt.
    task_id: number of the task, from 1; 0 is none.
    context_id: number of the context, likewise.
    condition: I2V's mask and first-frame latents (t, y, x, 20) over the whole sentence, or None.
    image_features: I2V's CLIP features (257, 1280), or None.
  """
  tokens = [patchify(clip, patch_size) for clip in sentence.clips]
  positions, start = [], 0
  for clip in sentence.clips:
    t, y, x = (n // p for n, p in zip(clip.shape, patch_size))
    grid = np.stack(np.meshgrid(np.arange(start, start + t), np.arange(y), np.arange(x), indexing="ij"), axis=-1)
    positions.append(grid.reshape(-1, 3))
    start += t
  lengths = [len(part) for part in tokens]
  padding = text_len - len(prompt_embedding)
  if padding < 0:
    raise ValueError(f"a prompt of {len(prompt_embedding)} tokens is longer than {text_len}")
  text = np.concatenate([prompt_embedding, np.zeros((min(padding, 1), prompt_embedding.shape[1]))])
  counts = np.concatenate([np.ones(len(prompt_embedding)), np.full(min(padding, 1), padding)])
  target_mask = np.repeat([role == Role.TARGET for role in sentence.roles], lengths)
  conditions = {}
  if condition is not None:
    conditions["condition"] = patchify(condition, patch_size).astype(np.float32)
  if image_features is not None:
    conditions["image_features"] = np.asarray(image_features, np.float32)
  return {
      **conditions,
      "tokens": np.concatenate(tokens).astype(np.float32),
      "positions": np.concatenate(positions).astype(np.int32),
      "target_mask": target_mask,
      "targets": np.flatnonzero(target_mask).astype(np.int32),
      "text": text.astype(np.float32),
      "text_counts": counts.astype(np.float32),
      "task_ids": np.array([task_id], np.int32),
      "context_ids": np.array([context_id], np.int32),
  }


def finish_rows(packed: Features, *, context_causal: bool = False) -> PackedRow:
  """Adds to packed features what follows from which sentence stands where; every array has a leading row dim.

  Args:
    packed: the features of `sentence_features`, and for tokens, text and image features the segment ids of each (from 1; 0 is
      padding) under their name and `_segment_ids`.
    context_causal: whether context tokens see only context.
  """
  segment_ids, targets = packed["tokens_segment_ids"], packed["target_mask"].astype(bool)
  key_intervals = segment_intervals(segment_ids, segment_ids)
  if context_causal:
    context = segment_intervals(segment_ids, np.where(targets, 0, segment_ids))
    key_intervals = np.where(targets[..., None], key_intervals, context)
  images = packed.get("image_features_segment_ids")
  given = {name: packed[name] for names in FEATURES.values() for name in names if name in packed}
  if "targets" in given:  # places in the sentence; those in the row follow from the mask
    given["targets"] = target_places(targets, given["targets"].shape[1])
  return PackedRow(
      **given,
      segment_ids=segment_ids.astype(np.int32),
      key_intervals=key_intervals,
      text_intervals=segment_intervals(segment_ids, packed["text_segment_ids"]),
      image_intervals=None if images is None else segment_intervals(segment_ids, images),
      modulation_ids=(2 * np.maximum(segment_ids - 1, 0) + targets).astype(np.int32),
      context_causal=context_causal,
  )


def target_places(target_mask: np.ndarray, count: int | None = None) -> np.ndarray:
  """Where the targets' tokens stand in each row, (b, l) to (b, count), see `PackedRow.targets`; as many as needed by default."""
  places = [np.flatnonzero(mask) for mask in target_mask]
  count = max(map(len, places)) if count is None else count
  return np.stack([np.pad(p, (0, count - len(p)), constant_values=target_mask.shape[1]) for p in places]).astype(np.int32)


def segment_intervals(query_ids: np.ndarray, key_ids: np.ndarray) -> np.ndarray:
  """[start, end) of the keys with each query's segment id: (b, l), (b, n) to (b, l, 2); padding gets [0, 0).

  Keys of one segment must stand together.
  """
  highest = int(max(query_ids.max(initial=0), key_ids.max(initial=0)))
  ids = np.arange(1, highest + 1)
  member = key_ids[:, None, :] == ids[:, None]
  start, count = member.argmax(-1), member.sum(-1)
  table = np.stack([start, start + count], axis=-1)
  table = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
  return np.take_along_axis(table, query_ids[..., None].astype(np.int64), axis=1).astype(np.int32)


def pack(sentences: Sequence[Features], shape: RowShape) -> PackedRow:
  """Puts the given sentences, in order, into one row (b = 1).

  Raises:
    ValueError: they do not fit.
  """
  packed = {}
  for name, limit in shape.limits(sentences[0]).items():
    parts = [features[name] for features in sentences]
    total = sum(map(len, parts))
    if total > limit:
      raise ValueError(f"{len(sentences)} sentences with {total} {name} do not fit into a row of {limit}")
    values = np.concatenate(parts)
    packed[name] = np.pad(values, [(0, limit - total)] + [(0, 0)] * (values.ndim - 1))[None]
    if name in SEGMENTED:
      ids = np.repeat(np.arange(1, len(parts) + 1), [len(part) for part in parts])
      packed[f"{name}_segment_ids"] = np.pad(ids, (0, limit - total))[None]
  return finish_rows(packed, context_causal=shape.context_causal)


def join_rows(rows: Sequence[PackedRow]) -> PackedRow:
  """Rows of one shape as a batch."""
  return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


def pack_rows(sentences: Sequence[Features], shape: RowShape) -> tuple[PackedRow, list[tuple[int, int]]]:
  """Packs sentences into rows by `assign_rows`.

  Returns:
    The rows, and (row, segment id) of each sentence.
  """
  rows = assign_rows(sentences, shape)
  return join_rows([pack([sentences[i] for i in row], shape) for row in rows]), places_of(rows)


def places_of(rows: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
  """(row, segment id) of each sentence."""
  places = {index: (r, 1 + s) for r, row in enumerate(rows) for s, index in enumerate(row)}
  return [places[i] for i in range(len(places))]


def assign_rows(sentences: Sequence[Features], shape: RowShape) -> list[list[int]]:
  """Which sentences share a row: as few rows as first-fit-decreasing finds.

  Raises:
    ValueError: a sentence is longer than a row.
  """
  rows: list[list[int]] = []
  for index in sorted(range(len(sentences)), key=lambda i: -len(sentences[i]["tokens"])):
    row = next((row for row in rows if _fits([sentences[i] for i in (*row, index)], shape)), None)
    if row is None:
      rows.append(row := [])
    row.append(index)
  return rows


def _fits(sentences: Sequence[Features], shape: RowShape) -> bool:
  return (len(sentences) <= shape.num_slots
          and sum(len(features["tokens"]) for features in sentences) <= shape.num_tokens
          and sum(len(features["targets"]) for features in sentences) <= (shape.num_targets or shape.num_tokens)
          and sum(len(features["text"]) for features in sentences) <= shape.num_text_tokens)


def target_tokens(tokens: np.ndarray, row: PackedRow, place: tuple[int, int]) -> np.ndarray:
  """The tokens (n, p) of the targets of the sentence at (row, segment id)."""
  index, segment = place
  return tokens[index][(row.segment_ids[index] == segment) & row.target_mask[index]]
