"""Where the numbers of a run go: metrics.jsonl, TensorBoard and a picture of the loss."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from univid_jax.files import is_remote, local_file
from univid_jax.metrics.figures import plot_loss


class MetricsWriter:
  """Appends metrics of steps; what an earlier run wrote of later steps is dropped.

  Args:
    workdir: gets metrics.jsonl, tensorboard/ and loss.png; a folder or a bucket.
    start_step: the step that the run starts from.
  """

  def __init__(self, workdir: epath.PathLike, *, start_step: int):
    self._folder = epath.Path(workdir)
    self._path = self._folder / "metrics.jsonl"
    self._lines = [line for line in self._written() if json.loads(line)["step"] <= start_step]
    self._path.write_text("".join(self._lines))
    self._start_step = start_step

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    self._lines.append(json.dumps({"step": step, **metrics}) + "\n")
    if is_remote(self._path):  # buckets know no appending
      self._path.write_text("".join(self._lines))
    else:
      with self._path.open("a") as file:
        file.write(self._lines[-1])
    for name, value in metrics.items():
      self._board.add_scalar(name, value, step)

  @functools.cached_property
  def _board(self):
    # With the first metrics only: where PyTorch is installed, tensorboardX imports it.
    import tensorboardX
    return tensorboardX.SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._start_step + 1, flush_secs=30)

  def close(self) -> None:
    """Finishes the files and draws the losses."""
    self._board.close()
    rows: list[dict[str, Any]] = [json.loads(line) for line in self._lines]
    curves = {name: [(row["step"], row[name]) for row in rows if name in row] for name in ("loss", "val_loss")}
    if curves["loss"]:
      with local_file(self._folder / "loss.png") as path:
        plot_loss(path, curves["loss"], curves["val_loss"])

  def _written(self) -> list[str]:
    """Whole lines only: a killed run may have left half of one."""
    if not self._path.exists():
      return []
    return [line for line in self._path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
