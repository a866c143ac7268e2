"""The training loop: batches in, checkpoints and numbers out."""

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from flax import nnx
from tqdm import tqdm

import univid_jax
from univid_jax import build
from univid_jax.attention.api import best_backend
from univid_jax.compilation import kept_step, uncollected
from univid_jax.data.loader import make_loader
from univid_jax.encoders import Encoders
from univid_jax.files import local_file
from univid_jax.models.dit import DiTConfig
from univid_jax.models.lora import join
from univid_jax.parallel.mesh import make_mesh
from univid_jax.parallel.sharding import gathered, shard_batch
from univid_jax.performance import chip_of, step_flops
from univid_jax.pipeline import Pipeline, with_loras
from univid_jax.training.checkpoint import Checkpointer, read_config, write_config
from univid_jax.training.forecast import ADVICE, abstract_batch, compile_step
from univid_jax.training.optimizer import make_optimizer
from univid_jax.training.prepare import Prepared, open_data, prepare
from univid_jax.training.restore import base_parameters, lora_weights
from univid_jax.training.step import StateSpec, TrainState, make_train_step
from univid_jax.training.validation import PREVIEWS, Validation, validation_sentences, write_previews
from univid_jax.training.writer import MetricsWriter
from univid_jax.weights.checkpoint import read_info
from univid_jax.weights.lora import write_lora

# What may differ between a run and its continuation: how often it reports and saves, and where it runs.
MAY_CHANGE = ("num_steps", "log_every", "checkpoint", "mesh", "eval", "validation", "version")

# The trained LoRA, as ComfyUI and diffusers read it.
LORA_EXPORT = "lora.safetensors"


