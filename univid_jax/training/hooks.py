"""What happens between steps: summaries, validation, logging, checkpoints, stopping and profiling.

The loop calls its hooks in order after every step. Each hook reads the `StepEvent` and may add to its summary; later
hooks see what earlier ones added.
"""

import dataclasses
import logging
import time
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from univid_jax.checkpoints.run import Checkpointer
from univid_jax.config.schema import RunConfig
from univid_jax.core.errors import DivergedError
from univid_jax.core.protocols import Resumable
from univid_jax.data.rows.balancing import BatchLayout
from univid_jax.inference.distillation_loras import add_distillation
from univid_jax.inference.pipeline import Pipeline
from univid_jax.parallel.mesh import row_shards
from univid_jax.platform.chips import find_chip
from univid_jax.runtime.profiling import profiler_options
from univid_jax.runtime.supervisor import StopSignal, Supervisor
from univid_jax.training.balance import WorkCounter
from univid_jax.training.goodput import Activity, Goodput
from univid_jax.training.guard import MAX_SKIPPED_IN_A_ROW
from univid_jax.training.learning_rates import LearningRates
from univid_jax.training.metrics_writer import MetricsWriter
from univid_jax.training.setup import Run
from univid_jax.training.state import Params, TrainState
from univid_jax.training.validation import PREVIEWS_FOLDER, Validation, select_previews, write_previews

log = logging.getLogger(__name__)

PROFILE_FOLDER = "profile"
# The first steps of a process are not representative: they compile and fill caches.
PROFILE_AFTER = 2
LOWER_RATE = "lower config.optimizer.learning_rate and train in another --workdir"


@dataclasses.dataclass(kw_only=True)
class StepEvent:
  """A finished step.

  Attributes:
    step: its number, from 1.
    state: the state after the step.
    metrics: metrics of the step, on the devices.
    is_last: whether it is the last step of the run.
    logs, validates, is_checkpoint: what is due after this step.
    stop_signal: the signal because of which the run stops here; may arrive during validation.
    summary: means since the last summary; empty if none is due.
  """

  step: int
  state: TrainState
  metrics: dict[str, jax.Array]
  is_last: bool
  logs: bool
  validates: bool
  is_checkpoint: bool
  stop_signal: StopSignal | None = None
  summary: dict[str, float] = dataclasses.field(default_factory=dict)

  @classmethod
  def create(
    cls,
    config: RunConfig,
    step: int,
    state: TrainState,
    metrics: dict[str, jax.Array],
    stop_signal: StopSignal | None = None,
  ) -> "StepEvent":
    is_last = step == config.num_steps
    every = config.validation.every_steps
    return cls(
      step=step,
      state=state,
      metrics=metrics,
      is_last=is_last,
      logs=step % config.log_every == 0,
      validates=every > 0 and (is_last or step % every == 0) and not stop_signal,
      is_checkpoint=is_last or step % config.checkpoint.every_steps == 0,
      stop_signal=stop_signal,
    )

  @property
  def saves(self) -> bool:
    return self.is_checkpoint or self.ends

  @property
  def ends(self) -> bool:
    return self.is_last or self.stop_signal is not None


@runtime_checkable
class Hook(Protocol):
  """Runs after every step."""

  def __call__(self, event: StepEvent) -> None: ...


