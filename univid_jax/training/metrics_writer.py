"""Writes the metrics of a run: metrics.jsonl, TensorBoard events and a plot of the loss."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from univid_jax.core.paths import atomic_write, is_remote


class MetricsWriter:
  """Appends metrics per step; drops what an interrupted run wrote for later steps.

  Args:
    workdir: gets metrics.jsonl, tensorboard/ and loss.png; a folder or a bucket.
    start_step: the step that the run starts from.
  """

  def __init__(self, workdir: epath.PathLike, *, start_step: int):
    self._folder = epath.Path(workdir)
    self._path = self._folder / "metrics.jsonl"
    self._lines = [line for line in _read_whole_lines(self._path) if json.loads(line)["step"] <= start_step]
    self._path.write_text("".join(self._lines))
    self._start_step = start_step

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    self._lines.append(json.dumps({"step": step, **metrics}) + "\n")
    if is_remote(self._path):  # objects in a bucket cannot be appended to
      self._path.write_text("".join(self._lines))
    else:
      with self._path.open("a") as file:
        file.write(self._lines[-1])
    for name, value in metrics.items():
      self._board.add_scalar(name, value, step)

  @functools.cached_property
  def _board(self) -> Any:
    # Imported with the first metrics: where PyTorch is installed, tensorboardX imports it.
    import tensorboardX

    return tensorboardX.SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._start_step + 1, flush_secs=30)

  def close(self) -> None:
    """Finishes the files and plots the losses."""
    if "_board" in vars(self):
      self._board.close()
    rows: list[dict[str, Any]] = [json.loads(line) for line in self._lines]
    curves = {name: [(row["step"], row[name]) for row in rows if name in row] for name in ("loss", "val_loss")}
    if curves["loss"]:
      with atomic_write(self._folder / "loss.png") as path:
        plot_loss(path, curves["loss"], curves["val_loss"])


def plot_loss(path: Path, training: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]] = ()) -> None:
  """Plots (step, loss) of the training, with a running mean, and of the validation."""
  from matplotlib.figure import Figure  # takes a third of a second to import

  steps, losses = zip(*training)
  figure = Figure(figsize=(7, 4), layout="constrained")
  axes = figure.subplots()
  axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training")
  window = max(len(losses) // 20, 1)
  smooth = np.convolve(np.pad(losses, (window - 1, 0), mode="edge"), np.ones(window) / window, mode="valid")
  axes.plot(steps, smooth, color="tab:blue", label=f"mean of {window}" if window > 1 else None)
  if validation:
    axes.plot(*zip(*validation), color="tab:orange", marker="o", markersize=4, label="validation, fixed noise levels")
  axes.set(xlabel="step", ylabel="loss", yscale="log", title="loss")
  axes.grid(alpha=0.3, which="both")
  axes.legend()
  figure.savefig(path, dpi=120, format="png")


def _read_whole_lines(path: epath.Path) -> list[str]:
  """Reads the complete lines of a file: a killed run may have left part of one."""
  if not path.exists():
    return []
  return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