class Interrupted(Exception):
  """The run was asked to stop and has saved; the message says how to go on."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """What a finished run leaves in memory.

  Attributes:
    pipeline: the trained model.
    steps_taken: in this call; 0 where the run was complete already.
    seconds: they took, compilation included.
  """

  pipeline: Pipeline
  steps_taken: int
  seconds: float


@dataclasses.dataclass(frozen=True)
class Run:
  """What stays the same from the first step to the last.

  Attributes:
    config: as it was given.
    values: the same as plain values, with what else names the run; what stands in its config.json.
    workdir: a folder or a bucket.
    mesh: the devices.
    spec: of the state.
    base_graph: the transformer without adapters, where they are trained; else None.
    frozen: parameters that are not trained.
    encoders: of clips and prompts.
    prepared: the data.
  """

  config: ml_collections.ConfigDict
  values: dict[str, Any]
  workdir: str
  mesh: jax.sharding.Mesh
  spec: StateSpec
  base_graph: nnx.GraphDef | None
  frozen: Any
  encoders: Encoders
  prepared: Prepared

  @property
  def trains_lora(self) -> bool:
    return self.base_graph is not None

  @property
  def dit(self) -> DiTConfig:
    return build.transformer_config(self.config)

  def pipeline(self, params: Any) -> Pipeline:
    """What is trained so far, to sample with."""
    return Pipeline(self.dit, self.spec.graph, join(self.frozen, params), encoders=self.encoders, mesh=self.mesh, run=self.values)


def train(config: ml_collections.ConfigDict, workdir: str, *, traces: str | None = None) -> TrainResult:
  """Trains until config.num_steps, from the latest checkpoint in the workdir or else from the start.

  Args:
    config: of `configs/`.
    workdir: a folder or a bucket.
    traces: a folder that keeps the traced step for the next start, see `compilation.kept_step`; for processes that run this
      package as it is, which all commands do.

  Raises:
    ValueError: a value of the config fits no run, or the workdir holds a run of another config.
    FloatingPointError: the loss is not finite; the last checkpoint is from before.
    Interrupted: SIGTERM or Ctrl-C came; the state is saved.
    OSError: a checkpoint could not be written.
  """
  build.check(config)
  epath.Path(workdir).mkdir(parents=True, exist_ok=True)
  mesh = make_mesh(config.mesh)
  check_processes(mesh)
  optimizer = make_optimizer(config.optimizer, config.num_steps)
  trains_lora = build.lora_config(config) is not None
  spec = StateSpec.of(lambda: build.model(config, seed=config.seed), optimizer, mesh, ema=config.ema_decay > 0, lora=trains_lora)
  encoders = build.encoders(config, mesh)
  prepared = prepare(config, workdir, encoders, open_data(config, workdir))
  values = _plain({**config.to_dict(), "base": base_checksum(config), "version": univid_jax.__version__})
  base_graph, frozen = base_parameters(config, mesh) if trains_lora else (None, {})
  run = Run(config, values, workdir, mesh, spec, base_graph, frozen, encoders, prepared)

  loader = batches(config, mesh, encoders, prepared)
  checkpointer = Checkpointer(workdir, keep=config.checkpoint.keep)
  state = first_state(run, checkpointer, loader)
  write_config(workdir, values)
  loader.start_prefetch()  # the first batches are made while the step is compiled
  step_fn = make_train_step(spec, optimizer, build.flow(config), mesh=mesh, ema_decay=config.ema_decay, seed=config.seed,
                            microbatches=config.rows.microbatches, dropout=config.lora.dropout > 0)
  batch = abstract_batch(config, mesh)
  if traces:
    with uncollected(), jax.set_mesh(mesh):
      step_fn = kept_step(step_fn, spec.abstract, spec.abstract_frozen, batch, folder=traces, about=(values, run.dit))
  step_fn, memory = compile_step(step_fn, spec, batch, mesh)
  print(memory if memory.fits else f"{memory}: that is more than there is; {ADVICE}")
  print(f"attention: {backend_name(config, mesh, run.dit)}, {config.model.attention.replace('_', '-')}")
  start, started = int(state.step), time.monotonic()
  state = take_steps(run, state, step_fn, loader, checkpointer)
  if prepared.data.dropped:
    print(f"{len(prepared.data.dropped)} rows of the data could not be used and were left out, first {prepared.data.dropped[0]}")
  return TrainResult(finished(run, state), config.num_steps - start, time.monotonic() - started)


@uncollected()
def first_state(run: Run, checkpointer: Checkpointer, loader: grain.DatasetIterator) -> TrainState:
  """The state of the latest checkpoint, with the loader put where it was; else a new one, from the base where there is one.

  Raises:
    ValueError: the checkpoint is of another config, or cannot be read.
  """
  config = run.config
  if checkpointer.latest_step is not None:
    check_same_run(run.workdir, read_config(run.workdir), run.values)
    state = checkpointer.restore(run.spec.abstract, loader)
    print(f"resuming {run.workdir} at step {int(state.step)} of {config.num_steps}")
    return state
  if run.trains_lora or not config.init_from:
    return run.spec.create()
  return run.spec.create(base_parameters(config, run.mesh)[1])


def take_steps(run: Run, state: TrainState, step_fn: Callable[..., Any], loader: grain.DatasetIterator,
               checkpointer: Checkpointer) -> TrainState:
  """The steps from the state's to the config's last, with all that is written on the way.

  Closes the loader and the checkpointer.

  Raises:
    FloatingPointError: the loss is not finite.
    Interrupted: a signal came; the state is saved.
    OSError: a checkpoint could not be written.
  """
  config, mesh, start = run.config, run.mesh, int(state.step)
  watch = Watch(run)
  writer = MetricsWriter(run.workdir, start_step=start) if jax.process_index() == 0 else None
  try:
    with jax.set_mesh(mesh), stop_on_signal() as stop, progress_bar(start, config.num_steps) as bar:
      pending: list[dict[str, Any]] = []
      speed = Speed(config, run.dit, mesh)
      for step in range(start + 1, config.num_steps + 1):
        state, metrics = step_fn(state, run.frozen, shard_batch(next(loader), mesh))
        pending.append(metrics)
        bar.update()
        # Asked once a step: a signal that comes after this line is for the next step, which saves.
        last, stopping = step == config.num_steps, stop.is_set
        saves = last or stopping or step % config.checkpoint.every_steps == 0
        looks = watch.is_due(step, last) and not stopping
        # Before a save as well: what is not finite must not replace the last good checkpoint.
        if saves or looks or step % config.log_every == 0:
          summary = speed.added_to(_summarize(pending, step), len(pending))
          bar.set_postfix_str(shown(summary), refresh=False)
          if looks:
            summary |= watch(step, state.model_params)
            bar.write(f"step {step}: validation loss {summary['val_loss']:.4f}")
            speed.restart()
          if writer:
            writer.write(step, summary)
          pending.clear()
        if saves:
          checkpointer.save(state, loader, val_loss=summary.get("val_loss"))
        if stopping and not last:
          checkpointer.wait()
          raise Interrupted(f"stopped by {stop.name} at step {step} of {config.num_steps}, saved; "
                            "run the same command to go on")
      checkpointer.wait()
  finally:
    # Where the run fails already, its error is the one to be told.
    failing = sys.exc_info()[0] is not None
    for part in filter(None, (loader, checkpointer, writer)):
      with contextlib.suppress(Exception) if failing else contextlib.nullcontext():
        part.close()
  return state


def finished(run: Run, state: TrainState) -> Pipeline:
  """The trained model; adapters are exported, and run beside the base."""
  graph, params = run.spec.graph, state.model_params
  if run.trains_lora:
    lora = lora_weights(run.values, gathered(params), step=run.config.num_steps)
    if jax.process_index() == 0:
      with local_file(epath.Path(run.workdir) / LORA_EXPORT) as path:
        write_lora(path, lora, "comfyui")
    graph, params = with_loras(run.dit, run.base_graph, run.frozen, [(lora, 1.0)], mesh=run.mesh, merged=False)
  return Pipeline(run.dit, graph, params, encoders=run.encoders, mesh=run.mesh, run=run.values)


class Watch:
  """Validation and previews, every so many steps of the config's `validation`."""

  def __init__(self, run: Run):
    self._run, self._options = run, run.config.validation
    self._pipeline: Pipeline | None = None
    if not self._options.every_steps:
      return
    data = run.prepared.data
    self._sentences, held_out = validation_sentences(data, self._options.sentences)
    if not held_out:
      print("validation: too little data to hold any out, so its loss is on sentences of the training")
    make_features = build.feature_maker(run.config, run.encoders, caches=run.prepared.caches, task_names=data.task_names)
    self._validate = Validation(run.config, run.spec, self._sentences, make_features, run.mesh)
    run.encoders.release()

  def is_due(self, step: int, last: bool) -> bool:
    every = self._options.every_steps
    return every > 0 and (last or step % every == 0)

  def __call__(self, step: int, params: Any) -> dict[str, float]:
    """Measures, and paints the previews; the encoders' memory is given back to the training."""
    if self._options.previews:
      fresh = self._run.pipeline(params)
      self._pipeline = self._pipeline or fresh
      self._pipeline.params = fresh.params  # one pipeline throughout: its programs are compiled once
      write_previews(epath.Path(self._run.workdir) / PREVIEWS, step, self._pipeline, self._sentences[:self._options.previews],
                     num_inference_steps=self._options.num_inference_steps, seed=0)
      self._run.encoders.release()
    return self._validate(params, self._run.frozen)


