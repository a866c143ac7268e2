"""From a checkpoint folder back to PyTorch's files: the official release's layout, or that of diffusers."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from tools.convert_weights.convert import component_fills, writing
from univid_jax.models.dit import DiTConfig
from univid_jax.models.umt5 import UMT5Config
from univid_jax.models.vae import LATENT_MEAN, LATENT_STD, VAEConfig
from univid_jax.parallel.mesh import make_mesh
from univid_jax.weights.checkpoint import CheckpointInfo, abstract_component, component_config, read_info, restore_as_stored
from univid_jax.weights.files import save_safetensors, save_torch
from univid_jax.weights.names import name_to_diffusers

LAYOUTS = ("original", "diffusers")
SHARD_BYTES = 5 << 30

ORIGINAL_FILES = {"transformer": "diffusion_pytorch_model.safetensors", "vae": "Wan2.1_VAE.pth",
                  "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth"}
DIFFUSERS_FILES = {"transformer": "transformer/diffusion_pytorch_model.safetensors",
                   "vae": "vae/diffusion_pytorch_model.safetensors",
                   "text_encoder": "text_encoder/model.safetensors"}


def original_tensors(folder: epath.PathLike, component: str, info: CheckpointInfo) -> Iterator[tuple[str, np.ndarray]]:
  """A component's tensors under their official names and in their official layout, as they are stored."""
  config = component_config(component, info.components[component].config)
  mesh = make_mesh({"data": -1}, jax.devices("cpu")[:1])
  params = restore_as_stored(epath.Path(folder) / component, abstract_component(component, config), mesh)
  for fill in component_fills(component, config):
    value = params
    for key in fill.path:
      value = value[int(key) if key.isdigit() else key]
    value = np.asarray(value)
    for name, layer in zip(fill.names, value if fill.stacked else (value,)):
      yield name, fill.to_original(layer)


def export(source: epath.PathLike, destination: epath.PathLike, to: str, *, dtype: str | None = None,
           force: bool = False) -> None:
  """Writes a checkpoint folder's weights in the official layout or in that of diffusers.

  The official autoencoder and text encoder are PyTorch files, which need PyTorch. The image encoder is left out: what the
  project does not use of it (text tower, last block) is not kept.
  """
  info = read_info(source)
  size = sum(component.num_parameters * 4 for component in info.components.values())
  with writing(destination, needed=size, force=force) as folder:
    folder = Path(folder)
    for component in info.components:
      if component == "image_encoder":
        print("image_encoder is left out: its text tower and last block were not kept")
        continue
      config = component_config(component, info.components[component].config)
      rename: Callable[[str], str] = str
      if to == "diffusers":
        rename = lambda name: name_to_diffusers(component, name)  # noqa: B023, E731
      tensors = {rename(name): np.ascontiguousarray(value if dtype is None else value.astype(dtype))
                 for name, value in original_tensors(source, component, info)}
      path = folder / (ORIGINAL_FILES if to == "original" else DIFFUSERS_FILES)[component]
      path.parent.mkdir(exist_ok=True)
      write_tensors(path, tensors)
      if to == "diffusers" or component == "transformer":
        values = official_config(config) if to == "original" else diffusers_config(component, config)
        (path.parent / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    if info.tokenizer:
      target = folder / ("google/umt5-xxl" if to == "original" else "tokenizer")
      target.mkdir(parents=True)
      for file in (epath.Path(source) / info.tokenizer).parent.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    if to == "diffusers":
      (folder / "scheduler").mkdir()
      (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
      (folder / "model_index.json").write_text(json.dumps(model_index(info), indent=2) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
  """A .pth through PyTorch, or safetensors, in shards with an index where it is large."""
  if path.suffix == ".pth":
    save_torch(path, tensors)
    return
  shards: list[dict[str, np.ndarray]] = [{}]
  filled = 0
  for name, value in tensors.items():
    if filled and filled + value.nbytes > SHARD_BYTES:
      shards.append({})
      filled = 0
    shards[-1][name] = value
    filled += value.nbytes
  if len(shards) == 1:
    save_safetensors(path, shards[0])
    return
  weight_map = {}
  for number, shard in enumerate(shards, 1):
    name = f"{path.stem}-{number:05d}-of-{len(shards):05d}.safetensors"
    save_safetensors(path.parent / name, shard)
    weight_map |= dict.fromkeys(shard, name)
  index = {"metadata": {"total_size": sum(value.nbytes for value in tensors.values())}, "weight_map": weight_map}
  (path.parent / f"{path.name}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def official_config(config: DiTConfig) -> dict[str, Any]:
  """The official release's config.json."""
  names = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "model_type", "num_heads", "num_layers", "out_dim", "text_len")
  return {"_class_name": "WanModel", **{name: getattr(config, name) for name in names}}


def diffusers_config(component: str, config: DiTConfig | VAEConfig | UMT5Config) -> dict[str, Any]:
  """The config.json of the class in diffusers (transformers) that the weights are for."""
  if isinstance(config, DiTConfig):
    image = {"image_dim": config.image_dim, "added_kv_proj_dim": config.dim} if config.model_type == "i2v" else {}
    return {"_class_name": "WanTransformer3DModel", "patch_size": list(config.patch_size),
            "num_attention_heads": config.num_heads, "attention_head_dim": config.head_dim, "in_channels": config.in_dim,
            "out_channels": config.out_dim,
            "text_dim": config.text_dim, "freq_dim": config.freq_dim, "ffn_dim": config.ffn_dim, "num_layers": config.num_layers,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": config.eps, "rope_max_seq_len": 1024, **image}
  if isinstance(config, VAEConfig):
    return {"_class_name": "AutoencoderKLWan", "base_dim": config.dim, "z_dim": config.latent_channels,
            "dim_mult": list(config.dim_mult), "num_res_blocks": config.num_res_blocks, "attn_scales": [],
            "temperal_downsample": list(config.temporal_downsample), "dropout": 0.0,
            "latents_mean": list(LATENT_MEAN), "latents_std": list(LATENT_STD)}
  return {"architectures": ["UMT5EncoderModel"], "model_type": "umt5", "vocab_size": config.vocab_size, "d_model": config.dim,
          "d_kv": config.attention_dim // config.num_heads, "d_ff": config.ffn_dim, "num_layers": config.num_layers,
          "num_heads": config.num_heads, "relative_attention_num_buckets": config.num_buckets, "layer_norm_epsilon": config.eps,
          "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "is_encoder_decoder": True, "tie_word_embeddings": False}


SCHEDULER = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
             "flow_shift": 3.0, "num_train_timesteps": 1000}


def model_index(info: CheckpointInfo) -> dict[str, Any]:
  """The model_index.json of diffusers' pipeline."""
  classes = {"transformer": ("diffusers", "WanTransformer3DModel"), "vae": ("diffusers", "AutoencoderKLWan"),
             "text_encoder": ("transformers", "UMT5EncoderModel")}
  present = {name: list(value) if name in info.components else [None, None] for name, value in classes.items()}
  return {"_class_name": "WanPipeline", "scheduler": ["diffusers", "UniPCMultistepScheduler"],
          "tokenizer": ["transformers", "T5TokenizerFast"] if info.tokenizer else [None, None], **present}
