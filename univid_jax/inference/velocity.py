"""One call of a transformer, with its inputs as arrays."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array, Float

from univid_jax.core.errors import UserError
from univid_jax.core.sentence import Sentence, reference_roles
from univid_jax.core.text import describe_value
from univid_jax.data.rows.tokens import unpatchify
from univid_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS
from univid_jax.inference.arguments import check_embedding, check_latents, to_numpy
from univid_jax.inference.jobs import Job, pack_single, with_timesteps

if TYPE_CHECKING:
  from univid_jax.inference.pipeline import Pipeline


def predict_velocity(
  pipeline: "Pipeline",
  latents: Float[Array | np.ndarray, "t y x c"],
  timestep: float | Float[Array | np.ndarray, "_t"],
  prompt_embeds: Float[Array | np.ndarray, "n d"],
  condition: Float[Array | np.ndarray, "t y x v"] | None = None,
  clip_features: Float[Array | np.ndarray, "i e"] | None = None,
) -> Float[np.ndarray, "t y x c"]:
  """Calls the transformer of a pipeline once, see `Pipeline.predict_velocity`."""
  config, sampler = pipeline.config, pipeline.sampler
  if pipeline.usage.clip_gap:
    gap = f"clip_gap = {pipeline.usage.clip_gap}"
    raise UserError(f"the model was trained with {gap}, and latents do not say where clips begin: use sample")
  given = check_latents(latents, config.out_dim)
  shape = given.shape[0], given.shape[1], given.shape[2]
  if any(length % patch for length, patch in zip(shape, config.patch_size)):
    patches = " x ".join(map(str, config.patch_size))
    raise UserError(f"latents must divide into patches of {patches} (t, y, x), got {describe_value(given)}")
  job = Job(
    Sentence(clips=(given,), roles=reference_roles(1)),
    np.zeros((0, 0), np.float32),
    _check_input("condition", condition, (*shape, config.in_dim - config.out_dim), is_taken=config.takes_condition),
    _check_input("clip_features", clip_features, (None, config.image_dim), is_taken=config.takes_image_features),
  )
  embedding = check_embedding("prompt_embeds", prompt_embeds, config)
  row = pack_single(pipeline.make_features(job, embedding), context_mode=pipeline.context_mode)
  row, timesteps = with_timesteps(row, _check_timestep(timestep))
  return unpatchify(sampler.predict(pipeline.experts, row, timesteps)[0], shape, config.patch_size)


def _check_input(name: str, value: Any, shape: tuple[int | None, ...], *, is_taken: bool) -> np.ndarray | None:
  """Returns an input of I2V; raises UserError if it is taken and has another shape, in which None is any length."""
  if value is None:
    return None
  array = to_numpy(name, value)
  fits = array.ndim == len(shape) and all(want in (None, has) for want, has in zip(shape, array.shape))
  if is_taken and not fits:
    expected = ", ".join("n" if length is None else str(length) for length in shape)
    raise UserError(f"{name} must be an array ({expected}), got {describe_value(array)}")
  return array


def _check_timestep(timestep: Any) -> np.ndarray:
  """Returns timesteps; raises UserError unless they are one number or a row of numbers, from 0 to 1000."""
  expected = f"one number from 0 to {NUM_TRAIN_TIMESTEPS}, or one for each latent frame"
  array = to_numpy("timestep", timestep, expected)
  if array.ndim > 1 or not ((array >= 0) & (array <= NUM_TRAIN_TIMESTEPS)).all():
    raise UserError(f"timestep must be {expected}, got {describe_value(timestep)}")
  return np.asarray(array, np.float32)
