"""Samples whole videos in windows of the model's length, in device memory that does not grow with the video.

A window is a clip as in training: its first latent frame is a single frame, and each of the others a group of four. The
video is such a clip too, so that all windows share their groups with it, but the first frame of a window that does not
start the video is in the middle of one of the video's groups. It belongs to this window alone: an anchor, which is
generated like the rest and then dropped.

Jointly, all windows take a step together. Where they overlap, their velocities are averaged, with weights that fall
linearly towards the end of a window. One after the other (`carry_context`), the last window and its result are an example
pair of the next, and the last frame of the result is its first frame.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float, Int

from univid_jax.core.errors import UserError
from univid_jax.core.packed_row import PackedRow
from univid_jax.core.pixels import to_uint8
from univid_jax.core.sentence import Sentence, reference_roles
from univid_jax.data.packing import join_rows
from univid_jax.data.reader import Frames
from univid_jax.data.tokens import patchify, unpatchify
from univid_jax.inference.jobs import Job
from univid_jax.inference.plan import SamplingPlan
from univid_jax.inference.progress_file import ProgressFile

if TYPE_CHECKING:
  from univid_jax.inference.pipeline import Pipeline

# Called with the number of steps of windows that were taken.
WindowProgress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class VideoReader:
  """A video that is read in parts.

  Attributes:
    num_frames: of the video.
    read: returns frames, uint8 (T, H, W, 3), given the first and their number.
  """

  num_frames: int
  read: Callable[[int, int], Frames]

  @classmethod
  def of(cls, frames: Frames) -> "VideoReader":
    return cls(len(frames), lambda start, count: frames[start : start + count])

  def read_padded(self, start: int, count: int) -> Frames:
    """Reads frames; after the end the last one is repeated."""
    begin = min(start, self.num_frames - 1)
    frames = self.read(begin, min(start + count, self.num_frames) - begin if start < self.num_frames else 1)
    return np.concatenate([frames, frames[-1:].repeat(count - len(frames), axis=0)])


@dataclasses.dataclass(frozen=True)
class Windows:
  """Places of windows in a video, in latent frames.

  Attributes:
    total: latent frames of the video.
    length: of each window.
    starts: the first latent frame of each window, ascending from 0.
  """

  total: int
  length: int
  starts: tuple[int, ...]

  @classmethod
  def of(cls, num_frames: int, *, length: int, temporal_stride: int, overlap: int) -> "Windows":
    """Spreads windows over a video.

    Args:
      num_frames: of the video.
      length: of a window, in latent frames; a shorter video is extended to it.
      temporal_stride: frames per group.
      overlap: groups that neighbouring windows share, at least, if windows are long enough.
    """
    total = max(1 + math.ceil((num_frames - 1) / temporal_stride), length)
    advance = max(length - 1 - overlap, 1)
    count = 1 + math.ceil((total - length) / advance)
    starts = np.linspace(0, total - length, count).round().astype(int)
    return cls(total, length, tuple(starts.tolist()))

  @property
  def num_entries(self) -> int:
    """Latent frames of the video and anchors of all windows but the first."""
    return self.total + len(self.starts) - 1

  def entries(self, window: int) -> Int[np.ndarray, "t"]:
    """Returns where the latent frames of a window are among the entries: anchors follow the video."""
    entries = self.starts[window] + np.arange(self.length)
    if window:
      entries[0] = self.total + window - 1
    return entries

  def weights(self, window: int) -> Float[np.ndarray, "t"]:
    """Returns the share of a window in the velocity of its latent frames; the shares of all windows sum to 1."""
    total = np.zeros(self.num_entries)
    for other in range(len(self.starts)):
      total[self.entries(other)] += self._ramps(other)
    return (self._ramps(window) / total[self.entries(window)]).astype(np.float32)

  def _ramps(self, window: int) -> Float[np.ndarray, "t"]:
    weights = np.ones(self.length)
    for other, forward in ((window - 1, True), (window + 1, False)):
      if 0 <= other < len(self.starts):
        shared = self.length - 1 - abs(self.starts[other] - self.starts[window])
        ramp = np.arange(1, shared + 1) / (shared + 1)
        part = slice(1, 1 + shared) if forward else slice(self.length - shared, None)
        weights[part] *= ramp if forward else ramp[::-1]
    return weights


class VideoSample:
  """A whole video to sample: iterate over it to get its frames, in blocks of uint8 (T, H, W, 3).

  Args:
    pipeline: the model.
    examples: the example pairs A, A', uint8, an even number of clips.
    query: the video B.
    embeds: the prompt's embedding, and the negative prompt's if there is guidance.
    plan: what each step does.
    window_frames: of a window, 4n + 1.
    seed: of the noise.
    carry_context: samples windows one after the other.
    saved: where progress is saved, and found again; None starts anew.
    progress: called with the number of steps of windows taken, after each.

  Attributes:
    num_windows: how many there are.
    num_steps: all steps of all windows.

  Raises:
    UserError: the clips do not fit the model, or each other, or the plan does not fit windows.
  """

  def __init__(
    self,
    pipeline: "Pipeline",
    examples: Sequence[Frames],
    query: VideoReader,
    *,
    embeds: Sequence[np.ndarray],
    plan: SamplingPlan,
    window_frames: int,
    seed: int = 0,
    carry_context: bool = False,
    saved: ProgressFile | None = None,
    progress: WindowProgress | None = None,
  ):
    if len(examples) % 2:
      raise UserError(f"examples are pairs A, A', an even number of clips, got {len(examples)}")
    if plan.step_cache is not None and not carry_context:
      raise UserError("windows that advance together have no step cache: use carry_context, or give num_frames")
    first = query.read(0, 1)
    sizes = {clip.shape[1:3] for clip in (*examples, first)}
    if len(sizes) > 1:
      raise UserError(f"all clips must have the same size, got {sorted(sizes)}")
    self._pipeline, self._examples, self._query, self._embeds = pipeline, examples, query, embeds
    self._first_clip = examples[0] if examples else first
    self._plan, self._seed, self._saved, self._progress = plan, seed, saved, progress
    self._carry_context = carry_context
    self._shape = pipeline.latent_shape((window_frames, *first.shape[1:3]))
    stride = pipeline.encoders.codec.temporal_stride
    length = self._shape[0]
    if length == 1:
      raise UserError("windows need several frames: give num_frames, 4n + 1, at least 5")
    overlap = 0 if carry_context else min((length - 1) // 2, length - 2)
    self._windows = Windows.of(query.num_frames, length=length, temporal_stride=stride, overlap=overlap)
    if carry_context:  # windows follow each other without overlap; the last one goes on after the end
      count = math.ceil((self._windows.total - 1) / (length - 1))
      self._windows = Windows(1 + count * (length - 1), length, tuple(range(0, count * (length - 1), length - 1)))
    self.num_windows = len(self._windows.starts)
    self.num_steps = self.num_windows * len(plan.sigmas)

  def __iter__(self) -> Iterator[Frames]:
    blocks = self._sample_in_turn() if self._carry_context else self._decode(self._sample_jointly())
    left = self._query.num_frames
    for block in blocks:
      if left > 0:
        yield block[:left]
      left -= len(block)

  def _read_window(self, window: int) -> Frames:
    stride = self._pipeline.encoders.codec.temporal_stride
    return self._query.read_padded(self._windows.starts[window] * stride, (self._windows.length - 1) * stride + 1)

  def _noise(self, latent_frame: int) -> Float[np.ndarray, "y x c"]:
    """Returns the noise of one latent frame of the video, whatever windows it is in."""
    key = jax.random.fold_in(jax.random.key(self._seed), latent_frame)
    return np.asarray(jax.random.normal(key, (*self._shape[1:], self._pipeline.encoders.codec.latent_channels)))

  def _window_noise(self, window: int) -> Float[np.ndarray, "t y x c"]:
    start = self._windows.starts[window]
    return np.stack([self._noise(start + index) for index in range(self._windows.length)])

  def _pack(self, clips: Sequence[np.ndarray], num_target_frames: int) -> tuple[Job, list[PackedRow]]:
    """Packs a sentence of latents, once for each prompt."""
    channels = self._pipeline.encoders.codec.latent_channels
    target = np.zeros((num_target_frames, *self._shape[1:], channels), np.float32)
    encoded = (*clips, target)
    condition, features = self._pipeline.image_inputs(self._first_clip, sum(map(len, encoded)))
    job = Job(Sentence(clips=encoded, roles=reference_roles(len(encoded))), np.zeros((0, 0)), condition, features)
    return job, self._pipeline.pack_job(job, self._embeds)

  def _sample_jointly(self) -> Float[np.ndarray, "t y x c"]:
    """Advances all windows together, and returns the latents of the video."""
    windows, patch_size = self._windows, self._pipeline.config.patch_size
    examples = [self._pipeline.encode(clip) for clip in self._examples]
    queries = [self._pipeline.encode(self._read_window(window)) for window in range(self.num_windows)]
    _, template = self._pack([*examples, queries[0]], windows.length)
    joint = JointWindows(windows, template, [patchify(query, patch_size) for query in queries])
    positions = [*range(windows.total), *windows.starts[1:]]
    noise = np.stack([patchify(self._noise(position)[None], patch_size) for position in positions])
    tokens = self._pipeline.sampler.sample_jointly(
      self._pipeline.experts, joint, noise, self._plan, saved=self._saved, progress=self._progress
    )
    latents = unpatchify(
      np.concatenate(list(tokens[: windows.total])), (windows.total, *self._shape[1:]), patch_size
    )
    return self._pipeline.require_finite(latents)

  def _decode(self, latents: Float[np.ndarray, "t y x c"]) -> Iterator[Frames]:
    for part in self._pipeline.decode_parts(latents):
      yield to_uint8(self._pipeline.require_finite(part))

  def _sample_in_turn(self) -> Iterator[Frames]:
    """Yields what each window adds to the video; decodes again what an earlier process has sampled."""
    done = self._saved.load() if self._saved else {}
    examples = [self._pipeline.encode(clip) for clip in self._examples]
    before: tuple[np.ndarray, ...] = ()
    first: np.ndarray | None = None
    for window in range(self.num_windows):
      query = self._pipeline.encode(self._read_window(window))
      latents = done.get(f"window{window}")
      if latents is None:
        latents = self._sample_window(window, [*examples, *before, query], first)
        done[f"window{window}"] = latents
        if self._saved:
          self._saved.save(done)
      if self._progress:
        self._progress((window + 1) * len(self._plan.sigmas))
      frames = to_uint8(self._pipeline.require_finite(self._pipeline.decode(latents)))
      yield frames[1:] if window else frames
      before, first = (query, latents), self._pipeline.encode(frames[-1:])

  def _sample_window(
    self, window: int, clips: Sequence[np.ndarray], first: Float[np.ndarray, "1 y x c"] | None
  ) -> Float[np.ndarray, "t y x c"]:
    """Samples one window, of which the first latent frame is given unless it starts the video."""
    given = () if first is None else (first,)
    job, rows = self._pack([*clips, *given], self._windows.length - len(given))
    patch_size = self._pipeline.config.patch_size
    noise = patchify(self._window_noise(window)[len(given) :], patch_size)
    taken = window * len(self._plan.sigmas)
    (tokens,) = self._pipeline.sample_rows(
      rows, [noise], self._plan, lambda steps: self._progress and self._progress(taken + steps)
    )
    return self._pipeline.require_finite(np.concatenate([*given, job.finish(tokens, patch_size)]))


@dataclasses.dataclass(frozen=True)
class JointWindows:
  """Rows of windows that differ in the tokens of their query.

  Attributes:
    windows: their places.
    template: the row of the first window, for the prompt and, with guidance, for the negative prompt.
    queries: the tokens of each window's query, the last clip of the context.
  """

  windows: Windows
  template: Sequence[PackedRow]
  queries: Sequence[Float[np.ndarray, "l p"]]

  def rows(self, batch: Sequence[int]) -> list[PackedRow]:
    """Returns the rows of some windows."""
    return [join_rows([self._with_query(row, self.queries[window]) for window in batch]) for row in self.template]

  def place(self, tokens: Float[np.ndarray, "f s p"], batch: Sequence[int]) -> Float[np.ndarray, "b l p"]:
    """Returns the noised target tokens of some windows in their rows, given the tokens of all entries."""
    row = self.template[0]
    placed = np.zeros((len(batch), *row.tokens.shape[1:]), np.float32)
    for index, window in enumerate(batch):
      placed[index, np.asarray(row.target_mask[0])] = np.concatenate(list(tokens[self.windows.entries(window)]))
    return placed

  def blend(self, velocities: Iterator[tuple[int, Float[np.ndarray, "l p"]]], into: Float[np.ndarray, "f s p"]) -> None:
    """Adds the velocities of the target tokens of windows, weighted, to those of all entries."""
    is_target = np.asarray(self.template[0].target_mask[0])
    for window, velocity in velocities:
      entries = self.windows.entries(window)
      parts = velocity[is_target].reshape(len(entries), *into.shape[1:])
      into[entries] += parts * self.windows.weights(window)[:, None, None]

  def _with_query(self, row: PackedRow, query: Float[np.ndarray, "l p"]) -> PackedRow:
    tokens = np.array(row.tokens)
    end = int(np.argmax(row.target_mask[0]))
    tokens[0, end - len(query) : end] = query
    return dataclasses.replace(row, tokens=tokens)


def batches(count: int, size: int) -> Iterator[list[int]]:
  """Yields the numbers of windows in batches of one size; the last window fills up the last batch."""
  for start in range(0, count, size):
    yield [min(index, count - 1) for index in range(start, start + size)]


_ = itertools, Any
