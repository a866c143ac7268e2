"""Pictures of results."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from univid_jax.data.cache import read_frames
from univid_jax.types import Role, Sentence

COLUMNS = ("A", "A'", "B", "B' predicted", "B' true")


def plot_loss(path: Path, training: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]] = ()) -> None:
  """(step, loss) of the training, with a running mean, and of the validation."""
  from matplotlib.figure import Figure  # a third of a second, at the end of a run instead of its start

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


def sentence_grid(path: Path, rows: Sequence[tuple[str, Sequence[np.ndarray]]], *, columns: Sequence[str] = COLUMNS,
                  tile: int = 96) -> None:
  """Draws sentences one below the other; of a video the first, the middle and the last frame.

  Args:
    path: of the picture.
    rows: label and clips (uint8 (T, H, W, 3)) of each sentence, as many as there are columns at most.
    columns: what the clips are.
    tile: height of a frame in pixels.
  """
  gap, margin, top = 6, 150, 30
  frames = [[_frames_shown(clip) for clip in clips] + [[]] * (len(columns) - len(clips)) for _, clips in rows]
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


def contact_sheet(path: Path, sentences: Sequence[tuple[str, Sentence]]) -> None:
  """Draws sentences as the model gets them: clips with their roles, context and prompt.

  Args:
    path: of the picture.
    sentences: each with the name of where it is from.
  """
  count = max(len(sentence.clips) for _, sentence in sentences)
  columns = [chr(ord("A") + i // 2) + "'" * (i % 2) for i in range(count)]
  rows = []
  for name, sentence in sentences:
    targets = [column for column, role in zip(columns, sentence.roles) if role == Role.TARGET]
    prompt = textwrap.shorten(sentence.prompt, 24, placeholder=" ...") or "no prompt"
    label = f"{name} {sentence.task}\ncontext {sentence.context or '-'}\npaints {', '.join(targets)}\n{prompt}"
    rows.append((label, [read_frames(clip) for clip in sentence.clips]))
  sentence_grid(path, rows, columns=columns)


def beside(clips: Sequence[np.ndarray]) -> np.ndarray:
  """Clips of one size side by side, the last frame of the shorter ones held: uint8 (T, H, W, 3)."""
  count = max(len(clip) for clip in clips)
  gap = np.full((count, clips[0].shape[1], 4, 3), 255, np.uint8)
  held = [clip[np.minimum(np.arange(count), len(clip) - 1)] for clip in clips]
  return np.concatenate([part for clip in held for part in (clip, gap)][:-1], axis=2)


def _frames_shown(clip: np.ndarray) -> list[np.ndarray]:
  return [clip[i] for i in sorted({0, len(clip) // 2, len(clip) - 1})]


def _strip_width(frames: Sequence[np.ndarray], tile: int) -> int:
  return max(sum(round(tile * frame.shape[1] / frame.shape[0]) + 2 for frame in frames) - 2, 0)
