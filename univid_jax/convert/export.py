"""From a checkpoint folder back to PyTorch files, in the layout of the official release or of diffusers."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from univid_jax.checkpoints.casting import cast
from univid_jax.checkpoints.checksums import verified
from univid_jax.checkpoints.pretrained import PretrainedCheckpoint
from univid_jax.checkpoints.tensor_files import TensorFile, TensorInfo, numpy_dtype, save_safetensors, save_torch
from univid_jax.convert.destination import atomic_folder
from univid_jax.convert.layout import Layout, make_fills
from univid_jax.convert.release_configs import (
  diffusers_config,
  model_index,
  official_config,
  own_entries,
  require_readable,
  scheduler_config,
)
from univid_jax.core.errors import UserError
from univid_jax.core.json_files import write_json
from univid_jax.core.options import Expert, Quantize
from univid_jax.core.paths import require_local
from univid_jax.models.names import name_to_diffusers
from univid_jax.models.variants import DiTConfig

# Size of a shard, and with it the memory that writing one takes.
SHARD_BYTES = 5 << 30

# For JSON files and the headers of weights.
SPARE_BYTES = 1 << 20

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleaseFiles:
  """The files of a release.

  Attributes:
    weights: the file of each component, a format string that gets its config; components without one are left out.
    tokenizer: the folder of the tokenizer's files.
    rename: converts the official name of a component's tensor.
    configs: returns the contents of the config.json next to a component's weights, if it has one.
    others: JSON files of the whole release, by name.
    experts: what replaces entries of `weights` if the checkpoint has two experts.
  """

  weights: Mapping[str, str]
  tokenizer: str
  rename: Callable[[str, str], str]
  configs: Mapping[str, Callable[[Any], dict[str, Any]]]
  others: Mapping[str, Callable[[PretrainedCheckpoint], dict[str, Any]]]
  experts: Mapping[str, str]


def _keep_name(component: str, name: str) -> str:
  del component
  return name


# The official autoencoder and text encoder are PyTorch files, and writing them needs PyTorch. The image encoder cannot
# be exported: a checkpoint lacks its text tower and last block, which Wan does not use.
LAYOUTS: Mapping[str, ReleaseFiles] = {
  Layout.ORIGINAL: ReleaseFiles(
    weights={
      "transformer": "diffusion_pytorch_model.safetensors",
      "vae": "Wan{config.version}_VAE.pth",
      "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    },
    tokenizer="google/umt5-xxl",
    rename=_keep_name,
    configs=dict.fromkeys(("transformer", "transformer_2"), official_config),
    others={},
    experts={
      "transformer": "high_noise_model/diffusion_pytorch_model.safetensors",
      "transformer_2": "low_noise_model/diffusion_pytorch_model.safetensors",
    },
  ),
  Layout.DIFFUSERS: ReleaseFiles(
    weights={
      "transformer": "transformer/diffusion_pytorch_model.safetensors",
      "vae": "vae/diffusion_pytorch_model.safetensors",
      "text_encoder": "text_encoder/model.safetensors",
    },
    tokenizer="tokenizer",
    rename=name_to_diffusers,
    configs=dict.fromkeys(("transformer", "transformer_2", "vae", "text_encoder"), diffusers_config),
    others={"scheduler/scheduler_config.json": scheduler_config, "model_index.json": model_index},
    experts={"transformer_2": "transformer_2/diffusion_pytorch_model.safetensors"},
  ),
}


def export_checkpoint(
  source: epath.PathLike, destination: epath.PathLike, layout: Layout, *, dtype: str | None, force: bool
) -> None:
  """Writes the weights of a checkpoint folder as a release of PyTorch files.

  Args:
    source: the checkpoint folder.
    destination: the new folder, local.
    layout: of the release.
    dtype: of the written tensors; None is as stored.
    force: whether to replace an existing destination.

  Raises:
    UserError: a file needs PyTorch, which is not installed, the layout cannot hold a component's config, or the
      destination is in a bucket.
    DamagedError: a file of the checkpoint differs from its checksum; nothing is written.
    OSError: the destination exists, or the disk is too small.
  """
  require_local(destination)
  checkpoint, files = PretrainedCheckpoint.open(source), LAYOUTS[layout]
  weights = {**files.weights, **(files.experts if checkpoint.info.has_both_experts else {})}
  if checkpoint.info.expert in (Expert.HIGH, Expert.LOW):  # its folder says which
    weights["transformer"] = files.experts.get(
      "transformer" if checkpoint.info.expert == Expert.HIGH else "transformer_2", weights["transformer"]
    )
  tensors: dict[str, LazyTensors] = {}
  configs: dict[str, dict[str, Any]] = {}
  for component in checkpoint.info.components:
    if component in weights:
      original = original_tensors(checkpoint, component)
      config = checkpoint.config(component)
      configs[component] = _make_config(checkpoint.folder, component, config, layout, original.infos)
      if component == "transformer":
        configs[component] |= own_entries(checkpoint.info)
      names = {name: files.rename(component, name) for name in original.infos}
      tensors[component] = LazyTensors(original.rename(names), dtype)
    else:
      log.warning("%s is left out: the checkpoint has only the parts of it that Wan uses", component)
  tokenizer = sorted(checkpoint.tokenizer_path().parent.iterdir()) if checkpoint.info.tokenizer else []
  needed = sum(part.nbytes for part in tensors.values()) + sum(path.stat().length for path in tokenizer) + SPARE_BYTES
  with atomic_folder(destination, needed=needed, force=force) as folder, verified(checkpoint.folder):
    folder = Path(folder)
    for component, part in tensors.items():
      path = folder / weights[component].format(config=checkpoint.config(component))
      path.parent.mkdir(exist_ok=True)
      write_tensors(path, part)
      if configs[component]:
        write_json(path.parent / "config.json", configs[component])
    for file in tokenizer:
      (folder / files.tokenizer).mkdir(parents=True, exist_ok=True)
      (folder / files.tokenizer / file.name).write_bytes(file.read_bytes())
    for name, make_values in files.others.items():
      (folder / name).parent.mkdir(exist_ok=True)
      write_json(folder / name, make_values(checkpoint))


def check_layout(source: epath.PathLike, config: DiTConfig, layout: Layout) -> None:
  """Raises UserError if a layout cannot hold the config of a transformer; `source` names it in the message."""
  fills = make_fills("transformer", config)
  infos = {name: TensorInfo(fill.original_shape, "float32") for fill in fills for name in fill.names}
  _make_config(source, "transformer", config, layout, infos)


def _make_config(
  source: epath.PathLike, component: str, config: Any, layout: Layout, infos: Mapping[str, TensorInfo]
) -> dict[str, Any]:
  """Returns the config.json next to a component's weights, {} if it has none; raises UserError if it loses values."""
  make_values = LAYOUTS[layout].configs.get(component)
  values = make_values(config) if make_values else {}
  try:
    require_readable(component, config, infos, values)
  except UserError as error:
    raise UserError(f"{source} cannot be written in the layout {layout}: {error}") from error
  return values


