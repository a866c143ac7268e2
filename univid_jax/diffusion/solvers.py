"""From noise to clips: solvers of the flow's ordinary differential equation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from univid_jax.diffusion.loss import timestep_table
from univid_jax.types import PackedRow


def euler(model, row: PackedRow, noise: Float[Array, "b l p"], sigmas: Float[Array, "i"]) -> Float[Array, "b l p"]:
  """UniVid's sampler: Euler steps on target tokens, context clean throughout, latents in float32.

  Args:
    model: a DiT.
    row: the context, clean; its target tokens are not used.
    noise: where the targets start.
    sigmas: the noise level before each step; after the last it is 0.

  Returns:
    The row's tokens with the targets sampled.
  """
  mask = row.target_mask[..., None]
  shape = (row.tokens.shape[0], row.num_slots)

  def step(x, levels):
    sigma, following = levels
    predicted = model(x, timestep_table(jnp.full(shape, sigma)), row).astype(jnp.float32)
    return jnp.where(mask, x + predicted * (following - sigma), row.tokens), None

  start = jnp.where(mask, noise, row.tokens).astype(jnp.float32)
  x, _ = jax.lax.scan(step, start, (sigmas, jnp.append(sigmas[1:], 0.0)))
  return x
