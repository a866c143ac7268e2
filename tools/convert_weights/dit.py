"""Where each parameter of the transformer stands in Wan2.1's official files."""

import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

# Module names that differ from the original's; all others are the same.
MODULES = {
    "text_embedding.up": "text_embedding.0",
    "text_embedding.down": "text_embedding.2",
    "time_embedding.up": "time_embedding.0",
    "time_embedding.down": "time_embedding.2",
    "time_projection": "time_projection.1",
    "ffn.up": "ffn.0",
    "ffn.down": "ffn.2",
    "img_emb.norm_in": "img_emb.proj.0",
    "img_emb.up": "img_emb.proj.1",
    "img_emb.down": "img_emb.proj.3",
    "img_emb.norm_out": "img_emb.proj.4",
}
LEAVES = {"kernel": "weight", "scale": "weight"}


def original_name(path: Iterable[str], layer: int | None = None) -> str:
  """The official name of a parameter, for one layer where layers are stacked."""
  *modules, leaf = path
  module = re.sub(r"^blocks\b", f"blocks.{layer}", ".".join(modules))
  for ours, theirs in MODULES.items():
    module = re.sub(rf"(^|\.){re.escape(ours)}$", rf"\g<1>{theirs}", module)
  return ".".join(filter(None, [module, LEAVES.get(leaf, leaf)]))


def from_original(path: Iterable[str], tensor: np.ndarray) -> np.ndarray:
  """A tensor of the official layout in this project's: products as (in, out), patches ordered (t, y, x, channel)."""
  path = tuple(path)
  if path == ("patch_embedding", "kernel"):
    return tensor.transpose(2, 3, 4, 1, 0).reshape(-1, tensor.shape[0])
  if path[-1] == "kernel":
    return tensor.T
  return tensor[0] if path[-1] == "modulation" else tensor


def read_parameters(shapes: Mapping[tuple[str, ...], tuple[int, ...]], names: Iterable[str],
                    read: Callable[[str], np.ndarray]) -> dict[tuple[str, ...], np.ndarray]:
  """Fills every parameter from a source, using each tensor of the source once.

  Args:
    shapes: the shape of each parameter by its path.
    names: all tensors of the source.
    read: gives the tensor of a name.

  Raises:
    ValueError: a tensor is missing, left over or of the wrong shape; the message lists them.
  """
  left, missing, wrong, out = set(names), [], [], {}
  for path, shape in shapes.items():
    stacked = path[0] == "blocks"
    wanted = [original_name(path, i) for i in range(shape[0])] if stacked else [original_name(path)]
    absent = [name for name in wanted if name not in left]
    if absent:
      missing += absent
      continue
    left -= set(wanted)
    arrays = [from_original(path, read(name)) for name in wanted]
    value = np.stack(arrays) if stacked else arrays[0]
    if value.shape != tuple(shape):
      wrong.append(f"{wanted[0]}: {value.shape} where {tuple(shape)} is expected")
    out[path] = value
  problems = [f"{label}: {', '.join(sorted(found))}" for label, found in
              (("missing", missing), ("not used", left), ("wrong shape", wrong)) if found]
  if problems:
    raise ValueError("; ".join(problems))
  return out
