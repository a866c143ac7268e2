"""This project's own LoRA folder.

FOLDER/lora.json   metadata; written after the arrays, so a folder that has it is complete
FOLDER/lora/       arrays; in blocks/ and others/ low-rank changes of Linears by module, layers of blocks stacked up to
                   the highest adapted one and ranks padded with zeros; in changes/ all others by tensor and part
FOLDER/checksums.xxh128   checksums of all other files; written last
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from univid_jax.checkpoints.checksums import write_checksums
from univid_jax.checkpoints.lora.building import PartsError, build_changes
from univid_jax.checkpoints.lora.formats import check_complete
from univid_jax.checkpoints.lora.kinds import Change, LoRALayer
from univid_jax.checkpoints.lora.weights import LoRAWeights
from univid_jax.checkpoints.orbax_files import restore_arrays, save_arrays
from univid_jax.core.errors import UserError
from univid_jax.core.json_files import parse_json_object, write_json
from univid_jax.core.paths import exists, read_bytes, to_path

LORA_FILE = "lora.json"
FORMAT = 2  # 1 has no changes/


def is_lora_folder(path: epath.PathLike) -> bool:
  """Returns whether a path is a complete LoRA folder."""
  return exists(to_path(path) / LORA_FILE)


def write_lora_folder(folder: epath.PathLike, lora: LoRAWeights) -> None:
  """Writes a LoRA into an existing folder, local or in a bucket."""
  folder = epath.Path(folder)
  check_complete(lora)
  tree: dict[str, Any] = {}
  stacked, others = _group_changes(lora)
  for (name, in_blocks), layers in stacked.items():
    tree.setdefault("blocks" if in_blocks else "others", {})[name.replace(".", "__")] = _stack(layers)
  if others:
    tree["changes"] = {tensor.replace(".", "__"): _to_arrays(change) for tensor, change in others.items()}
  save_arrays(folder / "lora", tree)
  info = {"format": FORMAT if others else 1, **lora.file_metadata(), "source_format": lora.format}
  write_json(folder / LORA_FILE, info)
  write_checksums(folder)


def read_lora_folder(folder: epath.PathLike) -> LoRAWeights:
  """Reads a LoRA that `write_lora_folder` wrote.

  Raises:
    FileNotFoundError: the folder has no lora.json.
    UserError: its contents cannot be read.
  """
  folder = epath.Path(folder)
  info = parse_json_object(read_bytes(folder / LORA_FILE), source=folder / LORA_FILE)
  if info.get("format", 1) not in range(1, FORMAT + 1):
    raise UserError(
      f"{folder / LORA_FILE} has another format than 1 to {FORMAT}: it is damaged, or a newer univid_jax wrote it"
    )
  changes: dict[str, Change] = {}
  try:
    for group, modules in restore_arrays(folder / "lora").items():
      for name, arrays in modules.items():
        changes |= _from_arrays(group, name.replace("__", "."), {key: np.asarray(x) for key, x in arrays.items()})
  except (PartsError, KeyError, AttributeError, IndexError) as error:
    raise UserError(f"{folder} is damaged: {error}") from error
  for tensor, change in changes.items():
    if not all(np.isfinite(part).all() for part in change.parts().values()):
      raise UserError(f"{folder}: the change of {tensor} contains NaN or infinity")
  return LoRAWeights(changes, "jax", {key: str(value) for key, value in info.items()}, source=str(folder))


_Stacks = dict[tuple[str, bool], dict[int, LoRALayer]]


def _group_changes(lora: LoRAWeights) -> tuple[_Stacks, dict[str, Change]]:
  """Groups the changes that can be stacked by (module name within a block, True) or (module name, False).

  Returns:
    Groups by layer, and the other changes.
  """
  groups: _Stacks = defaultdict(dict)
  others: dict[str, Change] = {}
  for tensor, change in sorted(lora.changes.items()):
    if not isinstance(change, LoRALayer) or change.down.ndim != 2 or change.up.ndim != 2:
      others[tensor] = change
      continue
    module = tensor.removesuffix(".weight")
    block = re.fullmatch(r"blocks\.(\d+)\.(.*)", module)
    key, index = ((block[2], True), int(block[1])) if block else ((module, False), 0)
    groups[key][index] = change
  for key, layers in list(groups.items()):
    if len({(layer.shape, layer.down.dtype, layer.up.dtype) for layer in layers.values()}) > 1:
      name, in_blocks = key
      others |= {f"{f'blocks.{i}.' if in_blocks else ''}{name}.weight": layer for i, layer in groups.pop(key).items()}
  return groups, others


def _to_arrays(change: Change) -> dict[str, np.ndarray]:
  alpha = {"alpha": np.array(change.rank_and_alpha[1], np.float32)} if change.rank_and_alpha else {}
  return {**change.parts(), **alpha}


def _from_arrays(group: str, name: str, arrays: dict[str, np.ndarray]) -> Mapping[str, Change]:
  """Inverts `_to_arrays` and `_stack`."""
  if group == "changes":
    alpha = arrays.pop("alpha", None)
    return build_changes(name, arrays, lambda rank: None if alpha is None else float(alpha))
  prefix = "blocks.{}.{}.weight" if group == "blocks" else "{1}.weight"
  return {prefix.format(index, name): layer for index, layer in _unstack(arrays).items()}


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
  """Returns the layers of `_stack` that are not absent."""
  down, up, alphas, ranks = (np.asarray(arrays[name]) for name in ("down", "up", "alpha", "rank"))
  return {
    index: LoRALayer(
      np.ascontiguousarray(down[index, :, :rank].T), np.ascontiguousarray(up[index, :rank].T), float(alphas[index])
    )
    for index, rank in enumerate(ranks)
    if rank
  }
