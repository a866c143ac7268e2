"""The configuration of a run: a tree of frozen dataclasses that validate themselves.

Every error is a `UserError` that names the key, the value and the valid range. The defaults are those of the preset
`tiny`. Keys are stable: a config written by an earlier version loads, and keys that it lacks take their defaults.
"""

import dataclasses

from univid_jax.config.data import DataConfig, SourceWeights, TFDSConfig
from univid_jax.config.grids import ARCConfig, GridsConfig
from univid_jax.config.model import BaseConfig, CodecConfig, LoRAConfig, ModelConfig, TilingConfig
from univid_jax.config.section import MAX_HOST_COUNT, Section
from univid_jax.config.training import (
  CheckpointConfig,
  EvalConfig,
  FlowConfig,
  MeshConfig,
  OptimizerConfig,
  RowsConfig,
  ValidationConfig,
)
from univid_jax.core.errors import UserError
from univid_jax.core.options import MAX_RUN_SEED, RematPolicy, TrainedExpert

__all__ = [
  "ARCConfig",
  "BaseConfig",
  "CheckpointConfig",
  "CodecConfig",
  "DataConfig",
  "EvalConfig",
  "FlowConfig",
  "GridsConfig",
  "LoRAConfig",
  "MeshConfig",
  "ModelConfig",
  "OptimizerConfig",
  "RowsConfig",
  "RunConfig",
  "SourceWeights",
  "TFDSConfig",
  "TilingConfig",
  "ValidationConfig",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
  """Everything that determines a run.

  Attributes:
    name: names the default workdir, runs/NAME.
    seed: seed of weights, data order and noise.
    num_steps: training steps.
    log_every: steps between lines of metrics.jsonl.
    init_from: a converted checkpoint to train on; "" trains from scratch with a weightless codec.
    ema_decay: decay of the exponential moving average of the weights; 0 keeps none.
  """

  name: str = "tiny"
  seed: int = 0
  num_steps: int = 1600
  log_every: int = 20
  model: ModelConfig = ModelConfig()
  init_from: str = ""
  base: BaseConfig = BaseConfig()
  codec: CodecConfig = CodecConfig()
  vae_tiling: TilingConfig = TilingConfig()
  lora: LoRAConfig = LoRAConfig()
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  rows: RowsConfig = RowsConfig()
  flow: FlowConfig = FlowConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  ema_decay: float = 0.98
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  validation: ValidationConfig = ValidationConfig()
  eval: EvalConfig = EvalConfig()

  def check(self) -> None:
    self.require_at_least(1, "num_steps")
    self.require_at_least(1, "log_every", maximum=MAX_HOST_COUNT)
    self.require("seed", 0 <= self.seed <= MAX_RUN_SEED, "from 0 to 2**63 - 2")
    self.require_share("ema_decay")
    if self.base.offload and not self.lora.enabled:
      raise UserError("config.base.offload is for a frozen base: set config.lora.rank, or leave it off")
    if self.base.offload and self.model.remat == RematPolicy.NONE:  # the device would keep every block
      raise UserError(
        "config.base.offload needs a backward pass that copies blocks again: set config.model.remat to full, or to "
        "another policy than none"
      )
    if self.model.expert == TrainedExpert.BOTH and not self.lora.enabled:
      raise UserError("config.model.expert is both, which trains LoRAs: set config.lora.rank, or train one at a time")
