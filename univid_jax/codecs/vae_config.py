"""Shapes of Wan's causal video autoencoders, and the published ones."""

import dataclasses
from collections.abc import Mapping

from univid_jax.core.errors import UserError
from univid_jax.core.text import describe_value

# Mean and standard deviation of each latent channel of the released weights of Wan2.1 and Wan2.2.
# fmt: off
_MEAN_21 = (
  -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
  0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
_STD_21 = (
  2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
  3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
_MEAN_22 = (
  -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
  -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
  -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
  -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
  -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
  0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
_STD_22 = (
  0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
  0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
  0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
  0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
  0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
  0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on

MAX_STATISTIC = 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
  """Shape of an autoencoder; the defaults are Wan2.1's.

  Attributes:
    dim: channels of the encoder at its highest resolution.
    decoder_dim: the same for the decoder; None for `dim`.
    dim_mult: channels at each level, in multiples of dim.
    num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
    temporal_downsample: for each level but the last, whether the downsampling after it halves time too.
    patch_size: side of the squares of pixels that are folded into channels.
    level_shortcuts: whether a shortcut without parameters surrounds each level.
    latent_channels: channels of the latents.
    latent_mean, latent_std: of each channel before normalisation.

  Raises:
    UserError: mean or standard deviation is not one valid number per channel.
  """

  dim: int = 96
  decoder_dim: int | None = None
  dim_mult: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  temporal_downsample: tuple[bool, ...] = (False, True, True)
  patch_size: int = 1
  level_shortcuts: bool = False
  latent_channels: int = 16
  latent_mean: tuple[float, ...] = _MEAN_21
  latent_std: tuple[float, ...] = _STD_21

  def __post_init__(self):
    for name, least in (("latent_mean", -MAX_STATISTIC), ("latent_std", 1 / MAX_STATISTIC)):
      values = getattr(self, name)
      if len(values) != self.latent_channels or not all(least <= value <= MAX_STATISTIC for value in values):
        raise UserError(
          f"{name} of the autoencoder must be {self.latent_channels} numbers from {least:g} to {MAX_STATISTIC:g}, "
          f"got {describe_value(values)}"
        )

  @property
  def version(self) -> str:
    """The version of Wan that has this design."""
    return "2.2" if self.level_shortcuts else "2.1"

  @property
  def has_weights(self) -> bool:
    return True

  @property
  def spatial_stride(self) -> int:
    return self.patch_size * 2 ** (len(self.dim_mult) - 1)

  @property
  def temporal_stride(self) -> int:
    return 2 ** sum(self.temporal_downsample)


# Published autoencoders by name.
AUTOENCODERS: Mapping[str, VAEConfig] = {
  "wan2.1": VAEConfig(),
  "wan2.2": VAEConfig(
    dim=160,
    decoder_dim=256,
    patch_size=2,
    level_shortcuts=True,
    latent_channels=48,
    latent_mean=_MEAN_22,
    latent_std=_STD_22,
  ),
}


def find_autoencoder(latent_channels: int) -> VAEConfig:
  """Returns the published autoencoder with these latent channels.

  Raises:
    UserError: there is none.
  """
  for config in AUTOENCODERS.values():
    if config.latent_channels == latent_channels:
      return config
  known = " and ".join(f"{config.latent_channels} ({name})" for name, config in AUTOENCODERS.items())
  raise UserError(f"there is no autoencoder with {latent_channels} latent channels, only with {known}")
