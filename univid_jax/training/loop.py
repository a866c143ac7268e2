"""The training loop: batches in, checkpoints and metrics out."""

import contextlib
import dataclasses
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from tqdm import tqdm

from univid_jax.checkpoints.lora.formats import write_lora
from univid_jax.checkpoints.run import Checkpointer, read_run, write_run
from univid_jax.checkpoints.run_parts import context_mode
from univid_jax.checkpoints.trained import load_base, to_lora_weights
from univid_jax.config.schema import RunConfig
from univid_jax.core import lock
from univid_jax.core.checks import require_integer
from univid_jax.core.errors import UserError
from univid_jax.core.options import AttentionBackend, OnDamaged, TrainedExpert, parse_option
from univid_jax.core.protocols import TrainStep
from univid_jax.data.rows.balancing import BatchLayout
from univid_jax.data.rows.loader import Loader, make_loader
from univid_jax.data.rows.loader_options import LoaderOptions, RowOwnership
from univid_jax.data.rows.packing import RowShape
from univid_jax.data.sources.open import DataSources
from univid_jax.inference.added_loras import add_loras
from univid_jax.inference.experts import Transformer
from univid_jax.inference.pipeline import Pipeline
from univid_jax.models.attention.api import best_backend
from univid_jax.models.attention.sharded import rows_per_device
from univid_jax.parallel.mesh import row_shards
from univid_jax.parallel.sharding import shard_own_rows
from univid_jax.platform.current import current_platform
from univid_jax.runtime.processes import gather_arrays
from univid_jax.runtime.supervisor import Supervisor, supervise
from univid_jax.training.goodput import Activity, Goodput
from univid_jax.training.hooks import (
  PROFILE_AFTER,
  Hook,
  MeasureGoodput,
  Profile,
  ReportGoodput,
  SaveCheckpoint,
  StepEvent,
  StopOnSignal,
  Summarize,
  Validate,
  WriteMetrics,
)
from univid_jax.training.learning_rates import LearningRates
from univid_jax.training.memory import ADVICE, abstract_batch, compile_step
from univid_jax.training.metrics_writer import MetricsWriter
from univid_jax.training.setup import Run, check_arguments, set_up_run
from univid_jax.training.state import TrainState
from univid_jax.training.step import make_train_step

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """What a finished run returns.

  Attributes:
    make_pipeline: returns the trained model.
    steps_taken: number of steps that this call took; 0 if the run was already complete.
    seconds: time that they took, including validation, saving and the export of a LoRA, excluding the step's
      compilation.
  """

  make_pipeline: Callable[[], Pipeline]
  steps_taken: int
  seconds: float

  @functools.cached_property
  def pipeline(self) -> Pipeline:
    """The trained model; if only one of two experts was trained, the other one is loaded, too."""
    return self.make_pipeline()


def train(
  config: RunConfig,
  workdir: epath.PathLike,
  *,
  data: DataSources | None = None,
  profile_steps: int = 0,
  verify_weights: bool = True,
  on_damaged_checkpoint: OnDamaged = OnDamaged.FALLBACK,
) -> TrainResult:
  """Trains until `config.num_steps`, from the latest checkpoint in the workdir or else from the start.

  Args:
    config: config of the run.
    workdir: a folder or a bucket.
    data: sources of your own, the same whenever the run is resumed; by default those that the config names.
    profile_steps: number of steps to write a profiler trace of.
    verify_weights: whether to compare every file of the base and of the checkpoint with its checksum before use.
    on_damaged_checkpoint: whether to resume from an older checkpoint if the latest one, which is then renamed, is
      damaged.

  Raises:
    UserError: an argument has another type, the config is invalid for a run, or the workdir belongs to another config
      or is in use.
    DivergedError: the loss or the gradient is not finite, or too many steps in a row were skipped; the last checkpoint
      is from before that.
    Interrupted: SIGTERM or Ctrl-C arrived, and the state is saved; or another process of the run has ended.
    OSError: a file could not be read or a checkpoint not written.
  """
  workdir = check_arguments(config, workdir, data=data, verify_weights=verify_weights)
  profile_steps = require_integer("profile_steps", profile_steps, 0)
  on_damaged = parse_option(OnDamaged, "on_damaged_checkpoint", on_damaged_checkpoint)
  with (
    contextlib.closing(Goodput(workdir, writes=jax.process_index() == 0)) as goodput,
    lock.hold(workdir, process=jax.process_index()),
  ):
    run = set_up_run(config, workdir, data=data, verify_weights=verify_weights)
    loader = open_loader(run)
    checkpointer = Checkpointer(workdir, keep=config.checkpoint.keep, verify=verify_weights, on_damaged=on_damaged)
    with close_all([loader, checkpointer]):
      state = restore_or_create_state(run, checkpointer, loader)
      if jax.process_index() == 0:
        report_schedule(run, state)
        write_run(workdir, run.record)
      loader.start_prefetch()  # makes the first batches while the step compiles
      with goodput.measure(Activity.COMPILING):
        step_fn = compile_train_step(run)
      start, started = int(state.step), time.monotonic()
      if start < config.num_steps:
        goodput.resume(start)
      session = Session(run, loader, checkpointer, goodput)
      state = take_steps(session, state, step_fn, profile_steps=profile_steps)
    if run.data.dropped:
      log.info("%d records of the data could not be used, first %s", len(run.data.dropped), run.data.dropped[0])
    return TrainResult(finish_run(run, state), config.num_steps - start, time.monotonic() - started)


