"""Flow matching as in UniVid: straight paths from data to noise, a shifted grid of times, velocity as the target."""

import dataclasses
import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float, Int, PRNGKeyArray

from univid_jax.config.schema import FlowConfig
from univid_jax.core.options import Objective

NUM_TRAIN_TIMESTEPS = 1000

# Target tokens of the paper's videos: 5 latent frames at 832 x 480, with Wan2.1's autoencoder.
REFERENCE_TOKENS = 7800

ArrayT = TypeVar("ArrayT", np.ndarray, Array)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching:
  """The path x(sigma) = (1 - sigma) clean + sigma noise, whose velocity is noise - clean.

  Attributes:
    shift: warps uniform times towards noise; 5 in UniVid, 3 in Wan2.1 at 480p.
    stratified: spreads the times of a batch evenly (each is still uniform), which makes the loss less noisy.
    objective: how training draws noise levels and weights their losses.
    noise_range: noise levels [low, high) that training draws, or (low, high] with RESOLUTION_SHIFT, in the same
      proportions as without a range.
    reference_tokens: number of target tokens, that of the paper's videos, at which RESOLUTION_SHIFT leaves the shift
      unchanged.
  """

  shift: float = 5.0
  stratified: bool = False
  objective: Objective = Objective.UNIVID
  noise_range: tuple[float, float] = (0.0, math.inf)
  reference_tokens: int = REFERENCE_TOKENS

  @classmethod
  def from_config(
    cls,
    config: FlowConfig,
    *,
    noise_range: tuple[float, float] = (0.0, math.inf),
    reference_tokens: int = REFERENCE_TOKENS,
  ) -> "FlowMatching":
    """Returns the path of a config; the arguments are attributes that a config does not have."""
    return cls(
      shift=config.shift,
      stratified=config.stratified,
      objective=config.objective,
      noise_range=noise_range,
      reference_tokens=reference_tokens,
    )

  @property
  def range_probability(self) -> float:
    """The probability that training without a range draws a noise level in it.

    With RESOLUTION_SHIFT it depends on the sentence; the value is for the paper's videos.
    """
    if self.objective == Objective.LOGIT_NORMAL:
      low, high = map(self._logit, self.noise_range)
      return (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
    return len(self._ids_in_range()) / NUM_TRAIN_TIMESTEPS

  def sigma(self, u: ArrayT) -> ArrayT:
    """Returns the noise level of a uniform time in [0, 1]; 1 is pure noise."""
    return self.shift * u / (1 + (self.shift - 1) * u)

  def training_sigmas(self) -> np.ndarray:
    """Returns UniVid's grid of 1,000 noise levels, descending from 1, float32; a timestep is 1,000 sigma, unrounded."""
    times = np.linspace(1, 0, NUM_TRAIN_TIMESTEPS + 1)[:-1]
    return self.sigma(times).astype(np.float32)

  def sample(
    self, key: PRNGKeyArray, num_tokens: Float[Array, "..."]
  ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Draws noise levels for training; returns them and the weights of their losses.

    Args:
      key: random key.
      num_tokens: target tokens of each sentence.
    """
    shape = num_tokens.shape
    one = jnp.ones(shape, jnp.float32)
    if self.objective == Objective.LOGIT_NORMAL:
      low, high = map(self._logit, self.noise_range)
      if self.stratified:
        first, last = ndtr(jnp.float32(low)), ndtr(jnp.float32(high))
        normal = ndtri(first + (last - first) * self._stratify(key, shape))
      else:
        normal = _truncated_normal(key, low, high, shape)
      return self.sigma(jax.nn.sigmoid(normal)), one
    if self.objective == Objective.RESOLUTION_SHIFT:
      shift = self.shift * jnp.sqrt(jnp.maximum(num_tokens, 1) / self.reference_tokens)
      low, high = self.noise_range
      low, high = low / (shift - (shift - 1) * low), 1.0 if high > 1 else high / (shift - (shift - 1) * high)
      drawn = self._draw(key, shape, NUM_TRAIN_TIMESTEPS).astype(jnp.float32)
      u = low + (high - low) * (1 - drawn / NUM_TRAIN_TIMESTEPS)
      return (shift * u / (1 + (shift - 1) * u)).astype(jnp.float32), one
    ids = self.sample_timestep_ids(key, shape)
    weights = jnp.asarray(self.bell_weights())[ids] if self.objective == Objective.DIFFSYNTH else one
    return jnp.asarray(self.training_sigmas())[ids], weights

  def bell_weights(self) -> np.ndarray:
    """Returns DiffSynth's weight of each training timestep: a bell around 500 with minimum 0 and mean 1."""
    steps = NUM_TRAIN_TIMESTEPS
    bell = np.exp(-2 * ((self.training_sigmas().astype(np.float64) * steps - steps / 2) / steps) ** 2)
    bell -= bell.min()
    return (bell * (steps / bell.sum())).astype(np.float32)

  def sample_timestep_ids(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Int[Array, "..."]:
    """Draws indices into `training_sigmas`, uniform over those in the range."""
    inside = self._ids_in_range()
    return inside[0] + self._draw(key, shape, len(inside))

  def _ids_in_range(self) -> np.ndarray:
    low, high = map(np.float32, self.noise_range)
    sigmas = self.training_sigmas()
    return np.flatnonzero((sigmas >= low) & (sigmas < high))

  def _logit(self, sigma: float) -> float:
    """Returns the logit of the uniform time of a noise level."""
    if not 0 < sigma < 1:
      return math.copysign(math.inf, sigma - 0.5)
    u = sigma / (self.shift - (self.shift - 1) * sigma)
    return math.log(u / (1 - u))

  def _draw(self, key: PRNGKeyArray, shape: tuple[int, ...], num: int) -> Int[Array, "..."]:
    """Draws uniformly from range(num), stratified if so configured."""
    if not self.stratified:
      return jax.random.randint(key, shape, 0, num, jnp.int32)
    return jnp.minimum((self._stratify(key, shape) * num).astype(jnp.int32), num - 1)

  def _stratify(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Draws uniform numbers in [0, 1) that are spread evenly over the batch."""
    offset_key, order_key = jax.random.split(key)
    count = int(np.prod(shape))
    u = (jnp.arange(count, dtype=jnp.float32) / count + jax.random.uniform(offset_key, dtype=jnp.float32)) % 1.0
    return jax.random.permutation(order_key, u).reshape(shape)


def _truncated_normal(key: PRNGKeyArray, low: float, high: float, shape: tuple[int, ...]) -> Float[Array, "..."]:
  if math.isinf(low) and math.isinf(high):
    return jax.random.normal(key, shape, jnp.float32)
  return jax.random.truncated_normal(key, low, high, shape, jnp.float32)


def interpolate(
  clean: Float[Array, "..."], noise: Float[Array, "..."], sigma: Float[Array, "..."]
) -> Float[Array, "..."]:
  """Returns the point of the path at a noise level."""
  return (1 - sigma) * clean + sigma * noise


def velocity(clean: Float[Array, "..."], noise: Float[Array, "..."]) -> Float[Array, "..."]:
  """Returns the direction of the path, from data to noise."""
  return noise - clean
