"""What a pipeline does with its codec and encoders alone."""

import dataclasses
import logging
from collections.abc import Iterator

import numpy as np
from jaxtyping import Array, Float, Int

from univid_jax.core.checks import require_text
from univid_jax.core.errors import UserError
from univid_jax.core.pixels import to_float, to_uint8
from univid_jax.core.protocols import Encoders
from univid_jax.inference.arguments import check_encodable, check_latents

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sample:
  """A sampled clip: latents, float32 (t, y, x, c), and frames, uint8 (T, H, W, 3)."""

  latents: Float[np.ndarray, "t y x c"]
  frames: np.ndarray


class EncodingPipeline:
  """Encodes and decodes clips and prompts.

  Args:
    encoders: the codec, and the encoders of prompts and images.
    text_len: length to which prompts are padded.
  """

  def __init__(self, encoders: Encoders, *, text_len: int):
    self.encoders, self.text_len = encoders, text_len
    self._warned: set[str] = set()

  def warn_once(self, text: str) -> None:
    """Logs a warning, unless this pipeline has logged it before."""
    if text not in self._warned:
      self._warned.add(text)
      log.warning("%s", text)

  def tokenize(self, text: str) -> Int[np.ndarray, "n"]:
    """Returns token ids, int32, with the end-of-text token, without padding.

    Raises:
      UserError: the model has no tokenizer, or the text is none.
    """
    require_text("text", text)
    return self.encoders.tokenize(text)

  def encode_prompt(self, text: str) -> Float[np.ndarray, "n d"]:
    """Returns the prompt's embedding, float32 (text_len, text_dim), zeros past the prompt.

    Raises:
      UserError: the model has no text encoder, or the text is none.
    """
    embedding = self.encoders.embed_prompt(require_text("text", text))
    return np.pad(embedding, ((0, self.text_len - len(embedding)), (0, 0)))

  def encode(self, frames: Array | np.ndarray) -> Float[np.ndarray, "t y x c"]:
    """Encodes a clip to latents, float32. It runs on the host and cannot be traced.

    Args:
      frames: (T, H, W, 3), uint8, or float in [-1, 1]; T must be 4n + 1.

    Raises:
      UserError: frames are of another kind or range, or their shape has no latents; the message names the nearest.
    """
    return np.asarray(self.encoders.codec.encode(to_float(check_encodable(frames))))

  def decode(self, latents: Float[Array | np.ndarray, "t y x c"]) -> Float[np.ndarray, "T H W 3"]:
    """Decodes latents to a clip, float32 in [-1, 1]. It runs on the host and cannot be traced.

    Raises:
      UserError: latents have another number of dims or channels.
    """
    codec = self.encoders.codec
    return np.clip(np.asarray(codec.decode(check_latents(latents, codec.latent_channels))), -1, 1)

  def decode_parts(self, latents: Float[Array | np.ndarray, "t y x c"]) -> Iterator[Float[np.ndarray, "T H W 3"]]:
    """Decodes latents like `decode`, one latent frame after the other."""
    codec = self.encoders.codec
    for frames in codec.decode_parts(check_latents(latents, codec.latent_channels)):
      yield np.clip(np.asarray(frames), -1, 1)

  def finish(self, latents: Float[np.ndarray, "t y x c"]) -> Sample:
    """Decodes sampled latents.

    Raises:
      UserError: latents or frames are not finite.
    """
    return Sample(latents, to_uint8(require_finite(self.decode(require_finite(latents)))))


def require_finite(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
  """Returns sampled latents or frames.

  Raises:
    UserError: they are not finite.
  """
  if not np.isfinite(x).all():
    raise UserError(
      "the sample is not finite: the weights or a LoRA contain NaN, or dtype, shift and guidance scale overflow; "
      "try dtype float32"
    )
  return x