@dataclasses.dataclass(frozen=True)
class Session:
  """A run with its loader, checkpointer and goodput, as the loop uses them."""

  run: Run
  loader: Loader
  checkpointer: Checkpointer
  goodput: Goodput


def take_steps(session: Session, state: TrainState, step_fn: TrainStep, *, profile_steps: int) -> TrainState:
  """Takes steps from the state's to the config's last, and calls the hooks after each."""
  run, goodput = session.run, session.goodput
  config, start = run.config, int(state.step)
  writer = MetricsWriter(run.workdir, start_step=start) if jax.process_index() == 0 else None
  with (
    close_all([writer] if writer else []),
    jax.set_mesh(run.mesh),
    supervise() as supervisor,
    progress_bar(start, config.num_steps) as bar,
  ):
    hooks = make_hooks(session, writer, bar, supervisor, start=start, profile_steps=profile_steps)
    with supervisor.stepping():
      if start and session.checkpointer.val_loss(start) is None:
        validate_again(hooks, StepEvent.create(config, start, state, {}), writer, session.checkpointer)
      metrics = None
      for step in range(start + 1, config.num_steps + 1):
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
          with jax.profiler.TraceAnnotation("data"), goodput.measure(Activity.WAITING):
            batch = shard_own_rows(next(session.loader), run.mesh)
          with jax.profiler.TraceAnnotation("step"), goodput.measure(Activity.STEPPING):
            previous, (state, metrics) = metrics, step_fn(state, run.frozen, batch)
            goodput.watch(metrics)
            # Devices are at most two steps behind, so that stopping waits for no more.
            jax.block_until_ready(previous)
        signal = supervisor.stop_signal if supervisor.should_stop() else None
        event = StepEvent.create(config, step, state, metrics, signal)
        for hook in hooks:
          hook(event)
  return state


def validate_again(
  hooks: Sequence[Hook], event: StepEvent, writer: MetricsWriter | None, checkpointer: Checkpointer
) -> None:
  """Makes up for a validation that a signal prevented before the run was resumed.

  Raises:
    Interrupted: another signal prevented it; the next start makes up for it.
    OSError: the loss could not be written.
  """
  for hook in hooks:
    if isinstance(hook, (Validate, StopOnSignal)):
      hook(event)
  if event.summary:
    if writer is not None:
      writer.add(event.step, event.summary)
    checkpointer.add_val_loss(event.step, event.summary["val_loss"])


def make_hooks(
  session: Session, writer: MetricsWriter | None, bar: tqdm, supervisor: Supervisor, *, start: int, profile_steps: int
) -> list[Hook]:
  """Returns what happens after each step, in order."""
  run, goodput = session.run, session.goodput
  summarize = Summarize(run, bar)
  hooks: list[Hook] = [summarize]
  if run.config.validation.every_steps:
    hooks.append(Validate(run, summarize, supervisor, goodput))
  hooks.append(MeasureGoodput(goodput))
  if writer is not None:
    hooks.append(WriteMetrics(writer))
  hooks += [
    SaveCheckpoint(session.checkpointer, session.loader, goodput),
    ReportGoodput(goodput),
    StopOnSignal(run.config.num_steps),
  ]
  if profile_steps:
    if start + PROFILE_AFTER >= run.config.num_steps:
      log.warning("no profile written: the first %d steps are skipped and none remain", PROFILE_AFTER)
    hooks.insert(0, Profile(run.workdir, first_step=start, num_steps=profile_steps))
  return hooks


def open_loader(run: Run) -> Loader:
  """Opens the endless stream of this process's rows of every batch."""
  config, data = run.config, run.data
  layout = BatchLayout.from_config(config.rows, row_shards(run.mesh))
  ownership = RowOwnership.from_mesh(layout.num_rows, run.mesh)
  return make_loader(
    list(data.sources.values()),
    run.features,
    row_shape=RowShape.from_config(config.rows, context_mode(config)),
    layout=layout,
    seed=config.seed,
    weights=[data.weights[name] for name in data.sources],
    ownership=ownership,
    options=LoaderOptions.from_config(config, ownership),
  )


