"""The flags that say what is sampled and how, for the commands that do it."""

import dataclasses
import logging
import re
from typing import TYPE_CHECKING

from univid_jax.cli.flags import CommandFlags, UsageError
from univid_jax.core.dims import is_clip_length, nearest_clip_lengths
from univid_jax.core.errors import UserError
from univid_jax.core.options import MAX_FPS, MAX_SEED, MAX_STEPS, Attention, ClipFit, SolverName
from univid_jax.core.text import join_words

if TYPE_CHECKING:
  from univid_jax import Pipeline
  from univid_jax.checkpoints.origin import Origin
  from univid_jax.data.clips import ClipFormat
  from univid_jax.diffusion.step_cache import StepCache
  from univid_jax.inference.distillation_loras import DistillationLoRAs
  from univid_jax.inference.plan import SamplingOptions

log = logging.getLogger(__name__)


class SamplingFlags:
  """The flags of a model, of the clips that it is shown, and of solver, noise levels and guidance."""

  def __init__(self, command: CommandFlags, *, clips_required: bool = True):
    self._define_model(command)
    self._define_sentence(command, clips_required=clips_required)
    self._define_steps(command)

  def _define_model(self, command: CommandFlags) -> None:
    self._command = command
    self.checkpoint, self._lora, self._step = command.checkpoint(), command.lora(), command.step()
    self.verification = command.run_verification()
    help_text = "Add LoRAs to the weights: faster, equal up to rounding."
    self.merge_lora = command.switch("merge_lora", False, help_text)
    self._quantize, dtype, self._skip_unmatched = command.quantize(), command.dtype(), command.lora_skip_unmatched()
    options = [
      dtype,
      self.merge_lora,
      self._skip_unmatched,
      command.choice("attention", None, list(Attention), "Default: what the model was trained with."),
      command.choice(
        "context_timestep",
        None,
        ["target", "zero"],
        "Timestep of the context; default: what the model was trained with.",
      ),
      command.offload_inactive(),
    ]
    self._loading = options

  def _define_sentence(self, command: CommandFlags, *, clips_required: bool) -> None:
    help_text = "The context in order: A, A', B, or any odd number of clips; a name with a comma in double quotes."
    self.clips = command.paths("clips", None if clips_required else [], help_text, required=clips_required)
    help_text = "Text of the sentence; default: that of training, if all its tasks had the same, else none."
    self.prompt = command.string("prompt", None, help_text)
    help_text = "Use the prompt of this task: a task of training, or one of the paper, such as depth map."
    self.task = command.string("task", None, help_text)
    self.negative_prompt = command.string("negative_prompt", "", "What guidance moves away from.")
    self._size = command.string(
      "size", None, "HEIGHTxWIDTH in pixels, the height first, or `input` for the size of B; default: as in training."
    )
    help_text = "Frames of B', 4n + 1, and of videos in the context; default: as in training, or all of a longer B."
    self.num_frames = command.integer("num_frames", None, help_text, lower_bound=1)
    help_text = "How clips are brought to the size; default: as in training."
    self._fit = command.choice("fit", None, list(ClipFit), help_text)
    help_text = "Frame rate that videos are resampled to; 0 keeps theirs; default: as in training."
    self._fps = command.number("fps", None, help_text)
    self.seed = command.integer("seed", 0, "Seed of the noise.", lower_bound=-MAX_SEED - 1, upper_bound=MAX_SEED)

  def _define_steps(self, command: CommandFlags) -> None:
    help_text = "euler (default) is the reference's; unipc needs fewer steps; distilled has the four of distillations."
    self._solver = command.choice("solver", None, list(SolverName), help_text)
    help_text = "Sampling steps; default: those of the model's evaluation (50 for Wan), or of the solver."
    self._steps = command.integer("steps", None, help_text, lower_bound=1, upper_bound=MAX_STEPS)
    help_text = "The noise level before each Euler step, descending within (0, 1], instead of --steps and --shift."
    self._sigmas = command.strings("sigmas", [], help_text)
    help_text = "Shift of the noise levels toward noise; default: as in training."
    self._shift = command.number("shift", None, help_text)
    help_text = "Classifier-free guidance; 1 (default) is none. LOW,HIGH: one for each of two experts, low noise first."
    self._guidance_scale = command.string("guidance_scale", None, help_text)
    help_text = "FROM,TO: noise levels with guidance, from 0 to 1; steps at other levels take half the time."
    self._guidance_range = command.string("guidance_range", None, help_text)

  @property
  def steps(self) -> "SamplingOptions":
    """What was asked for, except for the step cache.

    Raises:
      UsageError: a flag cannot be read.
    """
    from univid_jax.cli import sampling
    from univid_jax.inference.plan import SamplingOptions

    scale, limits = self._guidance_scale.value, self._guidance_range.value
    return SamplingOptions(
      num_inference_steps=self._steps.value,
      shift=self._shift.value,
      solver=self._solver.value,
      sigmas=sampling.parse_sigmas(self._sigmas.value),
      guidance_scale=sampling.parse_guidance_scale(scale) if scale else None,
      guidance_range=sampling.parse_guidance_range(limits) if limits else None,
    )

  @property
  def keep_size(self) -> bool:
    """Whether results have the size of their query."""
    return self._size.value == "input"

  @property
  def fps(self) -> float | None:
    """Frame rate that videos are resampled to, if it is given."""
    return self._fps.value

  def check(self, *, is_accelerated: bool = False) -> None:
    """Raises UsageError if flags exclude each other, one cannot be read, or has no effect.

    Args:
      is_accelerated: whether there is a distillation, whose LoRAs count, too.
    """
    from univid_jax.cli import sampling

    if self.prompt.value is not None and self.task.value is not None:
      raise UsageError("--prompt and --task exclude each other")
    count = self.num_frames.value
    if count is not None and not is_clip_length(count):
      raise UsageError(f"--num_frames must be 4n + 1 ({join_words(nearest_clip_lengths(count), 'or')}), got {count}")
    if self.fps is not None and not 0 <= self.fps <= MAX_FPS:
      raise UsageError(f"--fps must be from 0 to {MAX_FPS:g}, got {self.fps}")
    self._parse_size()
    if not (self._lora.value or is_accelerated):
      self._command.refuse("no LoRA is added to the model", [self._skip_unmatched.name])
    sampling.group_loras(self._split_loras())

  def check_steps(
    self, distillation: "DistillationLoRAs | None" = None, *, step_cache: "StepCache | None" = None
  ) -> None:
    """Raises UsageError if what is asked of the steps contradicts itself or the distillation, or has no effect."""
    import numpy as np

    from univid_jax.inference.plan import SamplingPlan

    try:
      options = dataclasses.replace(self.steps, step_cache=step_cache)
      plan = SamplingPlan.from_options(options, distillation and distillation.kind)
    except UserError as error:
      if isinstance(error, UsageError):
        raise
      raise UsageError(_name_flags(str(error))) from error
    if self.negative_prompt.value and np.all(np.asarray(plan.guidance_scale) == 1):
      remedy = "leave it out with --accelerate" if distillation else "give a --guidance_scale other than 1"
      raise UsageError(f"--negative_prompt needs guidance: {remedy}")

  def load(self, distillation: "DistillationLoRAs | None" = None) -> "tuple[Pipeline, Origin]":
    """Loads the model, on the devices of this process, after checking what its configs tell about size and guidance."""
    from univid_jax.cli.loading import load_model

    self._check_shape()
    return load_model(
      self.checkpoint.value,
      step=self._step.value,
      loras=self._split_loras(),
      distillation=distillation,
      quantize=self._quantize.value,
      verification=self.verification.value,
      accelerate=distillation,
      **{flag.name: flag.value for flag in self._loading},
    )

  def _check_shape(self) -> None:
    """Checks, as far as the model's configs tell, that it can be sampled in this way.

    Raises:
      UsageError: the size or the guidance scales are not for this model.
      UserError: its tokenizer is missing.
    """
    from univid_jax.cli.model_shape import ModelShape

    size, scale = self._parse_size(), self.steps.guidance_scale
    shape = ModelShape.read(self.checkpoint.value)
    if shape is None:
      return
    shape.check_tokenizer()
    try:
      if scale is not None:
        shape.check_guidance(scale)
    except UserError as error:
      raise UsageError(_name_flags(str(error))) from error
    try:
      if size:
        shape.check_size(size)
    except UserError as error:
      raise UsageError(f"--size={self._size.value}: {error}") from error

  def choose_prompt(self, pipeline: "Pipeline") -> str:
    """Returns the prompt that is given, or the one that the model was trained with, if there is only one."""
    from univid_jax.cli.prompts import only_prompt, task_prompt

    if self.prompt.value is not None:
      return self.prompt.value
    if self.task.value is None:
      return only_prompt(pipeline.usage) if pipeline.encoders.has_text_encoder else ""
    prompt = task_prompt(self.task.value, pipeline.usage.prompts)
    if not prompt:
      log.info("--task=%s changes nothing: the model was trained on this task without a prompt", self.task.value)
    return prompt

  def choose_format(self, pipeline: "Pipeline") -> "ClipFormat":
    """Returns the form in which clips are read."""
    from univid_jax.cli import sampling

    return sampling.choose_format(
      pipeline.clip_format,
      size=self._parse_size(),
      num_frames=self.num_frames.value,
      fit=self._fit.value,
      fps=self._fps.value,
    )

  def _split_loras(self) -> list[tuple[str, float]]:
    """Returns the LoRAs as they were named, with their weights."""
    from univid_jax.checkpoints.experts import split_loras

    return split_loras(self._lora.value)

  def _parse_size(self) -> tuple[int, int] | None:
    from univid_jax.cli import sampling

    return sampling.parse_size(self._size.value) if self._size.value and not self.keep_size else None


def _name_flags(message: str) -> str:
  """Names flags in a message about arguments of Python, which stand at its beginning or after "replace" or "give a"."""
  from univid_jax.inference.plan import SamplingOptions

  names = "|".join(field.name for field in dataclasses.fields(SamplingOptions))
  message = re.sub(rf"(^|\breplace |\bgive a )({names})\b", r"\1--\2", message)
  return message.replace("--num_inference_steps", "--steps")
