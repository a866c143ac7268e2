"""Between the layout of PyTorch's tensors and this project's, strictly: every tensor once, every parameter filled."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from univid_jax.weights.names import original_name

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Fill:
  """A parameter and the official tensors that fill it.

  Attributes:
    path: of the parameter.
    shape: of the parameter, with its leading dim of layers where layers are stacked.
    names: the tensors' official names, one a layer or one in all; None where a tensor may be and is missing.
    original_shape: of each tensor.
    stacked: whether layers are stacked.
  """

  path: tuple[str, ...]
  shape: Shape
  names: tuple[str | None, ...]
  original_shape: Shape
  stacked: bool

  @property
  def layer_shape(self) -> Shape:
    return self.shape[1:] if self.stacked else self.shape

  def from_original(self, tensor: np.ndarray) -> np.ndarray:
    """A tensor of the official layout as (a layer of) the parameter.

    Products become (in, out), convolutions (t, y, x, in, out), those over patches products with patches (t, y, x, channel);
    dims of size 1 that broadcast in PyTorch go.
    """
    if self.path[-1] != "kernel":
      return tensor.reshape(self.layer_shape)
    return (tensor.T if tensor.ndim == 2 else np.moveaxis(tensor, (0, 1), (-1, -2))).reshape(self.layer_shape)

  def to_original(self, array: np.ndarray) -> np.ndarray:
    """The inverse of `from_original`."""
    if self.path[-1] != "kernel":
      return array.reshape(self.original_shape)
    if len(self.original_shape) == 2:
      return array.T
    out_dim, in_dim, *kernel = self.original_shape
    return np.moveaxis(array.reshape(*kernel, in_dim, out_dim), (-1, -2), (0, 1))

  def default(self) -> np.ndarray:
    """What stands for a tensor that may be missing: ones for a scale, zeros for all else."""
    return np.full(self.layer_shape, 1.0 if self.path[-1] == "scale" else 0.0, np.float32)


def fills(component: str, config: Any, shapes: Mapping[tuple[str, ...], Shape]) -> list[Fill]:
  """Which official tensors each parameter of a component needs.

  Args:
    component: a name of `weights.names.TABLES`.
    config: the component's.
    shapes: of each parameter by its path; those under `blocks` are stacked.
  """
  out = []
  for path, shape in shapes.items():
    stacked = path[0] == "blocks"
    names = tuple(original_name(component, path, layer) for layer in (range(shape[0]) if stacked else (None,)))
    one = shape[1:] if stacked else shape
    out.append(Fill(path, tuple(shape), names, _original_shape(component, config, path, names[0], one), stacked))
  return out


def _original_shape(component: str, config: Any, path: Sequence[str], name: str, shape: Shape) -> Shape:
  *_, leaf = path
  if leaf == "kernel":
    *kernel, in_dim, out_dim = shape
    if path[0] == "patch_embedding":
      patch = config.patch_size if component == "transformer" else (config.patch_size,) * 2
      return (out_dim, in_dim // int(np.prod(patch)), *patch)
    if component == "vae" and name.endswith((".resample.1.weight", ".to_qkv.weight", ".proj.weight")):
      kernel = kernel[1:]  # over y and x alone
    return (out_dim, in_dim, *kernel)
  if name.endswith(".gamma"):
    return (*shape, 1, 1) if ".norm." in name else (*shape, 1, 1, 1)
  if leaf == "modulation" or (component == "image_encoder" and leaf in ("cls_embedding", "pos_embedding")):
    return (*(1,) * (3 - len(shape)), *shape)
  return tuple(shape)


def check_fills(wanted: Iterable[Fill], available: Mapping[str, Shape], *, allow_missing: Sequence[str] = ()) -> list[Fill]:
  """Holds what is wanted against what a source has.

  Args:
    wanted: see `fills`.
    available: the shape of each tensor by its official name.
    allow_missing: patterns (`fnmatch`) of official names that may be missing.

  Returns:
    The fills, with None for names that are missing and may be.

  Raises:
    ValueError: a tensor is missing, left over or of the wrong shape; the message lists them.
  """
  left, missing, wrong, out = set(available), [], [], []
  for fill in wanted:
    names = []
    for name in fill.names:
      if name in left:
        left.remove(name)
        if _squeezed(available[name]) != _squeezed(fill.original_shape):
          wrong.append(f"{name}: {tuple(available[name])} where {fill.original_shape} is expected")
      elif any(fnmatch.fnmatch(name, pattern) for pattern in allow_missing):
        name = None
      else:
        missing.append(name)
      names.append(name)
    out.append(dataclasses.replace(fill, names=tuple(names)))
  problems = []
  if missing:
    problems.append("missing: " + _listed(_with_nearest(name, left) for name in sorted(missing)))
  if left:
    problems.append("not used: " + _listed(sorted(left)))
  if wrong:
    problems.append("wrong shape: " + _listed(wrong))
  if problems:
    raise ValueError("; ".join(problems))
  return out


def read_parameters(wanted: Iterable[Fill], read: Callable[[str], np.ndarray]) -> dict[tuple[str, ...], np.ndarray]:
  """All parameters in memory; for what is too large for that, see `to_jax`."""
  out = {}
  for fill in wanted:
    layers = [fill.default() if name is None else fill.from_original(read(name)) for name in fill.names]
    out[fill.path] = np.stack(layers) if fill.stacked else layers[0]
  return out


def _squeezed(shape: Shape) -> Shape:
  return tuple(n for n in shape if n != 1)


def _listed(items: Iterable[str], limit: int = 12) -> str:
  items = list(items)
  return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _with_nearest(name: str, others: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, others, 1)
  return f"{name} (there is {near[0]})" if near else name
