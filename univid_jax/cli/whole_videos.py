"""Sampling of whole videos from files: what is read of the query, and where progress is saved."""

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from univid_jax import Pipeline
from univid_jax.cli.results import remove_record
from univid_jax.cli.sampling import SamplingArguments
from univid_jax.core.numbers import round_up
from univid_jax.core.paths import require_writable
from univid_jax.data.clips import ClipFormat, ContextClip, Footage, file_footage
from univid_jax.data.media.reader import Frames, probe, read_clip
from univid_jax.data.media.writer import write_frames
from univid_jax.data.pictures import concatenate_clips
from univid_jax.inference.jobs import infer_length
from univid_jax.inference.long_video import VideoReader, VideoSample
from univid_jax.inference.progress_file import ProgressFile

log = logging.getLogger(__name__)

# Called after each step with the number of steps taken, and their total.
StepProgress = Callable[[int, int], None]

# Frames of a grid that are in memory at once.
GRID_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class WholeQuery:
  """A query that is sampled from its first frame to its last.

  Attributes:
    footage: all of it, at the model's size.
    fps: frame rate; None for folders and arrays.
    size: height and width of the result, at most the model's.
  """

  footage: Footage
  fps: float | None
  size: tuple[int, int]

  @classmethod
  def open(cls, path: str, form: ClipFormat, *, fps: float | None, keep_size: bool) -> "WholeQuery":
    """Opens a query.

    Args:
      path: of the file.
      form: in which the context is read.
      fps: to resample it to; None keeps its own, unlike that of the context.
      keep_size: whether the result has the query's own size.
    """
    found = probe(path)
    form = dataclasses.replace(form.for_shape(found.size), fps=fps or 0.0, extend=keep_size)
    footage = file_footage(Path(path), found, form, num_frames=found.count_at(form.fps))
    return cls(footage, footage.clip_fps, found.size if keep_size else form.size)

  def is_longer(self, context: Sequence[ContextClip], form: ClipFormat) -> bool:
    """Returns whether the result is a video as long as the query, and the query longer than the model's clips."""
    num_frames = form.num_frames
    lengths = [len(clip.frames) for clip in context]
    return 1 < num_frames < self.footage.num_frames and infer_length([*lengths, num_frames]) == num_frames

  def cut(self, num_frames: int) -> "WholeQuery":
    """Returns at most its first frames."""
    count = min(num_frames, self.footage.num_frames)
    return dataclasses.replace(self, footage=dataclasses.replace(self.footage, num_frames=count))

  def read(self, start: int, count: int) -> Frames:
    footage = self.footage
    assert footage.path is not None
    frames = read_clip(footage.path, start, count, footage.form.fps or None).frames
    footage.require_unchanged()
    return footage.form.resize(frames)

  def describe(self) -> dict[str, Any]:
    """Returns what the record of a result says of the query."""
    footage = self.footage
    changes = footage.describe_changes(footage.num_frames)
    return {
      "path": str(footage.path), "sha256": footage.identify(), "num_frames": footage.num_frames, "changes": changes
    }  # fmt: skip


def progress_path(path: Path) -> Path:
  """Returns where the progress of a result is saved."""
  return path.with_name(f"{path.name}.state.npz")


