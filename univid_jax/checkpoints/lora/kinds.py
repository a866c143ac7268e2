"""Kinds of changes of a weight in LoRA files: their factors as stored, and as `models.changes` applies them."""

import abc
import dataclasses
import functools
from typing import Any

import numpy as np

from univid_jax.checkpoints.tensor_files import numpy_dtype


def as_matrix(array: np.ndarray) -> np.ndarray:
  """Flattens all dims after the first; only convolutions have more than one."""
  return array.reshape(len(array), -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Change(abc.ABC):
  """The change of one tensor of the transformer, in PyTorch's layout (out, in) as in files.

  Dims of convolutions after the first are flattened where matrices are expected. `building.STORED_KINDS` builds the
  subclasses, and `formats.FORMATS` lists those that each format has.
  """

  @property
  @abc.abstractmethod
  def kind(self) -> str:
    """Name of the kind, for messages."""

  @property
  @abc.abstractmethod
  def shape(self) -> tuple[int, ...]:
    """The shape of the change: (out, in) for a kernel, else the tensor's."""

  @abc.abstractmethod
  def parts(self) -> dict[str, np.ndarray]:
    """Returns the arrays by part, see `names`."""

  @abc.abstractmethod
  def kernel_parts(self, weight: float) -> tuple[str, dict[str, np.ndarray]]:
    """Returns the kind and the parts for `models.changes`, with the scale times `weight` folded in.

    They are float32, except that a `Difference` with weight 1 keeps its dtype.
    """

  @property
  def rank_and_alpha(self) -> tuple[int, float] | None:
    """Rank and alpha, whose quotient alpha / rank is the scale; None if the kind or form has none."""
    return None

  @property
  def nbytes(self) -> int:
    return sum(part.nbytes for part in self.parts().values())

  def astype(self, dtype: str) -> "Change":
    def convert(value: Any) -> Any:
      match value:
        case np.ndarray():
          return value.astype(numpy_dtype(dtype))
        case tuple():
          return tuple(map(convert, value))
        case Change():
          return value.astype(dtype)
      return value

    with np.errstate(all="ignore"):  # overflows are refused on use
      fields = {field.name: convert(getattr(self, field.name)) for field in dataclasses.fields(self)}
    return dataclasses.replace(self, **fields)


@dataclasses.dataclass(frozen=True, eq=False)
class LoRALayer(Change):
  """alpha / rank * up @ down.

  Attributes:
    down: (rank, in).
    up: (out, rank).
    alpha: the rank if the file stores none.
  """

  down: np.ndarray
  up: np.ndarray
  alpha: float

  @property
  def kind(self) -> str:
    return "low-rank"

  @property
  def rank(self) -> int:
    return len(self.down)

  @property
  def rank_and_alpha(self) -> tuple[int, float] | None:
    return self.rank, self.alpha

  @property
  def shape(self) -> tuple[int, ...]:
    return (len(self.up), as_matrix(self.down).shape[1])

  def parts(self) -> dict[str, np.ndarray]:
    return {"down": self.down, "up": self.up}

  def kernel_parts(self, weight: float) -> tuple[str, dict[str, np.ndarray]]:
    up = as_matrix(self.up).astype(np.float32).T * np.float32(weight * self.alpha / self.rank)
    return "lora", {"down": as_matrix(self.down).astype(np.float32).T, "up": up}

  def fold_up(self) -> np.ndarray:
    """Returns `up` times alpha / rank, in the dtype of `up` if that is exact, else in float32."""
    if self.alpha == self.rank:
      return self.up
    folded = self.up.astype(np.float32) * np.float32(self.alpha / self.rank)
    narrow = folded.astype(self.up.dtype)
    return narrow if np.array_equal(narrow.astype(np.float32), folded) else folded


@dataclasses.dataclass(frozen=True, eq=False)
class LoHaLayer(Change):
  """alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), where the products of matrices are multiplied elementwise."""

  w1_a: np.ndarray
  w1_b: np.ndarray
  w2_a: np.ndarray
  w2_b: np.ndarray
  alpha: float

  @property
  def kind(self) -> str:
    return "LoHa"

  @property
  def rank(self) -> int:
    return len(self.w1_b)

  @property
  def rank_and_alpha(self) -> tuple[int, float] | None:
    return self.rank, self.alpha

  @property
  def shape(self) -> tuple[int, ...]:
    return (len(self.w1_a), as_matrix(self.w1_b).shape[1])

  def parts(self) -> dict[str, np.ndarray]:
    return {f"hada_{name}": getattr(self, name) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}

  def kernel_parts(self, weight: float) -> tuple[str, dict[str, np.ndarray]]:
    up, down, up_2, down_2 = (as_matrix(part).astype(np.float32).T for part in self.parts().values())
    return "loha", {
      "down": down,
      "up": up * np.float32(weight * self.alpha / self.rank),
      "down_2": down_2,
      "up_2": up_2,
    }


@dataclasses.dataclass(frozen=True, eq=False)
class LoKrLayer(Change):
  """alpha / rank * kron(w1, w2).

  Attributes:
    w1, w2: the factors, each either whole, (matrix,), or low-rank, (a, b) for a @ b.
    alpha: None if both factors are whole, when the scale is 1.
  """

  w1: tuple[np.ndarray, ...]
  w2: tuple[np.ndarray, ...]
  alpha: float | None

  @property
  def kind(self) -> str:
    return "LoKr"

  @property
  def rank(self) -> int | None:
    """The rank of the second factor, or of the first if only that is low-rank; None if neither is."""
    return next((len(factor[1]) for factor in (self.w2, self.w1) if len(factor) == 2), None)

  @property
  def rank_and_alpha(self) -> tuple[int, float] | None:
    return None if self.rank is None or self.alpha is None else (self.rank, self.alpha)

  @property
  def shape(self) -> tuple[int, ...]:
    sizes = ((len(factor[0]), as_matrix(factor[-1]).shape[1]) for factor in (self.w1, self.w2))
    (out_1, in_1), (out_2, in_2) = sizes
    return (out_1 * out_2, in_1 * in_2)

  def parts(self) -> dict[str, np.ndarray]:
    parts = {}
    for name, factor in (("w1", self.w1), ("w2", self.w2)):
      endings = ("",) if len(factor) == 1 else ("_a", "_b")
      parts |= {f"lokr_{name}{ending}": value for ending, value in zip(endings, factor)}
    return parts

  def kernel_parts(self, weight: float) -> tuple[str, dict[str, np.ndarray]]:
    rank, alpha = self.rank_and_alpha or (1, 1.0)
    scale = weight * alpha / rank
    w1, w2 = map(_multiply_out, (self.w1, self.w2))
    return "lokr", {"w1": w1.T * np.float32(scale), "w2": w2.T}

  def with_whole_w1(self) -> "LoKrLayer":
    """Returns the same change with `w1` whole, float32 if it was not; `w1` includes the scale if `w2` is whole, too."""
    if len(self.w1) == 1:
      return self
    if len(self.w2) == 2:
      return dataclasses.replace(self, w1=(_multiply_out(self.w1),))
    rank, alpha = self.rank_and_alpha or (1, 1.0)
    return dataclasses.replace(self, w1=(_multiply_out(self.w1) * np.float32(alpha / rank),), alpha=None)


def _multiply_out(factor: tuple[np.ndarray, ...]) -> np.ndarray:
  """Returns a whole or low-rank factor of LoKr as one matrix, float32."""
  return functools.reduce(np.matmul, [as_matrix(part).astype(np.float32) for part in factor])


@dataclasses.dataclass(frozen=True, eq=False)
class Difference(Change):
  """The difference of a whole tensor: a weight, a bias, a norm's scale or a modulation."""

  diff: np.ndarray

  @property
  def kind(self) -> str:
    return "difference"

  @property
  def shape(self) -> tuple[int, ...]:
    return self.diff.shape

  def parts(self) -> dict[str, np.ndarray]:
    return {"diff": self.diff}

  def kernel_parts(self, weight: float) -> tuple[str, dict[str, np.ndarray]]:
    # A whole tensor may be large, so it is widened only if necessary.
    diff = self.diff if weight == 1 else self.diff.astype(np.float32) * np.float32(weight)
    return "diff", {"diff": as_matrix(diff).T}


@dataclasses.dataclass(frozen=True, eq=False)
class DoRALayer(Change):
  """A change that fixes the norms of the weight: W' = magnitude * (W + change) / |W + change|.

  Attributes:
    change: a change of any other kind.
    magnitude: (out, 1), norms over in; or (1, in), norms over out.
  """

  change: Change
  magnitude: np.ndarray

  @property
  def kind(self) -> str:
    return f"DoRA ({self.change.kind})"

  @property
  def shape(self) -> tuple[int, ...]:
    return self.change.shape

  @property
  def rank_and_alpha(self) -> tuple[int, float] | None:
    return self.change.rank_and_alpha

  @property
  def axis(self) -> str:
    """The dim of the kernel that has one magnitude per channel: out or in."""
    return "out" if self.magnitude.shape[1] == 1 else "in"

  def parts(self) -> dict[str, np.ndarray]:
    return {**self.change.parts(), "dora_scale": self.magnitude}

  def kernel_parts(self, weight: float) -> tuple[str, dict[str, np.ndarray]]:
    kind, parts = self.change.kernel_parts(1.0)
    magnitude = self.magnitude.astype(np.float32).T
    return kind, {**parts, f"magnitude_{self.axis}": magnitude, "weight": np.array(weight, np.float32)}
