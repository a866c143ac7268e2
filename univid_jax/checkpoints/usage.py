"""How a model was trained, and so must be run; stored with every LoRA that a run writes, in any format."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

from univid_jax.config.drawn import DrawnSentences
from univid_jax.config.schema import RunConfig
from univid_jax.core.dims import MAX_POSITION, is_clip_length
from univid_jax.core.errors import UserError
from univid_jax.core.json_files import parse_json
from univid_jax.core.options import MAX_FPS, MAX_SHIFT, MAX_STEPS, Attention, ClipFit, ContextTimestep, Expert, Quantize
from univid_jax.models.variants import VARIANTS

# The entry that identifies files of this project; other software may use the same names for other things.
SOFTWARE = "software"
SOFTWARE_NAME = "univid_jax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
  """Settings of training that sampling adopts unless told otherwise; the defaults are the paper's.

  Differences in the base are only reported.

  Attributes:
    attention: see `Attention`.
    context_timestep: see `ContextTimestep`; AUTO if it is not known.
    clip_gap: see `ModelConfig`.
    shift: shift of the noise levels towards noise.
    num_inference_steps: inference steps of evaluation.
    sizes: (height, width) in pixels: the size of clips, then the other buckets, if there were clips of such sizes.
    num_frames: frames of a video.
    fit, fps: see `DataConfig`; clips of computed tasks, grids and ARC count as cropped.
    base_model: name or shape of the base; "" if it is not known.
    base_checksum: checksum of the base's transformer; "" without a base, and for both experts together.
    base_quantize: how the base was quantised in training.
    prompts: prompts of the tasks.
    own_prompts: whether records may have had prompts of their own.
    contexts: which clips are videos, see `core.contexts`; empty if that is not known, as for records that list clips.
    clip_counts: numbers of clips of a sentence, the target included; empty if they are not known.
    expert: HIGH or LOW if it was trained for one expert, else None.
    is_known: whether all values come from a training run; False for Wan's releases and LoRA files of earlier versions.
  """

  attention: Attention = Attention.FULL
  context_timestep: ContextTimestep = ContextTimestep.AUTO
  clip_gap: int = 0
  shift: float = 5.0
  num_inference_steps: int = 50
  sizes: tuple[tuple[int, int], ...] = ((480, 832),)
  num_frames: int = 17
  fit: ClipFit = ClipFit.CROP
  fps: float = 0.0
  base_model: str = ""
  base_checksum: str = ""
  prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  own_prompts: bool = False
  contexts: tuple[str, ...] = ()
  clip_counts: tuple[int, ...] = ()
  expert: Expert | None = None
  base_quantize: Quantize = Quantize.NONE
  is_known: bool = dataclasses.field(default=True, compare=False)

  @classmethod
  def from_config(
    cls,
    config: RunConfig,
    *,
    context_timestep: ContextTimestep = ContextTimestep.AUTO,
    expert: Expert | None = None,
    base_model: str = "",
    base_checksum: str = "",
    prompts: Mapping[str, str] | None = None,
    adapts_clips: bool = True,
  ) -> "Usage":
    """Returns the usage of a run; `context_timestep` also depends on its base, and `adapts_clips` on its data."""
    data = config.data
    drawn = DrawnSentences.from_config(data)
    return cls(
      attention=config.model.attention,
      context_timestep=context_timestep,
      expert=expert,
      clip_gap=config.model.clip_gap,
      shift=config.flow.shift,
      num_inference_steps=config.eval.num_inference_steps,
      sizes=data.sizes if adapts_clips else data.sizes[:1],
      num_frames=data.num_frames,
      fit=data.fit if adapts_clips else ClipFit.CROP,
      fps=data.fps,
      base_model=base_model,
      base_checksum=base_checksum,
      base_quantize=config.base.quantize,
      prompts=dict(prompts or {}),
      own_prompts=drawn.lists_prompts,
      contexts=drawn.contexts,
      clip_counts=drawn.clip_counts,
    )

  @property
  def has_own_base(self) -> bool:
    """Whether this project trained the base, judging by its name; no other program can load such a base."""
    return self.base_model not in ("", "custom", *VARIANTS)

  def to_metadata(self) -> dict[str, str]:
    """Returns text entries for the header of a file."""
    return {
      "attention": str(self.attention),
      "context_timestep": str(self.context_timestep),
      "clip_gap": str(self.clip_gap),
      "shift": _format(self.shift),
      "num_inference_steps": str(self.num_inference_steps),
      "sizes": " ".join(f"{height}x{width}" for height, width in self.sizes),
      "num_frames": str(self.num_frames),
      "fit": str(self.fit),
      "fps": _format(self.fps),
      "base_model": self.base_model,
      "base_checksum": self.base_checksum,
      "prompts": json.dumps(self.prompts, ensure_ascii=False),
      "expert": str(self.expert or ""),
      **({"contexts": " ".join(self.contexts)} if self.contexts else {}),
      **({"clip_counts": " ".join(map(str, self.clip_counts))} if self.clip_counts else {}),
      **({"own_prompts": "true"} if self.own_prompts else {}),
      **({} if self.base_quantize == Quantize.NONE else {"base_quantize": str(self.base_quantize)}),
    }

  @classmethod
  def from_metadata(cls, metadata: Mapping[str, str], *, source: str) -> "Usage | None":
    """Reads the entries of a file; missing ones, as in files of earlier versions, get the defaults.

    Args:
      metadata: text entries of the header.
      source: names the file in messages.

    Returns:
      The usage; None for files of other software, and for converted LoRAs of other software.

    Raises:
      UserError: an entry is malformed.
    """
    if not metadata.get(SOFTWARE, "").startswith(SOFTWARE_NAME) or "attention" not in metadata:
      return None
    values = {}
    for field, parse in _PARSERS.items():
      if field in metadata:
        try:
          values[field] = parse(metadata[field])
        except (ValueError, TypeError, AttributeError) as error:
          raise UserError(f"the header of {source} has {field} = {metadata[field]!r}: {error}") from error
    if "context_timestep" not in values:  # files of earlier versions, which supported only Wan2.1
      causal = values.get("attention") == Attention.CONTEXT_CAUSAL
      values["context_timestep"] = ContextTimestep.ZERO if causal else ContextTimestep.TARGET
    return cls(**values, is_known="sizes" in values)


ENTRIES = tuple(field.name for field in dataclasses.fields(Usage))


def merge_usages(usages: Sequence[tuple[str, Usage]]) -> tuple[Usage | None, list[str]]:
  """Returns how several LoRAs are run together: in the way that the first was trained.

  Args:
    usages: names of the LoRAs, with their usages.

  Returns:
    Their common usage, None if there are none, and lines that describe where others differ from it.

  Raises:
    UserError: they were trained with different attention or context timesteps.
  """
  if not usages:
    return None, []
  (first, chosen), *others = usages
  prompts, own_prompts = dict(chosen.prompts), any(usage.own_prompts for _, usage in usages)
  notes = []
  for name, usage in others:
    for field in ("attention", "context_timestep"):
      values = [getattr(each, field) for each in (chosen, usage)]
      if values[0] != values[1]:
        raise UserError(
          f"{first} was trained with {field} {values[0]} and {name} with {values[1]}: choose one with --{field}= of "
          f"sample, or {field}= of load_pipeline"
        )
    prompts = {**usage.prompts, **prompts}
    for field in ("clip_gap", "shift", "num_inference_steps", "sizes", "num_frames", "fit", "fps"):
      values = [getattr(each, field) for each in (chosen, usage)]
      if values[0] != values[1]:
        notes.append(f"{first} was trained with {field} {values[0]}, which is used, and {name} with {values[1]}")
  return dataclasses.replace(chosen, prompts=prompts, own_prompts=own_prompts), notes


def _format(number: float) -> str:
  """Formats a number as the shortest text that is read as the same number: 8, 0.1, 23.976023976023978."""
  return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def _parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
  sizes = []
  for size in text.split():
    height, _, width = size.partition("x")
    sizes.append((int(height), int(width)))
  if not sizes or min(map(min, sizes)) < 1:
    raise ValueError("it must be sizes HEIGHTxWIDTH")
  return tuple(sizes)


def _parse_prompts(text: str) -> dict[str, str]:
  prompts = parse_json(text)
  if not isinstance(prompts, dict) or not all(isinstance(value, str) for value in prompts.values()):
    raise ValueError("it must be an object of texts")
  return prompts


def _parse_clip_gap(text: str) -> int:
  gap = int(text)
  if not 0 <= gap < MAX_POSITION:
    raise ValueError(f"it must be from 0 to {MAX_POSITION - 1}")
  return gap


def _parse_shift(text: str) -> float:
  shift = float(text)
  if not 0 < shift <= MAX_SHIFT:
    raise ValueError(f"it must be above 0 and at most {MAX_SHIFT:g}")
  return shift


def _parse_steps(text: str) -> int:
  count = int(text)
  if not 1 <= count <= MAX_STEPS:
    raise ValueError(f"it must be from 1 to {MAX_STEPS}")
  return count


def _parse_fps(text: str) -> float:
  fps = float(text)
  if not 0 <= fps <= MAX_FPS:
    raise ValueError(f"it must be from 0 to {MAX_FPS:g}")
  return fps


def _parse_num_frames(text: str) -> int:
  count = int(text)
  if not is_clip_length(count):
    raise ValueError("it must be 4n + 1")
  return count


def _parse_expert(text: str) -> Expert | None:
  if text not in ("", Expert.HIGH, Expert.LOW):
    raise ValueError("it must be high, low or empty")
  return Expert(text) if text else None


_PARSERS = {
  "attention": Attention,
  "context_timestep": ContextTimestep,
  "clip_gap": _parse_clip_gap,
  "shift": _parse_shift,
  "num_inference_steps": _parse_steps,
  "sizes": _parse_sizes,
  "num_frames": _parse_num_frames,
  "fit": ClipFit,
  "fps": _parse_fps,
  "base_model": str,
  "base_checksum": str,
  "prompts": _parse_prompts,
  "own_prompts": lambda text: text == "true",
  "expert": _parse_expert,
  "base_quantize": Quantize,
  "contexts": lambda text: tuple(text.split()),
  "clip_counts": lambda text: tuple(map(int, text.split())),
}


def describe_mismatch(usage: Usage, checksum: str, *, source: str) -> str | None:
  """Returns a line if a LoRA was trained on weights other than a base's, else None."""
  if not usage.base_checksum or not checksum or usage.base_checksum == checksum:
    return None
  name = f" ({usage.base_model})" if usage.base_model else ""
  return f"{source} was trained on other base weights{name}: their checksums differ, perhaps only in dtype"
