"""Packs features of sentences into rows: whole sentences one after another, and everything the model knows of them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from univid_jax.config.schema import RowsConfig
from univid_jax.core.errors import UserError
from univid_jax.core.numbers import round_up
from univid_jax.core.packed_row import UNIVID_CONTEXT, ContextMode, PackedRow
from univid_jax.data.rows.tokens import IMAGE_FEATURES, SEGMENTED, UNITS, Features, Unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShape:
  """The capacity of a row.

  Attributes:
    num_tokens: tokens.
    num_text_tokens: text tokens; the padding of a prompt counts as one.
    num_slots: sentences.
    num_targets: target tokens; None allows any number, and rows then have no indices of target tokens.
    context_mode: see `PackedRow`.
  """

  num_tokens: int
  num_text_tokens: int
  num_slots: int
  num_targets: int | None = None
  context_mode: ContextMode = UNIVID_CONTEXT

  @classmethod
  def from_config(cls, rows: RowsConfig, context_mode: ContextMode) -> "RowShape":
    """Returns the shape of a run's rows."""
    return cls(
      num_tokens=rows.num_tokens,
      num_text_tokens=rows.num_text_tokens,
      num_slots=rows.num_sentences,
      num_targets=rows.target_tokens,
      context_mode=context_mode,
    )

  def capacities(self, names: Iterable[str]) -> dict[str, int]:
    """Returns the length of each of the named features in a row, without those that are left out."""
    of_units = {
      Unit.TOKEN: self.num_tokens,
      Unit.TEXT_TOKEN: self.num_text_tokens,
      Unit.IMAGE_FEATURE: IMAGE_FEATURES * self.num_slots,
      Unit.TARGET_TOKEN: self.num_targets,
      Unit.SENTENCE: self.num_slots,
    }
    return {name: capacity for name in names if (capacity := of_units[UNITS[name]]) is not None}


def bucket_size(count: int) -> int:
  """Rounds a count up, by at most a 16th from 256 on, so that few sizes occur.

  Sizes are multiples of 16; from 512 on there are 16 per power of two; from 16,384 on they are multiples of 1,024, the
  keys that attention on TPUs computes together.
  """
  step = min(max(16, 2 ** (count.bit_length() - 5)), 1024)
  return round_up(count, step)


def pack(sentences: Sequence[Features], shape: RowShape) -> PackedRow:
  """Packs sentences, in order, into one row (b = 1).

  Raises:
    UserError: they do not fit.
  """
  parts = [features.arrays() for features in sentences]
  packed, segment_ids = {}, {}
  for name, capacity in shape.capacities(parts[0]).items():
    values = [part[name] for part in parts]
    total = sum(map(len, values))
    if total > capacity:
      raise UserError(f"{len(sentences)} sentences with {total} {name} do not fit into a row of {capacity}")
    packed[name] = _pad(np.concatenate(values), capacity)[None]
    if SEGMENTED.get(UNITS[name]) == name:
      ids = np.repeat(np.arange(1, len(values) + 1), [len(value) for value in values])
      segment_ids[UNITS[name]] = _pad(ids, capacity)[None]
  return finish_rows(packed, segment_ids, context_mode=shape.context_mode)


def finish_rows(
  packed: Mapping[str, np.ndarray], segment_ids: Mapping[Unit, Integer[np.ndarray, "b _"]], *, context_mode: ContextMode
) -> PackedRow:
  """Returns rows with the fields that depend on where sentences are in them.

  Args:
    packed: the features of `Features` by name, each with a leading row dim.
    segment_ids: the sentence of each token, text token and, for I2V, image feature, from 1; 0 is padding.
    context_mode: see `PackedRow`.
  """
  tokens, is_target = segment_ids[Unit.TOKEN], packed["target_mask"].astype(bool)
  key_intervals = segment_intervals(tokens, tokens)
  if context_mode.causal:
    context = segment_intervals(tokens, np.where(is_target, 0, tokens))
    key_intervals = np.where(is_target[..., None], key_intervals, context)
  fields: dict[str, Any] = {
    **packed,
    "segment_ids": tokens.astype(np.int32),
    "key_intervals": key_intervals,
    "text_intervals": segment_intervals(tokens, segment_ids[Unit.TEXT_TOKEN]),
    "modulation_ids": (2 * np.maximum(tokens - 1, 0) + is_target).astype(np.int32),
  }
  if "targets" in packed:  # indices within the sentence so far; those within the row follow from the mask
    fields["targets"] = target_indices(is_target, packed["targets"].shape[1])
  if Unit.IMAGE_FEATURE in segment_ids:
    fields["image_intervals"] = segment_intervals(tokens, segment_ids[Unit.IMAGE_FEATURE])
  return PackedRow(**fields, context_mode=context_mode)


