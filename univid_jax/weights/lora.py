"""LoRA files of every trainer: UniVid and DiffSynth, musubi and kohya, ComfyUI and diffusion-pipe, diffusers and PEFT.

In memory a LoRA is one form whatever its file: by official module name a pair of matrices and an alpha, the update being
alpha / rank * up @ down.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

import univid_jax
from univid_jax.files import absolute
from univid_jax.models.dit import DiTConfig
from univid_jax.models.lora import linear_name, lora_targets
from univid_jax.weights.files import TensorFile, numpy_dtype, open_tensors, save_safetensors, save_torch
from univid_jax.weights.names import name_from_diffusers, name_to_diffusers

FORMATS = ("univid", "diffusers", "comfyui", "musubi")
LORA_FILE = "lora.json"

# Ends of names, and what they are.
_SUFFIXES = {
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up",
    ".alpha": "alpha",
}
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "lora_unet_")

# Linears outside of blocks.
_OTHER_LINEARS = ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1",
                  "head.head", "img_emb.proj.1", "img_emb.proj.3")

# What else such files hold, by the end of a name, and why it is refused.
_REFUSED = (
    (r"\.diff$", "whole weight differences (.diff)"),
    (r"\.diff_b$", "bias differences (.diff_b)"),
    (r"\.(hada_w|hada_t)", "LoHa factors"),
    (r"\.lokr_", "LoKr factors"),
    (r"\.(dora_scale|lora_magnitude_vector)", "DoRA magnitudes"),
    (r"\.lora_mid\.", "Tucker (lora_mid) factors"),
    (r"\.(oft_|boft_)", "OFT factors"),
    (r"\.lora_[AB]\.bias|lora_B\.(default\.)?bias", "biases of LoRA layers"),
    (r"^lora_te", "layers of the text encoder"),
)


@dataclasses.dataclass(frozen=True)
class LoRALayer:
  """The update of one Linear: alpha / rank * up @ down, in PyTorch's layout.

  Attributes:
    down: (rank, in_dim).
    up: (out_dim, rank).
    alpha: the rank itself where a file stores none.
  """

  down: np.ndarray
  up: np.ndarray
  alpha: float

  @property
  def rank(self) -> int:
    return len(self.down)

  @property
  def folded_up(self) -> np.ndarray:
    """`up` times alpha / rank, in its dtype."""
    if self.alpha == self.rank:
      return self.up
    return (self.up.astype(np.float32) * np.float32(self.alpha / self.rank)).astype(self.up.dtype)


@dataclasses.dataclass(frozen=True)
class LoRAWeights:
  """A LoRA, whatever file it came from.

  Attributes:
    layers: by the official name of the Linear.
    format: of its file: univid, diffusers, comfyui, musubi or jax.
    metadata: text by key, from the file's header.
  """

  layers: Mapping[str, LoRALayer]
  format: str
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def ranks(self) -> tuple[int, ...]:
    return tuple(sorted({layer.rank for layer in self.layers.values()}))

  @property
  def alphas(self) -> tuple[float, ...]:
    return tuple(sorted({layer.alpha for layer in self.layers.values()}))

  @property
  def num_layers(self) -> int:
    """Blocks that its base has at least."""
    return 1 + max((int(name.split(".")[1]) for name in self.layers if name.startswith("blocks.")), default=-1)

  def astype(self, dtype: str) -> "LoRAWeights":
    """The same in another dtype."""
    layers = {name: LoRALayer(layer.down.astype(numpy_dtype(dtype)), layer.up.astype(numpy_dtype(dtype)), layer.alpha)
              for name, layer in self.layers.items()}
    return dataclasses.replace(self, layers=layers)

  def describe(self) -> str:
    """A line for people."""
    def listed(values):
      return ", ".join(f"{value:g}" for value in values[:4]) + (", ..." if len(values) > 4 else "")
    targets = ", ".join(lora_targets(list(self.layers)))
    return (f"LoRA ({self.format}) of {len(self.layers)} Linears in {self.num_layers} blocks ({targets}), "
            f"rank {listed(self.ranks)}, alpha {listed(self.alphas)}")


def is_lora(names: Iterable[str]) -> bool:
  """Whether tensors of these names are a LoRA's (or one of its relatives')."""
  return any(re.search(r"lora_(A|B|up|down)\.|hada_w|lokr_w", name) for name in names)


def read_lora(path: str | os.PathLike) -> LoRAWeights:
  """Reads a LoRA from a file of any trainer, or from this project's own folder.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it holds what is no LoRA of a Wan2.1 transformer; the message names it.
  """
  if (epath.Path(path) / LORA_FILE).exists():
    return _read_folder(epath.Path(path))
  return parse_lora(open_tensors(path))


def parse_lora(file: TensorFile) -> LoRAWeights:
  """Reads a LoRA from named tensors; see `read_lora`."""
  path, names = file.path, file.infos
  for pattern, what in _REFUSED:
    found = sorted(name for name in names if re.search(pattern, name))
    if found:
      raise ValueError(f"{path} holds {what}, which are not supported: {found[0]}"
                       + (f" and {len(found) - 1} more" if len(found) > 1 else ""))
  parts: dict[str, dict[str, str]] = {}
  kinds, unknown = set(), []
  for name in names:
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
    module = None if suffix is None else _module(name.removesuffix(suffix), kinds)
    if module is None:
      unknown.append(name)
      continue
    part = _SUFFIXES[suffix]
    if part in parts.setdefault(module, {}):
      raise ValueError(f"{path} holds two of {part} for {module}: {parts[module][part]} and {name}")
    parts[module][part] = name
  if unknown:
    raise ValueError(f"{path} holds tensors that are no part of a LoRA of Wan2.1: {', '.join(sorted(unknown)[:8])}"
                     + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""))
  if len(kinds) != 1:
    raise ValueError(f"{path} mixes the names of {' and '.join(sorted(kinds))}" if kinds else f"{path} holds no LoRA")
  layers = {}
  for module, found in parts.items():
    if {"down", "up"} - found.keys():
      raise ValueError(f"{path} holds only {', '.join(found.values())} for {module}: a LoRA needs both matrices")
    down, up = file.read(found["down"]), file.read(found["up"])
    if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1]:
      raise ValueError(f"{path}: {found['down']} {down.shape} and {found['up']} {up.shape} are not (rank, in) and (out, rank)")
    alpha = float(file.read(found["alpha"]).reshape(())) if "alpha" in found else _peft_alpha(file.metadata, module, len(down))
    layers[module] = LoRALayer(down, up, alpha)
  return LoRAWeights(layers, kinds.pop(), dict(file.metadata))


def _module(name: str, kinds: set[str]) -> str | None:
  """The official module of a name without its suffix; adds to `kinds` whose name it is."""
  prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
  name = name.removeprefix(prefix)
  if prefix == "lora_unet_":
    kinds.add("musubi")
    return _from_underscores(name)
  if re.search(r"\.attn[12]\.|\.ffn\.net\.|^condition_embedder\.|^proj_out$", name):
    kinds.add("diffusers")
    return name_from_diffusers("transformer", name + ".").removesuffix(".")
  if name not in _OTHER_LINEARS and not re.fullmatch(r"blocks\.\d+\.((self|cross)_attn\.(q|k|v|o|k_img|v_img)|ffn\.[02])", name):
    return None
  kinds.add("comfyui" if prefix.endswith("diffusion_model.") else "diffusers" if prefix == "transformer." else "univid")
  return name


def _from_underscores(name: str) -> str | None:
  """musubi and kohya write underscores for dots."""
  block = re.fullmatch(r"blocks_(\d+)_(self_attn|cross_attn|ffn)_(\w+)", name)
  if block:
    return "blocks.{}.{}.{}".format(*block.groups())
  return next((other for other in _OTHER_LINEARS if other.replace(".", "_") == name), None)


def _peft_alpha(metadata: Mapping[str, str], module: str, rank: int) -> float:
  """The alpha that diffusers keeps in a file's header; the rank where there is none."""
  if "lora_adapter_metadata" not in metadata:
    return float(rank)
  values = json.loads(metadata["lora_adapter_metadata"])
  values = {key.removeprefix("transformer."): value for key, value in values.items()}
  theirs = name_to_diffusers("transformer", module + ".").removesuffix(".")
  pattern = values.get("alpha_pattern") or {}
  alpha = next((pattern[key] for key in pattern if theirs == key or theirs.endswith("." + key)), values.get("lora_alpha", rank))
  return float(alpha) * (rank**0.5 if values.get("use_rslora") else 1.0)


