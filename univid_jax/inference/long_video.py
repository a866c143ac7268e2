"""Samples whole videos in windows of the model's length, in device memory that does not grow with the video.

Jointly, all windows take a step together. Where they overlap, their velocities are averaged, with weights that fall
linearly towards the end of a window. One after the other (`carry_context`), a window and its result are an example pair
of the next, and the last frame of the result is its first frame.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from univid_jax.core.checks import require_callables, require_integer
from univid_jax.core.dims import pixel_frames
from univid_jax.core.errors import UserError
from univid_jax.core.numbers import ceil_div
from univid_jax.core.pixels import to_uint8
from univid_jax.core.seeds import check_seed, random_key
from univid_jax.data.clips import ClipFormat
from univid_jax.data.media.reader import Frames, probe, read_clip
from univid_jax.data.rows.tokens import patchify, unpatchify
from univid_jax.inference.arguments import as_numpy_clip, check_frames, list_clips
from univid_jax.inference.encoding import require_finite
from univid_jax.inference.jobs import Job, make_job
from univid_jax.inference.joint import JointWindows, WindowProgress
from univid_jax.inference.plan import SamplingPlan
from univid_jax.inference.progress_file import ProgressFile
from univid_jax.inference.windows import Windows

if TYPE_CHECKING:
  from univid_jax.inference.pipeline import Pipeline


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
  def from_frames(cls, frames: Frames) -> "VideoReader":
    return cls(len(frames), lambda start, count: frames[start : start + count])

  @classmethod
  def open(cls, path: str | os.PathLike, form: ClipFormat, *, size: tuple[int, int] | None = None) -> "VideoReader":
    """Opens a file, all of whose frames are read in a form's fit, at their own rate.

    Args:
      path: of the file.
      form: of the model.
      size: height and width in pixels; None takes the form's size nearest to the file's shape.

    Raises:
      OSError, UserError: the file cannot be read.
    """
    found = probe(path)
    form = form.for_shape(found.size) if size is None else dataclasses.replace(form, size=size, buckets=())

    def read(start: int, count: int) -> Frames:
      return form.resize(read_clip(path, start, count).frames)

    return cls(found.count_at(0.0), read)

  def read_padded(self, start: int, count: int) -> Frames:
    """Reads frames; after the end the last one is repeated."""
    begin = min(start, self.num_frames - 1)
    frames = self.read(begin, min(start + count, self.num_frames) - begin if start < self.num_frames else 1)
    return np.concatenate([frames, frames[-1:].repeat(count - len(frames), axis=0)])


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
    saved: where progress is saved, and found again; None starts from the beginning.
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
    examples: Iterable[Frames],
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
    examples = list_clips("examples", examples)
    require_callables(progress=progress)
    if len(examples) % 2:
      raise UserError(f"the context must be an odd number of clips (A, A', B), got {len(examples) + 1}")
    if plan.step_cache is not None and not carry_context:
      raise UserError("windows that advance together have no step cache: use carry_context, or give num_frames")
    if pipeline.config.takes_condition and not examples:
      raise UserError("windows of an I2V base share the first frame of A: add an example pair, or give num_frames")
    first = query.read(0, 1)
    for clip in (*examples, first):
      check_frames(clip)
    sizes = {clip.shape[1:3] for clip in (*examples, first)}
    if len(sizes) > 1:
      raise UserError(f"all clips must have the same size, got {sorted(sizes)}")
    self._pipeline, self._examples, self._query, self._embeds = pipeline, examples, query, embeds
    self._first_clip = examples[0] if examples else first  # only an I2V base looks at it
    self._plan, self._seed, self._saved, self._progress = plan, check_seed(seed), saved, progress
    self._carry_context = carry_context
    self._shape = pipeline.latent_shape((window_frames, *first.shape[1:3]))
    stride = pipeline.encoders.codec.temporal_stride
    length = self._shape[0]
    if length == 1:
      raise UserError("windows need several frames: give num_frames, 4n + 1, at least 5")
    overlap = 0 if carry_context else (length - 1) // 2
    self._windows = Windows.spread(query.num_frames, length=length, temporal_stride=stride, overlap=overlap)
    if carry_context:  # windows follow each other without overlap; the last one goes on after the end
      count = ceil_div(self._windows.total - 1, length - 1)
      self._windows = Windows(1 + count * (length - 1), length, tuple(range(0, count * (length - 1), length - 1)))
    self.num_windows = len(self._windows.starts)
    if carry_context and self.num_windows > 1:
      pipeline.warn_of_first_frame()
    self.num_steps = self.num_windows * len(plan.sigmas)

  @classmethod
  def prepare(
    cls,
    pipeline: "Pipeline",
    examples: Iterable[Frames],
    query: Frames | VideoReader | str | os.PathLike,
    prompt: str = "",
    *,
    num_frames: int | None = None,
    negative_prompt: str = "",
    seed: int = 0,
    carry_context: bool = False,
    saved: ProgressFile | None = None,
    progress: WindowProgress | None = None,
    **options: Any,
  ) -> "VideoSample":
    """Prepares to sample a video.

    Args:
      pipeline: the model.
      examples: the example pairs A, A', uint8 (T, H, W, 3), of one size.
      query: B, what reads parts of it, or a file, which is brought to the size of the examples and read in parts.
      prompt, negative_prompt: see `Pipeline.sample`.
      num_frames: of a window, 4n + 1; by default that of training.
      seed, carry_context, saved, progress: see the class.
      **options: of `Pipeline.plan`.

    Raises:
      OSError, UserError: the file cannot be read, or see the class and `Pipeline.sample`.
    """
    examples = list_clips("examples", examples)
    for clip in examples:
      check_frames(clip)
    if isinstance(query, (str, os.PathLike)):
      query = VideoReader.open(query, pipeline.clip_format, size=examples[0].shape[1:3] if examples else None)
    elif not isinstance(query, VideoReader):
      frames = as_numpy_clip(query)
      check_frames(frames)
      query = VideoReader.from_frames(frames)
    plan = pipeline.plan(**options)
    return cls(
      pipeline,
      examples,
      query,
      embeds=pipeline.embed_branches(plan, prompt, negative_prompt),
      plan=plan,
      window_frames=pipeline.num_frames if num_frames is None else require_integer("num_frames", num_frames, 1),
      seed=seed,
      carry_context=carry_context,
      saved=saved,
      progress=progress,
    )

  def __iter__(self) -> Iterator[Frames]:
    blocks = self._sample_in_turn() if self._carry_context else self._decode(self._sample_jointly())
    left = self._query.num_frames
    for block in blocks:
      if left > 0:
        yield block[:left]
      left -= len(block)

  def _read_window(self, window: int) -> Frames:
    stride = self._pipeline.encoders.codec.temporal_stride
    num_frames = pixel_frames(self._windows.length, temporal_stride=stride)
    return self._query.read_padded(self._windows.starts[window] * stride, num_frames)

  def _noise(self, latent_frame: int) -> Float[np.ndarray, "y x c"]:
    """Returns the noise of one latent frame of the video, whatever windows it is in."""
    key = jax.random.fold_in(random_key(self._seed), latent_frame)
    shape = *self._shape[1:], self._pipeline.encoders.codec.latent_channels
    return np.asarray(jax.random.normal(key, shape, jnp.float32))

  def _window_noise(self, window: int) -> Float[np.ndarray, "t y x c"]:
    start = self._windows.starts[window]
    return np.stack([self._noise(start + index) for index in range(self._windows.length)])

  def _make_job(self, context: Sequence[np.ndarray], noise: np.ndarray, *, has_first_frame: bool = False) -> Job:
    clips = (*context, np.zeros_like(noise))
    features = self._pipeline.features
    return make_job(clips, noise, features=features, first_clip=self._first_clip, has_first_frame=has_first_frame)

  def _sample_jointly(self) -> Float[np.ndarray, "t y x c"]:
    """Advances all windows together, and returns the latents of the video."""
    windows, patch_size = self._windows, self._pipeline.config.patch_size
    examples = [self._pipeline.encode(clip) for clip in self._examples]
    queries = [self._pipeline.encode(self._read_window(window)) for window in range(self.num_windows)]
    job = self._make_job([*examples, queries[0]], self._window_noise(0))
    template = self._pipeline.pack_job(job, self._embeds)
    joint = JointWindows(windows, template, [patchify(query, patch_size) for query in queries])
    positions = [*range(windows.total), *windows.starts[1:]]
    noise = np.stack([patchify(self._noise(position)[None], patch_size) for position in positions])
    tokens = self._pipeline.joint_sampler.sample(
      self._pipeline.experts, joint, noise, self._plan, saved=self._saved, progress=self._progress
    )
    latents = unpatchify(np.concatenate(list(tokens[: windows.total])), (windows.total, *self._shape[1:]), patch_size)
    return require_finite(latents)

  def _decode(self, latents: Float[np.ndarray, "t y x c"]) -> Iterator[Frames]:
    for part in self._pipeline.decode_parts(latents):
      yield to_uint8(require_finite(part))

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
        # In the layout of a file, so that codecs round alike.
        latents = np.ascontiguousarray(self._sample_window(window, [*examples, *before, query], first))
        done[f"window{window}"] = latents
        if self._saved:
          self._saved.save(done)
      if self._progress:
        self._progress((window + 1) * len(self._plan.sigmas))
      frames = to_uint8(require_finite(self._pipeline.decode(latents)))
      yield frames[1:] if window else frames
      before, first = (query, latents), self._pipeline.encode(frames[-1:])

  def _sample_window(
    self, window: int, clips: Sequence[np.ndarray], first: Float[np.ndarray, "1 y x c"] | None
  ) -> Float[np.ndarray, "t y x c"]:
    """Samples one window, of which the first latent frame is given unless it starts the video."""
    given = () if first is None else (first,)
    noise = self._window_noise(window)[len(given) :]
    job = self._make_job([*clips, *given], noise, has_first_frame=bool(given))
    taken = window * len(self._plan.sigmas)

    def show(steps: int) -> None:
      if self._progress is not None:
        self._progress(taken + steps)

    return require_finite(self._pipeline.sample_job(job, self._embeds, self._plan, progress=show))
