"""The project's presets; choose one with --config=PRESET.

tiny (the default): the real architecture, small, trained from scratch on sentences made from photographs that come with
scikit-image. No download, about five minutes on two CPU cores.

  python -m univid_jax.train

grids: the same model trained on grid tasks, whose answers are right or wrong.

  python -m univid_jax.train --config=grids

small_lora: a LoRA on the base that the package ships, which knows other tasks; no download, five minutes.

  python -m univid_jax.train --config=small_lora

small: trains this base itself, in five minutes on an H100.

wan_1_3b, wan_14b, wan_i2v_14b: the paper's training, a LoRA on Wan2.1. They start from a converted checkpoint and take
their sentences from your videos and images (computed tasks) or from pairs of your own.

  python -m univid_jax.train --config=wan_1_3b --config.init_from=wan_1_3b --config.data.folder=DIR \\
    --workdir=runs/mine

wan22_ti2v_5b, wan22_a14b, wan22_i2v_a14b: the same on Wan2.2. A run on A14B trains both experts, or one of them with
--config.model.expert=high or low.

The paper's recipes are one override away: one task (--config.data.tasks.NAME=1.0 and 0.0 for the others), one context
for a task (--config.data.contexts.I=1.0 ...), more shots (--config.data.num_clips.clips_6=1.0).
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import ml_collections

from univid_jax.config.boundary import to_config_dict
from univid_jax.config.grids import GridsConfig
from univid_jax.config.schema import (
  CheckpointConfig,
  CodecConfig,
  DataConfig,
  EvalConfig,
  FlowConfig,
  LoRAConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RowsConfig,
  RunConfig,
  SourceWeights,
  ValidationConfig,
)
from univid_jax.core.contexts import PAPER_CONTEXTS
from univid_jax.core.errors import UserError
from univid_jax.core.options import (
  LearningRateSchedule,
  OptimizerName,
  Packing,
  PromptStyle,
  RematPolicy,
  TrainedExpert,
)

# The preset that commands use without --config.
DEFAULT = "tiny"

# Presets name what they draw: a task or family added later has weight 0 in them, so that their runs can be resumed.
_FAMILIES: Mapping[str, float] = dict.fromkeys(
  (
    *("recolor", "translate", "reorient", "gravity", "automaton", "count", "life", "outline", "fill", "largest"),
    *("maze", "hanoi", "sudoku"),
  ),
  1.0,
)
_SMALL_TASKS: Mapping[str, float] = (
  dict.fromkeys(("invert", "swap_channels", "duotone", "camera_movement"), 1.0)
  | dict.fromkeys(("salient_object", "inpainting", "colorization", "super_resolution", "deblurring", "denoising"), 0.5)
  | dict.fromkeys(("deraining", "low_light", "greyscale", "invert_brightness", "flip"), 0.5)
  | {"time_reversal": 0.2, "moving_object": 0.2}
)


def get_config(preset: str = DEFAULT) -> ml_collections.ConfigDict:
  """Returns a preset for flags.

  Raises:
    UserError: there is no such preset.
  """
  if preset not in PRESETS:
    raise UserError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
  return to_config_dict(PRESETS[preset]())


def _with_weights(names: Iterable[str], weights: Mapping[str, float]) -> dict[str, float]:
  """Returns weights for all names, so that flags can change them; a name without a weight gets 0."""
  return {**dict.fromkeys(names, 0.0), **weights}


def tiny() -> RunConfig:
  """Trains a small model from scratch in about five minutes on two CPU cores.

  The paper draws contexts I, II and III with 0.3, 0.3 and 0.4; images teach more per minute than videos do. A row holds
  two sentences of context III, one each of I and II, or three of II.
  """
  return RunConfig()


def grids() -> RunConfig:
  """Trains the same model on all families of grid tasks, at 32x32 pixels with cells of 4 pixels.

  Evaluation counts exact matches: for each family with held-out rules, or held-out grids, and with trained rules.
  """
  return RunConfig(
    name="grids",
    num_steps=8000,
    data=DataConfig(
      bundled=False,
      contexts={"I": 0.1, "II": 0.7, "III": 0.1, "IV": 0.1},
      grids=GridsConfig(families=_with_weights(GridsConfig().families, _FAMILIES)),
    ),
    eval=EvalConfig(sentences_per_case=16, num_inference_steps=4),
  )


def small() -> RunConfig:
  """Trains the base that the package ships: 64x64 pixels, videos of 9 frames, 9 million parameters.

  Five minutes on an H100 with 16 cores, days on two cores. Six in ten sentences are grid tasks, the others computed
  tasks over photographs; tasks with weight 0 are kept for fine-tuning. A video clip has three latent frames, hence
  `look_back`.
  """
  families = {**_FAMILIES, "automaton": 2.0, "translate": 1.5, "hanoi": 0.5, "outline": 0.0}
  return RunConfig(
    name="small",
    num_steps=2336,
    model=ModelConfig(
      dim=256, ffn_dim=640, num_heads=8, num_layers=10, dtype="bfloat16", remat=RematPolicy.NONE, look_back=(1, 2, 3, 6)
    ),
    data=DataConfig(
      height=64,
      width=64,
      num_frames=9,
      num_sentences=100_000_000,
      grids=GridsConfig(cell=8, families=_with_weights(GridsConfig().families, families)),
      weights=SourceWeights(computed=0.4, grids=0.6),
      tasks=_with_weights(DataConfig().tasks, _SMALL_TASKS),
      contexts={"I": 0.1, "II": 0.6, "III": 0.15, "IV": 0.15},
      num_clips={"clips_4": 0.7, "clips_6": 0.2, "clips_8": 0.1},
      reverse_probability=0.15,
      stream_processes=True,
    ),
    rows=RowsConfig(
      per_batch=32,
      num_tokens=1536,
      num_sentences=6,
      num_text_tokens=6,
      packing=Packing.BEST_FIT,
      packing_bins=8,
      streams=16,
    ),
    optimizer=OptimizerConfig(warmup_steps=100),
    ema_decay=0.999,
    checkpoint=CheckpointConfig(every_steps=1000),
    validation=ValidationConfig(every_steps=1000, sentences=64, num_inference_steps=4),
    eval=EvalConfig(num_inference_steps=4),
  )


def small_lora() -> RunConfig:
  """Trains a LoRA on the base that the package ships, as the paper does on Wan: 20 pairs, five minutes on two cores.

  The task is a family of grids that the base has never seen, as ten sentences of two pairs; `data.pairs` replaces it
  with a task of yours, at 64x64 pixels.
  """
  base = small()
  families = _with_weights(GridsConfig().families, {"outline": 1.0})
  return dataclasses.replace(
    base,
    name="small_lora",
    num_steps=150,
    log_every=10,
    init_from="small",
    model=dataclasses.replace(base.model, dtype="float32", remat=RematPolicy.DOTS, look_back=()),
    lora=LoRAConfig(rank=16),
    data=dataclasses.replace(
      base.data,
      bundled=False,
      num_sentences=10,
      grids=dataclasses.replace(base.data.grids, families=families),
      contexts={"I": 0.0, "II": 1.0, "III": 0.0, "IV": 0.0},
      num_clips={"clips_4": 1.0, "clips_6": 0.0, "clips_8": 0.0},
      weights=SourceWeights(),
      reverse_probability=0.0,
      stream_processes=False,
    ),
    rows=RowsConfig(per_batch=2, num_tokens=768, packing_bins=4),
    optimizer=OptimizerConfig(name=OptimizerName.ADAMW, learning_rate=2e-3, warmup_steps=10),
    ema_decay=0.95,
    checkpoint=CheckpointConfig(every_steps=50),
    validation=ValidationConfig(every_steps=50, sentences=12, previews=3),
    eval=EvalConfig(sentences_per_case=32),
  )


def wan_1_3b() -> RunConfig:
  """The paper's training of Wan2.1-T2V-1.3B: LoRA of rank 16 at 832 x 480, videos of 17 frames.

  The paper uses 20 to 40 times 200 sentences per task. A row holds a sentence of context I and one of II, or two of
  III.
  """
  default = DataConfig()
  return RunConfig(
    name="wan_1_3b",
    num_steps=4000,
    model=ModelConfig(variant="wan2.1-t2v-1.3b", dtype="bfloat16", param_dtype="bfloat16", look_back=()),
    codec=CodecConfig(spatial_stride=8),
    lora=LoRAConfig(rank=16),
    data=DataConfig(
      bundled=False,
      jitter=False,
      height=480,
      width=832,
      num_frames=17,
      prompt=PromptStyle.DETAILED,
      num_threads=8,
      # Fixed computed sentences, so that their latents can be cached.
      num_sentences=2000,
      tasks={name: float(name in ("scribble", "camera_movement")) for name in default.tasks},
      contexts=PAPER_CONTEXTS,
    ),
    rows=RowsConfig(per_batch=0, num_tokens=37504, num_sentences=6, num_text_tokens=768, packing=Packing.BEST_FIT),
    flow=FlowConfig(stratified=False),
    optimizer=OptimizerConfig(
      name=OptimizerName.ADAMW,
      learning_rate=1e-4,
      clip_norm=0.0,
      schedule=LearningRateSchedule.CONSTANT,
      warmup_steps=0,
    ),
    ema_decay=0.0,
    checkpoint=CheckpointConfig(every_steps=200, keep=3),
    validation=ValidationConfig(every_steps=200, sentences=16, previews=2, num_inference_steps=20),
    eval=EvalConfig(sentences_per_case=0, num_inference_steps=50, batch_size=1),
  )


def wan_14b() -> RunConfig:
  """The same for Wan2.1-T2V-14B, its weights sharded over all devices."""
  base = wan_1_3b()
  return dataclasses.replace(
    base,
    name="wan_14b",
    model=dataclasses.replace(base.model, variant="wan2.1-t2v-14b"),
    mesh=MeshConfig(data=1, fsdp=-1),
  )


def wan_i2v_14b() -> RunConfig:
  """The same for Wan2.1-I2V-14B-480P, also conditioned on the first frame of A (CLIP features and latents)."""
  base = wan_14b()
  return dataclasses.replace(
    base, name="wan_i2v_14b", model=dataclasses.replace(base.model, variant="wan2.1-i2v-14b-480p")
  )


def wan22_ti2v_5b() -> RunConfig:
  """The same for Wan2.2-TI2V-5B, at 1280 x 704 and 832 x 480, 24 fps: its autoencoder yields a quarter of the tokens.

  Context tokens have timestep 0, as clean latents had in the model's own training. A row holds a sentence of context I
  at 1280 x 704, or two at 832 x 480.
  """
  base = wan_1_3b()
  return dataclasses.replace(
    base,
    name="wan22_ti2v_5b",
    model=dataclasses.replace(base.model, variant="wan2.2-ti2v-5b"),
    codec=CodecConfig(latent_channels=48, spatial_stride=16),
    data=dataclasses.replace(base.data, height=704, width=1280, buckets=("480x832",), fps=24.0),
    rows=dataclasses.replace(base.rows, num_tokens=17600),
    mesh=MeshConfig(data=1, fsdp=-1),
  )


def wan22_a14b() -> RunConfig:
  """The same for both experts of Wan2.2-T2V-A14B, whose base weights take twice the memory.

  The high-noise expert is trained at noise levels from 0.875, of which shift 12 draws more than half.
  """
  base = wan_14b()
  return dataclasses.replace(
    base,
    name="wan22_a14b",
    model=dataclasses.replace(base.model, variant="wan2.2-t2v-a14b", expert=TrainedExpert.BOTH),
    flow=dataclasses.replace(base.flow, shift=12.0),
    # Samples need both experts in memory.
    validation=dataclasses.replace(base.validation, sigmas=(0.3, 0.6, 0.9, 0.95), previews=0),
  )


def wan22_i2v_a14b() -> RunConfig:
  """The same for both experts of Wan2.2-I2V-A14B, also conditioned on the latents of the first frame of A."""
  base = wan22_a14b()
  return dataclasses.replace(
    base,
    name="wan22_i2v_a14b",
    model=dataclasses.replace(base.model, variant="wan2.2-i2v-a14b"),
    flow=dataclasses.replace(base.flow, shift=5.0),
  )


PRESETS: Mapping[str, Callable[[], RunConfig]] = {
  "tiny": tiny,
  "grids": grids,
  "small": small,
  "small_lora": small_lora,
  "wan_1_3b": wan_1_3b,
  "wan_14b": wan_14b,
  "wan_i2v_14b": wan_i2v_14b,
  "wan22_ti2v_5b": wan22_ti2v_5b,
  "wan22_a14b": wan22_a14b,
  "wan22_i2v_a14b": wan22_i2v_a14b,
}