class Speed:
  """How fast training runs, from the wall clock between summaries.

  Args:
    config: of the run.
    dit: the model's shape.
    mesh: the devices.
  """

  def __init__(self, config: ml_collections.ConfigDict, dit: DiTConfig, mesh: jax.sharding.Mesh):
    self._dit, self._rank = dit, config.lora.rank
    rows = build.rows_per_batch(config, mesh)
    self._tokens, self._text = rows * config.rows.num_tokens, rows * config.rows.num_text_tokens
    chip = chip_of(mesh.devices.flat[0])
    self._peak = chip.flops * mesh.size if chip else None
    self.restart()

  def restart(self) -> None:
    """Leaves out what ran since the last summary."""
    self._since = time.monotonic()

  def added_to(self, summary: dict[str, float], steps: int) -> dict[str, float]:
    """With step_time in seconds, tokens (padding left out) a second and, where the chip's peak is known, the share of it that
    the model's own work takes (mfu)."""
    seconds = (time.monotonic() - self._since) / steps
    self.restart()
    pairs = {name: summary.pop(name) for name in ("attended", "attended_text", "targets")}
    tokens = summary["fill_rate"] * self._tokens
    summary |= {"step_time": seconds, "tokens_per_second": tokens / seconds}
    if self._peak:
      work = step_flops(self._dit, lora_rank=self._rank, tokens=tokens, text_tokens=self._text, **pairs)
      summary["mfu"] = work / seconds / self._peak
    return summary