def lora_tensors(lora: LoRAWeights, to: str) -> dict[str, np.ndarray]:
  """The named tensors of a LoRA in the way of a trainer, such that its reader applies the right scale.

  univid and diffusers know no alpha beside each layer, so alpha / rank goes into `up`; comfyui gets alphas where they differ
  from the rank (none means 1.0); musubi always stores them.
  """
  out = {}
  for module, layer in sorted(lora.layers.items()):
    alpha = np.array(layer.alpha, np.float32)
    if to == "univid":
      out |= {f"{module}.lora_A.default.weight": layer.down, f"{module}.lora_B.default.weight": layer.folded_up}
    elif to == "diffusers":
      name = "transformer." + name_to_diffusers("transformer", module + ".").removesuffix(".")
      out |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.folded_up}
    elif to == "comfyui":
      name = f"diffusion_model.{module}"
      out |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
      out |= {f"{name}.alpha": alpha} if layer.alpha != layer.rank else {}
    elif to == "musubi":
      name = "lora_unet_" + module.replace(".", "_")
      out |= {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up, f"{name}.alpha": alpha}
    else:
      raise ValueError(f"unknown LoRA format {to!r}; there are {', '.join(FORMATS)}")
  return {name: np.ascontiguousarray(value) for name, value in out.items()}


