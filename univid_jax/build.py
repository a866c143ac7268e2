"""From a config to the parts of a run. A config is an ml_collections.ConfigDict; see configs/video_tasks.py."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import univid_jax
from univid_jax.attention.api import BACKENDS
from univid_jax.data.cache import Cache, read_frames
from univid_jax.data.clips import ClipFormat, ClipRef, file_hash
from univid_jax.data.datasets import Drawing, Dropped, open_manifest, open_metadata, open_pairs
from univid_jax.data.kinds import COMPUTED_KINDS, KIND_NAMES
from univid_jax.data.loader import FeatureMaker
from univid_jax.data.packing import RowShape
from univid_jax.data.sources import ComputedSentences, FolderSource, LazySentences, PhotoSource
from univid_jax.data.tfds import open_tfds
from univid_jax.diffusion.flow import FlowMatching
from univid_jax.encoders import CheckpointEncoders, Encoders, PlainEncoders, i2v_condition
from univid_jax.files import CACHE_FOLDER, is_remote, local_data
from univid_jax.models.codec import DCTCodec
from univid_jax.models.dit import PRESETS, REMAT_POLICIES, DiT, DiTConfig
from univid_jax.models.in_context import look_back
from univid_jax.models.lora import LoRAConfig, attach
from univid_jax.models.vae import Tiling
from univid_jax.weights.checkpoint import component_config, read_info

Config = Mapping[str, Any]

# Values of a config that count something and so have to be at least 1.
COUNTS = ("num_steps", "log_every", "data.height", "data.width", "data.num_frames", "data.num_sentences", "data.variants",
          "data.num_threads", "rows.num_tokens", "rows.num_text_tokens", "rows.num_sentences", "rows.packing_bins",
          "rows.microbatches", "checkpoint.every_steps", "checkpoint.keep", "eval.num_inference_steps", "eval.batch_size",
          "validation.num_inference_steps")


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
  if not 0 <= config["data"]["held_out"] < 1:
    raise ValueError(f"config.data.held_out is a share, at least 0 and below 1, got {config['data']['held_out']}")
  for key in ("per_batch", "num_target_tokens"):
    if config["rows"][key] < 0:
      raise ValueError(f"config.rows.{key} must be at least 0, got {config['rows'][key]}")
  if config["rows"]["packing"] not in ("first_fit", "best_fit"):
    raise ValueError(f"config.rows.packing is first_fit or best_fit, got {config['rows']['packing']!r}")
  if config["model"]["remat"] not in REMAT_POLICIES:
    raise ValueError(f"config.model.remat is one of {', '.join(REMAT_POLICIES)}, got {config['model']['remat']!r}")
  if config["model"]["attention"] not in ("full", "context_causal"):
    raise ValueError(f"config.model.attention is full or context_causal, got {config['model']['attention']!r}")
  if config["model"]["attention_backend"] not in ("auto", *BACKENDS):
    raise ValueError(f"config.model.attention_backend is auto or one of {', '.join(BACKENDS)}, got "
                     f"{config['model']['attention_backend']!r}")
  if not 0 <= config["ema_decay"] < 1:
    raise ValueError(f"config.ema_decay is at least 0 (no mean) and below 1, got {config['ema_decay']}")
  data = config["data"]
  latent_frames, pixels = 1 + (data["num_frames"] - 1) // 4, 2 * (8 if config["init_from"] else config["codec"]["spatial_stride"])
  sizes = (data["height"], data["width"]), *bucket_sizes(config)
  longest = 4 * latent_frames * max((height // pixels) * (width // pixels) for height, width in sizes)
  if longest > config["rows"]["num_tokens"]:
    raise ValueError(f"a sentence of context I has {longest} tokens, config.rows.num_tokens is only "
                     f"{config['rows']['num_tokens']}")


def clip_counts(config: Config) -> dict[int, float]:
  """How often a sentence has so many clips."""
  return {int(name.removeprefix("clips_")): weight for name, weight in config["data"]["num_clips"].items()}


def bucket_sizes(config: Config) -> tuple[tuple[int, int], ...]:
  """The sizes beside data.height and data.width.

  Raises:
    ValueError: one is no HEIGHTxWIDTH.
  """
  sizes = []
  for text in config["data"]["buckets"]:
    height, _, width = str(text).partition("x")
    if not (height.isdigit() and width.isdigit()):
      raise ValueError(f"config.data.buckets are HEIGHTxWIDTH, for instance 480x832, got {text!r}")
    sizes.append((int(height), int(width)))
  return tuple(sizes)


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
            remat=options["remat"], attention_backend=options["attention_backend"], rngs=nnx.Rngs(seed))
  if options["look_back"]:
    look_back(dit, options["look_back"], rng=jax.random.key(seed))
  if adapters and (lora := lora_config(config)):
    attach(dit, lora, rngs=nnx.Rngs(seed + 1))
  return dit


def flow(config: Config) -> FlowMatching:
  return FlowMatching(**config["flow"])


def row_shape(config: Config) -> RowShape:
  rows = config["rows"]
  return RowShape(num_tokens=rows["num_tokens"], num_text_tokens=rows["num_text_tokens"], num_slots=rows["num_sentences"],
                  num_targets=rows["num_target_tokens"] or rows["num_tokens"] // 2,
                  context_causal=config["model"]["attention"] == "context_causal")


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
  # Held-out photographs are always the bundled ones.
  clips = [PhotoSource.bundled(split, jitter=data["jitter"])] if data["bundled"] or split != "train" else []
  if data["folder"] and split == "train":
    side = 4 * max(data["height"], data["width"])
    # Mapped from disk, so on this machine.
    cache = os.path.join(os.path.expanduser(CACHE_FOLDER) if is_remote(workdir) else workdir, "clips")
    clips.append(FolderSource.open(local_data(data["folder"]), cache=cache, side=side))
  return ComputedSentences(
      clips=clips,
      tasks=dict(data["tasks"]),
      contexts=dict(data["contexts"]),
      animating_contexts=dict(data["animating_contexts"]),
      num_frames=data["num_frames"],
      size=(data["height"], data["width"]),
      num_clips=clip_counts(config),
      reverse_probability=data["reverse_probability"],
      prompt_style=data["prompt"],
      prompt_dropout=data["prompt_dropout"],
      num_sentences=data["num_sentences"],
      seed=seed,
  )


@dataclasses.dataclass(frozen=True)
class DataSources:
  """What training draws sentences from.

  Attributes:
    sources: sentences by the name of their kind.
    weights: how often each is drawn.
    dropped: rows that cannot be used.
    held_out: sentences that training does not see, by the name of their kind; kinds that have none are left out.
  """

  sources: Mapping[str, Any]
  weights: Mapping[str, float]
  dropped: Sequence[Dropped]
  held_out: Mapping[str, Any]

  @property
  def task_names(self) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for source in self.sources.values() for name in source.task_names))


def data_sources(config: Config, workdir: str) -> DataSources:
  """Opens all data that the config names, and checks every row.

  Raises:
    FileNotFoundError: a file or folder is not there.
    ValueError: none has a row that can be used.
  """
  data, seed = config["data"], config["seed"]
  form = ClipFormat(size=(data["height"], data["width"]), num_frames=data["num_frames"], fit=data["fit"], fps=data["fps"],
                    buckets=bucket_sizes(config))
  drawing = Drawing(contexts=dict(data["contexts"]), num_clips=clip_counts(config),
                    reverse_probability=data["reverse_probability"], prompt=data["prompt"],
                    prompt_dropout=data["prompt_dropout"], variants=data["variants"], seed=seed)
  kinds, tfds = task_kinds(config), dict(data["tfds"])

  def pairs(folder):
    return open_pairs(local_data(folder), form, drawing, kinds=kinds)

  def data_set(split):
    return open_tfds(tfds | {"split": split}, form, drawing, depth_range=tuple(data["depth_range"]))

  # What opens the data, and where there is one its test set.
  opened = {
      "metadata": (lambda: open_metadata(local_data(data["metadata"]), form, drawing), None),
      "pairs": (lambda: pairs(data["pairs"]), data["test_pairs"] and (lambda: pairs(data["test_pairs"]))),
      "manifest": (lambda: open_manifest(local_data(data["manifest"]), form, drawing), None),
      "tfds": (lambda: data_set(tfds["split"]), tfds["test_split"] and (lambda: data_set(tfds["test_split"]))),
  }
  given = [name for name in opened if (tfds["name"] if name == "tfds" else data[name])]
  for name, option in (("pairs", "test_pairs"), ("tfds", "tfds.test_split")):
    if opened[name][1] and name not in given:
      raise ValueError(f"config.data.{option} is a test set, and there is no training data for its examples: give config.data."
                       + ("pairs" if name == "pairs" else "tfds.name"))
  found, dropped, held_out = {}, [], {}
  for name in given:
    (source, problems), open_test = opened[name][0](), opened[name][1]
    if len(source) and open_test:
      test, more = open_test()
      found[name] = source
      held_out[name], unasked = source.asked_by(test)
      problems = [*problems, *more, *unasked]
    elif len(source):
      found[name], held_out[name] = source.split(data["held_out"])
    else:
      reasons = "; ".join(map(str, problems[:3])) or "it is empty"
      raise ValueError(f"nothing in config.data.{name} can be used: {reasons}")
    dropped += problems
  if not (given or data["folder"] or data["bundled"]):
    raise ValueError("there is no data: give config.data.folder (videos and photos, for computed tasks), or "
                     "config.data.metadata, pairs, manifest or tfds.name")
  if data["folder"] or not given:
    computed = sentences(config, "train", seed=seed, workdir=workdir)
    # Only with an encoder worth sparing are sentences fixed and kept.
    found["computed"] = LazySentences(computed, computed_identity(config)) if config["init_from"] else computed
    held_out["computed"] = sentences(config, "held_out", seed=seed + 1)
  return DataSources(found, {name: data["weights"][name] for name in found}, dropped,
                     {name: source for name, source in held_out.items() if len(source)})


def task_kinds(config: Config) -> Mapping[str, str]:
  """What the targets of each task are, see `data.kinds`; tasks that are not there make pictures.

  Raises:
    ValueError: the config names a kind that there is not.
  """
  tfds, own = config["data"]["tfds"], dict(config["data"]["kinds"])
  unknown = sorted(set(own.values()) - set(KIND_NAMES))
  if unknown:
    raise ValueError(f"config.data.kinds are {', '.join(KIND_NAMES)}, got {unknown[0]!r}")
  of_tfds = {tfds["task"]: tfds["kind"]} if tfds["name"] and tfds["kind"] != "image" else {}
  return {**COMPUTED_KINDS, **of_tfds, **own}


def computed_identity(config: Config) -> str:
  """Names all that determines computed sentences."""
  data = config["data"]
  names = ("tasks", "contexts", "animating_contexts", "num_clips", "height", "width", "num_frames", "reverse_probability",
           "bundled", "jitter")
  files = []
  if data["folder"]:
    files = [file_hash(path) for path in sorted(Path(local_data(data["folder"])).iterdir()) if path.is_file()]
  return repr((univid_jax.__version__, config["seed"], [(name, str(data[name])) for name in names], files))


@dataclasses.dataclass(frozen=True)
class Caches:
  """Where latents, prompt embeddings and image features are kept."""

  latents: Cache
  prompts: Cache
  images: Cache


def caches(config: Config, encoders: Encoders, workdir: str) -> Caches | None:
  """The caches of a run; None where nothing is worth keeping."""
  if not config["init_from"]:
    return None
  folder = config["data"]["cache"] or os.path.join(workdir, "cache")
  return Caches(Cache(os.path.join(folder, "latents"), encoders.codec_fingerprint),
                Cache(os.path.join(folder, "prompts"), encoders.prompt_fingerprint),
                Cache(os.path.join(folder, "images"), encoders.image_fingerprint))


def feature_maker(config: Config, encoders: Encoders, *, caches: Caches | None = None,
                  task_names: Sequence[str] | None = None) -> FeatureMaker:
  """Turns sentences of clips into what a row holds; what is in the caches is not computed again."""
  dit = transformer_config(config)

  def encode_frames(clip: np.ndarray | ClipRef) -> np.ndarray:
    return encoders.codec.encode(read_frames(clip).astype(np.float32) / 127.5 - 1)

  def encode(clip: np.ndarray | ClipRef) -> np.ndarray:
    if caches is None or not isinstance(clip, ClipRef):
      return encode_frames(clip)
    return caches.latents.get_or_compute(clip.key, lambda: encode_frames(clip))

  @functools.lru_cache(maxsize=256)
  def embed_prompt(prompt: str) -> np.ndarray:
    if caches is None:
      return encoders.embed_prompt(prompt)
    return caches.prompts.get_or_compute(prompt, lambda: encoders.embed_prompt(prompt))

  def condition(clip: np.ndarray | ClipRef, num_latent_frames: int) -> tuple[np.ndarray, np.ndarray]:
    def compute_condition():
      return i2v_condition(encoders.codec, read_frames(clip)[0].astype(np.float32) / 127.5 - 1, num_latent_frames)

    def compute_features():
      return encoders.embed_image(read_frames(clip)[0].astype(np.float32) / 127.5 - 1)

    if caches is None or not isinstance(clip, ClipRef):
      return compute_condition(), compute_features()
    return (caches.latents.get_or_compute(f"{clip.key}|first frame of {num_latent_frames}", compute_condition),
            caches.images.get_or_compute(clip.key, compute_features))

  return FeatureMaker(encode=encode, embed_prompt=embed_prompt, patch_size=dit.patch_size, text_len=dit.text_len,
                      task_names=tuple(config["data"]["tasks"]) if task_names is None else tuple(task_names),
                      condition=condition if dit.model_type == "i2v" else None)