def segment_intervals(
  query_ids: Integer[np.ndarray, "b l"], key_ids: Integer[np.ndarray, "b n"]
) -> Int[np.ndarray, "b l 2"]:
  """Returns [start, end) of the keys with each query's segment id; padding gets [0, 0).

  The keys of a segment must be contiguous.
  """
  highest = int(max(query_ids.max(initial=0), key_ids.max(initial=0)))
  ids = np.arange(1, highest + 1)
  member = key_ids[:, None, :] == ids[:, None]
  start, count = member.argmax(-1), member.sum(-1)
  table = np.stack([start, start + count], axis=-1)
  table = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
  return np.take_along_axis(table, query_ids[..., None].astype(np.int64), axis=1).astype(np.int32)


def target_indices(target_mask: Bool[np.ndarray, "b l"], count: int | None = None) -> Int[np.ndarray, "b q"]:
  """Returns the indices of the target tokens of each row, padded to `count` with l; as many as needed by default."""
  indices = [np.flatnonzero(mask) for mask in target_mask]
  count = max(map(len, indices)) if count is None else count
  length = target_mask.shape[1]
  return np.stack([np.pad(i, (0, count - len(i)), constant_values=length) for i in indices]).astype(np.int32)


def join_rows(rows: Sequence[PackedRow]) -> PackedRow:
  """Joins rows of the same shape into a batch."""
  return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


def pack_rows(sentences: Sequence[Features], shape: RowShape) -> tuple[PackedRow, list[tuple[int, int]]]:
  """Packs sentences into the rows that `assign_rows` chooses.

  Returns:
    The rows, and (row, segment id) of each sentence.
  """
  rows = assign_rows(sentences, shape)
  return join_rows([pack([sentences[i] for i in row], shape) for row in rows]), places_of(rows)


def take_rows(x: np.ndarray, start: int, length: int) -> np.ndarray:
  """Takes rows from `start` on, padded to `length` rows with zeros."""
  x = x[start : start + length]
  return np.pad(x, [(0, length - len(x))] + [(0, 0)] * (x.ndim - 1))


def assign_rows(sentences: Sequence[Features], shape: RowShape) -> list[list[int]]:
  """Assigns sentences to rows, first-fit decreasing; a sentence that fits into no open row gets its own."""
  rows: list[list[int]] = []
  for index in sorted(range(len(sentences)), key=lambda i: -len(sentences[i].tokens)):
    row = next((row for row in rows if _fits([sentences[i] for i in (*row, index)], shape)), None)
    if row is None:
      rows.append(row := [])
    row.append(index)
  return rows


def places_of(rows: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
  """Returns (row, segment id) of each sentence, given the sentences of each row."""
  places = {index: (r, 1 + s) for r, row in enumerate(rows) for s, index in enumerate(row)}
  return [places[i] for i in range(len(places))]


def select_target_tokens(
  tokens: Float[Array | np.ndarray, "b l p"], row: PackedRow, place: tuple[int, int]
) -> Float[np.ndarray, "q p"]:
  """Selects the target tokens of the sentence at (row, segment id)."""
  index, segment = place
  selected = (np.asarray(row.segment_ids[index]) == segment) & np.asarray(row.target_mask[index])
  return np.asarray(tokens[index])[selected]


def _fits(sentences: Sequence[Features], shape: RowShape) -> bool:
  return (
    len(sentences) <= shape.num_slots
    and sum(len(features.tokens) for features in sentences) <= shape.num_tokens
    and sum(len(features.targets) for features in sentences) <= (shape.num_targets or shape.num_tokens)
    and sum(len(features.text) for features in sentences) <= shape.num_text_tokens
  )


def _pad(values: np.ndarray, length: int) -> np.ndarray:
  """Pads the first dim with zeros."""
  return np.pad(values, [(0, length - len(values))] + [(0, 0)] * (values.ndim - 1))