def original_tensors(checkpoint: PretrainedCheckpoint, component: str) -> TensorFile:
  """Returns a component's tensors by official name, in the official layout and in their stored dtypes.

  Raises:
    UserError: the weights are quantised, or damaged; reading a tensor raises it too.
  """
  if (method := checkpoint.quantization(component)) != Quantize.NONE:
    raise UserError(
      f"{checkpoint.folder} stores its {component} in {method}, which has lost the original weights: use the "
      "release or the checkpoint that it was made from"
    )
  fills = make_fills(component, checkpoint.config(component))
  arrays = checkpoint.open_arrays(component, [fill.path for fill in fills])
  layers = {name: (fill, index) for fill in fills for index, name in enumerate(fill.names)}
  infos = {}
  for name, (fill, _) in layers.items():
    if (found := tuple(arrays[fill.path].shape)) != fill.shape:
      raise UserError(f"{checkpoint.folder} is damaged: {'.'.join(fill.path)} of the {component} has the shape {found}")
    infos[name] = TensorInfo(fill.original_shape, arrays[fill.path].dtype.name)

  def read(name: str) -> np.ndarray:
    fill, index = layers[name]
    array = arrays[fill.path]
    try:
      return fill.to_original((array[index] if fill.stacked else array).read().result())
    except ValueError as error:
      raise UserError(f"{checkpoint.folder} is damaged: {name} of the {component}: {error}") from error

  return TensorFile(Path(checkpoint.folder), infos, read)


class LazyTensors(Mapping[str, np.ndarray]):
  """The tensors of a file, read when they are asked for, and optionally converted to a dtype."""

  def __init__(self, file: TensorFile, dtype: str | None):
    self._file, self._dtype = file, dtype

  @property
  def nbytes(self) -> int:
    infos = self._file.infos.values()
    return sum(TensorInfo(info.shape, self._dtype or info.dtype).nbytes for info in infos)

  def __getitem__(self, name: str) -> np.ndarray:
    value = self._file.read(name)
    return np.ascontiguousarray(value if self._dtype is None else cast(name, value, numpy_dtype(self._dtype)))

  def __iter__(self) -> Iterator[str]:
    return iter(self._file.infos)

  def __len__(self) -> int:
    return len(self._file.infos)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a .pth file with PyTorch, or a .safetensors file: large ones as shards with an index, one after another."""
  if path.suffix == ".pth":
    save_torch(path, tensors)
    return
  shards: list[list[str]] = []
  pending: dict[str, np.ndarray] = {}

  def write_shard() -> None:
    save_safetensors(path.with_name(f"{len(shards)}-{path.name}"), pending)
    shards.append(list(pending))
    pending.clear()

  total = 0
  for name, value in tensors.items():
    if pending and sum(each.nbytes for each in pending.values()) + value.nbytes > SHARD_BYTES:
      write_shard()
    pending[name] = value
    total += value.nbytes
  write_shard()
  if len(shards) == 1:
    path.with_name(f"0-{path.name}").rename(path)
    return
  weight_map = {}
  for index, names in enumerate(shards):
    name = f"{path.stem}-{index + 1:05d}-of-{len(shards):05d}.safetensors"
    path.with_name(f"{index}-{path.name}").rename(path.with_name(name))
    weight_map |= dict.fromkeys(names, name)
  write_json(path.with_name(f"{path.name}.index.json"), {"metadata": {"total_size": total}, "weight_map": weight_map})
