"""Formats in which LoRA files are written; to add one, add an entry to FORMATS."""

import dataclasses
import enum
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import numpy as np
from etils import epath

from univid_jax.checkpoints.checksums import OPEN_SEAL, SEAL, seal_file
from univid_jax.checkpoints.lora.kinds import Change, Difference, DoRALayer, LoHaLayer, LoKrLayer, LoRALayer
from univid_jax.checkpoints.lora.names import list_names
from univid_jax.checkpoints.lora.sidecar import sidecar_path, write_sidecar
from univid_jax.checkpoints.lora.weights import SCALE_OF_ONE, LoRAWeights
from univid_jax.checkpoints.tensor_files import numpy_dtype, require_torch, save_safetensors, save_torch
from univid_jax.core.errors import UserError
from univid_jax.core.paths import atomic_write
from univid_jax.models.names import name_to_diffusers


def _unchanged(module: str) -> str:
  return module


def _to_diffusers(module: str) -> str:
  return name_to_diffusers("transformer", module + ".").removesuffix(".")


def _to_underscores(module: str) -> str:
  return module.replace(".", "_")


def _as_it_is(change: Change) -> Change:
  return change


def _with_whole_w1(change: Change) -> Change:
  return change.with_whole_w1() if isinstance(change, LoKrLayer) else change


_MUSUBI_MODULES: Mapping[type[Change], str] = {LoRALayer: "lora_wan", LoHaLayer: "loha", LoKrLayer: "lokr"}


def _no_metadata(lora: LoRAWeights) -> dict[str, str]:
  del lora
  return {}


def _musubi_metadata(lora: LoRAWeights) -> dict[str, str]:
  modules = {_MUSUBI_MODULES[type(change)] for change in lora.changes.values()} or {"lora_wan"}
  rank_and_alpha = lora.file_metadata()
  return {
    "ss_network_module": f"networks.{modules.pop()}",
    "ss_network_dim": rank_and_alpha["rank"],
    "ss_network_alpha": rank_and_alpha["alpha"],
  }


class Alpha(enum.Enum):
  """How a format stores alpha, so that its reader applies the right scale."""

  FOLDED = "folded"  # the reader applies no scale: `up` is multiplied by alpha / rank, see `LoRALayer.fold_up`
  IF_NOT_RANK = "if_not_rank"  # the reader assumes alpha = rank if there is none
  ALWAYS = "always"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAFormat:
  """What a format's files contain.

  Attributes:
    prefix: of every tensor name.
    spell: converts the official name of a module.
    down, up: endings of the names of the two matrices.
    alpha: how alpha is stored.
    kinds: kinds of changes that its readers apply; others are refused.
    one_kind: whether its readers apply only one kind of changes, the first that they find.
    adapt: converts a change to the form that its readers apply.
    suffixes: suffixes of its files.
    metadata: returns additional header entries.
  """

  prefix: str = ""
  spell: Callable[[str], str] = _unchanged
  down: str = ".lora_A.weight"
  up: str = ".lora_B.weight"
  alpha: Alpha
  kinds: tuple[type[Change], ...] = (LoRALayer,)
  one_kind: bool = False
  adapt: Callable[[Change], Change] = _as_it_is
  suffixes: tuple[str, ...] = (".safetensors",)
  metadata: Callable[[LoRAWeights], Mapping[str, str]] = _no_metadata

  def can_express(self, change: Change) -> bool:
    inner = change.change if isinstance(change, DoRALayer) else change
    return isinstance(change, self.kinds) and isinstance(inner, self.kinds)

  def module_name(self, tensor: str) -> str:
    """Returns the beginning of the names of the tensors that change a tensor."""
    return self.prefix + self.spell(tensor.removesuffix(".weight").removesuffix(".bias"))

  def tensors(self, tensor: str, change: Change, dtype: str | None = None) -> dict[str, np.ndarray]:
    """Returns the named tensors for the change of one tensor, in a dtype or else in their own."""
    change = self.adapt(change)
    stored = change.astype(dtype) if dtype else change
    name = self.module_name(tensor)
    endings = {"down": self.down, "up": self.up, "diff": ".diff_b" if tensor.endswith(".bias") else ".diff"}
    out = {name + endings.get(part, f".{part}"): value for part, value in stored.parts().items()}
    if self.alpha is Alpha.FOLDED:
      assert isinstance(change, LoRALayer)
      folded = change.fold_up()
      out[name + self.up] = folded.astype(numpy_dtype(dtype)) if dtype else folded
    elif change.rank_and_alpha:
      rank, alpha = change.rank_and_alpha
      if self.alpha is Alpha.ALWAYS or alpha != rank:
        out[f"{name}.alpha"] = np.array(alpha, np.float32)
    return {key: np.asarray(value, order="C") for key, value in out.items()}