def write_lora(path: str | os.PathLike, lora: LoRAWeights, to: str, *, metadata: Mapping[str, Any] | None = None) -> None:
  """Writes a LoRA file: safetensors, or UniVid's own .ckpt (which needs PyTorch and has no room for metadata).

  Args:
    path: .safetensors; .ckpt with univid.
    lora: what to write.
    to: univid, diffusers, comfyui or musubi.
    metadata: more for the header (base model, step), beside rank, alpha, targets and version.
  """
  path, tensors = Path(path), lora_tensors(lora, to)
  if path.suffix == ".ckpt":
    if to != "univid":
      raise ValueError(f"{path}: only univid writes .ckpt, {to} writes .safetensors")
    save_torch(path, tensors)
    return
  if path.suffix != ".safetensors":
    raise ValueError(f"a LoRA file is named .safetensors{' or .ckpt' if to == 'univid' else ''}, got {path}")
  save_safetensors(path, tensors, metadata=header(lora, to, metadata or {}))


def header(lora: LoRAWeights, to: str, extra: Mapping[str, Any]) -> dict[str, str]:
  """What a file says of itself."""
  rank, alpha = (",".join(f"{value:g}" for value in values) for values in (lora.ranks, lora.alphas))
  values = {"format": "pt", "software": f"univid_jax {univid_jax.__version__}", "rank": rank, "alpha": alpha,
            "targets": ",".join(lora_targets(list(lora.layers)))}
  if to == "musubi":
    values |= {"ss_network_module": "networks.lora_wan", "ss_network_dim": rank, "ss_network_alpha": alpha}
  carried = {key: value for key, value in lora.metadata.items() if key in ("base_model", "step")}
  return {**values, **{key: str(value) for key, value in {**carried, **extra}.items() if value is not None}}


