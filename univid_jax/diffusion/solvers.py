"""From noise to clips: solvers of the flow's ordinary differential equation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from univid_jax.diffusion.loss import timestep_table
from univid_jax.types import PackedRow, put_tokens, take_tokens

# Noised tokens (b, l, p) and noise levels (b, s) to velocities.
VelocityFn = Callable[[Float[Array, "b l p"], Float[Array, "b s"]], Float[Array, "b l p"]]


def velocity_fn(model, row: PackedRow, *, negative: PackedRow | None = None, guidance_scale: float = 1.0) -> VelocityFn:
  """The model's velocity in float32, with classifier-free guidance where there is a negative row.

  Where a context-causal row says where its targets are, its context is computed once, here.

  Args:
    model: a DiT.
    row: the sentences with their prompts.
    negative: the same with the negative prompts.
    guidance_scale: 1 is the prompt alone; more moves away from the negative prompt.
  """
  def of(row: PackedRow) -> VelocityFn:
    if row.targets is None or not row.context_causal:
      return lambda x, sigmas: model(x, timestep_table(sigmas, row), row).astype(jnp.float32)
    context, queries = model.encode_context(row), row.of_targets()

    def predict(x, sigmas):
      out = model(take_tokens(x, row.targets), timestep_table(sigmas, row), queries, context)
      return put_tokens(out, row.targets, into=jnp.zeros_like(x))
    return predict

  positive = of(row)
  if negative is None:
    return positive
  opposite = of(negative)

  def guided(x, sigmas):
    away = opposite(x, sigmas)
    return away + guidance_scale * (positive(x, sigmas) - away)
  return guided


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


def unipc(predict: VelocityFn, row: PackedRow, noise: Float[Array, "b l p"], sigmas: Float[np.ndarray, "i"], *,
          on_step: Callable[[int], None] | None = None) -> Float[Array, "b l p"]:
  """UniPC of order 2 for flows (Zhao et al. 2023), as diffusers' UniPCMultistepScheduler does it; arguments as for `euler`.

  Each step corrects where the last one led with the new prediction, then predicts the next; both are sums of what is known
  already, whose weights depend on the noise levels alone. `sigmas` must be known when the program is made and lie below 1.
  """
  mask = row.target_mask[..., None]
  shape = (row.tokens.shape[0], row.num_slots)
  correct, advance = unipc_weights(np.asarray(sigmas, np.float64))

  def step(carry, levels):
    x, last, before, earlier = carry
    index, sigma, c, a = levels
    clean = x - sigma * predict(x, jnp.full(shape, sigma))
    corrected = c[0] * x + c[1] * last + c[2] * before + c[3] * earlier + c[4] * clean
    x = a[0] * corrected + a[1] * clean + a[2] * before
    x = jnp.where(mask, x, row.tokens)
    if on_step is not None:
      jax.debug.callback(lambda taken, _: on_step(int(taken)), index, x[0, 0, 0])
    return (x, corrected, clean, before), None

  start = jnp.where(mask, noise, row.tokens).astype(jnp.float32)
  levels = 1 + jnp.arange(len(sigmas)), *(jnp.asarray(value, jnp.float32) for value in (sigmas, correct, advance))
  (x, *_), _ = jax.lax.scan(step, (start, start, start, start), levels)
  return x


def unipc_weights(sigmas: Float[np.ndarray, "i"]) -> tuple[Float[np.ndarray, "i 5"], Float[np.ndarray, "i 3"]]:
  """What each step of UniPC adds up, in float64.

  Returns:
    Of the corrector: the weights of (x, last x, last clean, the one before, this clean); of the predictor: of (x, this clean,
    last clean).
  """
  count = len(sigmas)
  levels = np.append(sigmas, 0.0)
  with np.errstate(divide="ignore"):
    snr = np.log(1 - levels) - np.log(levels)  # half the logarithm of the signal-to-noise ratio

  def parts(start, end):
    """Weights of x and of the clean estimate at order 1, and the factor of all differences."""
    growth = np.expm1(-(snr[end] - snr[start]))
    return levels[end] / levels[start], -(1 - levels[end]) * growth, -(1 - levels[end]) * growth

  correct, advance = np.zeros((count, 5)), np.zeros((count, 3))
  correct[0, 0] = 1
  order = 1
  for i in range(count):
    if i > 0:
      keep, clean, factor = parts(i - 1, i)
      h = snr[i] - snr[i - 1]
      if order == 1:
        correct[i, 1:] = keep, clean - 0.5 * factor, 0, 0.5 * factor
      else:
        ratio = (snr[i - 2] - snr[i - 1]) / h
        first = np.expm1(-h) / -h - 1
        second = first / -h - 0.5
        b = np.array([first, 2 * second]) / np.expm1(-h)
        rho = np.linalg.solve(np.array([[1, 1], [ratio, 1]]), b)
        correct[i, 1:] = keep, clean - factor * (rho[0] / ratio + rho[1]), factor * rho[0] / ratio, factor * rho[1]
    order = min(2, count - i, i + 1)
    keep, clean, factor = parts(i, i + 1)
    advance[i] = keep, clean, 0
    if order == 2:
      ratio = (snr[i - 1] - snr[i]) / (snr[i + 1] - snr[i])
      advance[i] = keep, clean - 0.5 * factor / ratio, 0.5 * factor / ratio
  return correct, advance


SOLVERS = {"euler": euler, "unipc": unipc}
