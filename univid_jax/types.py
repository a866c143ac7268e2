"""The words of the project: clips make a sentence, sentences make a packed row.

Dims, everywhere: b row, l token of a row, n text token of a row, s sentence slot of a row, m modulation slot of a row,
p values of a patch, h head, k head_dim, d embed, f mlp; t, y, x latent frame, row, column; c channel; T, H, W pixels.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped


class Role(enum.IntEnum):
  """What the model does with a clip: a context is shown clean, a target is noised and learned."""

  CONTEXT = 0
  TARGET = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sentence:
  """A visual sentence: clips in order, each with its role.

  Attributes:
    clips: one array a clip, all of them pixels, uint8 (T, H, W, 3), or all latents, float32 (t, y, x, c).
    roles: one role a clip; within a sentence targets stand last.
    prompt: the text that goes with it; "" is the null prompt.
    task: name of the task that the example pairs show.
    context: "I", "II", "III" or "IV" as in the paper, or any other name of a pattern of images and videos.
    reverse: whether the pairs are turned round, so that A of A' is the task.
    params: what a computed task drew for this sentence, where it is one.
  """

  clips: tuple[np.ndarray, ...]
  roles: tuple[Role, ...]
  prompt: str = ""
  task: str = ""
  context: str = ""
  reverse: bool = False
  params: Mapping[str, Any] | None = None

  def __post_init__(self):
    if len(self.clips) != len(self.roles):
      raise ValueError(f"a sentence needs one role a clip: {len(self.clips)} clips, {len(self.roles)} roles")
    if Role.TARGET not in self.roles:
      raise ValueError("a sentence needs a target clip")
    if list(self.roles) != sorted(self.roles):
      raise ValueError(f"targets stand last in a sentence, got the roles {[r.name for r in self.roles]}")

  def replace(self, **changes) -> "Sentence":
    return dataclasses.replace(self, **changes)


def reference_roles(num_clips: int) -> tuple[Role, ...]:
  """The reading of UniVid's A, A', B, B': the last clip is the target, all before it are context."""
  return (Role.CONTEXT,) * (num_clips - 1) + (Role.TARGET,)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedRow:
  """A batch of rows, each holding one or several sentences; all that the model knows of their structure.

  Attributes:
    tokens: clean latents, one patch a token, values ordered (patch t, patch y, patch x, channel).
    positions: (t, y, x) of each token in units of patches; time runs on across the clips of a sentence.
    segment_ids: the sentence of a token, from 1; 0 is padding.
    target_mask: True where the token belongs to a target clip.
    targets: the places of these tokens, filled up with l where a row has fewer than others: the model may leave out what only
      the velocity of context would need. None where the velocity of all tokens is wanted.
    text: prompt embeddings of the row's sentences, one after another, without their padding but for one zero vector a
      sentence, which stands for all of it.
    text_counts: how often each text token stands in the original's padded prompt: 1, the number of padding positions
      for the vector that stands for them, or 0 where the row has no more text.
    key_intervals: [start, end) of the tokens that a token may attend to; None where a row is one sentence.
    text_intervals: [start, end) of the text tokens that a token may attend to; None where a row is one sentence.
    modulation_ids: the entry of the row's table of timesteps that modulates a token, two a sentence: 2 (segment - 1) +
      role; None where one timestep serves the whole row.
    condition: I2V's mask and first-frame latents, in patches like the tokens; None for T2V.
    image_features: I2V's CLIP features of each sentence's first frame, one sentence after another; None for T2V.
    image_intervals: [start, end) of the features that a token may attend to; None where a row is one sentence.
    task_ids: each sentence's task, as a number from 1 in the loader's list of tasks; 0 where the slot is empty.
    context_ids: each sentence's context, likewise.
    context_causal: whether context tokens see only context and carry timestep 0, so that they do not change while the target
      is sampled; else every token sees its whole sentence, as in UniVid.
  """

  tokens: Float[Array, "b l p"]
  positions: Int[Array, "b l 3"]
  segment_ids: Int[Array, "b l"]
  target_mask: Bool[Array, "b l"]
  text: Float[Array, "b n d"]
  text_counts: Float[Array, "b n"]
  targets: Int[Array, "b q"] | None = None
  key_intervals: Int[Array, "b l 2"] | None = None
  text_intervals: Int[Array, "b l 2"] | None = None
  modulation_ids: Int[Array, "b l"] | None = None
  condition: Float[Array, "b l q"] | None = None
  image_features: Float[Array, "b i e"] | None = None
  image_intervals: Int[Array, "b l 2"] | None = None
  task_ids: Int[Array, "b s"] | None = None
  context_ids: Int[Array, "b s"] | None = None
  context_causal: bool = dataclasses.field(default=False, metadata={"static": True})

  @property
  def num_slots(self) -> int:
    """Sentences that a row can hold."""
    return 1 if self.task_ids is None else self.task_ids.shape[1]

  def of_targets(self) -> "PackedRow":
    """The targets' tokens alone, as queries: their intervals still count the whole row's keys."""
    taken = {name: take_tokens(value, self.targets) for name in TOKEN_FIELDS if (value := getattr(self, name)) is not None}
    return dataclasses.replace(self, **taken, targets=None)


# Fields of a row with an entry a token.
TOKEN_FIELDS = ("tokens", "positions", "segment_ids", "target_mask", "key_intervals", "text_intervals", "modulation_ids",
                "condition", "image_intervals")


def take_tokens(x: Shaped[Array, "b l ..."], places: Int[Array, "b q"]) -> Shaped[Array, "b q ..."]:
  """The tokens at these places; zeros where a place is l."""
  return jnp.take_along_axis(x, places.reshape(places.shape + (1,) * (x.ndim - 2)), axis=1, mode="fill", fill_value=0)


def put_tokens(x: Shaped[Array, "b q ..."], places: Int[Array, "b q"], into: Shaped[Array, "b l ..."]
               ) -> Shaped[Array, "b l ..."]:
  """The inverse of `take_tokens`: the others are those of `into`."""
  return into.at[jnp.arange(len(x))[:, None], places].set(x.astype(into.dtype), mode="drop")


def latent_shape(shape: tuple[int, ...], *, temporal_stride: int, spatial_stride: int) -> tuple[int, int, int]:
  """(t, y, x) of the latents of a clip of pixels (T, H, W, ...), after checking that the clip has any.

  Raises:
    ValueError: T is not 1 more than a multiple of the temporal stride or a side is no multiple of the spatial stride;
      the message names the nearest values that are.
  """
  frames, height, width = shape[:3]
  if frames < 1 or (frames - 1) % temporal_stride:
    below = (frames - 1) // temporal_stride * temporal_stride + 1
    near = [n for n in (below, below + temporal_stride) if n > 0]
    raise ValueError(f"a clip needs {temporal_stride}n + 1 frames, got {frames}; the nearest are {' and '.join(map(str, near))}")
  for name, side in (("height", height), ("width", width)):
    if side < 1 or side % spatial_stride:
      below = side // spatial_stride * spatial_stride
      near = [n for n in (below, below + spatial_stride) if n > 0]
      raise ValueError(f"the {name} must be a multiple of {spatial_stride}, got {side}; the nearest are "
                       f"{' and '.join(map(str, near))}")
  return 1 + (frames - 1) // temporal_stride, height // spatial_stride, width // spatial_stride
