"""Runs requests: samples, and writes for each the clip and how it was made."""

import dataclasses
import functools
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import univid_jax
from univid_jax import Pipeline
from univid_jax.cli.context_reader import ContextReader
from univid_jax.cli.results import check_result, grid_path, is_finished, remove_record, write_record
from univid_jax.cli.sampling import Request, SamplingArguments
from univid_jax.cli.whole_videos import StepProgress, WholeQuery, WholeVideo, progress_path
from univid_jax.core.options import SolverName
from univid_jax.core.paths import require_writable
from univid_jax.core.text import count_noun
from univid_jax.data.clips import ClipFormat, ContextClip, frame_rate
from univid_jax.data.media.reader import Frames, probe
from univid_jax.data.media.writer import write_clip
from univid_jax.data.pictures import concatenate_clips
from univid_jax.diffusion.solvers import find_solver
from univid_jax.inference.jobs import infer_length
from univid_jax.inference.plan import SAMPLING_VERSION, SamplingOptions
from univid_jax.inference.preview import Preview
from univid_jax.runtime.profiling import profiler_options

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PreparedRequest:
  """A request whose clips are read.

  Attributes:
    request: what to sample.
    clips: the context.
    first: first frame of the result, if it is given.
    path: of the result.
    record: how the result is made.
  """

  request: Request
  clips: Sequence[ContextClip]
  first: ContextClip | None
  path: Path
  record: dict[str, Any]

  @property
  def frames(self) -> list[Frames]:
    return [clip.frames for clip in self.clips]


