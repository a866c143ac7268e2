"""I2V's image condition."""

import numpy as np
from jaxtyping import Float

from univid_jax.core.dims import pixel_frames
from univid_jax.core.protocols import Codec


def i2v_condition(
  codec: Codec, image: Float[np.ndarray, "H W 3"], num_latent_frames: int
) -> Float[np.ndarray, "t y x v"]:
  """Returns the channels that an I2V model reads in addition to the latents of a sentence.

  The first temporal_stride channels are a mask, 1 in the first latent frame; the others are the latents of a clip that
  shows the image and then grey. 20 channels with Wan2.1's autoencoder.

  Args:
    codec: the model's autoencoder.
    image: the first frame of the sentence, in [-1, 1].
    num_latent_frames: of the whole sentence.
  """
  num_frames = pixel_frames(num_latent_frames, temporal_stride=codec.temporal_stride)
  frames = np.zeros((num_frames, *image.shape), np.float32)
  frames[0] = image
  latents = codec.encode(frames)
  mask = np.zeros((*latents.shape[:3], codec.temporal_stride), np.float32)
  mask[0] = 1
  return np.concatenate([mask, latents], axis=-1)