class Summarize:
  """Averages metrics since the last summary, measures speed, and stops a run whose loss, gradient or parameters are
  not finite.

  Runs before a checkpoint is saved, so that a bad state never replaces a good checkpoint. Adds `learning_rate` (see
  `LearningRates.of_last_step`), `step_time` in seconds, `tokens_per_second` without padding, `balance` and, if the
  chip's peak is known, the model FLOPs utilisation `mfu`.
  """

  def __init__(self, run: Run, bar: tqdm):
    config, mesh = run.config, run.mesh
    self._bar, self._rates = bar, LearningRates.from_config(config)
    layout = BatchLayout.from_config(config.rows, row_shards(mesh))
    self._work = WorkCounter(shape=run.shape, lora_rank=config.lora.rank, rows=config.rows, layout=layout)
    self._tokens = layout.num_rows * config.rows.num_tokens
    chip = find_chip(mesh.devices.flat[0])
    self._peak = chip.flops * mesh.size if chip else None
    self._pending: list[dict[str, jax.Array]] = []
    self.restart_clock()

  def restart_clock(self) -> None:
    """Excludes the time since the last summary from the next."""
    self._since = time.monotonic()

  def __call__(self, event: StepEvent) -> None:
    self._pending.append(event.metrics)
    self._bar.update()
    if not (event.logs or event.validates or event.saves):
      return
    values = jax.device_get(self._pending)
    summary = self._average(event.step, values) | {"balance": self._work.balance(values)}
    for metric, name in (("loss", "loss"), ("grad_norm", "gradient")):
      if not np.isfinite(summary.get(metric, 0)):
        raise DivergedError(f"the {name} is not finite by step {event.step}: {LOWER_RATE}")
    if not event.state.is_finite():
      raise DivergedError(f"the parameters are not finite after step {event.step}: {LOWER_RATE}")
    seconds = (time.monotonic() - self._since) / len(self._pending)
    self._pending.clear()
    self.restart_clock()
    event.summary |= self._measure(summary, seconds)
    if (rate := self._rates.of_last_step(event.step, event.state)) is not None:
      event.summary["learning_rate"] = rate
    self._bar.set_postfix_str(_describe(event.summary), refresh=False)

  def _average(self, step: int, values: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Returns the means of metrics, without loss and gradient norm of skipped steps, and counts skipped steps."""
    used = [metrics for metrics in values if not metrics.get("skipped")]
    summary = {}
    for name in values[0]:
      found = used if name in ("loss", "grad_norm") else values
      if found:
        summary[name] = float(np.mean([np.sum(metrics[name]) for metrics in found]))
    if "skipped" in summary:
      summary["skipped"] = float(len(values) - len(used))
      del summary["skipped_in_a_row"]
    if len(used) < len(values):
      log.warning(
        "by step %d: skipped %d of %d steps, see optimizer.on_bad_step", step, len(values) - len(used), len(values)
      )
      if max(int(metrics["skipped_in_a_row"]) for metrics in values) >= MAX_SKIPPED_IN_A_ROW:
        raise DivergedError(
          f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped by step {step}: lower config.optimizer.learning_rate "
          "or raise config.optimizer.skip_norm, in another --workdir"
        )
    return summary

  def _measure(self, summary: dict[str, float], seconds: float) -> dict[str, float]:
    attended, attended_text, targets = (summary.pop(name) for name in ("attended", "attended_text", "targets"))
    tokens = summary["fill_rate"] * self._tokens
    summary |= {"step_time": seconds, "tokens_per_second": tokens / seconds}
    if self._peak:
      work = self._work.count_used(tokens=tokens, attended=attended, attended_text=attended_text, targets=targets)
      summary["mfu"] = work / seconds / self._peak
    return summary


class Validate:
  """Adds the validation loss to the summary and writes previews; frees the encoders' memory afterwards.

  A signal interrupts it, so that the state is saved in time.

  Args:
    run: the run.
    summarize: its clock excludes validation.
    supervisor: decides whether to go on.
    goodput: goodput of the run.
  """

  def __init__(self, run: Run, summarize: Summarize, supervisor: Supervisor, goodput: Goodput):
    self._run, self._summarize, self._supervisor, self._goodput = run, summarize, supervisor, goodput
    self._options = run.config.validation
    self._pipeline: Pipeline | None = None
    self._distillation = run.distillation
    self._previewed = select_previews(run.validation, run.config)
    if not run.data.held_out:
      log.info("validation: too little data to hold any out, so the loss is on training sentences")
    self._validation = Validation(run.config, run.spec, run.validation, run.features, run.mesh)
    run.encoders.release()
    summarize.restart_clock()

  def __call__(self, event: StepEvent) -> None:
    if not event.validates:
      return
    params = event.state.model_params
    try:
      with jax.profiler.TraceAnnotation("validate"), self._goodput.measure(Activity.VALIDATING):
        losses = self._validation(params, self._run.frozen, progress=self._go_on)
        if not np.isfinite(losses["val_loss"]):
          raise DivergedError(f"the validation loss is not finite after step {event.step}: {LOWER_RATE}")
        if self._previewed:
          self._write_previews(event.step, params)
      event.summary |= losses
      log.info("step %d: validation loss %.4f", event.step, losses["val_loss"])
    except _Stopped:
      event.stop_signal = self._supervisor.stop_signal
    self._summarize.restart_clock()

  def _go_on(self, part: int) -> None:
    """Passes a safe point after each part of the work; raises _Stopped if the run stops there."""
    del part
    if self._supervisor.should_stop():
      raise _Stopped

  def _write_previews(self, step: int, params: Params) -> None:
    fresh = self._run.create_pipeline(params)
    if self._distillation is not None:
      fresh = add_distillation(fresh, self._distillation)
    self._pipeline = self._pipeline or fresh
    self._pipeline.experts = fresh.experts  # always in the same pipeline, so that its programs compile once
    write_previews(
      epath.Path(self._run.workdir) / PREVIEWS_FOLDER,
      step,
      self._pipeline,
      self._previewed,
      num_inference_steps=None if self._distillation else self._options.num_inference_steps,
      progress=self._go_on,
    )
    self._pipeline.experts = dataclasses.replace(fresh.experts, transformers=())  # programs are kept, weights are not
    self._run.encoders.release()


class _Stopped(Exception):
  """Validation was interrupted by a signal."""


class MeasureGoodput:
  """Adds the share of the run's time, restarts included, in which steps ran to the summary."""

  def __init__(self, goodput: Goodput):
    self._goodput = goodput

  def __call__(self, event: StepEvent) -> None:
    if event.summary:
      event.summary["goodput"] = round(self._goodput.share, 4)
    self._goodput.keep()


class WriteMetrics:
  """Writes every summary."""

  def __init__(self, writer: MetricsWriter):
    self._writer = writer

  def __call__(self, event: StepEvent) -> None:
    if event.summary:
      self._writer.write(event.step, event.summary)


class SaveCheckpoint:
  """Saves asynchronously; waits only on the last step or when the run is stopped."""

  def __init__(self, checkpointer: Checkpointer, loader: Resumable, goodput: Goodput):
    self._checkpointer, self._loader, self._goodput = checkpointer, loader, goodput

  def __call__(self, event: StepEvent) -> None:
    if not event.saves:
      return
    with jax.profiler.TraceAnnotation("save"), self._goodput.measure(Activity.SAVING):
      self._checkpointer.save(
        event.step,
        model=event.state.model_item,
        training=event.state.training_items,
        data=self._loader,
        val_loss=event.summary.get("val_loss"),
      )
      if event.ends:
        self._checkpointer.wait()
    self._goodput.keep_checkpoint(event.step)


class ReportGoodput:
  """Logs how the run spent its time, when it ends or is stopped."""

  def __init__(self, goodput: Goodput):
    self._goodput = goodput

  def __call__(self, event: StepEvent) -> None:
    if event.ends and jax.process_index() == 0:
      log.info("%s", self._goodput)


class StopOnSignal:
  """Ends the run after a signal; the state is saved by then."""

  def __init__(self, num_steps: int):
    self._num_steps = num_steps

  def __call__(self, event: StepEvent) -> None:
    if event.stop_signal:
      raise event.stop_signal.interrupt(
        f" at step {event.step} of {self._num_steps}, state saved; rerun the same command to resume"
      )


class Profile:
  """Writes a JAX profiler trace of some steps to WORKDIR/profile."""

  def __init__(self, workdir: str, *, first_step: int, num_steps: int):
    self._folder = str(epath.Path(workdir) / PROFILE_FOLDER)
    self._start = first_step + PROFILE_AFTER
    self._stop = self._start + num_steps
    self._running = False

  def __call__(self, event: StepEvent) -> None:
    if event.step == self._start and not event.is_last:
      jax.block_until_ready(event.state)
      jax.profiler.start_trace(self._folder, profiler_options=profiler_options())
      self._running = True
    elif self._running and (event.step == self._stop or event.is_last or event.stop_signal):
      jax.block_until_ready(event.state)
      jax.profiler.stop_trace()
      self._running = False
      log.info("profile of steps %d to %d: %s", self._start + 1, event.step, self._folder)


def _describe(summary: dict[str, float]) -> str:
  loss = f"loss={summary['loss']:.3f}" if "loss" in summary else "skipped"
  filled = f"fill={summary['fill_rate']:.0%}, balance={summary['balance']:.0%}"
  text = f"{loss}, {filled}, {summary['tokens_per_second']:,.0f} tokens/s"
  return text + (f", MFU {summary['mfu']:.0%}" if "mfu" in summary else "")
