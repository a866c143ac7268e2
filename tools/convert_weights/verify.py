"""Whether a checkpoint folder is what its source is: numbers tensor by tensor, then the models' outputs."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from tools.convert_weights.convert import combined, digest
from tools.convert_weights.export import diffusers_config, original_tensors
from tools.convert_weights.sources import Release, Source
from univid_jax.data.packing import RowShape, pack, sentence_features, unpatchify
from univid_jax.parallel.mesh import make_mesh
from univid_jax.types import Role, Sentence
from univid_jax.weights.checkpoint import CheckpointInfo, read_info, restore
from univid_jax.weights.names import name_to_diffusers

# Relative L2 error between the outputs here and in PyTorch, both float32.
TOLERANCE = 1e-4


def verify_release(release: Release, destination: epath.PathLike) -> tuple[str, bool]:
  """Compares a checkpoint folder with its source.

  Returns:
    The lines of a report, and whether all is well.
  """
  info = read_info(destination)
  lines, failures = [], 0
  for source in release.sources:
    if source.component not in info.components:
      lines.append(f"{source.component}: FAILED, {destination} has none")
      failures += 1
      continue
    line, same = compare_tensors(source, destination, info)
    lines.append(line)
    failures += not same
  for source in release.sources:
    if source.component in info.components and source.component in RUNS:
      line, same = compare_outputs(source, destination)
      lines.append(line)
      failures += not same
  verdict = f"{failures} of these FAILED" if failures else f"all is well: {destination} is {release.variant} as in its source"
  return "\n".join([*lines, f"verdict: {verdict}"]), not failures


def compare_tensors(source: Source, destination: epath.PathLike, info: CheckpointInfo) -> tuple[str, bool]:
  """Checksums and statistics, tensor by tensor; where the folder keeps another dtype, after rounding to it."""
  different, digests, count, largest = [], {}, 0, 0.0
  for name, stored in original_tensors(destination, source.component, info):
    if name not in source.tensors.infos:
      continue  # was allowed to be missing
    original = source.tensors.read(name).astype(stored.dtype).reshape(stored.shape)
    count += 1
    digests[name] = digest(name, stored)
    if digests[name] != digest(name, original):
      different.append(name)
      largest = max(largest, float(np.max(np.abs(stored.astype(np.float64) - original.astype(np.float64)))))
  if different:
    return (f"{source.component}: FAILED, {len(different)} of {count} tensors differ by up to {largest:.2g}, first "
            f"{different[0]} ({_statistics(source.tensors.read(different[0]))} in the source)"), False
  if combined(digests) != info.components[source.component].checksum:
    return f"{source.component}: FAILED, the checksum in checkpoint.json is not that of the {count} tensors", False
  return f"{source.component}: {count} tensors equal bit for bit, checksum {combined(digests)[:16]}...", True


def _statistics(tensor: np.ndarray) -> str:
  x = tensor.astype(np.float64)
  return f"mean {x.mean():.4g}, deviation {x.std():.4g}, from {x.min():.4g} to {x.max():.4g}"


def compare_outputs(source: Source, destination: epath.PathLike) -> tuple[str, bool]:
  """The component's output on fixed inputs here and, where PyTorch and diffusers are installed, there."""
  ours_fn, theirs_fn = RUNS[source.component]
  graph, params = restore(destination, source.component, mesh=make_mesh({"data": -1}, jax.devices()[:1]), dtype=jnp.float32)
  with jax.default_matmul_precision("highest"):
    ours = ours_fn(nnx.merge(graph, params), source.config)
  line = f"{source.component}: output {_statistics(ours)}"
  if not np.isfinite(ours).all():
    return f"{line}: FAILED, not finite", False
  missing = [name for name in ("torch", "diffusers", "transformers") if importlib.util.find_spec(name) is None]
  if missing:
    return f"{line}; not compared with PyTorch, as there is no {', '.join(missing)}", True
  theirs = theirs_fn(source)
  error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
  fine = error <= TOLERANCE
  return f"{line}; against PyTorch {error:.1e}, {'at most' if fine else 'FAILED, more than'} {TOLERANCE:.0e}", fine


def _inputs(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).standard_normal(shape, np.float32)


