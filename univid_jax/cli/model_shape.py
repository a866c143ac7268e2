"""What the configs of a model say about it, before its weights are loaded."""

import contextlib
import dataclasses
from collections.abc import Sequence

from univid_jax.checkpoints.pretrained import PretrainedCheckpoint, is_converted
from univid_jax.checkpoints.run import require_run
from univid_jax.checkpoints.run_parts import open_base, patch_strides, split_config
from univid_jax.config.schema import ModelConfig, RunConfig
from univid_jax.core.dims import latent_shape
from univid_jax.core.errors import UserError
from univid_jax.core.options import TrainedExpert
from univid_jax.inference.experts import split_guidance


@dataclasses.dataclass(frozen=True)
class ModelShape:
  """What limits how a model can be sampled.

  Attributes:
    num_transformers: 2 for experts.
    patch_pixels: pixels along each side of a patch.
    base: what prompts are embedded with; None for a model from scratch.
  """

  num_transformers: int
  patch_pixels: int
  base: PretrainedCheckpoint | None

  @classmethod
  def read(cls, checkpoint: str) -> "ModelShape | None":
    """Reads the shape of a converted checkpoint or a run; None if it cannot be read, as loading it reports."""
    with contextlib.suppress(UserError, OSError):
      config = _read_config(checkpoint)
      base, (part, *_) = open_base(config), split_config(config)
      count = len(base.transformers) if base else 1
      return cls(count, patch_strides(part)[1], base)
    return None

  def check_size(self, size: tuple[int, int]) -> None:
    """Raises UserError if frames of a height and width do not divide into patches."""
    latent_shape((1, *size), temporal_stride=1, spatial_stride=self.patch_pixels)

  def check_tokenizer(self) -> None:
    """Raises UserError if there is a text encoder, but no tokenizer, which every prompt needs, the null prompt, too."""
    if self.base is not None and self.base.has("text_encoder"):
      self.base.tokenizer_path()

  def check_guidance(self, scale: float | Sequence[float]) -> None:
    """Raises UserError if there are two guidance scales for one transformer, or more."""
    split_guidance(scale, self.num_transformers)


def _read_config(checkpoint: str) -> RunConfig:
  """Returns the config of a run, or one that would train a converted checkpoint."""
  if not is_converted(checkpoint):
    return require_run(checkpoint).config
  has_two = len(PretrainedCheckpoint.open(checkpoint).transformers) > 1
  expert = TrainedExpert.HIGH if has_two else TrainedExpert.ONLY
  return RunConfig(init_from=checkpoint, model=ModelConfig(expert=expert))
