"""From a config to the parts of a run. A config is an ml_collections.ConfigDict; see configs/video_tasks.py."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from univid_jax.data.loader import FeatureMaker
from univid_jax.data.packing import RowShape
from univid_jax.data.sources import ComputedSentences, FolderSource, PhotoSource
from univid_jax.diffusion.flow import FlowMatching
from univid_jax.encoders import CheckpointEncoders, Encoders, PlainEncoders
from univid_jax.models.codec import DCTCodec
from univid_jax.models.dit import PRESETS, REMAT_POLICIES, DiT, DiTConfig
from univid_jax.models.in_context import look_back
from univid_jax.models.lora import LoRAConfig, attach
from univid_jax.models.vae import Tiling
from univid_jax.weights.checkpoint import component_config, read_info

Config = Mapping[str, Any]

# Values of a config that count something and so have to be at least 1.
COUNTS = ("num_steps", "log_every", "data.height", "data.width", "data.num_frames", "data.num_sentences", "rows.num_tokens",
          "rows.num_text_tokens", "rows.num_sentences", "rows.packing_bins", "rows.microbatches", "checkpoint.every_steps",
          "checkpoint.keep", "eval.num_inference_steps")


def check(config: Config) -> None:
  """Refuses values that no run can have.

  Raises:
    ValueError: names the key, its value and what is expected.
  """
  for key in COUNTS:
    value = config
    for part in key.split("."):
      value = value[part]
    if value < 1:
      raise ValueError(f"config.{key} must be at least 1, got {value}")
  if config["model"]["remat"] not in REMAT_POLICIES:
    raise ValueError(f"config.model.remat is one of {', '.join(REMAT_POLICIES)}, got {config['model']['remat']!r}")
  if not 0 <= config["ema_decay"] < 1:
    raise ValueError(f"config.ema_decay is at least 0 (no mean) and below 1, got {config['ema_decay']}")
  data = config["data"]
  latent_frames, pixels = 1 + (data["num_frames"] - 1) // 4, 2 * (8 if config["init_from"] else config["codec"]["spatial_stride"])
  longest = 4 * latent_frames * (data["height"] // pixels) * (data["width"] // pixels)
  if longest > config["rows"]["num_tokens"]:
    raise ValueError(f"a sentence of context I has {longest} tokens, config.rows.num_tokens is only "
                     f"{config['rows']['num_tokens']}")


def transformer_config(config: Config) -> DiTConfig:
  """The transformer's shape: that of the checkpoint that training starts from, of a published model, or the config's own.

  Raises:
    ValueError: the checkpoint is not the model that the config names, or there is no such model.
  """
  options, variant = config["model"], config["model"].get("variant", "")
  if variant and variant not in PRESETS:
    raise ValueError(f"config.model.variant is one of {', '.join(PRESETS)} or empty, got {variant!r}")
  if config["init_from"]:
    return component_config("transformer", read_info(config["init_from"]).components["transformer"].config)
  if variant:
    return PRESETS[variant]
  names = {field.name for field in dataclasses.fields(DiTConfig)}
  channels = config["codec"]["latent_channels"]
  return DiTConfig(in_dim=channels, out_dim=channels, **{name: value for name, value in options.items() if name in names})


def encoders(config: Config, mesh: Mesh) -> Encoders:
  """A codec and encoders: those of the checkpoint that training starts from, else what needs no weights."""
  if config["init_from"]:
    tiling = Tiling(**config["vae_tiling"]) if config["vae_tiling"]["size"] else None
    return CheckpointEncoders(config["init_from"], mesh, dtype=jnp.dtype(config["model"]["dtype"]), tiling=tiling)
  return PlainEncoders(DCTCodec(**config["codec"]), transformer_config(config).text_dim)


def lora_config(config: Config) -> LoRAConfig | None:
  """What to adapt, or None where the whole model is trained."""
  options = dict(config["lora"])
  return LoRAConfig(**{**options, "targets": tuple(options["targets"])}) if options["rank"] else None


def model(config: Config, seed: int = 0, *, adapters: bool = True) -> DiT:
  """A model with random weights; call under `nnx.eval_shape` or `jax.jit` where they shall not all be on one device.

  Args:
    config: of the run.
    seed: of the weights.
    adapters: whether it gets the config's LoRA.
  """
  options = config["model"]
  dit = DiT(transformer_config(config), dtype=jnp.dtype(options["dtype"]), param_dtype=jnp.dtype(options["param_dtype"]),
            remat=options["remat"], rngs=nnx.Rngs(seed))
  if options["look_back"]:
    look_back(dit, options["look_back"], rng=jax.random.key(seed))
  if adapters and (lora := lora_config(config)):
    attach(dit, lora, rngs=nnx.Rngs(seed + 1))
  return dit


def flow(config: Config) -> FlowMatching:
  return FlowMatching(**config["flow"])


def row_shape(config: Config) -> RowShape:
  rows = config["rows"]
  return RowShape(num_tokens=rows["num_tokens"], num_text_tokens=rows["num_text_tokens"], num_slots=rows["num_sentences"])


def rows_per_batch(config: Config, mesh: Mesh) -> int:
  """Rows of a batch on all devices.

  Raises:
    ValueError: they do not divide over the devices and microbatches.
  """
  rows, shards = config["rows"], mesh.shape["data"] * mesh.shape["fsdp"]
  count = rows["per_batch"] or shards * rows["microbatches"]
  if count % (shards * rows["microbatches"]):
    raise ValueError(f"config.rows.per_batch = {count} does not divide over data x fsdp = {shards} devices"
                     + (f" and {rows['microbatches']} microbatches" if rows["microbatches"] > 1 else ""))
  return count


def sentences(config: Config, split: str, *, seed: int, workdir: str = "") -> ComputedSentences:
  """Sentences of the config's tasks; split is "train" or "held_out" (only bundled photographs)."""
  data = config["data"]
  clips = [PhotoSource.bundled(split)]
  if data["folder"] and split == "train":
    side = 4 * max(data["height"], data["width"])
    clips.append(FolderSource.open(data["folder"], cache=os.path.join(workdir, "clips"), side=side))
  return ComputedSentences(
      clips=clips,
      tasks=dict(data["tasks"]),
      contexts=dict(data["contexts"]),
      animating_contexts=dict(data["animating_contexts"]),
      num_frames=data["num_frames"],
      size=(data["height"], data["width"]),
      num_clips={int(count): weight for count, weight in data["num_clips"].items()},
      reverse_probability=data["reverse_probability"],
      prompt_style=data["prompt"],
      num_sentences=data["num_sentences"],
      seed=seed,
  )


def feature_maker(config: Config, encoders: Encoders) -> FeatureMaker:
  """Turns sentences of pixels into what a row holds."""
  dit = transformer_config(config)

  def encode(clip: np.ndarray) -> np.ndarray:
    return encoders.codec.encode(clip.astype(np.float32) / 127.5 - 1)

  return FeatureMaker(encode=encode, embed_prompt=encoders.embed_prompt, patch_size=dit.patch_size, text_len=dit.text_len,
                      task_names=tuple(config["data"]["tasks"]))
