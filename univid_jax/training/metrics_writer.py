"""Writes the metrics of a run: metrics.jsonl, TensorBoard events and a plot of the loss."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from univid_jax.core.paths import atomic_write, is_remote
from univid_jax.evaluation.figures import plot_loss


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


def _read_whole_lines(path: epath.Path) -> list[str]:
  """Reads the complete lines of a file: a killed run may have left part of one."""
  if not path.exists():
    return []
  return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
