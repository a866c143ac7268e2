"""Outputs of components on fixed inputs, here and in PyTorch."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from univid_jax.codecs.wan_vae import VAE, VAEConfig
from univid_jax.convert.identify import Source
from univid_jax.convert.release_configs import diffusers_config
from univid_jax.core.sentence import Role, Sentence
from univid_jax.data.rows.packing import RowShape, pack
from univid_jax.data.rows.tokens import sentence_features, unpatchify
from univid_jax.models.dit import DiT
from univid_jax.models.names import name_to_diffusers
from univid_jax.models.umt5 import UMT5Config, UMT5Encoder
from univid_jax.models.variants import DiTConfig

TIMESTEP = 500.0


def _random(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).standard_normal(shape, np.float32)


def _transformer(model: DiT, config: DiTConfig) -> np.ndarray:
  """Returns the velocity of a video without context."""
  latents, text = _random(2, 8, 8, config.out_dim), _random(7, config.text_dim)
  features = sentence_features(
    Sentence(clips=(latents,), roles=(Role.TARGET,)),
    patch_size=config.patch_size,
    prompt_embedding=text,
    text_len=config.text_len,
  )
  row = pack([features], RowShape(num_tokens=len(features.tokens), num_text_tokens=len(features.text), num_slots=1))
  if config.takes_condition:
    condition = np.zeros((1, row.tokens.shape[1], config.patch_volume * (config.in_dim - config.out_dim)), np.float32)
    row = dataclasses.replace(row, condition=condition)
  if config.takes_image_features:
    row = dataclasses.replace(row, image_features=_random(1, 257, config.image_dim))
  timesteps = jnp.full((1, row.num_slots * 2), TIMESTEP, jnp.float32)
  tokens = nnx.jit(DiT.__call__)(model, row.tokens, timesteps, row)
  return unpatchify(np.asarray(tokens)[0], latents.shape[:3], config.patch_size)


def _diffusers_transformer(source: Source) -> np.ndarray:
  import torch
  from diffusers import WanTransformer3DModel  # pyright: ignore[reportPrivateImportUsage] (exported lazily)

  config: DiTConfig = source.config
  module = _load_torch(source, WanTransformer3DModel, **_constructor_options(config))
  latents, text = _random(2, 8, 8, config.out_dim), _random(7, config.text_dim)
  text = np.pad(text, [(0, config.text_len - len(text)), (0, 0)])
  latents = np.moveaxis(latents, -1, 0)
  image = {}
  if config.takes_condition:
    latents = np.concatenate([latents, np.zeros((config.in_dim - config.out_dim, *latents.shape[1:]), np.float32)])
  if config.takes_image_features:
    image = {"encoder_hidden_states_image": torch.from_numpy(_random(1, 257, config.image_dim))}
  with torch.no_grad():
    inputs = torch.from_numpy(latents[None]), torch.tensor([TIMESTEP]), torch.from_numpy(text[None])
    out = module(*inputs, return_dict=False, **image)[0]
  return np.moveaxis(out[0].numpy(), 0, -1)


def _vae(model: VAE, config: VAEConfig) -> np.ndarray:
  """Returns a video, encoded and decoded; clipped, because diffusers clips."""
  del config
  video = np.tanh(_random(5, 32, 32, 3))
  return np.clip(nnx.jit(lambda model, x: model.decode(model.encode(x)))(model, video), -1, 1)


def _diffusers_vae(source: Source) -> np.ndarray:
  import torch
  from diffusers import AutoencoderKLWan  # pyright: ignore[reportPrivateImportUsage] (exported lazily)

  module = _load_torch(source, AutoencoderKLWan, **_constructor_options(source.config))
  video = np.moveaxis(np.tanh(_random(5, 32, 32, 3)), -1, 0)
  with torch.no_grad():
    latents = module.encode(torch.from_numpy(video[None].copy())).latent_dist.mode()
    return np.moveaxis(module.decode(latents, return_dict=False)[0][0].numpy(), 0, -1)


def _text_encoder(model: UMT5Encoder, config: UMT5Config) -> np.ndarray:
  ids = jnp.asarray(_token_ids(config))
  return np.asarray(nnx.jit(UMT5Encoder.__call__)(model, ids, jnp.ones_like(ids, bool)))


def _transformers_text_encoder(source: Source) -> np.ndarray:
  import torch
  import transformers

  config = transformers.UMT5Config(**_constructor_options(source.config))
  module = _load_torch(source, transformers.UMT5EncoderModel, config=config)
  ids = torch.from_numpy(_token_ids(source.config))
  with torch.no_grad():
    return module(ids, attention_mask=torch.ones_like(ids)).last_hidden_state.numpy()


def _token_ids(config: UMT5Config) -> np.ndarray:
  return (np.arange(1, 20)[None] * 37) % config.vocab_size


def _constructor_options(config: Any) -> dict[str, Any]:
  """Returns the entries of a config.json that are arguments of the class."""
  values = diffusers_config(config)
  return {key: value for key, value in values.items() if key not in ("_class_name", "architectures", "model_type")}


def _load_torch(source: Source, module_class: Callable[..., Any], **options: Any) -> Any:
  """Builds a module of diffusers or transformers with the source's weights in float32."""
  import torch

  # The transformer computes its rotary tables when it is built, so it needs real memory.
  with contextlib.nullcontext() if isinstance(source.config, DiTConfig) else torch.device("meta"):
    module = module_class(**options)
  arrays = {name: np.ascontiguousarray(source.tensors.read(name), np.float32) for name in source.tensors.infos}
  state = {name_to_diffusers(source.component, name): torch.from_numpy(array) for name, array in arrays.items()}
  if source.component == "text_encoder":
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
  module.load_state_dict(state, strict=True, assign=True)
  return module.eval()


@dataclasses.dataclass(frozen=True)
class Outputs:
  """The output of a component: `ours` of a module and its config, `theirs` of the weights in PyTorch."""

  ours: Callable[[Any, Any], np.ndarray]
  theirs: Callable[[Source], np.ndarray]


OUTPUTS: Mapping[str, Outputs] = {
  "transformer": Outputs(_transformer, _diffusers_transformer),
  "transformer_2": Outputs(_transformer, _diffusers_transformer),
  "vae": Outputs(_vae, _diffusers_vae),
  "text_encoder": Outputs(_text_encoder, _transformers_text_encoder),
}
