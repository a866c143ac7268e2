"""Where the weights of a model come from, which identifies stored samples and reports."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from univid_jax.checkpoints.built_in import require_checkpoint
from univid_jax.checkpoints.checksums import digest_contents
from univid_jax.checkpoints.experts import join_weight, named_expert, split_expert
from univid_jax.checkpoints.lora.scaling import find_config
from univid_jax.checkpoints.lora.sidecar import sidecar_path
from univid_jax.checkpoints.pretrained import CONFIGS, TOKENIZER, PretrainedCheckpoint, is_converted, require_no_step
from univid_jax.checkpoints.run import read_run, require_run
from univid_jax.checkpoints.saved import SavedCheckpoints
from univid_jax.checkpoints.trained import find_lora_steps, find_step
from univid_jax.core.options import OnDamaged, Quantize, parse_option
from univid_jax.core.paths import bucket_errors, is_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
  """The weights of a model.

  Attributes:
    checkpoint: a converted checkpoint or the workdir of a run, as the user named it.
    step: step of the workdir's checkpoint; None for a converted one.
    loras: LoRAs on top with their weights, as the user named them.
    distillation: distillation LoRAs on top of these, likewise; part of the model, or of one variant of an evaluation.
    lora_steps: steps of the checkpoints of LoRAs that are workdirs, by path; for `load_pipeline`.
    quantize: how the base is quantised; None if as stored.
    is_verified: whether `load_pipeline` verifies the weights, so that their listed checksums identify them.
  """

  checkpoint: str
  step: int | None = None
  loras: Sequence[tuple[str, float]] = ()
  distillation: Sequence[tuple[str, float]] = ()
  lora_steps: Mapping[str, int] = dataclasses.field(default_factory=dict)
  quantize: Quantize | None = None
  is_verified: bool = False

  @classmethod
  def resolve(
    cls,
    checkpoint: str,
    *,
    step: int | str | None = None,
    loras: Sequence[tuple[str, float]] = (),
    distillation: Sequence[tuple[str, float]] | None = None,
    lora_steps: Mapping[str, int] | None = None,
    quantize: str | None = None,
    verify_weights: bool = True,
    on_damaged_checkpoint: str = OnDamaged.FALLBACK,
  ) -> "Origin":
    """Returns the origin of a model, with the number of the step that `step` means, and those of LoRA runs.

    Args: see `load_pipeline`; `lora_steps` are those of LoRAs that were read already.

    Raises:
      FileNotFoundError: there is no such checkpoint, run or step.
      UserError: the checkpoint is not a path, a converted one is given with a step, or `on_damaged_checkpoint` is
        unknown.
      DamagedError: the checkpoint of the step is damaged.
    """
    require_checkpoint(checkpoint)
    on_damaged = parse_option(OnDamaged, "on_damaged_checkpoint", on_damaged_checkpoint)
    found = None
    if is_converted(checkpoint):
      require_no_step(checkpoint, step)
    else:
      require_run(checkpoint)
      # Verified now only to choose the newest intact one: loading verifies the weights.
      verify = verify_weights and step in (None, "best")
      found = find_step(checkpoint, step, verify=verify, on_damaged=on_damaged)
    steps = dict(lora_steps or {})
    others = {split_expert(path)[1] for path, _ in (*loras, *(distillation or ()))} - set(steps)
    return cls(
      checkpoint=checkpoint,
      step=found,
      loras=tuple(loras),
      distillation=tuple(distillation or ()),
      lora_steps=steps | find_lora_steps(sorted(others), verify=verify_weights),
      quantize=None if quantize is None else parse_option(Quantize, "quantize", quantize),
      is_verified=verify_weights,
    )

  @functools.cached_property
  def checksums(self) -> Mapping[str, str]:
    """Checksums of everything that determines samples, by component; they do not depend on names.

    Read this property after `load_pipeline`, which has then verified the files, so that they are not read again.
    """
    checksums: dict[str, str] = {}
    base: str | None = self.checkpoint
    method = self.quantize
    if self.step is not None:
      record = read_run(self.checkpoint)
      assert record is not None
      base = record.config.init_from or None
      method = method or record.config.base.quantize
      checksums["trained"] = self._digest_step(self.checkpoint, self.step)
    if base is not None:
      checkpoint = PretrainedCheckpoint.open(base)
      checksums |= checkpoint.checksums
      if checkpoint.transformers:
        method = checkpoint.quantization(checkpoint.transformers[0], method or Quantize.NONE)
    if method and method != Quantize.NONE:
      checksums["quantize"] = str(method)  # checksums are those of the weights before quantisation
    named = [(f"lora {number}", lora) for number, lora in enumerate(self.loras)]
    # Stored samples and ratios are looked up by these names.
    named += [(f"accelerator {number}", lora) for number, lora in enumerate(self.distillation)]
    for name, (path, weight) in named:
      expert, file = split_expert(path)
      with bucket_errors(file):
        beside = find_config(epath.Path(file)), sidecar_path(epath.Path(file))  # these also determine how it is applied
        present = [each for each in beside if each and is_file(each)]
      digests = [self._digest_lora(file), *map(self._digest, present)]
      if "transformer_2" in checksums:  # the name may decide, so that moving the file changes the model
        expert = expert or named_expert(file)
      checksums[name] = f"{expert or ''} {' + '.join(digests)} x {weight:g}".strip()
    return checksums

  def _digest_step(self, workdir: str, step: int) -> str:
    folder = SavedCheckpoints(workdir).folder(step)
    return self._digest(folder / "model", folder)

  def _digest_lora(self, path: str) -> str:
    if path in self.lora_steps:
      return self._digest_step(path, self.lora_steps[path])
    return self._digest(epath.Path(path), epath.Path(path))

  def _digest(self, path: epath.Path, verified: epath.Path | None = None) -> str:
    """Returns the checksum of a file or folder inside the folder `verified`, which `load_pipeline` verifies."""
    return digest_contents(path, listed_in=verified if self.is_verified else None)

  @property
  def weights(self) -> dict[str, str]:
    """The checksums of weights alone."""
    return {name: value for name, value in self.checksums.items() if name not in (CONFIGS, TOKENIZER)}

  def to_json(self) -> dict[str, Any]:
    named = {
      name: [join_weight(path, weight) for path, weight in loras]
      for name, loras in {"lora": self.loras, "accelerate": self.distillation}.items()
      if loras or name == "lora"
    }
    steps = {"lora_steps": dict(self.lora_steps)} if self.lora_steps else {}
    return {"checkpoint": self.checkpoint, "step": self.step, **named, **steps, "checksums": dict(self.checksums)}
