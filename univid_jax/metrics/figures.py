"""Pictures of results."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

COLUMNS = ("A", "A'", "B", "B' predicted", "B' true")


def plot_loss(path: Path, steps: Sequence[int], losses: Sequence[float]) -> None:
  """The loss over the steps, with a running mean."""

  figure = Figure(figsize=(7, 4), layout="constrained")
  axes = figure.subplots()
  axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="loss")
  window = max(len(losses) // 20, 1)
  smooth = np.convolve(np.pad(losses, (window - 1, 0), mode="edge"), np.ones(window) / window, mode="valid")
  axes.plot(steps, smooth, color="tab:blue", label=f"mean of {window}" if window > 1 else None)
  axes.set(xlabel="step", ylabel="loss", yscale="log", title="training loss")
  axes.grid(alpha=0.3, which="both")
  axes.legend()
  figure.savefig(path, dpi=120)


def sentence_grid(path: Path, rows: Sequence[tuple[str, Sequence[np.ndarray]]], *, columns: Sequence[str] = COLUMNS,
                  tile: int = 96) -> None:
  """Draws sentences one below the other; of a video the first, the middle and the last frame.

  Args:
    path: of the picture.
    rows: label and clips (uint8 (T, H, W, 3)) of each sentence.
    columns: what the clips are.
    tile: height of a frame in pixels.
  """
  gap, margin, top = 6, 150, 30
  frames = [[_frames_shown(clip) for clip in clips] for _, clips in rows]
  widths = [max(_strip_width(row[i], tile) for row in frames) for i in range(len(columns))]
  canvas = Image.new("RGB", (margin + sum(widths) + gap * (len(columns) + 1), top + (tile + gap) * len(rows)), "white")
  pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
  lefts = [margin + gap * (i + 1) + sum(widths[:i]) for i in range(len(columns))]
  for left, width, name in zip(lefts, widths, columns):
    pen.text((left + width / 2, top / 2), name, fill="black", font=font, anchor="mm")
  for index, ((label, _), clips) in enumerate(zip(rows, frames)):
    y = top + index * (tile + gap)
    pen.text((margin - gap, y + tile / 2), label, fill="black", font=font, anchor="rm", align="right")
    for left, width, shown in zip(lefts, widths, clips):
      x = left + (width - _strip_width(shown, tile)) // 2
      for frame in shown:
        size = (round(tile * frame.shape[1] / frame.shape[0]), tile)
        canvas.paste(Image.fromarray(frame).resize(size, Image.Resampling.NEAREST), (x, y))
        x += size[0] + 2
  canvas.save(path)


def _frames_shown(clip: np.ndarray) -> list[np.ndarray]:
  return [clip[i] for i in sorted({0, len(clip) // 2, len(clip) - 1})]


def _strip_width(frames: Sequence[np.ndarray], tile: int) -> int:
  return sum(round(tile * frame.shape[1] / frame.shape[0]) + 2 for frame in frames) - 2
