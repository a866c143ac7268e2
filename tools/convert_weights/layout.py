"""From the layout of PyTorch's tensors to this project's, and strictly: every tensor once, every parameter filled."""

import difflib
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from tools.convert_weights.names import Path, original_name


def from_original(path: Path, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor of the official layout as a parameter of a shape (of one layer).

  Products become (in, out), convolutions (t, y, x, in, out), those over patches products with patches (t, y, x, channel);
  dims of size 1 that broadcast in PyTorch go.
  """
  *_, leaf = path
  if leaf == "kernel":
    if tensor.ndim == 2:
      return tensor.T
    tensor = np.moveaxis(tensor, (0, 1), (-1, -2))
    return tensor.reshape(-1, tensor.shape[-1]) if len(shape) == 2 else tensor.reshape(*(1,) * (5 - tensor.ndim), *tensor.shape)
  return tensor.reshape(shape) if tensor.size == np.prod(shape) else tensor


def read_parameters(component: str, shapes: Mapping[Path, tuple[int, ...]], names: Iterable[str],
                    read: Callable[[str], np.ndarray]) -> dict[Path, np.ndarray]:
  """Fills every parameter from a source, using each tensor of the source once.

  Args:
    component: "dit", "vae", "umt5" or "clip".
    shapes: the shape of each parameter by its path; those under `blocks` are stacked.
    names: all tensors of the source.
    read: gives the tensor of a name.

  Raises:
    ValueError: a tensor is missing, left over or of the wrong shape; the message lists them.
  """
  left, missing, wrong, out = set(names), [], [], {}
  for path, shape in shapes.items():
    stacked = path[0] == "blocks"
    layers = range(shape[0]) if stacked else [None]
    wanted = [original_name(component, path, layer) for layer in layers]
    absent = [name for name in wanted if name not in left]
    if absent:
      missing += absent
      continue
    left -= set(wanted)
    one = tuple(shape[1:]) if stacked else tuple(shape)
    arrays = [from_original(path, read(name), one) for name in wanted]
    wrong += [f"{name}: {array.shape} where {one} is expected" for name, array in zip(wanted, arrays) if array.shape != one]
    if all(array.shape == one for array in arrays):
      out[path] = np.stack(arrays) if stacked else arrays[0]
  problems = []
  if missing:
    problems.append("missing: " + ", ".join(_with_nearest(name, left) for name in sorted(missing)))
  if left:
    problems.append("not used: " + ", ".join(sorted(left)))
  if wrong:
    problems.append("wrong shape: " + ", ".join(wrong))
  if problems:
    raise ValueError("; ".join(problems))
  return out


def _with_nearest(name: str, others: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, others, 1)
  return f"{name} (there is {near[0]})" if near else name
