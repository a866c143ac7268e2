"""The config of rows, noise levels, optimizer, mesh, checkpoints, validation and evaluation."""

import dataclasses
import math
import os
from typing import ClassVar

from univid_jax.config.section import MAX_COUNT, MAX_HOST_COUNT, Section
from univid_jax.core.errors import UserError
from univid_jax.core.options import (
  MAX_EVAL_SEED,
  MAX_SHIFT,
  MAX_STEPS,
  DepthAlignment,
  LearningRateSchedule,
  Objective,
  OnBadStep,
  OptimizerName,
  Packing,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsConfig(Section):
  """Packed rows and batches.

  Attributes:
    per_batch: rows of a batch over all devices; 0 is data x fsdp x microbatches.
    num_tokens, num_sentences: capacity of a row.
    num_text_tokens: capacity for prompts, one token of padding per sentence included.
    num_target_tokens: capacity for targets; 0 is half of num_tokens.
    packing_bins: rows that are filled at the same time.
    packing: which of them a sentence goes to. `balanced` also groups rows of similar work into batches, from the
      packing_bins rows of a stream, rounded down to whole batches but at least one; more batches balance better.
    streams: independent streams of rows; 0 is one per process, or per group of processes that share rows. With a fixed
      number, the rows of a batch do not depend on the number of processes; their order may.
    microbatches: parts of a batch computed one after another. With a fixed per_batch that takes less memory and has,
      apart from lora.dropout, the same result; with per_batch = 0 the batch becomes larger instead.
  """

  KEY: ClassVar[str] = "rows."

  per_batch: int = 8
  num_tokens: int = 192
  num_sentences: int = 3
  packing_bins: int = 64
  packing: Packing = Packing.FIRST_FIT
  num_text_tokens: int = 3
  num_target_tokens: int = 0
  streams: int = 0
  microbatches: int = 1

  def check(self) -> None:
    self.require_at_least(1, "num_tokens", "num_text_tokens", "num_sentences", "packing_bins", "microbatches")
    self.require_at_least(0, "per_batch", "num_target_tokens", "streams")
    self.require(
      "num_target_tokens", self.num_target_tokens <= self.num_tokens, f"at most num_tokens = {self.num_tokens}"
    )

  @property
  def target_tokens(self) -> int:
    return self.num_target_tokens or self.num_tokens // 2

  def batch_size(self, num_shards: int) -> int:
    """Returns the number of rows of a batch over all devices.

    Args:
      num_shards: data x fsdp devices.

    Raises:
      UserError: they do not divide over the devices and microbatches.
    """
    count = self.per_batch or num_shards * self.microbatches
    if count % (num_shards * self.microbatches):
      raise UserError(
        f"config.rows.per_batch = {count} does not divide over data x fsdp = {num_shards} devices"
        + (f" and {self.microbatches} microbatches" if self.microbatches > 1 else "")
      )
    return count


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig(Section):
  """Noise levels of training and sampling; see `diffusion.flow.FlowMatching`.

  Attributes:
    shift: warps the noise levels of training and sampling towards noise; 1 leaves them as they are.
    stratified: whether the noise levels of a batch are spread evenly, which makes the loss less noisy; each alone has
      the same distribution.
    objective: how training draws noise levels and weights their losses.
  """

  KEY: ClassVar[str] = "flow."

  shift: float = 5.0
  stratified: bool = True
  objective: Objective = Objective.UNIVID

  def check(self) -> None:
    self.require_positive("shift")
    self.require("shift", self.shift <= MAX_SHIFT, f"at most {MAX_SHIFT:g}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
  """The optimizer and the schedule of its learning rate.

  Attributes:
    name: `adamw`, or `muon`: Muon for the matrices of self-attention and feed-forward, NAdam for all other parameters.
    learning_rate: peak; with `muon` for Muon's matrices only.
    adam_learning_rate: peak for all other parameters with `muon`.
    b1, b2: decay rates of the two moments of AdamW or, with `muon`, of NAdam.
    eps: added to denominators for stability.
    weight_decay: for all parameters with `adamw`, for Muon's matrices only with `muon`.
    clip_norm: global norm that gradients are clipped to; 0 does not clip.
    schedule: the learning rate after the warm-up: constant, decaying to 0 along a cosine, or `linear`: constant, then
      linear to 0.
    warmup_steps: steps over which the learning rate rises linearly from 0.
    decay_fraction: share of the steps over which `linear` decays.
    on_bad_step: what happens if the loss or the gradient is not finite.
    skip_norm: with on_bad_step = skip, also skips steps whose gradient norm exceeds this multiple of the median of
      recent ones; 0 switches this off.
  """

  KEY: ClassVar[str] = "optimizer."

  name: OptimizerName = OptimizerName.MUON
  learning_rate: float = 1e-2
  adam_learning_rate: float = 3e-3
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.01
  clip_norm: float = 1.0
  schedule: LearningRateSchedule = LearningRateSchedule.LINEAR
  warmup_steps: int = 50
  decay_fraction: float = 0.5
  on_bad_step: OnBadStep = OnBadStep.STOP
  skip_norm: float = 0.0

  def check(self) -> None:
    self.require("skip_norm", self.skip_norm == 0 or 1 < self.skip_norm < math.inf, "0, or above 1 and finite")
    if self.on_bad_step != OnBadStep.SKIP:
      self.require("skip_norm", self.skip_norm == 0, "0 unless config.optimizer.on_bad_step is skip")
    self.require_at_least(0, "learning_rate", "adam_learning_rate", "weight_decay", "clip_norm", "warmup_steps", "eps")
    self.require_share("b1", "b2")
    self.require_share("decay_fraction", closed=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
  """Devices along each axis of the mesh; one axis may be -1, which takes the remaining devices."""

  KEY: ClassVar[str] = "mesh."

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1

  def check(self) -> None:
    names = [field.name for field in dataclasses.fields(self)]
    for name in names:
      size = getattr(self, name)
      self.require(
        name, 1 <= size <= MAX_COUNT or size == -1, "a positive number of devices, or -1 for the remaining devices"
      )
    if sum(getattr(self, name) == -1 for name in names) > 1:
      raise UserError("config.mesh may have only one axis of -1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
  """Steps between checkpoints, and how many of the latest are kept (in addition to the best)."""

  KEY: ClassVar[str] = "checkpoint."

  every_steps: int = 250
  keep: int = 2

  def check(self) -> None:
    self.require_at_least(1, "every_steps", "keep", maximum=MAX_HOST_COUNT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationConfig(Section):
  """Validation during training.

  Attributes:
    every_steps: 0 never validates.
    sentences: held-out sentences whose loss is measured.
    sigmas: noise levels at which it is measured.
    previews: number of sentences whose samples are written.
    num_inference_steps: inference steps of these samples.
    accelerate: files of the distillation LoRA that makes these samples, as for the flag --accelerate; it replaces
      num_inference_steps. Text is read as a list with commas, except in a ConfigDict, which enforces its types.
  """

  KEY: ClassVar[str] = "validation."

  every_steps: int = 250
  sentences: int = 24
  sigmas: tuple[float, ...] = (0.3, 0.6, 0.9)
  previews: int = 6
  num_inference_steps: int = 2
  accelerate: tuple[str, ...] = ()

  def __post_init__(self):
    files = [self.accelerate] if isinstance(self.accelerate, str | os.PathLike) else self.accelerate
    if isinstance(files, list | tuple) and all(isinstance(file, str | os.PathLike) for file in files):
      parts = tuple(part for file in files for part in os.fspath(file).split(",") if part)
      object.__setattr__(self, "accelerate", parts)
    super().__post_init__()

  def check(self) -> None:
    self.require_at_least(0, "every_steps", maximum=MAX_HOST_COUNT)
    self.require_at_least(0, "previews")
    self.require_at_least(1, "sentences")
    self.require("num_inference_steps", 1 <= self.num_inference_steps <= MAX_STEPS, f"from 1 to {MAX_STEPS}")
    self.require(
      "sigmas",
      bool(self.sigmas) and all(0 < sigma <= 1 for sigma in self.sigmas),
      "one or more noise levels above 0 and at most 1",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
  """Evaluation, after training (quick) and by `python -m univid_jax.evaluate` (full).

  Attributes:
    sentences_per_case: sentences per task, context and number of clips, for grids also per split; for your own data
      per task. 0 skips the evaluation after training.
    num_inference_steps: inference steps of the samples.
    seed: seed of sentences and noise.
    batch_size: sentences sampled together; an interrupted evaluation loses at most these.
    num_seeds: repetitions with other noise (full).
    more_steps: further numbers of inference steps to compare (full).
    depth_alignment: how predicted depth is aligned to the scale of the ground truth.
    palette: file with one line R G B per label; "" is Pascal VOC's palette.
    num_labels: labels of the palette that are used; 0 is all.
    void_label: label that does not count, even beyond num_labels; -1 for none.
    clip_model: folder or name of a CLIP model for CLIP-T and CLIP-I; "" for neither.
  """

  KEY: ClassVar[str] = "eval."

  sentences_per_case: int = 32
  num_inference_steps: int = 2
  seed: int = 1
  batch_size: int = 8
  num_seeds: int = 1
  more_steps: tuple[int, ...] = ()
  depth_alignment: DepthAlignment = DepthAlignment.LEAST_SQUARES
  palette: str = ""
  num_labels: int = 0
  void_label: int = -1
  clip_model: str = ""

  def check(self) -> None:
    self.require_at_least(0, "sentences_per_case", "num_labels")
    self.require_at_least(1, "batch_size", "num_seeds")
    self.require("seed", 0 <= self.seed <= MAX_EVAL_SEED, "from 0 to 10**12")
    self.require("num_inference_steps", 1 <= self.num_inference_steps <= MAX_STEPS, f"from 1 to {MAX_STEPS}")
    self.require_at_least(-1, "void_label")
    self.require(
      "more_steps",
      all(1 <= steps <= MAX_STEPS for steps in self.more_steps),
      f"numbers of steps, each at least 1 and at most {MAX_STEPS}",
    )
