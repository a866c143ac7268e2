"""Pictures of sentences: their clips side by side, and one sentence below the other."""

import functools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from univid_jax.core.numbers import ceil_div
from univid_jax.core.sentence import Role, Sentence, read_frames

COLUMNS = ("A", "A'", "B", "B' predicted", "B' true")

# What a newcomer has to know of a column.
CAPTIONS: Mapping[str, str] = {
  "A": "example: before",
  "A'": "example: after",
  "B": "a new clip",
  "B' predicted": "the model's prediction",
  "B' true": "the ground truth",
  "with swapped pairs": "shown another task's example",
}

# Space between frames, and above them for the names of the columns, in pixels; between clips that are joined.
GAP, HEADER = 6, 50
CLIP_GAP = 4
# The colour of the line around frames.
FRAME = (200, 200, 200)

# Height of a frame in pixels.
TILE = 96

# Of letters in pixels: names of columns and labels of rows; captions.
SIZES = (15, 11)

# The most frames of an animation, the frame rate of one whose videos keep theirs, and what is added to the last frame's
# time, in milliseconds.
MAX_FRAMES, FPS, PAUSE = 33, 8.0, 1000


def sentence_grid(
  path: Path, rows: Sequence[tuple[str, Sequence[np.ndarray]]], *, columns: Sequence[str] = COLUMNS
) -> None:
  """Draws one sentence per line; videos are represented by their first, middle and last frame.

  Args:
    path: of the PNG file.
    rows: label and clips (uint8 (T, H, W, 3)) of each sentence, at most as many clips as columns.
    columns: names of the clips.
  """
  _draw([(label, [key_frames(clip) for clip in clips]) for label, clips in rows], columns).save(path)


def sentence_animation(
  path: Path, rows: Sequence[tuple[str, Sequence[np.ndarray]]], *, columns: Sequence[str] = COLUMNS, fps: float = FPS
) -> None:
  """Draws one sentence per line as an animation that repeats; shorter clips stay at their last frame.

  Of long videos it shows every n-th frame, for as long as n frames take.

  Args:
    path: of the WebP file.
    rows: label and clips (uint8 (T, H, W, 3)) of each sentence, at most as many clips as columns.
    columns: names of the clips.
    fps: frames per second.
  """
  count = max(len(clip) for _, clips in rows for clip in clips)
  stride = ceil_div(count, MAX_FRAMES)
  pictures = [
    _draw([(label, [list(clip[: time + 1][-1:]) for clip in clips]) for label, clips in rows], columns)
    for time in range(0, count, stride)
  ]
  durations = [round(1000 * stride / fps)] * len(pictures)
  durations[-1] += PAUSE
  pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, quality=90)


def _draw(rows: Sequence[tuple[str, Sequence[Sequence[np.ndarray]]]], columns: Sequence[str]) -> Image.Image:
  """Draws the label of each row and, in each column, some frames from left to right."""
  strips = [[*clips] + [[]] * (len(columns) - len(clips)) for _, clips in rows]
  headers = [(name, CAPTIONS.get(name, "")) for name in columns]
  widths = [
    max(*(_strip_width(line[i]) for line in strips), GAP + max(map(_text_width, headers[i], SIZES)))
    for i in range(len(columns))
  ]
  margin = 2 * GAP + max(_text_width(label, SIZES[0]) for label, _ in rows)
  shape = (margin + sum(widths) + GAP * (len(columns) + 1), HEADER + (TILE + GAP) * len(rows))
  canvas = Image.new("RGB", shape, "white")
  pen = ImageDraw.Draw(canvas)
  lefts = [margin + GAP * (i + 1) + sum(widths[:i]) for i in range(len(columns))]
  for left, width, header in zip(lefts, widths, headers):
    for text, size, color, height in zip(header, SIZES, ("black", "dimgrey"), (16, 35)):
      pen.text((left + width / 2, height), text, fill=color, font=_font(text, size), anchor="mm")
  for index, ((label, _), line) in enumerate(zip(rows, strips)):
    top = HEADER + index * (TILE + GAP)
    font = _font(label, SIZES[0])
    pen.text((margin - GAP, top + TILE / 2), label, fill="black", font=font, anchor="rm", align="right")
    for left, width, frames in zip(lefts, widths, line):
      x = left + (width - _strip_width(frames)) // 2
      for frame in frames:
        area = (round(TILE * frame.shape[1] / frame.shape[0]), TILE)
        pen.rectangle((x - 1, top - 1, x + area[0], top + TILE), outline=FRAME)  # or white frames would vanish
        canvas.paste(Image.fromarray(frame).resize(area, Image.Resampling.NEAREST), (x, top))
        x += area[0] + 2
  return canvas


def shown_context(context: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Returns A, A' and B of a sentence without its target; what it lacks is a clip of no frames, which is not drawn."""
  missing = 3 - len(context[-3:])
  return [np.zeros((0, 1, 1, 3), np.uint8)] * missing + list(context[-3:])


def contact_sheet(path: Path, sentences: Sequence[tuple[str, Sentence]]) -> None:
  """Draws sentences as the model sees them: clips with their roles, context and prompt.

  Args:
    path: of the PNG file.
    sentences: each with the name of its source.
  """
  count = max(len(sentence.clips) for _, sentence in sentences)
  columns = [chr(ord("A") + i // 2) + "'" * (i % 2) for i in range(count)]
  rows = []
  for name, sentence in sentences:
    targets = [column for column, role in zip(columns, sentence.roles) if role == Role.TARGET]
    prompt = textwrap.shorten(sentence.prompt, 24, placeholder=" ...") or "no prompt"
    label = f"{name} {sentence.task}\ncontext {sentence.context or '-'}\npredicts {', '.join(targets)}\n{prompt}"
    rows.append((label, [read_frames(clip) for clip in sentence.clips]))
  sentence_grid(path, rows, columns=columns)


def concatenate_clips(clips: Sequence[np.ndarray]) -> np.ndarray:
  """Joins clips of one height, uint8 (T, H, W, 3), from left to right; shorter clips repeat their last frame, and those
  of no frames are left out."""
  clips = [clip for clip in clips if len(clip)]
  count = max(len(clip) for clip in clips)
  gap = np.full((count, clips[0].shape[1], CLIP_GAP, 3), 255, np.uint8)
  extended = [clip[np.minimum(np.arange(count), len(clip) - 1)] for clip in clips]
  return np.concatenate([part for clip in extended for part in (clip, gap)][:-1], axis=2)


def key_frames(clip: np.ndarray) -> list[np.ndarray]:
  """Returns the frame of an image, or first, middle and last frame of a video; of no frames none."""
  return [clip[i] for i in sorted({0, len(clip) // 2, len(clip) - 1})] if len(clip) else []


@functools.cache
def _load_font(size: int, *, is_ascii: bool) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
  """Loads Pillow's own font, which has ASCII alone, or DejaVu, smaller, as its letters are wider."""
  if is_ascii:
    return ImageFont.load_default(size=size)
  import matplotlib  # takes a tenth of a second to import

  return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 0.87 * size)


def _font(text: str, size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
  """Returns a font that has the letters of a text: Latin, Greek, Cyrillic, ..."""
  return _load_font(size, is_ascii=text.isascii())


def _text_width(text: str, size: int) -> int:
  font = _font(text, size)
  return round(max(font.getlength(line) for line in text.splitlines() or [""]))


def _strip_width(frames: Sequence[np.ndarray]) -> int:
  return max(sum(round(TILE * frame.shape[1] / frame.shape[0]) + 2 for frame in frames) - 2, 0)
