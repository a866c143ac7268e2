"""LoRA weights in memory: one form, whatever file they come from."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

import univid_jax
from univid_jax.checkpoints.tensor_files import numpy_dtype
from univid_jax.models.lora import lora_targets

# Metadata that stays with a LoRA when it is written in another format.
_KEPT_METADATA = ("base_model", "step")


@dataclasses.dataclass(frozen=True)
class LoRALayer:
  """The update of one Linear: alpha / rank * up @ down, in PyTorch's layout.

  Attributes:
    down: (rank, in_dim).
    up: (out_dim, rank).
    alpha: equals the rank if the file stores none.
  """

  down: np.ndarray
  up: np.ndarray
  alpha: float

  @property
  def rank(self) -> int:
    return len(self.down)

  @property
  def folded_up(self) -> np.ndarray:
    """`up` times alpha / rank, in the dtype of `up`."""
    if self.alpha == self.rank:
      return self.up
    return (self.up.astype(np.float32) * np.float32(self.alpha / self.rank)).astype(self.up.dtype)

  def astype(self, dtype: str) -> "LoRALayer":
    kind = numpy_dtype(dtype)
    return LoRALayer(self.down.astype(kind), self.up.astype(kind), self.alpha)


@dataclasses.dataclass(frozen=True)
class LoRAWeights:
  """A LoRA for the transformer.

  Attributes:
    layers: by the official name of the Linear.
    format: of the file it was read from: a name in `formats.FORMATS`, or "jax" for this project's own folder.
    metadata: the text entries of the file's header.
  """

  layers: Mapping[str, LoRALayer]
  format: str
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def ranks(self) -> tuple[int, ...]:
    """The distinct ranks, ascending."""
    return tuple(sorted({layer.rank for layer in self.layers.values()}))

  @property
  def alphas(self) -> tuple[float, ...]:
    """The distinct alphas, ascending."""
    return tuple(sorted({layer.alpha for layer in self.layers.values()}))

  @property
  def num_layers(self) -> int:
    """The number of blocks that the base must have at least."""
    return 1 + max((int(name.split(".")[1]) for name in self.layers if name.startswith("blocks.")), default=-1)

  @property
  def nbytes(self) -> int:
    return sum(layer.down.nbytes + layer.up.nbytes for layer in self.layers.values())

  def astype(self, dtype: str) -> "LoRAWeights":
    return dataclasses.replace(self, layers={name: layer.astype(dtype) for name, layer in self.layers.items()})

  def describe(self) -> str:
    """Returns one line: format, number of Linears and blocks, targets, rank and alpha."""
    targets = ", ".join(lora_targets(list(self.layers)))
    return (
      f"LoRA ({self.format}) of {len(self.layers)} Linears in {self.num_layers} blocks ({targets}), "
      f"rank {_join_numbers(self.ranks, limit=4)}, alpha {_join_numbers(self.alphas, limit=4)}"
    )

  def file_metadata(self, extra: Mapping[str, Any]) -> dict[str, str]:
    """Returns the text entries to store with the weights: version, rank, alpha, targets, base, step, and `extra`."""
    values = {
      "software": f"univid_jax {univid_jax.__version__}",
      "rank": _join_numbers(self.ranks, separator=","),
      "alpha": _join_numbers(self.alphas, separator=","),
      "targets": ",".join(lora_targets(list(self.layers))),
    }
    kept = {key: self.metadata[key] for key in _KEPT_METADATA if key in self.metadata}
    return {**values, **{key: str(value) for key, value in {**kept, **extra}.items() if value is not None}}


def _join_numbers(values: Iterable[int | float], *, separator: str = ", ", limit: int | None = None) -> str:
  texts = [f"{value:g}" for value in values]
  return separator.join(texts[:limit] + (["..."] if limit is not None and len(texts) > limit else []))
