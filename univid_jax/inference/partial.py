"""The pipeline of a checkpoint without a transformer, for example of an autoencoder alone."""

from typing import Any

from jax.sharding import Mesh

from univid_jax.checkpoints.usage import Usage
from univid_jax.codecs.encoders import PretrainedEncoders
from univid_jax.core.errors import UserError
from univid_jax.core.options import Attention
from univid_jax.core.packed_row import UNIVID_CONTEXT
from univid_jax.inference.encoding import EncodingPipeline
from univid_jax.inference.pipeline import Pipeline

_OF_TRANSFORMER = ("config", "experts", "features", "sampler", "joint_sampler")


class PartialPipeline(Pipeline):
  """Encodes and decodes with the components that there are; what needs a transformer raises UserError.

  Args:
    encoders: of the checkpoint.
    mesh: the devices.
    reason: the message of the error.
  """

  def __init__(self, encoders: PretrainedEncoders, *, mesh: Mesh, reason: str):
    EncodingPipeline.__init__(self, encoders, text_len=encoders.text_len)
    self.mesh, self.usage, self._reason = mesh, Usage(is_known=False), reason
    self.attention, self.context_mode, self.distillation = Attention.FULL, UNIVID_CONTEXT, None

  def __getattr__(self, name: str) -> Any:
    if name in _OF_TRANSFORMER:
      raise UserError(self._reason)
    raise AttributeError(name)