@dataclasses.dataclass(frozen=True)
class RequestRunner:
  """Samples, and writes for each request the clip and a .json that says how it was made.

  Attributes:
    pipeline: the model.
    form: in which clips are read.
    arguments: of `Pipeline.sample`.
    origin: of the model, for the .json.
    grid: whether to write the whole sentence too.
    copy_audio: whether results get the sound of their query.
    keep_size: whether results have the size of their query; the model's is the least that holds it.
    video_fps: frame rate that whole videos are resampled to; None keeps theirs.
    carry_context: whether windows of whole videos are sampled one after the other.
    first_frame: an image that results begin with, which the model must be able to keep; the context may then be empty.
    is_warm_up: whether of whole videos only as many windows are sampled as use all programs.
    progress: called after each step, see `StepProgress`.
    preview: see `Pipeline.sample`; of whole videos there is none.
  """

  pipeline: Pipeline
  form: ClipFormat
  arguments: SamplingArguments
  origin: Mapping[str, Any]
  grid: bool = False
  copy_audio: bool = False
  keep_size: bool = False
  video_fps: float | None = None
  carry_context: bool = False
  first_frame: str | None = None
  is_warm_up: bool = False
  progress: StepProgress | None = None
  preview: Preview | None = None

  @functools.cached_property
  def reader(self) -> ContextReader:
    """Reads the clips of requests."""
    return ContextReader(self.pipeline, self.form, keep_size=self.keep_size, first_frame=self.first_frame)

  def run(self, request: Request) -> str:
    """Samples one request and returns a line that describes the result.

    Raises:
      UserError, OSError: a clip cannot be read, or the result cannot be written; the latter is checked first.
    """
    query = self.find_whole(request)
    if query is not None:
      return self.run_whole(request, query)
    prepared = self.prepare(request)
    arguments = self._keywords(prepared.first, prepared.record["num_frames"])
    if self.preview is not None:
      arguments["preview"] = self.preview
    total = self.num_steps
    with tqdm(total=total, desc="sample", unit="step") as bar:

      def show(taken: int) -> None:
        bar.update(taken - bar.n)
        if self.progress is not None:
          self.progress(taken, total)

      out = self.pipeline.sample(prepared.frames, **arguments, progress=show)
    return self.finish(prepared, out.frames)

  @property
  def num_steps(self) -> int:
    """Steps of a sample."""
    count = self.arguments.steps.num_steps
    assert count is not None, "`resolve_steps` has chosen it"
    return count

  def find_whole(self, request: Request) -> WholeQuery | None:
    """Returns the query of a request if it is longer than the model's clips, so that all of it is sampled."""
    if self.arguments.num_frames is not None or self.first_frame is not None:
      return None
    form, path = self.reader.form_of(request), request.clips[-1]
    query = WholeQuery.open(path, form, fps=self.video_fps, keep_size=self.keep_size)
    if not query.is_longer(self.reader.read_examples(request, form.for_shape(query.footage.size)), form):
      return None
    return query.cut(form.num_frames + 4) if self.is_warm_up else query

  def prepare(self, request: Request) -> PreparedRequest:
    """Reads the clips of a request, and checks that the result can be written."""
    clips, first = self.reader.read(request), self.reader.read_first_frame(request)
    count = self._count_frames(clips)
    frames = [clip.frames for clip in clips or ([] if first is None else [first])]
    path = self._choose_path(request, frames[-1], count)
    size = probe(self.reader.shown_last(request)).size if self.keep_size else frames[-1].shape[1:3]
    fps = frame_rate(clips) if clips else None
    shown: dict[str, Any] = {"size": frames[-1].shape[1:3], "num_frames": count, "fps": fps}
    self.reader.report_differences(request, clips, **shown)
    record = self._record([clip.describe() for clip in clips], num_frames=count, size=size, fps=fps)
    if first is not None:
      record["first_frame"] = first.describe()
    return PreparedRequest(request, clips, first, path, record)

  def finish(self, prepared: PreparedRequest, frames: Frames) -> str:
    """Writes the result of a request that was prepared; returns a line that describes it."""
    path, record, request = prepared.path, prepared.record, prepared.request
    sampled, fps = frames[:, : record["height"], : record["width"]], record["fps"]
    remove_record(path)
    write_clip(path, sampled, fps=fps, audio_from=request.clips[-1] if self.copy_audio and prepared.clips else None)
    if self.grid:
      _write_grid(path, [*prepared.frames, frames], fps)
    return write_record(path, record, self._files(path, record))

  def has_finished(self, path: Path, record: Mapping[str, Any]) -> bool:
    """Returns whether an earlier command has written this very result."""
    return is_finished(path, record, self._files(path, record))

  def _files(self, path: Path, record: Mapping[str, Any]) -> list[Path]:
    return [path, *([grid_path(path, record["num_frames"])] if self.grid else [])]

  def run_whole(self, request: Request, query: WholeQuery, *, keep: bool = False) -> str:
    """Samples all frames of a query that is longer than the model's clips, see `find_whole`.

    Args:
      request: to sample.
      query: of it.
      keep: whether a result of an earlier command is kept.
    """
    examples = self.reader.read_examples(request, query.footage.form)
    for clip in examples:
      self.reader.report(clip.path, clip.changes)
    self.reader.report(str(query.footage.path), query.footage.describe_changes(query.footage.num_frames))
    num_frames = query.footage.num_frames
    path = request.path_for(num_frames)
    check_result(path, request.clips, num_frames, grid=self.grid)
    shown: dict[str, Any] = {"size": query.footage.form.size, "num_frames": self.form.num_frames, "fps": query.fps}
    self.reader.report_differences(request, examples, **shown)
    clips = [*(clip.describe() for clip in examples), query.describe()]
    record = self._record(clips, num_frames=num_frames, size=query.size, fps=query.fps)
    record |= {"carry_context": self.carry_context, "window_frames": self.form.num_frames}
    if keep and self.has_finished(path, record):
      progress_path(path).unlink(missing_ok=True)  # if that command was killed before it did so
      return f"kept the result of an earlier command: {path}"
    arguments = dataclasses.replace(self.arguments, num_frames=self.form.num_frames)
    video = WholeVideo(self.pipeline, examples, query, arguments, record, carry_context=self.carry_context)
    grid = grid_path(path, num_frames) if self.grid else None
    audio_from = request.clips[-1] if self.copy_audio else None
    saved = video.write(path, grid=grid, audio_from=audio_from, progress=self.progress)
    line = write_record(path, record, self._files(path, record))
    saved.remove()
    return line

  def _record(
    self, clips: Sequence[Mapping[str, Any]], *, num_frames: int, size: tuple[int, int], fps: float | None
  ) -> dict[str, Any]:
    """Returns everything that says how a result was made."""
    height, width = size
    return {
      "version": univid_jax.__version__,
      "sampling_version": SAMPLING_VERSION,
      **self.origin,
      "dtype": str(self.pipeline.dtype),
      "quantize": str(self.pipeline.experts.quantize),
      "attention": str(self.pipeline.attention),
      "context_timestep": str(self.pipeline.context_mode.timestep),
      "clip_gap": self.pipeline.usage.clip_gap,
      "clips": clips,
      "height": height,
      "width": width,
      **self.arguments.to_record(),
      "num_frames": num_frames,
      "fps": fps,
      "copy_audio": self.copy_audio,
    }

  def warm_up(self, requests: Sequence[Request]) -> str:
    """Compiles the programs that requests need, into the compilation cache, and writes no results.

    Samples in as few steps as use all of them: of a whole video the first windows.
    """
    short = self.shorten()
    with tempfile.TemporaryDirectory() as scratch:
      for index, request in enumerate(requests):
        out = Path(scratch) / f"{index}{'' if request.needs_suffix else request.out.suffix}"
        short.run(dataclasses.replace(request, out=out))
    return f"compiled the programs of {count_noun(len(requests), 'result')}; nothing was sampled"

  def shorten(self) -> "RequestRunner":
    """Returns what uses all programs in as few steps as possible."""
    arguments = self.arguments.replace_steps(self._fewest_steps())
    return dataclasses.replace(self, arguments=arguments, grid=False, copy_audio=False, is_warm_up=True)

  def _fewest_steps(self) -> int | None:
    """Returns the least number of steps with all kinds of steps; the given number if it is fixed or steps are cached.

    Kinds differ in the expert, in guidance, and in whether a step is the first, which takes arrays from elsewhere.
    """
    options = self.arguments.steps
    given = options.num_inference_steps
    if given is None or options.step_cache is not None or _fixed_steps(options):
      return given

    def kinds(count: int) -> set[tuple[int, bool, bool]]:
      plan = self.pipeline.make_plan(dataclasses.replace(options, num_inference_steps=count))
      experts = (self.pipeline.experts.find(float(sigma)) for sigma in plan.sigmas)
      return {(expert, bool(guided), i == 0) for i, (expert, guided) in enumerate(zip(experts, plan.guided_steps()))}

    wanted = kinds(given)
    return next((count for count in range(1, given) if kinds(count) == wanted), given)

  def profile(self, request: Request, steps: int) -> str:
    """Writes a JAX profiler trace of sampling to OUT's folder; returns a line that says where.

    Args:
      request: what to sample.
      steps: of the solver, if their number is free: neither fixed nor that of a step cache.
    """
    clips = self.reader.read(request)
    options = self.arguments.steps
    if options.sigmas or options.step_cache is not None or _fixed_steps(options):
      steps = self.num_steps
    else:
      options = dataclasses.replace(options, num_inference_steps=steps)
    first = self.reader.read_first_frame(request)
    arguments = self._keywords(first, self._count_frames(clips)) | options.to_keywords()
    self.pipeline.sample([clip.frames for clip in clips], **arguments)  # compiles
    folder = request.out.parent / "profile"
    with jax.profiler.trace(str(folder), profiler_options=profiler_options()):
      with jax.profiler.TraceAnnotation("data"):
        clips = self.reader.read(request)
      with jax.profiler.TraceAnnotation("step"):
        frames = self.pipeline.sample([clip.frames for clip in clips], **arguments).frames
      with jax.profiler.TraceAnnotation("save"), tempfile.TemporaryDirectory() as scratch:
        write_clip(Path(scratch) / "sample.mp4", frames, fps=frame_rate(clips) if clips else None)
    return f"wrote a profile of {steps} steps: {folder}"

  def _count_frames(self, clips: Sequence[ContextClip]) -> int:
    """Returns the number of frames of the result, given its context."""
    given = self.arguments.num_frames
    if given is None and not clips:
      return self.form.num_frames
    return given or infer_length([len(clip.frames) for clip in clips])

  def _keywords(self, first: ContextClip | None, num_frames: int) -> dict[str, Any]:
    """Returns the arguments of `Pipeline.sample` besides the context, given the first frame of the result, if any."""
    given = {} if first is None else {"first_frame": first.frames[0], "num_frames": num_frames}
    return self.arguments.to_keywords() | given

  def _choose_path(self, request: Request, like: Frames, count: int) -> Path:
    """Returns the path of a result of `count` frames of the size of a clip, after checking that it can be written."""
    path = request.path_for(count)
    self.pipeline.latent_shape((count, *like.shape[1:]))
    check_result(path, request.inputs(self.first_frame), count, grid=self.grid)
    require_writable(path.parent, num_bytes=count * like[0].size)
    return path


def _write_grid(path: Path, clips: Sequence[np.ndarray], fps: float | None) -> None:
  """Writes clips side by side, next to `path`, as an image if all are, else as a video."""
  grid = concatenate_clips(clips)
  write_clip(grid_path(path, len(grid)), grid, fps=fps)


def _fixed_steps(options: SamplingOptions) -> int | None:
  """Returns the only number of steps that the solver takes; None if any will do."""
  return find_solver(options.solver or SolverName.EULER).fixed_steps