FORMATS: Mapping[str, LoRAFormat] = {
  "univid": LoRAFormat(
    down=".lora_A.default.weight",
    up=".lora_B.default.weight",
    alpha=Alpha.FOLDED,
    suffixes=(".safetensors", ".ckpt"),  # a .ckpt needs PyTorch, and has its metadata in a sidecar
  ),
  "diffusers": LoRAFormat(prefix="transformer.", spell=_to_diffusers, alpha=Alpha.FOLDED),
  "comfyui": LoRAFormat(
    prefix="diffusion_model.", alpha=Alpha.IF_NOT_RANK, kinds=(LoRALayer, LoHaLayer, LoKrLayer, DoRALayer, Difference)
  ),
  "musubi": LoRAFormat(
    prefix="lora_unet_",
    spell=_to_underscores,
    down=".lora_down.weight",
    up=".lora_up.weight",
    alpha=Alpha.ALWAYS,
    kinds=(LoRALayer, LoHaLayer, LoKrLayer),
    one_kind=True,
    adapt=_with_whole_w1,
    metadata=_musubi_metadata,
  ),
}


def find_format(name: str) -> LoRAFormat:
  """Returns an entry of `FORMATS`.

  Raises:
    UserError: there is no such format.
  """
  if name not in FORMATS:
    raise UserError(f"unknown LoRA format {name!r}; valid are {', '.join(FORMATS)}")
  return FORMATS[name]


def lora_tensors(lora: LoRAWeights, to: str, *, dtype: str | None = None) -> dict[str, np.ndarray]:
  """Returns the named tensors of a LoRA in a format of `FORMATS`, in a dtype or else in their own.

  Raises:
    UserError: the format cannot express a change, or the dtype a value.
  """
  file_format = find_format(to)
  check_complete(lora)
  refused: dict[str, list[str]] = defaultdict(list)
  for tensor, change in lora.changes.items():
    if not file_format.can_express(change):
      refused[change.kind].append(tensor)
  if refused:
    reasons = "; ".join(f"{len(tensors)} {kind} ({list_names(tensors)})" for kind, tensors in refused.items())
    raise UserError(f"{lora.source} cannot be written as {to}, which has no form for some of its changes: {reasons}")
  by_kind = Counter(change.kind for change in lora.changes.values())
  if file_format.one_kind and len(by_kind) > 1:
    counts = ", ".join(f"{count} {kind}" for kind, count in by_kind.items())
    raise UserError(f"{lora.source} cannot be written as {to}, which applies one kind of change per file: {counts}")
  out: dict[str, np.ndarray] = {}
  with np.errstate(all="ignore"):
    for tensor, change in sorted(lora.changes.items()):
      out |= file_format.tensors(tensor, change, dtype)
  overflow = [name for name, value in out.items() if not np.isfinite(value.astype(np.float32)).all()]
  if overflow:
    raise UserError(f"{lora.source} contains NaN, or values too large for their dtype, in {list_names(overflow)}")
  return out


