"""The pipeline of a checkpoint without a transformer, for example of an autoencoder alone."""

from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from univid_jax.checkpoints.usage import Usage
from univid_jax.codecs.encoders import PretrainedEncoders
from univid_jax.core.errors import UserError
from univid_jax.core.options import Attention
from univid_jax.inference.pipeline import Pipeline

_OF_TRANSFORMER = ("config", "graph", "params", "_features", "_sampler", "_predict")


class PartialPipeline(Pipeline):
  """Encodes and decodes with the components that there are; what needs a transformer raises UserError.

  Args:
    encoders: of the checkpoint.
    mesh: the devices.
    reason: the message of the error.
  """

  def __init__(self, encoders: PretrainedEncoders, *, mesh: Mesh, reason: str):
    self.encoders, self.mesh, self.usage, self.attention = encoders, mesh, Usage(), Attention.FULL
    self._reason, self._text_len = reason, encoders.text_len

  def __getattr__(self, name: str) -> Any:
    if name in _OF_TRANSFORMER:
      raise UserError(self._reason)
    raise AttributeError(name)

  def encode_prompt(self, text: str) -> Float[np.ndarray, "n d"]:
    """See `Pipeline.encode_prompt`; padded to the length that all of Wan2.1 has."""
    embedding = self.encoders.embed_prompt(text)
    return np.pad(embedding, ((0, self._text_len - len(embedding)), (0, 0)))
