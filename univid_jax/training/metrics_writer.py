"""Writes the metrics of a run: metrics.jsonl, TensorBoard events and a plot of the loss."""

import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from univid_jax.core.json_files import parse_json
from univid_jax.core.paths import atomic_write, bucket_errors, exists, is_remote, read_bytes, write_text

# Seconds that TensorBoard events stay in memory.
FLUSH_SECONDS = 30


class MetricsWriter:
  """Appends metrics by step; the file has each step once, in order, however the run ended before.

  Args:
    workdir: folder or bucket for metrics.jsonl, tensorboard/ and loss.png.
    start_step: the step that the run starts from. What an earlier run wrote for later steps is dropped.
  """

  def __init__(self, workdir: epath.PathLike, *, start_step: int):
    self._folder = epath.Path(workdir)
    self._path = self._folder / "metrics.jsonl"
    text = read_bytes(self._path).decode(errors="replace") if exists(self._path) else ""
    self._lines = _select_lines(text, last_step=start_step)
    if "".join(self._lines) != text:
      write_text(self._path, "".join(self._lines))  # a run that is killed here has lost nothing
    self._start_step = start_step

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes the metrics of a step; raises OSError, for example if the disk is full."""
    self._lines.append(json.dumps({"step": step, **metrics}) + "\n")
    try:
      if is_remote(self._path):  # objects in a bucket cannot be appended to
        with bucket_errors(self._path):
          self._path.write_text("".join(self._lines), encoding="utf-8")
      else:
        with self._path.open("a", encoding="utf-8") as file:
          file.write(self._lines[-1])
      with bucket_errors(self._path):
        self._board.write(step, metrics)
    except OSError as error:
      if error.errno and error.filename is None:  # an error of a write names no file; a bucket's may have no number
        error.filename = str(self._folder)
      raise

  def add(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds metrics to a step if it is the last that was written; raises OSError."""
    last = json.loads(self._lines[-1]) if self._lines else {}
    if last.get("step") == step:
      self._lines[-1] = json.dumps(last | dict(metrics)) + "\n"
      write_text(self._path, "".join(self._lines))
      with bucket_errors(self._path):
        self._board.write(step, metrics)

  @functools.cached_property
  def _board(self) -> "_Board":
    return _Board(self._folder / "tensorboard", first_step=self._start_step + 1)

  def close(self) -> None:
    """Finishes the files and plots the losses."""
    if "_board" in vars(self):
      self._board.close()
    rows: list[dict[str, Any]] = [json.loads(line) for line in self._lines]
    curves = {name: [(row["step"], row[name]) for row in rows if name in row] for name in ("loss", "val_loss")}
    if curves["loss"]:
      with atomic_write(self._folder / "loss.png") as path:
        plot_loss(path, curves["loss"], curves["val_loss"])


class _Board:
  """TensorBoard events, written synchronously: the thread of `tensorboardX.SummaryWriter` dies if the disk is full, and
  then its queue blocks the run.
  """

  def __init__(self, folder: epath.Path, *, first_step: int):
    # Imported with the first metrics, since tensorboardX imports PyTorch where that is installed.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2
    from tensorboardX.summary import scalar

    folder.mkdir(parents=True, exist_ok=True)
    self._messages: Any = event_pb2  # generated on import
    self._writer, self._scalar = EventsWriter(str(folder / "events")), scalar
    # Makes viewers drop what earlier files hold from this step on.
    start = self._messages.SessionLog(status=self._messages.SessionLog.START)
    self._writer.write_event(self._messages.Event(step=first_step, session_log=start))
    self._flushed = time.monotonic()

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
      summary = self._scalar(name, value)
      self._writer.write_event(self._messages.Event(wall_time=time.time(), step=step, summary=summary))
    if time.monotonic() - self._flushed > FLUSH_SECONDS:
      self._writer.flush()
      self._flushed = time.monotonic()

  def close(self) -> None:
    self._writer.close()


def plot_loss(path: Path, training: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]] = ()) -> None:
  """Plots (step, loss) of training, with a running mean, and of validation."""
  from matplotlib.figure import Figure  # takes a third of a second to import

  steps, losses = zip(*join_short(training))
  figure = Figure(figsize=(7, 4), layout="constrained")
  axes = figure.subplots()
  window = max(len(losses) // 20, 1)
  smooth = np.convolve(np.pad(losses, (window - 1, 0), mode="edge"), np.ones(window) / window, mode="valid")
  if window > 1:
    axes.plot(steps, losses, color="cornflowerblue", alpha=0.6, linewidth=1, label="training")
  label = f"training, mean of {window} points" if window > 1 else "training"
  axes.plot(steps, smooth, color="tab:blue", marker="o" if len(steps) == 1 else None, label=label)
  if validation:
    axes.plot(*zip(*validation), color="tab:orange", marker="o", markersize=4, label="validation, fixed noise levels")
  axes.set(xlabel="step", ylabel="loss", yscale="log", title="loss")
  axes.grid(alpha=0.3, which="both")
  axes.legend()
  figure.savefig(path, dpi=120, format="png")


def join_short(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
  """Joins means over fewer steps than most points, such as those around an interruption, with the points after them.

  Args:
    points: step, and mean since the previous point's step; for the first, since step 0.
  """
  lengths = np.diff([0, *(step for step, _ in points)])
  usual = max(lengths, key=lambda length: (np.count_nonzero(lengths == length), length))
  joined, total, count = [], 0.0, 0
  for (step, value), length in zip(points, lengths, strict=True):
    total, count = total + length * value, count + int(length)
    if count >= usual:
      joined.append((step, float(total / count)))
      total, count = 0.0, 0
  return joined if not count or not joined else [*joined, (points[-1][0], float(total / count))]


def _select_lines(text: str, *, last_step: int) -> list[str]:
  """Returns the lines up to a step, except those that are cut off or repeat a step."""
  lines, latest = [], -1
  for line in text.splitlines(keepends=True):
    step = _read_step(line)
    if step is not None and latest < step <= last_step:
      lines.append(line)
      latest = step
  return lines


def _read_step(line: str) -> int | None:
  """Returns the step of a line; None if it is damaged."""
  try:
    step = parse_json(line)["step"]
  except (ValueError, TypeError, KeyError):
    return None
  return step if isinstance(step, int) and line.endswith("\n") else None
