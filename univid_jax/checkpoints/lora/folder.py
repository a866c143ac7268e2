"""This project's own LoRA folder.

FOLDER/lora.json   metadata; written last, so a folder that has it is complete
FOLDER/lora/       arrays by module: layers of blocks stacked up to the highest adapted one, ranks padded with zeros
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from univid_jax.checkpoints.lora.weights import LoRALayer, LoRAWeights
from univid_jax.checkpoints.orbax_files import restore_arrays, save_arrays
from univid_jax.core.errors import UserError

LORA_FILE = "lora.json"
FORMAT = 1


def is_lora_folder(path: epath.PathLike) -> bool:
  """Returns whether a path is a complete LoRA folder."""
  return (epath.Path(path) / LORA_FILE).exists()


def write_lora_folder(folder: epath.PathLike, lora: LoRAWeights, *, metadata: Mapping[str, Any] | None = None) -> None:
  """Writes a LoRA into an existing folder.

  Args:
    folder: local or in a bucket.
    lora: the LoRA.
    metadata: entries to add to those of `LoRAWeights.file_metadata`.
  """
  folder = epath.Path(folder)
  tree: dict[str, Any] = {}
  for (name, stacked), layers in _group_layers(lora).items():
    tree.setdefault("blocks" if stacked else "others", {})[name.replace(".", "__")] = _stack(layers)
  save_arrays(folder / "lora", tree)
  info = {"format": FORMAT, **lora.file_metadata(metadata or {}), "source_format": lora.format}
  (folder / LORA_FILE).write_text(json.dumps(info, indent=2) + "\n")


def read_lora_folder(folder: epath.PathLike) -> LoRAWeights:
  """Reads a LoRA that `write_lora_folder` wrote.

  Raises:
    FileNotFoundError: the folder has no lora.json.
    UserError: its contents cannot be read.
  """
  folder = epath.Path(folder)
  try:
    info = json.loads((folder / LORA_FILE).read_text())
  except json.JSONDecodeError as error:
    raise UserError(f"{folder / LORA_FILE} is not valid JSON: {error}") from error
  layers: dict[str, LoRALayer] = {}
  for kind, modules in restore_arrays(folder / "lora").items():
    for name, arrays in modules.items():
      module = name.replace("__", ".")
      for index, layer in _unstack(arrays).items():
        layers[f"blocks.{index}.{module}" if kind == "blocks" else module] = layer
  return LoRAWeights(layers, "jax", {key: str(value) for key, value in info.items()})


def _group_layers(lora: LoRAWeights) -> dict[tuple[str, bool], dict[int, LoRALayer]]:
  """Groups layers by (module name within a block, True) or (module name, False)."""
  groups: dict[tuple[str, bool], dict[int, LoRALayer]] = defaultdict(dict)
  for module, layer in sorted(lora.layers.items()):
    block = re.fullmatch(r"blocks\.(\d+)\.(.*)", module)
    key, index = ((block[2], True), int(block[1])) if block else ((module, False), 0)
    groups[key][index] = layer
  return groups


def _stack(layers: Mapping[int, LoRALayer]) -> dict[str, np.ndarray]:
  """Stacks layers by index, as `down` (layers, in, rank) and `up` (layers, rank, out); absent layers have rank 0."""
  count, rank = 1 + max(layers), max(layer.rank for layer in layers.values())
  first = next(iter(layers.values()))
  arrays = {
    "down": np.zeros((count, first.down.shape[1], rank), first.down.dtype),
    "up": np.zeros((count, rank, first.up.shape[0]), first.up.dtype),
    "alpha": np.zeros(count, np.float32),
    "rank": np.zeros(count, np.int32),
  }
  for index, layer in layers.items():
    arrays["down"][index, :, : layer.rank], arrays["up"][index, : layer.rank] = layer.down.T, layer.up.T
    arrays["alpha"][index], arrays["rank"][index] = layer.alpha, layer.rank
  return arrays


def _unstack(arrays: Mapping[str, Any]) -> dict[int, LoRALayer]:
  """Inverts `_stack`."""
  down, up, alphas, ranks = (np.asarray(arrays[name]) for name in ("down", "up", "alpha", "rank"))
  return {
    index: LoRALayer(
      np.ascontiguousarray(down[index, :, :rank].T), np.ascontiguousarray(up[index, :rank].T), float(alphas[index])
    )
    for index, rank in enumerate(ranks)
    if rank
  }