# In this project's folders: by module, layers stacked as far as the highest adapted one, ranks filled up with zeros.


def write_lora_folder(folder: epath.PathLike, lora: LoRAWeights, *, metadata: Mapping[str, Any] | None = None) -> None:
  """Writes a LoRA as a folder of stacked arrays; FOLDER/lora.json comes last."""
  folder = epath.Path(folder)
  tree: dict[str, Any] = {}
  for (name, stacked), layers in _groups(lora).items():
    count, rank = 1 + max(layers), max(layer.rank for layer in layers.values())
    first = next(iter(layers.values()))
    arrays = {"down": np.zeros((count, first.down.shape[1], rank), first.down.dtype),
              "up": np.zeros((count, rank, first.up.shape[0]), first.up.dtype),
              "alpha": np.zeros(count, np.float32), "rank": np.zeros(count, np.int32)}
    for index, layer in layers.items():
      arrays["down"][index, :, :layer.rank], arrays["up"][index, :layer.rank] = layer.down.T, layer.up.T
      arrays["alpha"][index], arrays["rank"][index] = layer.alpha, layer.rank
    tree.setdefault("blocks" if stacked else "others", {})[name.replace(".", "__")] = arrays
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(absolute(folder) / "lora", tree)
  info = {"format": 1, **header(lora, "jax", metadata or {}), "source_format": lora.format}
  (folder / LORA_FILE).write_text(json.dumps(info, indent=2) + "\n")


def _groups(lora: LoRAWeights) -> dict[tuple[str, bool], dict[int, LoRALayer]]:
  """Layers by (module within a block, True) or (module, False)."""
  groups: dict[tuple[str, bool], dict[int, LoRALayer]] = {}
  for module, layer in sorted(lora.layers.items()):
    block = re.fullmatch(r"blocks\.(\d+)\.(.*)", module)
    key, index = ((block[2], True), int(block[1])) if block else ((module, False), 0)
    groups.setdefault(key, {})[index] = layer
  return groups


def _read_folder(folder: epath.Path) -> LoRAWeights:
  info = json.loads((folder / LORA_FILE).read_text())
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      tree = checkpointer.restore(absolute(folder) / "lora")
  except Exception as error:  # orbax and tensorstore raise many kinds
    raise ValueError(f"the LoRA in {folder} cannot be read: {str(error).splitlines()[0]}") from error
  layers = {}
  for kind, modules in tree.items():
    for name, arrays in modules.items():
      arrays = {key: np.asarray(value) for key, value in arrays.items()}
      for index, rank in enumerate(arrays["rank"]):
        if rank:
          module = name.replace("__", ".")
          module = f"blocks.{index}.{module}" if kind == "blocks" else module
          layers[module] = LoRALayer(np.ascontiguousarray(arrays["down"][index, :, :rank].T),
                                     np.ascontiguousarray(arrays["up"][index, :rank].T), float(arrays["alpha"][index]))
  return LoRAWeights(layers, "jax", {key: str(value) for key, value in info.items()})


# Onto a model.


