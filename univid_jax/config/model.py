"""The config of the transformer, the codec and the adapters."""

import dataclasses
import math
from typing import ClassVar

from univid_jax.config.section import Section
from univid_jax.core.dims import MAX_POSITION
from univid_jax.core.options import (
  MAX_LORA_SCALE,
  Attention,
  AttentionBackend,
  ContextTimestep,
  Quantize,
  RematPolicy,
  TrainedExpert,
)

DTYPES = ("float32", "bfloat16", "float16")
# Files store alpha in float32, where a smaller one could become 0.
_MIN_ALPHA = 2.0**-126


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
  """The transformer.

  Attributes:
    expert: which experts of Wan2.2 A14B are trained, each on its own noise levels: high, low or both; `only` for other
      bases.
    variant: name of a published model, which the base must be; "" takes any base or, without one, the numbers below.
    dim, ffn_dim, num_heads, num_layers, freq_dim, text_dim: shape of a model that is trained from scratch.
    rope_theta, rope_scale: base and scale of its rotary frequencies. A base, or `variant`, has its own shape and
      frequencies; values here that differ from the defaults are logged as ignored.
    remat: what the backward pass recomputes.
    dtype: of activations and matrix products.
    param_dtype: of the stored base weights.
    attention: what each token attends to.
    context_timestep: of context tokens: that of their target, as in UniVid, or zero, as TI2V was trained.
    attention_backend: implementation of self-attention.
    clip_gap: added to positions in time where a clip begins, so that it does not look like a continuation of the clip
      before (Video-As-Prompt); 0 adds none.
    look_back: initialisation of a model that is trained from scratch: head i attends this many latent frames back, gaps
      included; () is plain random initialisation.
  """

  KEY: ClassVar[str] = "model."

  expert: TrainedExpert = TrainedExpert.ONLY
  variant: str = ""
  dim: int = 128
  ffn_dim: int = 256
  num_heads: int = 4
  num_layers: int = 4
  freq_dim: int = 64
  text_dim: int = 16
  rope_theta: float = 10.0
  rope_scale: float = 1.57
  remat: RematPolicy = RematPolicy.FULL
  dtype: str = "float32"
  param_dtype: str = "float32"
  attention: Attention = Attention.FULL
  context_timestep: ContextTimestep = ContextTimestep.AUTO
  attention_backend: AttentionBackend = AttentionBackend.AUTO
  clip_gap: int = 0
  look_back: tuple[int, ...] = (1, 2, 4)

  def check(self) -> None:
    self.require_at_least(1, "dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim")
    self.require("clip_gap", 0 <= self.clip_gap < MAX_POSITION, f"from 0 to {MAX_POSITION - 1}")
    self.require_positive("rope_theta", "rope_scale")
    self.require(
      "look_back",
      all(0 <= frames < MAX_POSITION for frames in self.look_back),
      f"distances in latent frames, each from 0 to {MAX_POSITION - 1}",
    )
    for name in ("dtype", "param_dtype"):
      self.require(name, getattr(self, name) in DTYPES, f"one of {', '.join(DTYPES)}")
    if self.attention == Attention.CONTEXT_CAUSAL:
      is_possible = self.context_timestep != ContextTimestep.TARGET
      self.require("context_timestep", is_possible, "auto or zero with attention = context_causal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig(Section):
  """How the frozen base of a LoRA run is stored.

  Attributes:
    quantize: how its blocks' linear weights are quantised when they are loaded; "none" keeps them as they are stored.
    offload: whether its blocks are kept in host memory, and each is copied to the device when it runs.
  """

  KEY: ClassVar[str] = "base."

  quantize: Quantize = Quantize.NONE
  offload: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecConfig(Section):
  """The weightless codec, for runs without a base: coefficients kept per block, and the block's side in pixels."""

  KEY: ClassVar[str] = "codec."

  latent_channels: int = 16
  spatial_stride: int = 4

  def check(self) -> None:
    self.require_at_least(1, "latent_channels", "spatial_stride")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TilingConfig(Section):
  """How the base's autoencoder cuts large frames: side of a tile and overlap, in latents; size 0 does not cut."""

  KEY: ClassVar[str] = "vae_tiling."

  size: int = 0
  overlap: int = 8

  def check(self) -> None:
    self.require_at_least(0, "size", "overlap")
    if self.size:
      self.require("overlap", 0 < self.overlap <= self.size // 2, f"from 1 to half of size = {self.size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(Section):
  """Which Linears get adapters, and the adapters' shape and scale.

  Attributes:
    rank: rank of the update; 0 trains the whole model.
    alpha: the update is scaled by alpha / rank.
    targets: patterns (`fnmatch`) of official Linear names or of their ends: `q` matches every `....q`.
    dropout: share of the adapter inputs dropped in training.
    rslora: scales by alpha / sqrt(rank) instead.
  """

  KEY: ClassVar[str] = "lora."

  rank: int = 0
  alpha: float = 16.0
  targets: tuple[str, ...] = ("q", "k", "v", "o", "ffn.0", "ffn.2")
  dropout: float = 0.0
  rslora: bool = False

  def check(self) -> None:
    self.require_at_least(0, "rank")
    self.require_share("dropout")
    self.require("dropout", self.enabled or not self.dropout, "0 without adapters (config.lora.rank is 0)")
    self.require("targets", bool(self.targets) or not self.enabled, "at least one pattern")
    # The bounds that files are read with, so that a run writes nothing that cannot be read.
    self.require("alpha", _MIN_ALPHA <= self.alpha < math.inf, "positive and finite")
    if self.enabled:
      divisor = "sqrt(rank)" if self.rslora else "rank"
      self.require(
        "alpha", self.scale <= MAX_LORA_SCALE, f"at most {MAX_LORA_SCALE:g} times {divisor} (rank is {self.rank})"
      )

  @property
  def enabled(self) -> bool:
    return self.rank > 0

  @property
  def scale(self) -> float:
    return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
