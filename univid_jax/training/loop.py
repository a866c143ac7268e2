"""The training loop: batches in, checkpoints and numbers out."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

import univid_jax
from univid_jax import build
from univid_jax.data.loader import make_loader
from univid_jax.encoders import Encoders
from univid_jax.parallel.mesh import make_mesh
from univid_jax.parallel.sharding import shard_batch
from univid_jax.pipeline import Pipeline, with_loras
from univid_jax.training.checkpoint import Checkpointer, read_config, write_config
from univid_jax.training.forecast import ADVICE, abstract_batch, compile_step
from univid_jax.training.optimizer import make_optimizer
from univid_jax.training.prepare import Prepared, open_data, prepare
from univid_jax.training.restore import base_parameters, lora_weights
from univid_jax.training.step import StateSpec, make_train_step
from univid_jax.training.writer import MetricsWriter
from univid_jax.weights.lora import write_lora

# What may differ between a run and its continuation: how often it reports and saves, and where it runs.
MAY_CHANGE = ("num_steps", "log_every", "checkpoint", "mesh", "eval", "version")


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


def train(config: ml_collections.ConfigDict, workdir: str) -> TrainResult:
  """Trains until config.num_steps, from the latest checkpoint in the workdir or else from the start.

  Raises:
    ValueError: a value of the config fits no run, or the workdir holds a run of another config.
    FloatingPointError: the loss is not finite; the last checkpoint is from before.
    Interrupted: SIGTERM or Ctrl-C came; the state is saved.
  """
  build.check(config)
  if build.transformer_config(config).model_type == "i2v":
    raise ValueError("training of I2V models is not supported yet; sampling with them is")
  Path(workdir).mkdir(parents=True, exist_ok=True)
  mesh = make_mesh(config.mesh)
  check_processes(mesh)
  optimizer = make_optimizer(config.optimizer, config.num_steps)
  trains_lora = build.lora_config(config) is not None
  spec = StateSpec.of(lambda: build.model(config, seed=config.seed), optimizer, mesh, ema=config.ema_decay > 0, lora=trains_lora)
  encoders = build.encoders(config, mesh)
  prepared = prepare(config, workdir, encoders, open_data(config, workdir))
  loader = batches(config, mesh, encoders, prepared)
  step_fn = make_train_step(spec, optimizer, build.flow(config), mesh=mesh, ema_decay=config.ema_decay, seed=config.seed,
                            microbatches=config.rows.microbatches, dropout=config.lora.dropout > 0)
  values = _plain({**config.to_dict(), "version": univid_jax.__version__})
  checkpointer = Checkpointer(workdir, keep=config.checkpoint.keep)
  base_graph, base = base_parameters(config, mesh) if trains_lora or config.init_from else (None, {})
  frozen = base if trains_lora else {}
  if checkpointer.latest_step is None:
    state = spec.create() if trains_lora or not config.init_from else spec.create(base)
  else:
    check_same_run(workdir, read_config(workdir), values)
    state = checkpointer.restore(spec.abstract, loader)
    print(f"resuming {workdir} at step {int(state.step)} of {config.num_steps}")
  write_config(workdir, values)
  step_fn, memory = compile_step(step_fn, spec, abstract_batch(config, mesh), mesh)
  print(memory if memory.fits else f"{memory}: that is more than there is; {ADVICE}")
  start, started = int(state.step), time.monotonic()
  writer = MetricsWriter(workdir, start_step=start) if jax.process_index() == 0 else None
  try:
    with jax.set_mesh(mesh), stop_on_signal() as stop, progress_bar(start, config.num_steps) as bar:
      pending: list[dict[str, Any]] = []
      for step in range(start + 1, config.num_steps + 1):
        state, metrics = step_fn(state, frozen, shard_batch(next(loader), mesh))
        pending.append(metrics)
        bar.update()
        # Asked once a step: a signal that comes after this line is for the next step, which saves.
        last, stopping = step == config.num_steps, stop.is_set
        saves = last or stopping or step % config.checkpoint.every_steps == 0
        # Before a save as well: what is not finite must not replace the last good checkpoint.
        if saves or step % config.log_every == 0:
          summary = _summarize(pending, step)
          bar.set_postfix(loss=f"{summary['loss']:.3f}", fill=f"{summary['fill_rate']:.0%}", refresh=False)
          if writer:
            writer.write(step, summary)
          pending.clear()
        if saves:
          checkpointer.save(state, loader)
        if stopping and not last:
          checkpointer.wait()
          raise Interrupted(f"stopped by {stop.name} at step {step} of {config.num_steps}, saved; "
                            "run the same command to go on")
      checkpointer.wait()
  finally:
    loader.close()
    checkpointer.close()
    if writer:
      writer.close()
  if prepared.data.dropped:
    print(f"{len(prepared.data.dropped)} rows of the data could not be used and were left out, first {prepared.data.dropped[0]}")
  dit_config, graph, params = build.transformer_config(config), spec.graph, state.model_params
  if trains_lora:
    lora = lora_weights(values, gathered(params), step=config.num_steps)
    if jax.process_index() == 0:
      write_lora(Path(workdir) / LORA_EXPORT, lora, "comfyui")
    graph, params = with_loras(dit_config, base_graph, frozen, [(lora, 1.0)], mesh=mesh, merged=False)
  pipeline = Pipeline(dit_config, graph, params, encoders=encoders, mesh=mesh, run=values)
  return TrainResult(pipeline, config.num_steps - start, time.monotonic() - started)


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


def gathered(tree: Any) -> Any:
  """Sharded arrays as whole NumPy arrays, on every process."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


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