@dataclasses.dataclass(frozen=True)
class WholeVideo:
  """A whole video to sample into a file.

  Attributes:
    pipeline: the model.
    examples: the example pairs.
    query: B.
    arguments: of the windows.
    carry_context: whether these are sampled one after the other.
    record: everything that determines the result.
  """

  pipeline: Pipeline
  examples: Sequence[ContextClip]
  query: WholeQuery
  arguments: SamplingArguments
  record: Mapping[str, Any]
  carry_context: bool

  def write(
    self, path: Path, *, grid: Path | None = None, audio_from: str | None, progress: StepProgress | None = None
  ) -> ProgressFile:
    """Samples it into a file, or resumes what an earlier process has left.

    Args:
      path: of the result.
      grid: where to write the whole sentence side by side, too.
      audio_from: a clip whose sound the result gets.
      progress: see `StepProgress`.

    Returns:
      The progress, which is to be removed when the result has its record.
    """
    height, width = self.query.size
    num_frames = self.query.footage.num_frames
    require_writable(path.parent, num_bytes=num_frames * height * width * 3 * (1 if grid is None else 2))
    saved = ProgressFile(progress_path(path), self.record)

    def show(taken: int) -> None:
      remaining(taken)

    video = self.pipeline.sample_video(
      [clip.frames for clip in self.examples],
      VideoReader(num_frames, self.query.read),
      **self.arguments.to_keywords(),
      carry_context=self.carry_context,
      saved=saved,
      progress=show,
    )
    log.info("%s: %d frames in %d windows", self.query.footage.path, num_frames, video.num_windows)
    with tempfile.TemporaryFile(dir=path.parent) as sampled:

      def blocks() -> Iterator[Frames]:
        for block in _crop(video, height, width):
          if grid is not None:
            sampled.write(block.tobytes())
          yield block
        remove_record(path)  # of an earlier result, which is replaced next

      with tqdm(total=video.num_steps, desc="sample", unit="step") as bar:
        remaining = _RemainingTime(bar, progress)
        write_frames(path, blocks(), num_frames=num_frames, fps=self.query.fps, audio_from=audio_from)
      if grid is not None:
        self._write_grid(grid, sampled)
    return saved

  def _write_grid(self, path: Path, sampled: IO[bytes]) -> None:
    """Writes the whole sentence side by side, given the pixels of the result; files of it can have other frames."""
    height, width = self.query.size
    num_frames = self.query.footage.num_frames
    sampled.seek(0)

    def blocks() -> Iterator[Frames]:
      for start in range(0, num_frames, GRID_BLOCK):
        count = min(GRID_BLOCK, num_frames - start)
        shown = [clip.frames[min(start, len(clip.frames) - 1) :][:count] for clip in self.examples]
        out = np.frombuffer(sampled.read(count * height * width * 3), np.uint8).reshape(count, height, width, 3)
        yield concatenate_clips([*_crop([*shown, self.query.read(start, count)], height, width), out])

    write_frames(path, blocks(), num_frames=num_frames, fps=self.query.fps)


def _crop(blocks: VideoSample | Sequence[Frames], height: int, width: int) -> Iterator[Frames]:
  for block in blocks:
    yield block[:, :height, :width]


class _RemainingTime:
  """Shows progress, and says once, after the first steps of this process, how long the others will take.

  Steps that an earlier process has taken are reported at once, and take no time.
  """

  def __init__(self, bar: tqdm, progress: StepProgress | None):
    self._bar, self._progress = bar, progress
    self._first: tuple[int, float] | None = None
    self._said = False

  def __call__(self, taken: int) -> None:
    is_own = taken == self._bar.n + 1
    self._bar.update(taken - self._bar.n)
    if self._progress is not None:
      self._progress(taken, int(self._bar.total))
    if self._first is None:
      if is_own:  # until here, programs were compiled
        self._first = taken, time.monotonic()
      return
    steps, seconds = taken - self._first[0], time.monotonic() - self._first[1]
    is_tenth = steps >= 0.1 * (self._bar.total - self._first[0])
    if not self._said and steps and (seconds >= 5 or (is_tenth and seconds >= 1)):
      self._said = True
      left = seconds / steps * (self._bar.total - taken)
      if left >= 120:
        log.info("about %.0f minutes remain", left / 60)
      elif left >= 1.5:
        log.info("about %.0f seconds remain", left)


def padded_size(size: tuple[int, int], pipeline: Pipeline) -> tuple[int, int]:
  """Returns the least size, no smaller, that the model takes."""
  side = pipeline.encoders.codec.spatial_stride * pipeline.config.patch_size[1]
  height, width = (round_up(length, side) for length in size)
  return height, width
