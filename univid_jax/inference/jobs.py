"""Sentences to complete, and the rows that sampling packs them into."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from univid_jax.core.errors import UserError
from univid_jax.core.packed_row import ContextMode, PackedRow
from univid_jax.core.sentence import Sentence, reference_roles
from univid_jax.data.features import FeatureMaker
from univid_jax.data.rows.packing import RowShape, assign_rows, bucket_size, join_rows, pack, places_of
from univid_jax.data.rows.tokens import Features, patchify, unpatchify
from univid_jax.inference.arguments import as_numpy_clip, check_frames, check_image
from univid_jax.inference.sampler import PackedJobs


@dataclasses.dataclass(frozen=True)
class Job:
  """A sentence to complete.

  Attributes:
    sentence: its clips are latents; those of the target are zeros.
    noise: where the target starts, in patches (tokens, p).
    condition, image_features: I2V's; None for other models.
    first_frame: latents of the target's first frame, if they are the last clip of the context.
  """

  sentence: Sentence
  noise: Float[np.ndarray, "q p"]
  condition: np.ndarray | None
  image_features: np.ndarray | None
  first_frame: Float[np.ndarray, "1 y x c"] | None = None

  @property
  def target_shape(self) -> tuple[int, int, int]:
    target = self.sentence.clips[-1]
    assert isinstance(target, np.ndarray)
    return target.shape[0], target.shape[1], target.shape[2]

  def assemble(self, features: FeatureMaker, prompt_embedding: Float[np.ndarray, "n d"]) -> Features:
    """Returns the features of the sentence."""
    return features.assemble(
      self.sentence,
      prompt_embedding=prompt_embedding,
      condition=self.condition,
      image_features=self.image_features,
      has_first_frame=self.first_frame is not None,
    )

  def finish(self, tokens: Float[np.ndarray, "q p"], patch_size: tuple[int, int, int]) -> Float[np.ndarray, "t y x c"]:
    """Returns the target's latents from its sampled tokens."""
    latents = unpatchify(tokens, self.target_shape, patch_size)
    return latents if self.first_frame is None else np.concatenate([self.first_frame, latents])


def make_job(
  clips: Sequence[np.ndarray],
  noise: Float[np.ndarray, "t y x c"],
  *,
  features: FeatureMaker,
  first_clip: np.ndarray,
  has_first_frame: bool = False,
) -> Job:
  """Returns the job of a sentence of latents.

  Args:
    clips: of the whole sentence; those of the target are zeros.
    noise: where the target starts.
    features: computes I2V's inputs.
    first_clip: of the sentence, as frames.
    has_first_frame: whether the last clip of the context is the first frame of the target.
  """
  condition, image_features = features.image_inputs(first_clip, sum(map(len, clips)))
  return Job(
    Sentence(clips=tuple(clips), roles=reference_roles(len(clips))),
    patchify(noise, features.shape.patch_size),
    condition,
    image_features,
    first_frame=clips[-2] if has_first_frame else None,
  )


def join_context(clips: Sequence[np.ndarray], first_frame: np.ndarray | None) -> tuple[np.ndarray, ...]:
  """Returns what precedes a target: the clips of the context, then its own first frame as a clip, if it is given.

  Raises:
    UserError: the number of clips is even, one is not uint8 (T, H, W, 3), the frame is not (H, W, 3), or sizes differ.
  """
  if len(clips) % 2 == 0 and (clips or first_frame is None):
    raise UserError(f"the context must be an odd number of clips (A, A', B), got {len(clips)}")
  given = tuple(map(as_numpy_clip, clips))
  given += () if first_frame is None else (check_image("first_frame", first_frame)[None],)
  for clip in given:
    check_frames(clip)
  if len({clip.shape[1:3] for clip in given}) > 1:
    raise UserError(f"all clips must have the same size, got {[clip.shape[1:3] for clip in given]}")
  return given


