"""Where the weights of a model come from: what stored samples and reports are identified by."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from univid_jax.checkpoints.checksums import has_checksums
from univid_jax.checkpoints.experts import named_expert, split_expert
from univid_jax.checkpoints.lora.folder import is_lora_folder
from univid_jax.checkpoints.lora.scaling import find_config
from univid_jax.checkpoints.pretrained import PretrainedCheckpoint, is_checkpoint
from univid_jax.checkpoints.run import read_run, require_run
from univid_jax.checkpoints.saved import SavedCheckpoints
from univid_jax.checkpoints.trained import find_step
from univid_jax.core.options import OnDamaged

_BLOCK_BYTES = 2**24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
  """The weights of a model.

  Attributes:
    checkpoint: a converted checkpoint or the workdir of a run, as the user named it.
    step: of the workdir's checkpoint; None for a converted one.
    loras: LoRAs on top with their weights, as the user named them.
  """

  checkpoint: str
  step: int | None = None
  loras: Sequence[tuple[str, float]] = ()

  @classmethod
  def of(
    cls,
    checkpoint: str,
    *,
    step: int | str | None = None,
    loras: Sequence[tuple[str, float]] = (),
    verify_weights: bool = True,
    on_damaged_checkpoint: str = OnDamaged.FALLBACK,
  ) -> "Origin":
    """Returns the origin of a model, with the number of the step that `step` stands for.

    Args: see `load_pipeline`.

    Raises:
      FileNotFoundError: there is no such checkpoint, run or step.
      DamagedError: the checkpoint of the step is damaged.
    """
    found = None
    if not (is_checkpoint(checkpoint) or has_checksums(checkpoint)):
      require_run(checkpoint)
      found = find_step(checkpoint, step, verify=verify_weights, on_damaged=OnDamaged(on_damaged_checkpoint))
    return cls(checkpoint=checkpoint, step=found, loras=tuple(loras))

  @functools.cached_property
  def checksums(self) -> Mapping[str, str]:
    """Checksums of everything that determines samples, by component; they do not depend on names."""
    checksums: dict[str, str] = {}
    base: str | None = self.checkpoint
    if self.step is not None:
      record = read_run(self.checkpoint)
      assert record is not None
      base = record.config.init_from or None
      checksums["trained"] = _digest(_step_folder(self.checkpoint, self.step))
    if base is not None:
      checkpoint = PretrainedCheckpoint.open(base)
      checksums |= {name: checkpoint.checksum(name) for name in checkpoint.info.components}
    for number, (path, weight) in enumerate(self.loras):
      expert, file = split_expert(path)
      config = find_config(Path(file))
      digests = [_digest(part) for part in (_lora_path(file), *([epath.Path(config)] if config else []))]
      if "transformer_2" in checksums:  # the name may decide, so that moving the file changes the model
        expert = expert or named_expert(file) or ""
      checksums[f"lora {number}"] = f"{expert} {' + '.join(digests)} x {weight:g}".strip()
    return checksums

  def to_json(self) -> dict[str, Any]:
    loras = [path if weight == 1 else f"{path}:{weight:g}" for path, weight in self.loras]
    return {"checkpoint": self.checkpoint, "step": self.step, "lora": loras, "checksums": dict(self.checksums)}


def _step_folder(workdir: str, step: int) -> epath.Path:
  return SavedCheckpoints(workdir).folder(step) / "model"


def _lora_path(path: str) -> epath.Path:
  if epath.Path(path).is_dir() and not is_lora_folder(path) and read_run(path) is not None:
    return _step_folder(path, find_step(path, None))
  return epath.Path(path)


def _digest(path: epath.Path) -> str:
  """Returns a SHA-256 of a file, or of the names and contents of all files in a folder."""
  sha = hashlib.sha256()
  for file in _walk(path):
    sha.update(str(file.relative_to(path) if file != path else "").encode() + b"\n")
    with file.open("rb") as stream:
      while block := stream.read(_BLOCK_BYTES):
        sha.update(block)
  return sha.hexdigest()


def _walk(path: epath.Path) -> list[epath.Path]:
  if not path.is_dir():
    return [path]
  return [file for part in sorted(path.iterdir()) for file in _walk(part)]
