"""From a checkpoint folder back to PyTorch files, in the layout of the official release or of diffusers."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from univid_jax.checkpoints.pretrained import PretrainedCheckpoint
from univid_jax.checkpoints.tensor_files import numpy_dtype, save_safetensors, save_torch
from univid_jax.convert.destination import atomic_folder
from univid_jax.convert.layout import Layout, make_fills
from univid_jax.convert.release_configs import SCHEDULER, diffusers_config, model_index, official_config
from univid_jax.models.names import name_to_diffusers
from univid_jax.parallel.mesh import make_mesh

SHARD_BYTES = 5 << 30

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleaseFiles:
  """The files of a release.

  Attributes:
    weights: the file of each component; components without one are left out.
    tokenizer: the folder of the tokenizer's files.
    rename: converts the official name of a component's tensor.
    configs: returns the contents of the config.json next to a component's weights, if it has one.
    others: JSON files of the whole release, by name.
  """

  weights: Mapping[str, str]
  tokenizer: str
  rename: Callable[[str, str], str]
  configs: Mapping[str, Callable[[Any], dict[str, Any]]]
  others: Mapping[str, Callable[[PretrainedCheckpoint], dict[str, Any]]]


def _keep_name(component: str, name: str) -> str:
  del component
  return name


# The official autoencoder and text encoder are PyTorch files, and writing them needs PyTorch. The image encoder cannot
# be exported: a checkpoint lacks its text tower and last block, which Wan2.1 does not use.
LAYOUTS: Mapping[str, ReleaseFiles] = {
  Layout.ORIGINAL: ReleaseFiles(
    weights={
      "transformer": "diffusion_pytorch_model.safetensors",
      "vae": "Wan2.1_VAE.pth",
      "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    },
    tokenizer="google/umt5-xxl",
    rename=_keep_name,
    configs={"transformer": official_config},
    others={},
  ),
  Layout.DIFFUSERS: ReleaseFiles(
    weights={
      "transformer": "transformer/diffusion_pytorch_model.safetensors",
      "vae": "vae/diffusion_pytorch_model.safetensors",
      "text_encoder": "text_encoder/model.safetensors",
    },
    tokenizer="tokenizer",
    rename=name_to_diffusers,
    configs=dict.fromkeys(("transformer", "vae", "text_encoder"), diffusers_config),
    others={
      "scheduler/scheduler_config.json": lambda checkpoint: SCHEDULER,
      "model_index.json": lambda checkpoint: model_index(checkpoint.info),
    },
  ),
}


def export_checkpoint(
  source: epath.PathLike, destination: epath.PathLike, layout: Layout, *, dtype: str | None = None, force: bool = False
) -> None:
  """Writes the weights of a checkpoint folder as a release of PyTorch files.

  Args:
    source: the checkpoint folder.
    destination: the new folder.
    layout: of the release.
    dtype: of the written tensors; as stored by default.
    force: whether to replace an existing destination.

  Raises:
    UserError: a file needs PyTorch, which is not installed.
    OSError: the destination exists, or the disk is too small.
  """
  checkpoint, files = PretrainedCheckpoint.open(source), LAYOUTS[layout]
  needed = sum(component.num_parameters * 4 for component in checkpoint.info.components.values())
  with atomic_folder(destination, needed=needed, force=force) as folder:
    folder = Path(folder)
    for component in checkpoint.info.components:
      if component not in files.weights:
        logger.warning("%s is left out: the checkpoint has only the parts of it that Wan2.1 uses", component)
        continue
      rename = functools.partial(files.rename, component)
      tensors = {
        rename(name): np.ascontiguousarray(value if dtype is None else value.astype(numpy_dtype(dtype)))
        for name, value in original_tensors(checkpoint, component)
      }
      path = folder / files.weights[component]
      path.parent.mkdir(exist_ok=True)
      write_tensors(path, tensors)
      if component in files.configs:
        _write_json(path.parent / "config.json", files.configs[component](checkpoint.config(component)))
    if checkpoint.info.tokenizer:
      target = folder / files.tokenizer
      target.mkdir(parents=True)
      for file in checkpoint.tokenizer_path().parent.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    for name, make_values in files.others.items():
      (folder / name).parent.mkdir(exist_ok=True)
      _write_json(folder / name, make_values(checkpoint))


def original_tensors(checkpoint: PretrainedCheckpoint, component: str) -> Iterator[tuple[str, np.ndarray]]:
  """Yields a component's tensors by official name, in the official layout and in their stored dtypes."""
  mesh = make_mesh({"data": -1}, jax.devices("cpu")[:1])
  params = traverse_util.flatten_dict(checkpoint.load_as_stored(component, mesh=mesh))
  arrays = {tuple(map(str, path)): np.asarray(value) for path, value in params.items()}
  for fill in make_fills(component, checkpoint.config(component)):
    value = arrays[fill.path]
    for name, layer in zip(fill.names, value if fill.stacked else (value,)):
      yield name, fill.to_original(layer)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a .pth file with PyTorch, or a .safetensors file: large ones as shards with an index."""
  if path.suffix == ".pth":
    save_torch(path, tensors)
    return
  shards: list[dict[str, np.ndarray]] = [{}]
  shard_bytes = 0
  for name, value in tensors.items():
    if shard_bytes and shard_bytes + value.nbytes > SHARD_BYTES:
      shards.append({})
      shard_bytes = 0
    shards[-1][name] = value
    shard_bytes += value.nbytes
  if len(shards) == 1:
    save_safetensors(path, shards[0])
    return
  weight_map = {}
  for number, shard in enumerate(shards, 1):
    name = f"{path.stem}-{number:05d}-of-{len(shards):05d}.safetensors"
    save_safetensors(path.parent / name, shard)
    weight_map |= dict.fromkeys(shard, name)
  total = sum(value.nbytes for value in tensors.values())
  _write_json(path.with_name(f"{path.name}.index.json"), {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n")
