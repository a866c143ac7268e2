"""Flow matching as UniVid does it: straight paths from data to noise, a shifted grid of times, velocity as the target."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

NUM_TRAIN_TIMESTEPS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching:
  """The path x(sigma) = (1 - sigma) clean + sigma noise, whose velocity is noise - clean.

  Attributes:
    shift: warps uniform times toward noise; 5 in UniVid, 3 in Wan2.1 at 480p.
    stratified: spreads the times of a batch evenly (each is still uniform), which makes the loss less noisy.
  """

  shift: float = 5.0
  stratified: bool = False

  def sigma(self, u: Float[Array, "..."]) -> Float[Array, "..."]:
    """The noise level of a uniform time in [0, 1]; 1 is noise."""
    return self.shift * u / (1 + (self.shift - 1) * u)

  def training_sigmas(self) -> np.ndarray:
    """UniVid's grid of 1,000 noise levels, from 1 down, float32; a timestep is 1,000 times its level, never rounded."""
    return self.inference_sigmas(NUM_TRAIN_TIMESTEPS)

  def inference_sigmas(self, num_steps: int) -> np.ndarray:
    """The noise level before each step, float32 (num_steps,), from 1 down; after the last it is 0."""
    if num_steps < 1:
      raise ValueError(f"sampling takes at least 1 step, got {num_steps}")
    return self.sigma(np.linspace(1, 0, num_steps + 1)[:-1]).astype(np.float32)

  def sample_timestep_ids(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Int[Array, "..."]:
    """Indices into `training_sigmas`, uniform."""
    if not self.stratified:
      return jax.random.randint(key, shape, 0, NUM_TRAIN_TIMESTEPS)
    offset_key, order_key = jax.random.split(key)
    count = int(np.prod(shape))
    u = (jnp.arange(count) / count + jax.random.uniform(offset_key)) % 1.0
    u = jax.random.permutation(order_key, u).reshape(shape)
    return jnp.minimum((u * NUM_TRAIN_TIMESTEPS).astype(jnp.int32), NUM_TRAIN_TIMESTEPS - 1)


def interpolate(clean: Float[Array, "..."], noise: Float[Array, "..."], sigma: Float[Array, "..."]) -> Float[Array, "..."]:
  """The point of the path at a noise level."""
  return (1 - sigma) * clean + sigma * noise


def velocity(clean: Float[Array, "..."], noise: Float[Array, "..."]) -> Float[Array, "..."]:
  """The direction of the path, from data to noise."""
  return noise - clean
