"""Shapes of Wan's transformers, and the published ones."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from univid_jax.core.errors import UserError
from univid_jax.core.options import ContextTimestep, ModelType


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
  """Shape of a transformer; names and defaults are those of Wan2.1's config.json.

  Attributes:
    dim: embedding channels.
    ffn_dim: channels inside the feed-forward layers.
    model_type: what the model is conditioned on besides the prompt.
    in_dim, out_dim: channels of a latent as the model reads it, condition included, and of its velocity.
    freq_dim: channels of the sinusoidal timestep embedding.
    text_dim, text_len: channels of a prompt embedding, and its length including padding.
    patch_size: latents per token, (t, y, x).
    image_dim: channels of the image features that I2V models take; 0 for Wan2.2's, which take none.
    rope_theta, rope_scale: base and scale of the rotary frequencies.
  """

  dim: int
  ffn_dim: int
  num_heads: int
  num_layers: int
  model_type: ModelType = ModelType.T2V
  in_dim: int = 16
  out_dim: int = 16
  freq_dim: int = 256
  text_dim: int = 4096
  text_len: int = 512
  patch_size: tuple[int, int, int] = (1, 2, 2)
  image_dim: int = 1280
  eps: float = 1e-6
  rope_theta: float = 10000.0
  rope_scale: float = 1.0

  def __post_init__(self):
    if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
      raise UserError(f"dim {self.dim} does not split into {self.num_heads} heads of an even size")

  @property
  def head_dim(self) -> int:
    return self.dim // self.num_heads

  @property
  def patch_volume(self) -> int:
    return math.prod(self.patch_size)

  @property
  def takes_condition(self) -> bool:
    """Whether rows must carry the mask and latents of the first frame."""
    return self.model_type == ModelType.I2V

  @property
  def takes_image_features(self) -> bool:
    """Whether rows must carry CLIP features of the first frame."""
    return self.takes_condition and self.image_dim > 0

  @property
  def expert_boundary(self) -> float:
    """The noise level from which the high-noise expert is used, in models with two experts."""
    return 0.9 if self.takes_condition else 0.875

  @property
  def context_timestep(self) -> ContextTimestep:
    """The timestep that clean tokens had in the model's own training."""
    return ContextTimestep.ZERO if self.model_type == ModelType.TI2V else ContextTimestep.TARGET

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> "DiTConfig":
    """Converts the config.json of an official release, or this project's own.

    Raises:
      UserError: the variant is not supported (FLF2V, VACE, ...); the message names it.
    """
    class_name, model_type = values.get("_class_name", "WanModel"), values.get("model_type", ModelType.T2V)
    if class_name != "WanModel" or model_type not in tuple(ModelType):
      raise UserError(
        f"{class_name} with model_type {model_type!r} is not supported, only Wan's {', '.join(ModelType)}"
      )
    in_dim, out_dim = values.get("in_dim", 16), values.get("out_dim", 16)
    expected = 2 * out_dim + 4 if model_type == ModelType.I2V else out_dim
    if in_dim != expected:
      raise UserError(
        f"an {model_type.upper()} model with out_dim {out_dim} has in_dim {expected}, got {in_dim}: another variant, "
        "which is not supported"
      )
    names = {field.name for field in dataclasses.fields(cls)}
    known = {name: value for name, value in values.items() if name in names}
    patch_size = tuple(values.get("patch_size", (1, 2, 2)))
    return cls(**{**known, "model_type": ModelType(model_type), "patch_size": patch_size})


_T2V_14B = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_I2V_14B = dataclasses.replace(_T2V_14B, model_type=ModelType.I2V, in_dim=36)
_TI2V_5B = DiTConfig(
  dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, model_type=ModelType.TI2V, in_dim=48, out_dim=48
)

# Published models by name, as in config.model.variant.
VARIANTS: Mapping[str, DiTConfig] = {
  "wan2.1-t2v-1.3b": DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
  "wan2.1-t2v-14b": _T2V_14B,
  "wan2.1-i2v-14b-480p": _I2V_14B,
  "wan2.1-i2v-14b-720p": _I2V_14B,
  "wan2.2-ti2v-5b": _TI2V_5B,
  "wan2.2-t2v-a14b": _T2V_14B,
  "wan2.2-i2v-a14b": dataclasses.replace(_I2V_14B, image_dim=0),
}