def check_complete(lora: LoRAWeights) -> None:
  """Raises UserError if a file has tensors without a counterpart in any of Wan's transformers."""
  if lora.unmatched:
    raise UserError(
      f"{lora.source} has {len(lora.unmatched)} tensors that Wan's transformers have no counterpart of: "
      f"{list_names(lora.unmatched)}; --lora_skip_unmatched leaves them out"
    )


def check_suffix(path: epath.PathLike, to: str) -> None:
  """Raises UserError if files of a format in `FORMATS` have another suffix."""
  suffixes = find_format(to).suffixes
  if epath.Path(path).suffix.lower() not in suffixes:
    raise UserError(f"a {to} LoRA file must be named *{' or *'.join(suffixes)}, got {path}")


def write_lora(path: epath.PathLike, lora: LoRAWeights, to: str, *, dtype: str | None = None) -> str:
  """Writes a LoRA file, and its sidecar if it has one; nothing appears, or is replaced, before both are complete.

  Args:
    path: local or in a bucket; ends in one of the format's suffixes.
    lora: the LoRA.
    to: name of a format in `FORMATS`.
    dtype: dtype of the written tensors except alpha; by default their own, or float32 where their own would round
      folded values.

  Returns:
    One line on what differs from the LoRA that was read, or will differ where the file is used; "" if nothing does.

  Raises:
    UserError: the format is unknown, its files have another suffix, or the file needs PyTorch, which is not installed.
  """
  path, file_format = epath.Path(path), find_format(to)
  check_suffix(path, to)
  tensors = lora_tensors(lora, to, dtype=dtype)
  note = "; ".join(filter(None, (_describe_folding(lora, file_format, tensors), _describe_dora(lora))))
  entries = {**lora.file_metadata(), **SCALE_OF_ONE, SEAL: OPEN_SEAL}
  if path.suffix.lower() == ".ckpt":
    require_torch(path)
    # The two are published in reverse order: a kill in between leaves no sidecar without a file.
    with atomic_write(sidecar_path(path)) as sidecar, atomic_write(path) as weights:
      save_torch(weights, tensors)
      write_sidecar(sidecar, entries)
      seal_file(sidecar, weights)
    return note
  with atomic_write(path) as weights:
    save_safetensors(weights, tensors, metadata={**file_format.metadata(lora), **entries})
    seal_file(weights)
  return note


def _describe_folding(lora: LoRAWeights, file_format: LoRAFormat, tensors: Mapping[str, np.ndarray]) -> str:
  """Describes which tensors are float32 because alpha is folded into them, or how much their dtype rounds them."""
  widened, dtypes, total, lost = 0, set(), 0.0, 0.0
  for tensor, change in lora.changes.items():
    if file_format.alpha is not Alpha.FOLDED or not isinstance(change, LoRALayer) or change.alpha == change.rank:
      continue
    stored = tensors[file_format.module_name(tensor) + file_format.up]
    folded = change.fold_up().astype(np.float32)
    if stored.dtype != np.float32:
      dtypes.add(str(stored.dtype))
      total += float(np.sum(folded**2, dtype=np.float64))
      lost += float(np.sum((stored.astype(np.float32) - folded) ** 2, dtype=np.float64))
    elif change.up.dtype != np.float32:
      widened += 1
      dtypes.add(str(change.up.dtype))
  names = f"alpha is multiplied into lora_B, which {' and '.join(sorted(dtypes))}"
  if lost:
    return f"{names} rounds by {100 * (lost / total) ** 0.5:.2g} %"
  return f"{names} would round: {widened} of these tensors are float32" if widened else ""


def _describe_dora(lora: LoRAWeights) -> str:
  """Describes how many DoRA changes ComfyUI applies differently; no other format that is written has DoRA."""
  count = sum(isinstance(change, DoRALayer) and change.axis == "out" for change in lora.changes.values())
  if not count:
    return ""
  return (
    f"{count} DoRA changes have a magnitude per output channel, as all of PEFT's: ComfyUI divides by the norms of the "
    "weight without the change, so it applies them differently from PEFT and univid_jax"
  )
