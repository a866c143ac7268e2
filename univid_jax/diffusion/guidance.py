"""The velocity that solvers integrate: the model on a row, with cached context and classifier-free guidance."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from univid_jax.core.packed_row import PackedRow, put_tokens, take_tokens
from univid_jax.core.protocols import VelocityFn
from univid_jax.diffusion.loss import timestep_table
from univid_jax.models.dit import DiT, KeyValueCache

# A transformer, called like `DiT.__call__`: (tokens, timesteps, row[, cache]) to velocities.
VelocityModel = Callable[..., Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Branch:
  """A row to sample, with the keys and values of its context if these do not depend on the noise.

  Attributes:
    row: sentences with their prompts.
    cache: that of a context-causal row; None recomputes the context in every step.
  """

  row: PackedRow
  cache: KeyValueCache | None = None

  @classmethod
  def create(cls, model: DiT, row: PackedRow) -> "Branch":
    """Creates a branch; computes the context of a context-causal row once."""
    cached = row.context_mode.causal and row.targets is not None
    return cls(row, model.encode_context(row) if cached else None)

  def velocity(
    self, model: VelocityModel, tokens: Float[Array, "b l p"], sigma: Float[Array, ""]
  ) -> Float[Array, "b l p"]:
    """Predicts the velocity at a noise level, float32; replaces the context in `tokens` by the clean one."""
    row = self.row
    tokens = jnp.where(row.target_mask[..., None], tokens, row.tokens)
    timesteps = timestep_table(jnp.full((len(row.tokens), row.num_slots), sigma), row)
    if self.cache is None:
      return model(tokens, timesteps, row).astype(jnp.float32)
    assert row.targets is not None
    velocity = model(take_tokens(tokens, row.targets), timesteps, row.target_queries(), self.cache)
    return put_tokens(velocity, row.targets, into=jnp.zeros_like(tokens))


def guide(
  model: VelocityModel,
  positive: Branch,
  *,
  negative: Branch | None = None,
  negative_model: VelocityModel | None = None,
  guidance_scale: Float[Array, ""] | float = 1.0,
) -> VelocityFn:
  """Returns the velocity of a row, with classifier-free guidance if there is a negative branch.

  Args:
    model: the transformer.
    positive: the sentences with their prompts.
    negative: the same sentences with the negative prompts.
    negative_model: the transformer of this branch, if it differs.
    guidance_scale: 1 follows only the prompt; larger values move away from the negative prompt.
  """
  if negative is None:
    return lambda tokens, sigma: positive.velocity(model, tokens, sigma)

  def predict(tokens: Float[Array, "b l p"], sigma: Float[Array, ""]) -> Float[Array, "b l p"]:
    away = negative.velocity(negative_model or model, tokens, sigma)
    return away + guidance_scale * (positive.velocity(model, tokens, sigma) - away)

  return predict