def stack_loras(loras: Sequence[tuple[LoRAWeights, float]], config: DiTConfig,
                shapes: Mapping[tuple[str, ...], tuple[int, ...]]) -> tuple[dict[str, Any], int]:
  """One or several LoRAs as adapters of a model, their scales and weights in `up`; several stand side by side in the rank.

  Args:
    loras: each with its weight.
    config: of the base.
    shapes: of the base's parameters by path.

  Returns:
    float32 arrays `down` ([layers,] in, rank) and `up` ([layers,] rank, out) in nested dicts, and the rank that they share.

  Raises:
    ValueError: a LoRA is for another base.
  """
  places = {}  # official module -> (path of the Linear, layer or None)
  for path, shape in shapes.items():
    if path[-1] == "kernel" and path[0] != "patch_embedding":
      layers = range(shape[0]) if path[0] == "blocks" else (None,)
      places |= {linear_name(path[:-1], layer): (path[:-1], layer) for layer in layers}
  for lora, _ in loras:
    check_base(lora, config, places, shapes)
  rank = sum(max(lora.ranks) for lora, _ in loras)
  arrays: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
  start = 0
  for lora, weight in loras:
    for module, layer in lora.layers.items():
      path, index = places[module]
      if path not in arrays:
        *stack, in_dim, out_dim = shapes[(*path, "kernel")]
        arrays[path] = {"down": np.zeros((*stack, in_dim, rank), np.float32), "up": np.zeros((*stack, rank, out_dim), np.float32)}
      at = () if index is None else (index,)
      here = slice(start, start + layer.rank)
      arrays[path]["down"][(*at, slice(None), here)] = layer.down.astype(np.float32).T
      arrays[path]["up"][(*at, here)] = layer.up.astype(np.float32).T * np.float32(weight * layer.alpha / layer.rank)
    start += max(lora.ranks)
  tree: dict[str, Any] = {}
  for path, value in arrays.items():
    branch = tree
    for key in path:
      branch = branch.setdefault(key, {})
    branch["lora"] = value
  return tree, rank


_SIZES = {1536: "1.3B", 5120: "14B"}


def check_base(lora: LoRAWeights, config: DiTConfig, places: Mapping[str, Any],
               shapes: Mapping[tuple[str, ...], tuple[int, ...]]) -> None:
  """Refuses a LoRA for another base than this.

  Raises:
    ValueError: says for which it is.
  """
  dims = {layer.down.shape[1] for name, layer in lora.layers.items() if name.endswith(("attn.q", "attn.k", "attn.v", "ffn.0"))}
  if lora.num_layers > config.num_layers or (dims and dims != {config.dim}):
    def named(values, layers):
      sizes = ", ".join(f"{dim}" + (f" ({_SIZES[dim]})" if dim in _SIZES else "") for dim in sorted(values))
      return f"dim {sizes} and {layers} layers"
    raise ValueError(f"this LoRA is for a base with {named(dims, f'at least {lora.num_layers}')}, the base here has "
                     f"{named({config.dim}, config.num_layers)}")
  absent = sorted(name for name in lora.layers if name not in places)
  if absent:
    reason = "; k_img and v_img belong to I2V models" if any(name.endswith("_img") for name in absent) else ""
    raise ValueError(f"this LoRA adapts Linears that the base does not have: {', '.join(absent[:8])}{reason}")
  for name, layer in lora.layers.items():
    path, _ = places[name]
    expected = tuple(shapes[(*path, "kernel")][-2:])
    if (layer.down.shape[1], layer.up.shape[0]) != expected:
      raise ValueError(f"this LoRA is for another base: its {name} is {layer.down.shape[1]} to {layer.up.shape[0]}, "
                       f"the base's {expected[0]} to {expected[1]}")


def unstack_lora(params: Mapping[str, Any], *, alpha: float, rslora: bool = False,
                 metadata: Mapping[str, str] | None = None) -> LoRAWeights:
  """Adapters of a model as a LoRA.

  Args:
    params: nested dicts with `down` and `up` under `lora`.
    alpha: of the training.
    rslora: whether the scale was alpha / sqrt(rank).
    metadata: what else is known of it.
  """
  layers = {}

  def visit(params, path):
    for key, value in params.items():
      if key != "lora":
        visit(value, (*path, key))
        continue
      down, up = (np.asarray(value[name], np.float32) for name in ("down", "up"))
      stacked = down.ndim == 3
      for index in range(len(down)) if stacked else (None,):
        at, rank = () if index is None else index, down.shape[-1]
        layers[linear_name(path, index)] = LoRALayer(np.ascontiguousarray(down[at].T), np.ascontiguousarray(up[at].T),
                                                     alpha * rank**0.5 if rslora else float(alpha))
  visit(params, ())
  return LoRAWeights(layers, "jax", metadata or {})