def shown(summary: Mapping[str, float]) -> str:
  """A summary for the progress bar."""
  text = f"loss={summary['loss']:.3f}, fill={summary['fill_rate']:.0%}, {summary['tokens_per_second']:,.0f} tokens/s"
  return text + (f", MFU {summary['mfu']:.0%}" if "mfu" in summary else "")


def backend_name(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, dit: DiTConfig) -> str:
  """Of self-attention."""
  name = config.model.attention_backend
  return best_backend(mesh.devices.flat[0].platform, jnp.dtype(config.model.dtype), dit.head_dim) if name == "auto" else name


def batches(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, encoders: Encoders,
            prepared: Prepared) -> grain.DatasetIterator:
  """This process's rows of every batch, endlessly."""
  data, rows = prepared.data, config.rows
  return make_loader(
      list(data.sources.values()),
      build.feature_maker(config, encoders, caches=prepared.caches, task_names=data.task_names),
      row_shape=build.row_shape(config),
      rows_per_batch=build.rows_per_batch(config, mesh) // jax.process_count(),
      seed=config.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      num_threads=config.data.num_threads,
      num_packing_bins=rows.packing_bins,
      packing=rows.packing,
      num_streams=rows.streams,
      weights=list(data.weights.values()),
  )


def base_checksum(config: ml_collections.ConfigDict) -> str:
  """Of the transformer that training starts from; "" where it starts from nothing."""
  return read_info(config.init_from).components["transformer"].checksum if config.init_from else ""


def check_processes(mesh: jax.sharding.Mesh) -> None:
  """A row's tokens stay on one process.

  Raises:
    ValueError: tensor x context devices do not fit on one.
  """
  inner = mesh.shape["tensor"] * mesh.shape["context"]
  if jax.local_device_count() % inner:
    raise ValueError(f"tensor x context = {inner} devices must divide the {jax.local_device_count()} of each process")


def progress_bar(start: int, total: int) -> tqdm:
  return tqdm(total=total, initial=start, desc="train", unit="step", smoothing=0.05, dynamic_ncols=True, mininterval=0.5,
              disable=jax.process_index() > 0)


def check_same_run(workdir: str, previous: dict[str, Any] | None, values: dict[str, Any]) -> None:
  """Refuses to go on with a run under another config.

  Raises:
    ValueError: names the first key that differs.
  """
  before, now = (dict(_leaves({k: v for k, v in (x or {}).items() if k not in MAY_CHANGE})) for x in (previous, values))
  for key in sorted(now.keys() | before.keys()):
    if before.get(key) != now.get(key):
      raise ValueError(f"{workdir} holds a run with {key} = {before.get(key)!r}, not {now.get(key)!r}: give the same config, or "
                       "another --workdir")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
  """The values of nested dicts under dotted names."""
  if not isinstance(value, dict):
    yield name, value
    return
  for key, item in value.items():
    yield from _leaves(item, f"{name}.{key}" if name else key)


def _plain(value: Any) -> Any:
  """Only what JSON knows: lists for tuples."""
  if isinstance(value, dict):
    return {str(key): _plain(item) for key, item in value.items()}
  return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _summarize(metrics: list[dict[str, Any]], step: int) -> dict[str, float]:
  """Means over the steps since the last summary.

  Raises:
    FloatingPointError: a loss is not finite.
  """
  values = jax.device_get(metrics)
  summary = {name: float(np.mean([m[name] for m in values])) for name in values[0]}
  if not np.isfinite(summary["loss"]):
    raise FloatingPointError(f"the loss is not finite before step {step}: lower the learning rate, or resume from the last "
                             "checkpoint with another seed")
  return summary


class _Stop:
  """Whether a signal came, and which."""

  is_set = False
  name = ""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[_Stop]:
  """Turns SIGTERM and Ctrl-C into a request that the loop honours between steps; a second Ctrl-C is not held back."""
  stop = _Stop()

  def request(signum, frame):
    del frame
    if stop.is_set and signum == signal.SIGINT:
      raise KeyboardInterrupt
    stop.is_set, stop.name = True, signal.Signals(signum).name

  previous = {signum: signal.signal(signum, request) for signum in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield stop
  finally:
    for signum, handler in previous.items():
      signal.signal(signum, handler)
