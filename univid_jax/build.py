"""From a config to the parts of a run. A config is an ml_collections.ConfigDict; see configs/video_tasks.py."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from univid_jax.data.loader import FeatureMaker
from univid_jax.data.packing import RowShape
from univid_jax.data.sources import ComputedSentences, FolderSource, PhotoSource
from univid_jax.diffusion.flow import FlowMatching
from univid_jax.models.codec import DCTCodec
from univid_jax.models.dit import REMAT_POLICIES, DiT, DiTConfig
from univid_jax.models.in_context import look_back

Config = Mapping[str, Any]

# Values of a config that count something and so have to be at least 1.
COUNTS = ("num_steps", "log_every", "data.height", "data.width", "data.num_frames", "data.num_sentences", "rows.per_batch",
          "rows.num_tokens", "rows.num_sentences", "rows.packing_bins", "checkpoint.every_steps", "checkpoint.keep",
          "eval.sentences_per_case", "eval.num_inference_steps")


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
  latent_frames, pixels = 1 + (data["num_frames"] - 1) // 4, 2 * config["codec"]["spatial_stride"]
  longest = 4 * latent_frames * (data["height"] // pixels) * (data["width"] // pixels)
  if longest > config["rows"]["num_tokens"]:
    raise ValueError(f"a sentence of context I has {longest} tokens, config.rows.num_tokens is only "
                     f"{config['rows']['num_tokens']}")


def codec(config: Config) -> DCTCodec:
  return DCTCodec(**config["codec"])


def dit_config(config: Config) -> DiTConfig:
  model = config["model"]
  names = {field.name for field in dataclasses.fields(DiTConfig)}
  channels = config["codec"]["latent_channels"]
  return DiTConfig(in_dim=channels, out_dim=channels, **{name: value for name, value in model.items() if name in names})


def model(config: Config, seed: int = 0) -> DiT:
  """A model with random weights; call under `nnx.eval_shape` or `jax.jit` where they shall not all be on one device."""
  options = config["model"]
  dit = DiT(dit_config(config), dtype=jnp.dtype(options["dtype"]), param_dtype=jnp.dtype(options["param_dtype"]),
            remat=options["remat"], rngs=nnx.Rngs(seed))
  if options["look_back"]:
    look_back(dit, options["look_back"], rng=jax.random.key(seed))
  return dit


def flow(config: Config) -> FlowMatching:
  return FlowMatching(**config["flow"])


def row_shape(config: Config) -> RowShape:
  rows = config["rows"]
  # The null prompt is one token of padding a sentence.
  return RowShape(num_tokens=rows["num_tokens"], num_text_tokens=rows["num_sentences"], num_slots=rows["num_sentences"])


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


def feature_maker(config: Config) -> FeatureMaker:
  """Encodes with the codec; the null prompt, the only one without a text encoder, has no tokens of its own."""
  dit = dit_config(config)
  encoder = codec(config)

  def encode(clip: np.ndarray) -> np.ndarray:
    return encoder.encode(clip.astype(np.float32) / 127.5 - 1)

  def embed_prompt(prompt: str) -> np.ndarray:
    if prompt:
      raise ValueError("a prompt needs a text encoder, and this model has none: use the null prompt")
    return np.zeros((0, dit.text_dim), np.float32)

  return FeatureMaker(encode=encode, embed_prompt=embed_prompt, patch_size=dit.patch_size, text_len=dit.text_len,
                      task_names=tuple(config["data"]["tasks"]))
