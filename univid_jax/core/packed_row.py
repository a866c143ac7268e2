"""Packed rows: everything the model knows about the sentences it processes."""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from univid_jax.core.errors import UserError
from univid_jax.core.options import Attention, ContextTimestep

PER_TOKEN = {"per_token": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextMode:
  """How the context of a sentence is computed.

  Attributes:
    causal: whether context tokens attend to context only. They then stay constant while the target is sampled.
      Otherwise every token attends to its whole sentence, as in UniVid.
    zero_timestep: whether context tokens have timestep 0. Otherwise they have that of their target, as in UniVid.
      Causal context needs 0: its tokens must not depend on the target.
  """

  causal: bool = False
  zero_timestep: bool = False

  def __post_init__(self):
    if self.causal and not self.zero_timestep:
      raise UserError(
        "attention = context_causal needs context_timestep = zero: the context must not depend on the target"
      )

  @classmethod
  def from_options(cls, attention: Attention, timestep: ContextTimestep, *, default: ContextTimestep) -> "ContextMode":
    """Returns the mode that two options select.

    Args:
      attention: what tokens attend to.
      timestep: of context tokens; AUTO is zero with context-causal attention, else the default.
      default: what the base was trained with.

    Raises:
      UserError: context-causal attention with the target's timestep.
    """
    causal = attention == Attention.CONTEXT_CAUSAL
    if timestep == ContextTimestep.AUTO:
      timestep = ContextTimestep.ZERO if causal else default
    return cls(causal=causal, zero_timestep=timestep == ContextTimestep.ZERO)

  @property
  def timestep(self) -> ContextTimestep:
    return ContextTimestep.ZERO if self.zero_timestep else ContextTimestep.TARGET


# UniVid's mode: every token attends to its whole sentence and has the timestep of its target.
UNIVID_CONTEXT = ContextMode()


def _per_token(*, default: Any = dataclasses.MISSING) -> Any:
  """A field with one entry per token; its second dim is sharded over the sequence."""
  return dataclasses.field(default=default, metadata=PER_TOKEN)


@no_type_check  # of fields at run time: as a pytree it also holds shardings, shapes and other leaves
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedRow:
  """A batch of rows, each holding one or more sentences.

  Attributes:
    tokens: clean latents, one patch per token, values ordered (patch t, patch y, patch x, channel).
    positions: (t, y, x) of each token in patches; time runs on across the clips of a sentence, with
      a gap between clips if the model has one.
    segment_ids: the sentence of each token, from 1; 0 is padding.
    target_mask: True for tokens of target clips.
    targets: indices of the target tokens, padded with l; lets the last block and the head skip context tokens. None
      computes the velocity of every token.
    text: prompt embeddings of the row's sentences, concatenated. The padding of each prompt is represented by one zero
      vector.
    text_counts: how often each text token occurs in the reference's padded prompt: 1, the number of padding positions
      for the vector that represents them, 0 past the end of the row's text.
    key_intervals: [start, end) of the tokens that a token attends to; None if the row is one sentence.
    text_intervals: [start, end) of the text tokens that a token attends to; None if the row is one sentence.
    modulation_ids: index of each token into the row's table of timesteps, which has two entries per sentence:
      2 * (segment - 1) + role. None if one timestep applies to the whole row.
    condition: I2V's mask and first-frame latents, in patches like the tokens; None for models without.
    image_features: I2V's CLIP features of each sentence's first frame, concatenated; None for models without.
    image_intervals: [start, end) of the image features that a token attends to; None if the row is one sentence.
    task_ids: the task of each sentence slot, from 1 in the loader's list of tasks; 0 for empty slots.
    context_ids: the context of each sentence slot, likewise.
    context_mode: what context tokens attend to, and their timestep.
  """

  tokens: Float[Array, "b l p"] = _per_token()
  positions: Int[Array, "b l 3"] = _per_token()
  segment_ids: Int[Array, "b l"] = _per_token()
  target_mask: Bool[Array, "b l"] = _per_token()
  text: Float[Array, "b n d"]
  text_counts: Float[Array, "b n"]
  targets: Int[Array, "b q"] | None = None
  key_intervals: Int[Array, "b l 2"] | None = _per_token(default=None)
  text_intervals: Int[Array, "b l 2"] | None = _per_token(default=None)
  modulation_ids: Int[Array, "b l"] | None = _per_token(default=None)
  condition: Float[Array, "b l _p"] | None = _per_token(default=None)
  image_features: Float[Array, "b i e"] | None = None
  image_intervals: Int[Array, "b l 2"] | None = _per_token(default=None)
  task_ids: Int[Array, "b s"] | None = None
  context_ids: Int[Array, "b s"] | None = None
  context_mode: ContextMode = dataclasses.field(default=UNIVID_CONTEXT, metadata={"static": True})

  @property
  def num_slots(self) -> int:
    """The number of sentences a row can hold."""
    return 1 if self.task_ids is None else self.task_ids.shape[1]

  def target_queries(self) -> "PackedRow":
    """Returns the target tokens alone, as queries: their intervals still refer to the keys of the whole row."""
    assert self.targets is not None
    taken = {
      name: take_tokens(value, self.targets) for name in TOKEN_FIELDS if (value := getattr(self, name)) is not None
    }
    return dataclasses.replace(self, **taken, targets=None)


# Names of the fields with one entry per token, in a fixed order: the order of a set would differ between processes, and
# so would their programs, which would miss the compilation cache.
TOKEN_FIELDS = tuple(field.name for field in dataclasses.fields(PackedRow) if field.metadata.get("per_token"))


def take_tokens(x: Shaped[Array, "b l ..."], indices: Int[Array, "b q"]) -> Shaped[Array, "b q ..."]:
  """Gathers tokens by index; an index of l gives zeros."""
  indices = indices.reshape(indices.shape + (1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, indices, axis=1, mode="fill", fill_value=0)


def put_tokens(
  x: Shaped[Array, "b q ..."], indices: Int[Array, "b q"], into: Shaped[Array, "b l ..."]
) -> Shaped[Array, "b l ..."]:
  """Returns `into` with the tokens at `indices` replaced by `x`; the inverse of `take_tokens`."""
  # Mapped over rows: with row indices next to token indices, devices would exchange the tokens of all rows.
  return jax.vmap(lambda row, x, indices: row.at[indices].set(x, mode="drop"))(into, x.astype(into.dtype), indices)
