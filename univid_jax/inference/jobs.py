"""Sentences to complete, and the rows that sampling packs them into."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from univid_jax.core.packed_row import PackedRow
from univid_jax.core.sentence import Sentence
from univid_jax.data.packing import RowShape, assign_rows, join_rows, pack, places_of
from univid_jax.data.tokens import Features
from univid_jax.inference.sampler import Request


@dataclasses.dataclass(frozen=True)
class Job:
  """A sentence to complete.

  Attributes:
    sentence: its clips are latents; those of the target are zeros.
    noise: where the target starts, in patches (tokens, p).
    condition, image_features: I2V's; None for T2V.
  """

  sentence: Sentence
  noise: Float[np.ndarray, "q p"]
  condition: np.ndarray | None
  image_features: np.ndarray | None

  @property
  def target_shape(self) -> tuple[int, int, int]:
    target = self.sentence.clips[-1]
    assert isinstance(target, np.ndarray)
    return target.shape[0], target.shape[1], target.shape[2]


def infer_length(lengths: Sequence[int]) -> int:
  """Returns the target's length: the query's if the last example pair is equally long, else that of the pair's target.

  Args:
    lengths: frames of A, A', B and so on; of a query alone, its own length.
  """
  if len(lengths) < 3 or lengths[-3] == lengths[-2]:
    return lengths[-1]
  return lengths[-2]


def pack_single(features: Features, *, context_causal: bool) -> PackedRow:
  """Packs one sentence without padding: the row needs no intervals and, with full attention, a single timestep."""
  shape = RowShape(
    num_tokens=len(features.tokens), num_text_tokens=len(features.text), num_slots=1, context_causal=context_causal
  )
  row = dataclasses.replace(pack([features], shape), text_intervals=None, image_intervals=None)
  return row if context_causal else dataclasses.replace(row, key_intervals=None, modulation_ids=None)


def pack_request(
  positive: Sequence[Features],
  negative: Sequence[Features] | None,
  noises: Sequence[Float[np.ndarray, "_q p"]],
  *,
  context_causal: bool,
) -> Request:
  """Packs sentences into rows as long as the longest of them.

  Args:
    positive: of each sentence with its prompt.
    negative: of the same sentences with the negative prompt; None samples without guidance.
    noises: where each sentence's target starts.
    context_causal: see `PackedRow`.
  """
  lengths = [len(features.tokens) for features in positive]
  slots = max(1, max(lengths) // min(lengths))
  shape = RowShape(
    num_tokens=max(lengths),
    num_text_tokens=slots * max(len(features.text) for features in (*positive, *(negative or ()))),
    num_slots=slots,
    context_causal=context_causal,
  )
  groups = assign_rows(positive, shape)

  def join(features: Sequence[Features]) -> PackedRow:
    return join_rows([pack([features[i] for i in group], shape) for group in groups])

  return Request(join(positive), None if negative is None else join(negative), places_of(groups), noises)
