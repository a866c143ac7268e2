"""Where the numbers of a run go: metrics.jsonl, TensorBoard and a picture of the loss."""

import json
from collections.abc import Mapping
from pathlib import Path

import tensorboardX

from univid_jax.metrics.figures import plot_loss


class MetricsWriter:
  """Appends metrics of steps; what an earlier run wrote of later steps is dropped.

  Args:
    workdir: gets metrics.jsonl, tensorboard/ and loss.png.
    start_step: the step that the run starts from.
  """

  def __init__(self, workdir: str, *, start_step: int):
    self._path = Path(workdir) / "metrics.jsonl"
    kept = [line for line in self._lines() if json.loads(line)["step"] <= start_step]
    self._path.write_text("".join(kept))
    self._board = tensorboardX.SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start_step + 1, flush_secs=30)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    with self._path.open("a") as file:
      file.write(json.dumps({"step": step, **metrics}) + "\n")
    for name, value in metrics.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    """Finishes the files and draws the loss."""
    self._board.close()
    rows = [json.loads(line) for line in self._lines()]
    if rows:
      plot_loss(self._path.parent / "loss.png", [row["step"] for row in rows], [row["loss"] for row in rows])

  def _lines(self) -> list[str]:
    """Whole lines only: a killed run may have left half of one."""
    if not self._path.exists():
      return []
    return [line for line in self._path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
