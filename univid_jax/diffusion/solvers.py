"""From noise to clips: solvers of the flow's ordinary differential equation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from univid_jax.diffusion.loss import timestep_table
from univid_jax.types import PackedRow

# Noised tokens (b, l, p) and noise levels (b, s) to velocities.
VelocityFn = Callable[[Float[Array, "b l p"], Float[Array, "b s"]], Float[Array, "b l p"]]


def velocity_fn(model, row: PackedRow, *, negative: PackedRow | None = None, guidance_scale: float = 1.0) -> VelocityFn:
  """The model's velocity in float32, with classifier-free guidance where there is a negative row.

  Args:
    model: a DiT.
    row: the sentences with their prompts.
    negative: the same with the negative prompts.
    guidance_scale: 1 is the prompt alone; more moves away from the negative prompt.
  """
  def predict(x, sigmas):
    positive = model(x, timestep_table(sigmas, row), row).astype(jnp.float32)
    if negative is None:
      return positive
    opposite = model(x, timestep_table(sigmas, negative), negative).astype(jnp.float32)
    return opposite + guidance_scale * (positive - opposite)
  return predict


def euler(predict: VelocityFn, row: PackedRow, noise: Float[Array, "b l p"], sigmas: Float[Array, "i"], *,
          on_step: Callable[[int], None] | None = None) -> Float[Array, "b l p"]:
  """UniVid's sampler: Euler steps on target tokens, context clean throughout, latents in float32.

  Args:
    predict: gives the velocity.
    row: the context, clean; the values of its target tokens are not used.
    noise: where the targets start.
    sigmas: the noise level before each step; after the last it is 0.
    on_step: called on the host with the number of steps taken, after each.

  Returns:
    The row's tokens with the targets sampled.
  """
  mask = row.target_mask[..., None]
  shape = (row.tokens.shape[0], row.num_slots)

  def step(x, levels):
    index, sigma, following = levels
    x = jnp.where(mask, x + predict(x, jnp.full(shape, sigma)) * (following - sigma), row.tokens)
    if on_step is not None:
      jax.debug.callback(lambda taken, _: on_step(int(taken)), index, x[0, 0, 0])
    return x, None

  start = jnp.where(mask, noise, row.tokens).astype(jnp.float32)
  x, _ = jax.lax.scan(step, start, (1 + jnp.arange(len(sigmas)), sigmas, jnp.append(sigmas[1:], 0.0)))
  return x