def infer_length(lengths: Sequence[int]) -> int:
  """Returns the target's length: the query's if the last example pair is equally long, else that of the pair's target.

  Args:
    lengths: frames of A, A', B and so on; of a query alone, its own length.
  """
  if len(lengths) < 3 or lengths[-3] == lengths[-2]:
    return lengths[-1]
  return lengths[-2]


def pack_in_bucket(features: Features, *, context_mode: ContextMode) -> PackedRow:
  """Packs one sentence into a row of a few possible lengths, so that sentences of similar length share a program.

  Args:
    features: of the sentence.
    context_mode: see `PackedRow`.
  """
  shape = RowShape(
    num_tokens=bucket_size(len(features.tokens)),
    num_text_tokens=bucket_size(len(features.text)),
    num_slots=1,
    num_targets=bucket_size(len(features.targets)),
    context_mode=context_mode,
  )
  row = dataclasses.replace(pack([features], shape), image_intervals=None)
  return row if context_mode.zero_timestep else dataclasses.replace(row, modulation_ids=None)


def pack_single(features: Features, *, context_mode: ContextMode) -> PackedRow:
  """Packs one sentence without padding: the row needs only those intervals and timesteps that its mode demands.

  Args:
    features: of the sentence.
    context_mode: see `PackedRow`.
  """
  shape = RowShape(
    num_tokens=len(features.tokens), num_text_tokens=len(features.text), num_slots=1, context_mode=context_mode
  )
  row = dataclasses.replace(pack([features], shape), text_intervals=None, image_intervals=None)
  if not context_mode.causal:
    row = dataclasses.replace(row, key_intervals=None)
  return row if context_mode.zero_timestep else dataclasses.replace(row, modulation_ids=None)


def with_timesteps(row: PackedRow, timesteps: Float[np.ndarray, "*t"]) -> tuple[PackedRow, Float[np.ndarray, "1 m"]]:
  """Returns a row of one sentence without padding, and its table of timesteps.

  Args:
    row: from `pack_single`.
    timesteps: one for all tokens, or one per latent frame.

  Raises:
    UserError: there is another number of latent frames.
  """
  if timesteps.ndim == 0:
    return row, np.full((1, 1 if row.modulation_ids is None else 2), timesteps, np.float32)
  frames = row.positions[..., 0]
  if len(timesteps) != frames.max() + 1:
    raise UserError(
      f"timestep must be one number, or one for each of the {frames.max() + 1} latent frames, got {len(timesteps)}"
    )
  return dataclasses.replace(row, modulation_ids=frames), timesteps[None]


def pack_jobs(
  positive: Sequence[Features],
  negative: Sequence[Features] | None,
  noises: Sequence[Float[np.ndarray, "_q p"]],
  *,
  context_mode: ContextMode,
) -> PackedJobs:
  """Packs sentences into rows as long as the longest of them, rounded up to a bucket.

  Args:
    positive: of each sentence with its prompt.
    negative: of the same sentences with the negative prompt; None samples without guidance.
    noises: where each sentence's target starts.
    context_mode: see `PackedRow`.
  """
  lengths = [len(features.tokens) for features in positive]
  slots = max(1, max(lengths) // min(lengths))
  shape = RowShape(
    num_tokens=bucket_size(max(lengths)),
    num_text_tokens=bucket_size(slots * max(len(features.text) for features in (*positive, *(negative or ())))),
    num_slots=slots,
    context_mode=context_mode,
  )
  groups = assign_rows(positive, shape)
  most = max(sum(len(positive[i].targets) for i in group) for group in groups)
  shape = dataclasses.replace(shape, num_targets=bucket_size(most))

  def join(features: Sequence[Features]) -> PackedRow:
    return join_rows([pack([features[i] for i in group], shape) for group in groups])

  return PackedJobs(join(positive), None if negative is None else join(negative), places_of(groups), noises)
