"""Flow matching as UniVid does it: straight paths from data to noise, a shifted grid of times, velocity as the target."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

NUM_TRAIN_TIMESTEPS = 1000


# How training draws noise levels and weighs their losses, by name.
OBJECTIVES = ("univid", "diffsynth", "logit_normal", "resolution_shift")

# Target tokens of the paper's videos (5 latent frames at 832x480), at which `resolution_shift` has the shift as it stands.
REFERENCE_TOKENS = 7800


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching:
  """The path x(sigma) = (1 - sigma) clean + sigma noise, whose velocity is noise - clean.

  Attributes:
    shift: warps uniform times toward noise; 5 in UniVid, 3 in Wan2.1 at 480p.
    stratified: spreads the times of a batch evenly (each is still uniform), which makes the loss less noisy.
    objective: "univid" draws from the grid of 1,000 levels, all of one weight; "diffsynth" weighs them by a bell over the
      timesteps; "logit_normal" draws times from the logistic of a normal variable (as Stable Diffusion 3 does);
      "resolution_shift" multiplies the shift by the square root of the target's tokens over REFERENCE_TOKENS.
  """

  shift: float = 5.0
  stratified: bool = False
  objective: str = "univid"

  def __post_init__(self):
    if self.objective not in OBJECTIVES:
      raise ValueError(f"unknown objective {self.objective!r}; there are {', '.join(OBJECTIVES)}")

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

  def unipc_sigmas(self, num_steps: int) -> np.ndarray:
    """The noise levels of UniPC's steps, as diffusers spaces them: from just below 1, where the signal is not yet 0."""
    if num_steps < 1:
      raise ValueError(f"sampling takes at least 1 step, got {num_steps}")
    sigmas = self.sigma(np.linspace(1, 1 / NUM_TRAIN_TIMESTEPS, num_steps + 1)[:-1])
    return np.minimum(sigmas, 1 - 1e-6).astype(np.float32)

  def sample(self, key: PRNGKeyArray, num_tokens: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Noise levels and the weights of their losses, for training.

    Args:
      key: of the draw.
      num_tokens: of each sentence's targets.
    """
    shape = num_tokens.shape
    one = jnp.ones(shape, jnp.float32)
    if self.objective == "logit_normal":
      return self.sigma(jax.nn.sigmoid(jax.random.normal(key, shape, jnp.float32))), one
    ids = self.sample_timestep_ids(key, shape)
    if self.objective == "resolution_shift":
      shift = self.shift * jnp.sqrt(jnp.maximum(num_tokens, 1) / REFERENCE_TOKENS)
      u = 1 - ids / NUM_TRAIN_TIMESTEPS
      return (shift * u / (1 + (shift - 1) * u)).astype(jnp.float32), one
    weights = jnp.asarray(self.bell_weights())[ids] if self.objective == "diffsynth" else one
    return jnp.asarray(self.training_sigmas())[ids], weights

  def bell_weights(self) -> np.ndarray:
    """DiffSynth's weight of each training timestep: a bell around 500, lowered to touch 0, of mean 1."""
    steps = NUM_TRAIN_TIMESTEPS
    bell = np.exp(-2 * ((self.training_sigmas().astype(np.float64) * steps - steps / 2) / steps) ** 2)
    bell -= bell.min()
    return (bell * (steps / bell.sum())).astype(np.float32)

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
