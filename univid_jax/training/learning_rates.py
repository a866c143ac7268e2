"""The learning rate of a run's steps, computed on the host, without compiling a program or waiting for a device."""

import dataclasses
import math

from univid_jax.config.schema import OptimizerConfig, RunConfig
from univid_jax.core.options import LearningRateSchedule, OptimizerName, TrainedExpert
from univid_jax.training.expert_schedule import ExpertSchedule
from univid_jax.training.guard import GuardState
from univid_jax.training.state import TrainState


def schedule_factor(config: OptimizerConfig, num_steps: int, count: int) -> float:
  """Returns what `optimizer.make_schedule` computes on the devices, after `count` steps."""
  warmup = config.warmup_steps
  if count < warmup:
    return count / warmup
  after_warmup, taken = max(num_steps - warmup, 1), count - warmup
  if config.schedule == LearningRateSchedule.CONSTANT:
    return 1.0
  if config.schedule == LearningRateSchedule.COSINE:
    return (1 + math.cos(math.pi * min(taken / after_warmup, 1))) / 2
  length = min(max(int(num_steps * config.decay_fraction), 1), after_warmup)
  return min(max((after_warmup - taken) / length, 0.0), 1.0)


@dataclasses.dataclass(frozen=True)
class LearningRates:
  """The learning rates of a run: those for `optimizer.learning_rate`, to which all others are proportional.

  With Muon, adapters have `optimizer.adam_learning_rate` alone.

  Attributes:
    optimizer: the config of the optimizer.
    num_steps: number of steps of the run.
    expert: which transformers are trained.
    alternation: which of two experts each step trains, if both are trained.
  """

  optimizer: OptimizerConfig
  num_steps: int
  expert: TrainedExpert
  alternation: ExpertSchedule | None

  @classmethod
  def from_config(cls, config: RunConfig) -> "LearningRates":
    is_both = config.model.expert == TrainedExpert.BOTH
    alternation = ExpertSchedule.from_config(config) if is_both else None
    optimizer = config.optimizer
    if optimizer.name == OptimizerName.MUON and config.lora.enabled:  # no adapter is one of Muon's matrices
      optimizer = dataclasses.replace(optimizer, learning_rate=optimizer.adam_learning_rate)
    return cls(optimizer, config.num_steps, config.model.expert, alternation)

  def of_last_step(self, step: int, state: TrainState) -> float | None:
    """Returns the rate of the last step or, if that was skipped, of the last one before that was not.

    Args:
      step: the number of steps taken, at least 1.
      state: the state after them; read only if steps can be skipped, since the schedule does not count those.

    Returns:
      The rate; None if all steps were skipped.
    """
    part = self._find_part(step)
    count = self._count_used(step, state, part)
    return self._rate(part, count - 1) if count else None

  def describe_change(self, num_steps: int, step: int, state: TrainState) -> str | None:
    """Returns a line about a schedule that ends at another step in a resumed run; None if it does not.

    Args:
      num_steps: number of steps of the run before.
      step: the number of steps taken.
      state: the state after them.
    """
    is_constant = self.optimizer.schedule == LearningRateSchedule.CONSTANT
    if is_constant or num_steps == self.num_steps or not 0 < step < self.num_steps:
      return None
    part = self._find_part(step + 1)
    count = self._count_used(step, state, part)
    before = dataclasses.replace(self, num_steps=num_steps)._rate(part, max(count - 1, 0))
    return (
      f"the learning rate is scheduled for {self.num_steps} steps now, not {num_steps}: it was {before:.3g} and is "
      f"{self._rate(part, count):.3g} from step {step + 1} on"
    )

  def _rate(self, part: int, count: int) -> float:
    total = self._count_steps(self.num_steps)[part]
    return self.optimizer.learning_rate * schedule_factor(self.optimizer, total, count)

  def _find_part(self, step: int) -> int:
    """Returns which of the trained transformers a step, counted from 1, trains."""
    return 0 if self._count_steps(step)[0] > self._count_steps(step - 1)[0] else 1

  def _count_steps(self, step: int) -> tuple[int, ...]:
    """Returns how many of the first steps train each of the trained transformers."""
    return (step,) if self.alternation is None else self.alternation.count_steps(step)

  def _count_used(self, step: int, state: TrainState, part: int) -> int:
    """Returns how many of the first steps were not skipped and trained a transformer."""
    opt_state = self.expert.split_tree(state.opt_state)[part]
    return int(opt_state.num_used) if isinstance(opt_state, GuardState) else self._count_steps(step)[part]