def restore_or_create_state(run: Run, checkpointer: Checkpointer, loader: Loader) -> TrainState:
  """Restores the latest intact checkpoint and sets the loader to its position; creates a new state if there is none.

  Raises:
    UserError: the checkpoint belongs to another config, or cannot be restored.
  """
  config, spec = run.config, run.spec
  if checkpointer.has_any():
    abstract = spec.abstract
    model, training = checkpointer.restore(model=abstract.model_item, training=abstract.training_items, data=loader)
    state = TrainState.from_items(model, training, ema=abstract.ema is not None)
    if int(state.step) > config.num_steps:
      raise UserError(
        f"{run.workdir} has taken {int(state.step)} steps already, and config.num_steps is only {config.num_steps}"
      )
    log.info("resuming %s at step %d of %d", run.workdir, int(state.step), config.num_steps)
    return state
  if config.lora.enabled or not config.init_from:
    return spec.create()
  return spec.create(load_base(config, run.mesh)[1])


def report_schedule(run: Run, state: TrainState) -> None:
  """Logs how the learning rate changes in a run that is resumed with another number of steps."""
  previous = read_run(run.workdir)
  if previous is not None:
    rates = LearningRates.from_config(run.config)
    if line := rates.describe_change(previous.config.num_steps, int(state.step), state):
      log.info("%s", line)


def compile_train_step(run: Run) -> TrainStep:
  """Compiles the step for the run's batches, and logs its memory and attention backend."""
  config, mesh = run.config, run.mesh
  log.info("compiling the training step: seconds if it is cached, else half a minute to several minutes")
  step_fn = make_train_step(config, run.spec, run.optimizers, mesh)
  compiled, memory = compile_step(step_fn, run.spec, abstract_batch(config, run.shape, mesh), mesh)
  log.info(memory if memory.fits else f"{memory}: that is more than there is; {ADVICE}")
  log.info("attention: %s, %s", attention_backend(run), str(config.model.attention).replace("_", "-"))
  return compiled


def attention_backend(run: Run) -> AttentionBackend:
  """Returns the backend that computes the self-attention of a run's batches."""
  config = run.config
  if config.model.attention_backend != AttentionBackend.AUTO:
    return config.model.attention_backend
  with jax.set_mesh(run.mesh):
    num_rows = rows_per_device(config.rows.batch_size(row_shards(run.mesh)) // config.rows.microbatches)
    mask_size = num_rows * config.rows.num_tokens**2
    return best_backend(current_platform(), jnp.dtype(config.model.dtype), run.shape.head_dim, mask_size=mask_size)


def finish_run(run: Run, state: TrainState) -> Callable[[], Pipeline]:
  """Exports the LoRA of a LoRA run; returns a function that makes the trained model, with the LoRA unmerged."""
  if run.base_graph is None:
    return functools.partial(run.create_pipeline, state.model_params)
  loras = to_lora_weights(run.record, gather_arrays(state.model_params), step=run.config.num_steps)
  if jax.process_index() == 0:
    for name, lora in zip(lora_exports(run.config), loras, strict=True):
      write_lora(epath.Path(run.workdir) / name, lora, "comfyui")
  trained = [
    Transformer(*add_loras(run.shape, run.base_graph, frozen, [(lora, 1.0)], mesh=run.mesh, merged=False))
    for frozen, lora in zip(run.config.model.expert.split_tree(run.frozen), loras, strict=True)
  ]
  return functools.partial(run.complete, trained)


def lora_exports(config: RunConfig) -> list[str]:
  """Returns the names of the files that a LoRA run exports; the name of an expert's file says which it is."""
  return [
    "lora.safetensors" if part == TrainedExpert.ONLY else f"lora_{part}.safetensors"
    for part in config.model.expert.parts
  ]


def progress_bar(start: int, total: int) -> tqdm:
  return tqdm(
    total=total,
    initial=start,
    desc="train",
    unit="step",
    smoothing=0.05,
    dynamic_ncols=True,
    mininterval=0.5,
    disable=jax.process_index() > 0,
  )


@contextlib.contextmanager
def close_all(parts: Sequence[Any]) -> Iterator[None]:
  """Closes all parts on exit; if the block raised an error, that is the one reported."""
  try:
    yield
  finally:
    failing = sys.exc_info()[0] is not None
    for part in parts:
      with contextlib.suppress(Exception) if failing else contextlib.nullcontext():
        part.close()
