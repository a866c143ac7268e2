"""LoRA weights in memory, in one form for all kinds of files."""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping

import univid_jax
from univid_jax.checkpoints.lora.kinds import Change
from univid_jax.checkpoints.usage import ENTRIES, SOFTWARE, SOFTWARE_NAME, Usage
from univid_jax.models.lora import lora_targets

# Metadata that a LoRA of this project keeps when it is written in another format.
_KEPT_METADATA = (*ENTRIES, "step")

# Header of files that this project writes: where no alpha is stored, alpha is the rank, and the scale is 1.
SCALE_OF_ONE: Mapping[str, str] = {"scale_without_alpha": "1"}


@dataclasses.dataclass(frozen=True)
class LoRAWeights:
  """A LoRA for the transformer.

  Attributes:
    changes: by the official name of the tensor.
    format: format of the file's names: a key of `formats.FORMATS`, or "jax" for this project's own folder.
    metadata: the text entries of the file's header.
    source: the file, for messages.
    names: names of the file's tensors, by the official name of the tensor that they change.
    unmatched: names of the file's tensors without a counterpart in any of Wan's transformers.
    notes: what had to be assumed to read the file, one line each.
  """

  changes: Mapping[str, Change]
  format: str
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
  source: str = "the LoRA"
  names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  unmatched: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()

  @functools.cached_property
  def usage(self) -> Usage | None:
    """How the LoRA must be run; None if it does not say.

    Raises:
      UserError: its metadata is malformed.
    """
    return Usage.from_metadata(self.metadata, source=self.source)

  @property
  def ranks(self) -> tuple[int, ...]:
    """The distinct ranks, ascending."""
    return tuple(sorted({found[0] for change in self.changes.values() if (found := change.rank_and_alpha)}))

  @property
  def alphas(self) -> tuple[float, ...]:
    """The distinct alphas, ascending."""
    return tuple(sorted({found[1] for change in self.changes.values() if (found := change.rank_and_alpha)}))

  @property
  def num_layers(self) -> int:
    """The number of blocks that the base must have at least."""
    return 1 + max((int(name.split(".")[1]) for name in self.changes if name.startswith("blocks.")), default=-1)

  @property
  def nbytes(self) -> int:
    return sum(change.nbytes for change in self.changes.values())

  def astype(self, dtype: str) -> "LoRAWeights":
    return dataclasses.replace(self, changes={name: change.astype(dtype) for name, change in self.changes.items()})

  def select(self, tensors: Iterable[str]) -> "LoRAWeights":
    """Returns a LoRA with only the changes of some tensors."""
    return dataclasses.replace(self, changes={name: self.changes[name] for name in tensors}, unmatched=())

  def names_of(self, tensors: Iterable[str]) -> list[str]:
    """Returns the names in the file of the tensors that change some tensors."""
    return [name for tensor in tensors for name in self.names.get(tensor, (tensor,))]

  def describe(self) -> str:
    """Returns one line: format, number of tensors and blocks, their names by kind, rank and alpha."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for name, change in self.changes.items():
      by_kind[change.kind].append(name.removesuffix(".weight"))
    kinds = [f"{len(names)} {kind} ({', '.join(lora_targets(names))})" for kind, names in by_kind.items()]
    numbers = [
      f"{name} {_join_numbers(values, limit=4)}"
      for name, values in (("rank", self.ranks), ("alpha", self.alphas))
      if values
    ]
    return ", ".join(
      [f"LoRA ({self.format}), {len(self.changes)} tensors in {self.num_layers} blocks: {', '.join(kinds)}", *numbers]
    )

  def file_metadata(self) -> dict[str, str]:
    """Returns the text entries to store with the weights: version, rank, alpha, targets, base and step."""
    values = {
      SOFTWARE: f"{SOFTWARE_NAME} {univid_jax.__version__}",
      "rank": _join_numbers(self.ranks, separator=","),
      "alpha": _join_numbers(self.alphas, separator=","),
      "targets": ",".join(lora_targets([name.removesuffix(".weight") for name in self.changes])),
    }
    is_own = self.metadata.get(SOFTWARE, "").startswith(SOFTWARE_NAME)
    kept = {key: self.metadata[key] for key in _KEPT_METADATA if is_own and key in self.metadata}
    return {**values, **kept}


def _join_numbers(values: Iterable[int | float], *, separator: str = ", ", limit: int | None = None) -> str:
  texts = [f"{value:g}" for value in values]
  return separator.join(texts[:limit] + (["..."] if limit is not None and len(texts) > limit else []))
