"""Pictures and videos for the demo page: large enough to be looked at, in formats that every browser shows."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from univid_jax.data.media.reader import Frames, read_clip
from univid_jax.data.media.writer import write_clip
from univid_jax.data.pictures import CLIP_GAP, key_frames

# Side in pixels that small clips are enlarged to; frames of a long video that comparisons show.
LARGE, SMALL = 512, 256
MAX_FRAMES = 129


def enlarge(frames: Frames, side: int = LARGE) -> Frames:
  """Repeats pixels until the longer side is about `side`; larger clips stay as they are."""
  factor = max(1, round(side / max(frames.shape[1:3])))
  return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def show(path: Path, frames: Frames, *, fps: float | None = None, side: int = LARGE) -> Path:
  """Writes a clip enlarged, as .png or .mp4; returns the path with its suffix."""
  path = path.with_suffix(".png" if len(frames) == 1 else ".mp4")
  write_clip(path, enlarge(frames, side), fps=fps)
  return path


def show_key_frames(frames: Frames) -> np.ndarray:
  """Returns an image: the frame of an image, or first, middle and last frame of a video side by side."""
  return np.concatenate(key_frames(enlarge(frames)), axis=1)


def read_grid(path: Path, count: int) -> tuple[list[Frames], float | None]:
  """Reads the clips of a grid that `sample --grid` has written, and its frame rate."""
  grid = read_clip(path, 0, count)
  width = (grid.frames.shape[2] - 3 * CLIP_GAP) // 4
  starts = range(0, 4 * (width + CLIP_GAP), width + CLIP_GAP)
  return [grid.frames[:, :, start : start + width] for start in starts], grid.fps


def arrange(clips: Sequence[Frames]) -> Frames:
  """Puts A and A' above B and B'."""
  a, a2, b, b2 = (enlarge(clip, SMALL) for clip in clips)
  across = np.full((*a.shape[:2], 2 * CLIP_GAP, 3), 255, np.uint8)
  above, below = (np.concatenate([left, across, right], axis=2) for left, right in ((a, a2), (b, b2)))
  between = np.full((len(a), 2 * CLIP_GAP, *above.shape[2:]), 255, np.uint8)
  return np.concatenate([above, between, below], axis=1)


def subtract(clips: Sequence[Frames]) -> Frames:
  """Returns the absolute difference of B' and B: black where nothing has changed."""
  b, b2 = (clip.astype(np.int16) for clip in clips[2:])
  return np.abs(b2 - b).astype(np.uint8)


VIEWS: dict[str, Callable[[Sequence[Frames]], Frames]] = {"pairs": arrange, "difference": subtract}


def draw_views(grid: Path, folder: Path, count: int) -> dict[str, Path]:
  """Draws the views of a result into a folder, from a grid of which at most MAX_FRAMES frames are shown."""
  clips, fps = read_grid(grid, min(count, MAX_FRAMES))
  return {name: show(folder / name, draw(clips), fps=fps) for name, draw in VIEWS.items()}
