"""Builds changes from the tensors that a file has for a module, by one table of kinds."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from univid_jax.checkpoints.lora.kinds import Change, Difference, DoRALayer, LoHaLayer, LoKrLayer, LoRALayer, as_matrix

Parts = Mapping[str, np.ndarray]

# Returns alpha for a rank. If the rank is None (no part is low-rank), it is the scale itself, or None for 1.
AlphaOf = Callable[[int | None], float | None]

# The transformer's only convolution, the patch embedding, has less than a million weights.
_MAX_CONVOLUTION = 1 << 24

# Parts that may accompany every kind.
_COMMON = {"alpha", "dora_scale", "magnitude"}


class PartsError(ValueError):
  """The parts of a change are incomplete or do not fit together; the message says what was expected."""


@dataclasses.dataclass(frozen=True)
class StoredKind:
  """A kind of change as files store it.

  Attributes:
    name: for messages.
    prefixes: prefixes of its parts' names.
    required: names of the parts that it must have.
    build: converts the parts to a change.
    has_products: whether each required part may also be a product, of two parts whose names end with _a and _b.
  """

  name: str
  prefixes: tuple[str, ...]
  required: tuple[str, ...]
  build: Callable[[Parts, AlphaOf], Change]
  has_products: bool = False


def build_changes(tensor: str, parts: Parts, alpha_of: AlphaOf) -> dict[str, Change]:
  """Builds the changes that a module's parts make, by official name: of its weight, and the bias of a low-rank layer.

  Args:
    tensor: official name of the weight, or of another tensor that the parts belong to.
    parts: the arrays, see `names`.
    alpha_of: see `AlphaOf`.

  Raises:
    PartsError: the parts are incomplete, or do not fit together.
  """
  kind = next((kind for kind in STORED_KINDS if any(part.startswith(kind.prefixes) for part in parts)), None)
  if kind is None:
    raise PartsError("has no matrices")
  if missing := _missing(kind, parts):
    raise PartsError(f"is incomplete: {kind.name} needs {' and '.join(missing)} too")
  strange = sorted(part for part in parts if part not in _COMMON and not part.startswith(kind.prefixes))
  if strange:
    raise PartsError(f"mixes {kind.name} with {' and '.join(strange)}")
  changes = {tensor: kind.build(parts, alpha_of)}
  if "up_bias" in parts:
    rank, alpha = changes[tensor].rank_and_alpha or (1, 1.0)
    bias = Difference(parts["up_bias"].astype(np.float32) * np.float32(alpha / rank))
    changes[tensor.removesuffix(".weight") + ".bias"] = bias
  if "dora_scale" in parts or "magnitude" in parts:
    changes[tensor] = DoRALayer(changes[tensor], _magnitude(parts, changes[tensor].shape))
  return changes


def _missing(kind: StoredKind, parts: Parts) -> list[str]:
  """Returns the required parts that are missing; of half a product the other half."""
  missing = []
  for part in kind.required:
    halves = (f"{part}_a", f"{part}_b")
    is_product = kind.has_products and part not in parts and any(half in parts for half in halves)
    missing += [name for name in (halves if is_product else (part,)) if name not in parts]
  return missing


def _build_low_rank(parts: Parts, alpha_of: AlphaOf) -> LoRALayer:
  down, up = parts["down"], parts["up"]
  if "mid" in parts:
    down = _tucker(parts["mid"], None, as_matrix(down))
  if down.ndim < 2 or up.ndim < 2 or as_matrix(up).shape[1] != len(down):
    raise PartsError("needs matrices (rank, in) and (out, rank)")
  return LoRALayer(down, up, _number(alpha_of(len(down))))


def _build_loha(parts: Parts, alpha_of: AlphaOf) -> Change:
  w1_a, w1_b, w2_a, w2_b = (parts[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
  rank = len(w1_b)
  if "hada_t1" in parts or "hada_t2" in parts:
    if not {"hada_t1", "hada_t2"} <= parts.keys():
      raise PartsError("needs both hada_t1 and hada_t2")
    first, second = _tucker(parts["hada_t1"], w1_a, w1_b), _tucker(parts["hada_t2"], w2_a, w2_b)
    _check_equal(first.shape, second.shape)
    return Difference(first * second * np.float32(_number(alpha_of(rank)) / rank))
  _check_equal(_product_shape(w1_a, w1_b), _product_shape(w2_a, w2_b))
  return LoHaLayer(w1_a, w1_b, w2_a, w2_b, _number(alpha_of(rank)))


def _build_lokr(parts: Parts, alpha_of: AlphaOf) -> LoKrLayer:
  w1, w2 = (
    [parts[f"lokr_{name}{ending}"] for ending in ("", "_a", "_b") if f"lokr_{name}{ending}" in parts]
    for name in ("w1", "w2")
  )
  if len(w1) > 2 or len(w2) > 2:
    raise PartsError("has a factor both whole and as a product")
  rank = next((len(factor[1]) for factor in (w2, w1) if len(factor) == 2), None)
  if rank is None:
    # Whole factors have scale 1, except for musubi, where a side of w2 counts as the rank, and PEFT.
    side = max(as_matrix(w2[0]).shape) if "lokr_factor" in parts else None
    found = alpha_of(side)
    scale = 1.0 if found is None else found / (side or 1)
    w1, alpha = ([w1[0].astype(np.float32) * np.float32(scale)] if scale != 1 else w1), None
  else:
    alpha = alpha_of(rank)
  if "lokr_t2" in parts:
    if len(w2) != 2:
      raise PartsError("needs lokr_w2_a and lokr_w2_b with lokr_t2")
    w2 = [_tucker(parts["lokr_t2"], w2[0], w2[1]) * np.float32(_number(alpha) / len(w2[1]))]
    alpha = float(len(w1[1])) if len(w1) == 2 else None
  for factor in (w1, w2):
    if len(factor) == 2:
      _product_shape(factor[0], factor[1])
    else:
      _check_matrix(factor[0])
  return LoKrLayer(tuple(w1), tuple(w2), alpha)


def _build_difference(parts: Parts, alpha_of: AlphaOf) -> Difference:
  del alpha_of  # no program applies alpha to a difference
  return Difference(parts["diff"])


STORED_KINDS: Sequence[StoredKind] = (
  StoredKind("a low-rank pair", ("down", "up", "mid"), ("down", "up"), _build_low_rank),
  StoredKind("LoHa", ("hada_",), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _build_loha),
  StoredKind("LoKr", ("lokr_",), ("lokr_w1", "lokr_w2"), _build_lokr, has_products=True),
  StoredKind("a difference", ("diff",), ("diff",), _build_difference),
)


def _number(alpha: float | None) -> float:
  assert alpha is not None, "there is an alpha for every rank"
  return alpha


def _check_matrix(array: np.ndarray) -> None:
  if array.ndim < 2:
    raise PartsError("needs matrices")


def _check_equal(first: Sequence[int], second: Sequence[int]) -> None:
  if tuple(first) != tuple(second):
    raise PartsError(f"multiplies a matrix {tuple(first)} by another {tuple(second)}")


def _product_shape(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
  _check_matrix(a)
  _check_matrix(b)
  if as_matrix(a).shape[1] != len(b):
    raise PartsError("needs pairs of matrices (m, rank) and (rank, n)")
  return len(a), as_matrix(b).shape[1]


def _tucker(core: np.ndarray, a: np.ndarray | None, b: np.ndarray) -> np.ndarray:
  """Returns a convolution (p or i, r, ...): core (i, j, ...), times a (i, p) unless it is None, times b (j, r)."""
  fits = core.ndim >= 2 and b.ndim == 2 and core.shape[1] == len(b)
  if not fits or (a is not None and (a.ndim != 2 or len(core) != len(a))):
    raise PartsError("needs a core (i, j, ...) between matrices (i, m) and (j, n)")
  size = (len(core) if a is None else a.shape[1]) * b.shape[1] * math.prod(core.shape[2:])
  if size > _MAX_CONVOLUTION:
    raise PartsError(f"is a convolution of {size} weights, more than any of Wan")
  out = np.einsum("ij...,jr->ir...", core.astype(np.float32), b.astype(np.float32))
  return out if a is None else np.einsum("ir...,ip->pr...", out, a.astype(np.float32))


def _magnitude(parts: Parts, shape: Sequence[int]) -> np.ndarray:
  """Returns DoRA's magnitudes as (out, 1) or (1, in)."""
  if {"dora_scale", "magnitude"} <= parts.keys():
    raise PartsError("has the magnitudes of DoRA twice")
  size_out, size_in = shape[0], math.prod(shape[1:])
  value = parts.get("dora_scale", parts.get("magnitude"))
  assert value is not None
  # PEFT's magnitudes are those of out channels, in any shape.
  along_in = "dora_scale" in parts and value.ndim >= 2 and len(value) == 1 and size_out != 1
  if value.size != (size_in if along_in else size_out):
    raise PartsError(f"needs one magnitude of DoRA per channel, {size_out} (out, 1) or {size_in} (1, in)")
  return value.reshape((1, -1) if along_in else (-1, 1))
