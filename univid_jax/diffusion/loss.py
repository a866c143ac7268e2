"""The training loss on packed rows: every sentence has the same weight, whatever its length and place in a row."""

import dataclasses
from collections.abc import Callable
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from univid_jax.core.packed_row import PackedRow
from univid_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS, FlowMatching, interpolate, velocity


def per_token(values: Float[Array, "b s"], row: PackedRow) -> Float[Array, "b l 1"]:
  """Gives each token the value of its sentence; padding gets the first sentence's."""
  return jnp.take_along_axis(values, jnp.maximum(row.segment_ids - 1, 0), axis=1)[..., None]


def timestep_table(sigmas: Float[Array, "b s"], row: PackedRow) -> Float[Array, "b m"]:
  """Returns timesteps (0 to 1000) by modulation slot.

  A sentence's context has the timestep of its target or 0, see `ContextMode`.
  """
  timesteps = sigmas * NUM_TRAIN_TIMESTEPS
  if row.modulation_ids is None:
    return timesteps
  context = jnp.zeros_like(timesteps) if row.context_mode.zero_timestep else timesteps
  return jnp.stack([context, timesteps], axis=-1).reshape(len(timesteps), -1)


def has_sentence(row: PackedRow) -> Float[Array, "b s"]:
  """Returns 1 for each slot that holds a sentence, else 0."""
  return jnp.max(_targets_of_slots(row), axis=1)


def _targets_of_slots(row: PackedRow) -> Float[Array, "b l s"]:
  """Returns a mask with 1 at each target token and the slot of its sentence."""
  return jax.nn.one_hot(row.segment_ids - 1, row.num_slots) * row.target_mask[..., None].astype(jnp.float32)


def sentence_losses(
  model: Callable[[Array, Array, PackedRow], Array],
  row: PackedRow,
  noise: Float[Array, "b l p"],
  sigmas: Float[Array, "b s"],
) -> tuple[Float[Array, "b s"], Float[Array, "b s"]]:
  """Returns the mean squared error of the velocity over each sentence's targets.

  Args:
    model: predicts velocities, as `models.dit.DiT` does.
    row: the sentences, clean.
    noise: standard normal; used for target tokens only.
    sigmas: the noise level of each sentence.

  Returns:
    The losses, float32, 0 for empty slots; and 1 for each slot that holds a sentence, else 0.
  """
  noised = interpolate(row.tokens, noise, per_token(sigmas, row))
  tokens = jnp.where(row.target_mask[..., None], noised, row.tokens)
  predicted = model(tokens, timestep_table(sigmas, row), row).astype(jnp.float32)
  errors = jnp.mean(jnp.square(predicted - velocity(row.tokens, noise)), axis=-1)
  errors = jnp.where(row.target_mask, errors, 0)
  targets = _targets_of_slots(row)
  counts = jnp.sum(targets, axis=1)
  totals = jnp.einsum("bl,bls->bs", errors, targets, precision=jax.lax.Precision.HIGHEST)
  return totals / jnp.maximum(counts, 1), (counts > 0).astype(jnp.float32)


@no_type_check  # of fields at run time: leaves of a pytree can be anything
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseLevels:
  """The noise level of each sentence of a batch, and the weight of its loss.

  Attributes:
    sigmas: noise levels; 1 is pure noise.
    weights: weights of the losses; 1 in UniVid.
  """

  sigmas: Float[Array, "b s"]
  weights: Float[Array, "b s"]


def draw_noise(key: PRNGKeyArray, row: PackedRow, flow: FlowMatching) -> tuple[Float[Array, "b l p"], NoiseLevels]:
  """Draws noise and noise levels for a training batch."""
  noise_key, time_key = jax.random.split(key)
  noise = jax.random.normal(noise_key, row.tokens.shape, jnp.float32)
  sigmas, weights = flow.sample(time_key, jnp.sum(_targets_of_slots(row), axis=1))
  return noise, NoiseLevels(sigmas, weights)
