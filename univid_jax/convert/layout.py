"""Mapping between the tensors of an official release and this project's parameters.

It is strict: every tensor is used once and every parameter is filled, or an error lists the names.
"""

import dataclasses
import difflib
import enum
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from univid_jax.checkpoints.pretrained import abstract_component
from univid_jax.core.errors import UserError
from univid_jax.core.text import list_first
from univid_jax.models.names import original_name
from univid_jax.models.variants import DiTConfig

Shape = tuple[int, ...]

# Tensors of each kind that a message names.
_NAMED = 12


class Layout(enum.StrEnum):
  """How a release of PyTorch weights names its tensors and divides them into files."""

  ORIGINAL = "original"  # Wan-AI's
  DIFFUSERS = "diffusers"  # the encoders of text and images: transformers'
  LLAMA_CPP = "llama.cpp"  # the text encoder in GGUF files


@dataclasses.dataclass(frozen=True)
class Fill:
  """A parameter, and the official tensors that fill it.

  Attributes:
    path: of the parameter.
    shape: of the parameter, including the leading dim of stacked layers.
    names: official names of the tensors, one per layer if layers are stacked, else one.
    original_shape: of each tensor.
    stacked: whether layers are stacked.
    absent: those of `names` that the source lacks and may lack; see `default`.
  """

  path: tuple[str, ...]
  shape: Shape
  names: tuple[str, ...]
  original_shape: Shape
  stacked: bool
  absent: frozenset[str] = frozenset()

  @property
  def layer_shape(self) -> Shape:
    return self.shape[1:] if self.stacked else self.shape

  def from_original(self, tensor: np.ndarray) -> np.ndarray:
    """Converts an official tensor to the parameter, or to one layer of it.

    Matrices become (in, out), convolutions (t, y, x, in, out), and convolutions over patches matrices for patches
    ordered (t, y, x, channel). Dims of size 1 for broadcasting in PyTorch are removed.
    """
    if self.path[-1] != "kernel":
      return tensor.reshape(self.layer_shape)
    return (tensor.T if tensor.ndim == 2 else np.moveaxis(tensor, (0, 1), (-1, -2))).reshape(self.layer_shape)

  def to_original(self, array: np.ndarray) -> np.ndarray:
    """Inverts `from_original`."""
    if self.path[-1] != "kernel":
      return array.reshape(self.original_shape)
    if len(self.original_shape) == 2:
      return array.T
    out_dim, in_dim, *kernel = self.original_shape
    return np.moveaxis(array.reshape(*kernel, in_dim, out_dim), (-1, -2), (0, 1))

  def default(self) -> np.ndarray:
    """Returns the values of an absent tensor: ones for scales, else zeros."""
    return np.full(self.layer_shape, 1.0 if self.path[-1] == "scale" else 0.0, np.float32)


def make_fills(component: str, config: Any) -> list[Fill]:
  """Lists the parameters of a component with the official tensors that they need.

  Args:
    component: a name in `checkpoints.pretrained.COMPONENTS`.
    config: of the component.
  """
  fills = []
  for path, leaf in nnx.to_flat_state(nnx.state(abstract_component(component, config), nnx.Param)):
    path, shape = tuple(map(str, path)), tuple(leaf.shape)
    stacked = path[0] == "blocks"
    names = tuple(original_name(component, path, layer) for layer in (range(shape[0]) if stacked else (None,)))
    original_shape = _original_shape(component, config, path, names[0], shape[1:] if stacked else shape)
    fills.append(Fill(path, shape, names, original_shape, stacked))
  return fills


def _original_shape(component: str, config: Any, path: tuple[str, ...], name: str, shape: Shape) -> Shape:
  """Returns the shape of the official tensor `name`; `shape` is that of one layer."""
  leaf = path[-1]
  if leaf == "kernel":
    *kernel, in_dim, out_dim = shape
    if path[0] == "patch_embedding":
      patch = config.patch_size if isinstance(config, DiTConfig) else (config.patch_size,) * 2
      return (out_dim, in_dim // int(np.prod(patch)), *patch)
    if component == "vae" and name.endswith((".resample.1.weight", ".to_qkv.weight", ".proj.weight")):
      kernel = kernel[1:]  # over y and x only
    return (out_dim, in_dim, *kernel)
  if name.endswith(".gamma"):
    return (*shape, 1, 1) if ".norm." in name else (*shape, 1, 1, 1)
  if leaf == "modulation" or (component == "image_encoder" and leaf in ("cls_embedding", "pos_embedding")):
    return (*(1,) * (3 - len(shape)), *shape)
  return shape


def match_fills(
  fills: Iterable[Fill], available: Mapping[str, Shape], *, allow_missing: Sequence[str] = ()
) -> list[Fill]:
  """Checks that a source has exactly the tensors that are needed.

  Args:
    fills: see `make_fills`.
    available: the shapes of the source's tensors by official name.
    allow_missing: patterns (`fnmatch`) of official names that the source may lack.

  Returns:
    The fills, those of `allow_missing` that the source lacks marked as absent.

  Raises:
    UserError: tensors are missing, unused or have the wrong shape; the message lists them.
  """
  unused, missing, wrong, out = set(available), [], [], []
  for fill in fills:
    absent = set()
    for name in fill.names:
      if name in unused:
        unused.remove(name)
        if _squeeze(available[name]) != _squeeze(fill.original_shape):
          wrong.append(f"{name} is {tuple(available[name])} instead of {fill.original_shape}")
      elif any(fnmatch.fnmatch(name, pattern) for pattern in allow_missing):
        absent.add(name)
      else:
        missing.append(name)
    out.append(dataclasses.replace(fill, absent=frozenset(absent)))
  problems = []
  if missing:
    problems.append("missing: " + list_first((_with_nearest(name, unused) for name in sorted(missing)), _NAMED))
  if unused:
    problems.append("not used: " + list_first(sorted(unused), _NAMED))
  if wrong:
    problems.append("wrong shape: " + list_first(wrong, _NAMED))
  if problems:
    raise UserError("; ".join(problems))
  return out


def _squeeze(shape: Shape) -> Shape:
  return tuple(n for n in shape if n != 1)


def _with_nearest(name: str, others: Iterable[str]) -> str:
  nearest = difflib.get_close_matches(name, others, 1)
  return f"{name} (similar: {nearest[0]})" if nearest else name