def _transformer(model: nnx.Module, config: Any) -> np.ndarray:
  latents, text = _inputs(2, 8, 8, config.out_dim), _inputs(7, config.text_dim)
  features = sentence_features(Sentence(clips=(latents,), roles=(Role.TARGET,)), patch_size=config.patch_size,
                               prompt_embedding=text, text_len=config.text_len)
  row = pack([features], RowShape(num_tokens=len(features["tokens"]), num_text_tokens=len(features["text"]), num_slots=1))
  if config.model_type == "i2v":
    condition = np.zeros((1, row.tokens.shape[1], config.patch_volume * (config.in_dim - config.out_dim)), np.float32)
    row = dataclasses.replace(row, condition=condition, image_features=_inputs(1, 257, config.image_dim))
  tokens = nnx.jit(model.__class__.__call__)(model, row.tokens, np.full((1, row.num_slots * 2), 500.0, np.float32), row)
  return unpatchify(np.asarray(tokens)[0], latents.shape[:3], config.patch_size)


def _torch_module(source: Source, module_class: type, **options: Any):
  """A module of diffusers or transformers with the source's weights in float32."""
  import torch
  # The transformer's rotary tables are computed when it is made; the others are made without memory.
  with contextlib.nullcontext() if source.component == "transformer" else torch.device("meta"):
    module = module_class(**options)
  arrays = {name: np.ascontiguousarray(source.tensors.read(name), np.float32) for name in source.tensors.infos}
  state = {name_to_diffusers(source.component, name): torch.from_numpy(array) for name, array in arrays.items()}
  if source.component == "text_encoder":
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
  module.load_state_dict(state, strict=True, assign=True)
  return module.eval()


def _options(source: Source) -> dict[str, Any]:
  return {key: value for key, value in diffusers_config(source.component, source.config).items() if key != "_class_name"}


def _diffusers_transformer(source: Source) -> np.ndarray:
  import diffusers
  import torch
  config = source.config
  module = _torch_module(source, diffusers.WanTransformer3DModel, **_options(source))
  latents, text = _inputs(2, 8, 8, config.out_dim), _inputs(7, config.text_dim)
  text = np.pad(text, [(0, config.text_len - len(text)), (0, 0)])
  latents = np.moveaxis(latents, -1, 0)
  given = {}
  if config.model_type == "i2v":
    latents = np.concatenate([latents, np.zeros((config.in_dim - config.out_dim, *latents.shape[1:]), np.float32)])
    given = {"encoder_hidden_states_image": torch.from_numpy(_inputs(1, 257, config.image_dim))}
  with torch.no_grad():
    inputs = torch.from_numpy(latents[None]), torch.tensor([500.0]), torch.from_numpy(text[None])
    out = module(*inputs, return_dict=False, **given)[0]
  return np.moveaxis(out[0].numpy(), 0, -1)


def _vae(model: nnx.Module, config: Any) -> np.ndarray:
  video = np.tanh(_inputs(5, 32, 32, 3))
  # Clipped, because the decoder of diffusers clips.
  return np.clip(nnx.jit(lambda model, x: model.decode(model.encode(x)))(model, video), -1, 1)


def _diffusers_vae(source: Source) -> np.ndarray:
  import diffusers
  import torch
  module = _torch_module(source, diffusers.AutoencoderKLWan, **_options(source))
  video = np.moveaxis(np.tanh(_inputs(5, 32, 32, 3)), -1, 0)
  with torch.no_grad():
    latents = module.encode(torch.from_numpy(video[None].copy())).latent_dist.mode()
    return np.moveaxis(module.decode(latents, return_dict=False)[0][0].numpy(), 0, -1)


def _text_encoder(model: nnx.Module, config: Any) -> np.ndarray:
  ids = (np.arange(1, 20)[None] * 37) % config.vocab_size
  return np.asarray(nnx.jit(model.__class__.__call__)(model, ids, np.ones_like(ids, bool)))


def _transformers_text_encoder(source: Source) -> np.ndarray:
  import torch
  import transformers
  options = {key: value for key, value in _options(source).items() if key not in ("architectures", "model_type")}
  module = _torch_module(source, transformers.UMT5EncoderModel, config=transformers.UMT5Config(**options))
  ids = torch.from_numpy((np.arange(1, 20)[None] * 37) % source.config.vocab_size)
  with torch.no_grad():
    return module(ids, attention_mask=torch.ones_like(ids)).last_hidden_state.numpy()


Run = Callable[..., np.ndarray]
RUNS: dict[str, tuple[Run, Run]] = {
    "transformer": (_transformer, _diffusers_transformer),
    "vae": (_vae, _diffusers_vae),
    "text_encoder": (_text_encoder, _transformers_text_encoder),
}
