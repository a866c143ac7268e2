"""Runs requests: samples, and writes for each the clip and how it was made."""

import dataclasses
import json
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
from univid_jax.cli.sampling import Request, check_request
from univid_jax.cli.whole_videos import StepProgress, WholeQuery, WholeVideo, padded_size
from univid_jax.core.paths import require_writable
from univid_jax.data.clips import ClipFormat, ContextClip, frame_rate, read_context
from univid_jax.data.pictures import concatenate_clips
from univid_jax.data.reader import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Frames, probe
from univid_jax.data.writer import write_clip
from univid_jax.diffusion.step_cache import StepCache
from univid_jax.inference.jobs import infer_length
from univid_jax.inference.preview import Preview

log = logging.getLogger(__name__)


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
  arguments: Mapping[str, Any]
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
  _reported: set[str] = dataclasses.field(default_factory=set)

  def run(self, request: Request) -> str:
    """Samples one request and returns a line that describes the result.

    Raises:
      UserError, OSError: a clip cannot be read, or the result cannot be written; the latter is checked first.
    """
    form = self._form(request)
    if self.arguments["num_frames"] is None and self.first_frame is None:
      *pairs, path = request.clips
      query = WholeQuery.open(path, form, fps=self.video_fps, keep_size=self.keep_size)
      examples = read_context(pairs, form.for_shape(query.footage.size)) if pairs else []
      if query.is_longer(examples, form):
        query = query.cut(form.num_frames + 4) if self.is_warm_up else query
        return self._run_whole(request, examples, query)
    clips, first = self._read(request), self._read_first_frame(request)
    fps, frames = frame_rate(clips) if clips else None, [clip.frames for clip in clips]
    arguments = dict(self.arguments) if self.preview is None else {**self.arguments, "preview": self.preview}
    if first is not None:
      arguments["first_frame"] = first.frames[0]
      if not clips and arguments["num_frames"] is None:
        arguments["num_frames"] = form.num_frames
    path = self._choose_path(request, frames or [arguments["first_frame"][None]], arguments["num_frames"])
    total = len(self.arguments.get("sigmas") or ()) or self.arguments["num_inference_steps"]
    with tqdm(total=total, desc="sample", unit="step") as bar:

      def show(taken: int) -> None:
        bar.update(taken - bar.n)
        if self.progress is not None:
          self.progress(taken, total)

      out = self.pipeline.sample(frames, **arguments, progress=show)
    height, width = probe(self._shown_last(request)).size if self.keep_size else out.frames.shape[1:3]
    sampled = out.frames[:, :height, :width]
    write_clip(path, sampled, fps=fps, audio_from=request.clips[-1] if self.copy_audio and clips else None)
    if self.grid:
      _write_grid(path, [*frames, out.frames], fps)
    record = self._record([clip.describe() for clip in clips], num_frames=len(sampled), size=(height, width), fps=fps)
    if first is not None:
      record["first_frame"] = first.describe()
    return _write_record(path, record)

  def _run_whole(self, request: Request, examples: Sequence[ContextClip], query: WholeQuery) -> str:
    """Samples all frames of a query that is longer than the model's clips."""
    for clip in examples:
      self._report(clip.path, clip.changes)
    self._report(str(query.footage.path), query.footage.describe_changes(query.footage.num_frames))
    path = request.out.with_name(request.out.name + ".mp4") if request.needs_suffix else request.out
    num_frames = query.footage.num_frames
    check_request(path, request, num_frames)
    clips = [*(clip.describe() for clip in examples), query.describe()]
    record = self._record(clips, num_frames=num_frames, size=query.size, fps=query.fps)
    record |= {"carry_context": self.carry_context, "window_frames": self.form.num_frames}
    arguments = {**self.arguments, "num_frames": self.form.num_frames, "carry_context": self.carry_context}
    video = WholeVideo(self.pipeline, examples, query, arguments, record)
    video.write(path, audio_from=request.clips[-1] if self.copy_audio else None, progress=self.progress)
    if self.grid:
      video.write_grid(_grid_path(path, num_frames), path)
    return _write_record(path, record)

  def _record(
    self, clips: Sequence[Mapping[str, Any]], *, num_frames: int, size: tuple[int, int], fps: float | None
  ) -> dict[str, Any]:
    """Returns everything that says how a result was made."""
    height, width = size
    return {
      "version": univid_jax.__version__,
      **self.origin,
      "dtype": str(self.pipeline.dtype),
      "quantize": str(self.pipeline.experts.quantize),
      "attention": str(self.pipeline.attention),
      "context_timestep": str(self.pipeline.context_mode.timestep),
      "clips": clips,
      "height": height,
      "width": width,
      **self.arguments,
      "num_frames": num_frames,
      "fps": fps,
    }

  def warm_up(self, requests: Sequence[Request]) -> str:
    """Compiles the programs that requests need, into the compilation cache, and writes no results.

    Samples in as few steps as use all of them: of a whole video the first windows.
    """
    arguments = {**self.arguments, "num_inference_steps": self._fewest_steps()}
    with tempfile.TemporaryDirectory() as scratch:
      for index, request in enumerate(requests):
        out = Path(scratch) / f"{index}{'' if request.needs_suffix else request.out.suffix}"
        short = dataclasses.replace(self, arguments=arguments, grid=False, copy_audio=False, is_warm_up=True)
        short.run(dataclasses.replace(request, out=out))
    return f"compiled the programs of {len(requests)} result{'s' * (len(requests) > 1)}; nothing was sampled"

  def _fewest_steps(self) -> int | None:
    """Returns the least number of steps that uses every expert; the given number if it is fixed or steps differ."""
    names = ("num_inference_steps", "guidance_scale", "shift", "solver", "sigmas", "guidance_range", "step_cache")
    options = {name: self.arguments[name] for name in names if name in self.arguments}
    given = options.get("num_inference_steps")
    if given is None or options.get("solver") == "distilled" or options.get("step_cache") is not None:
      return given
    experts = self.pipeline.experts
    for count in range(2, given):  # the first step takes arrays from elsewhere, which is a program of its own
      plan = self.pipeline.plan(**{**options, "num_inference_steps": count})
      used = {experts.find(float(sigma)) for sigma in plan.sigmas}
      if len(used) == len(experts.transformers) and len(set(plan.guided_steps())) == 1 + ("guidance_range" in options):
        return count
    return given

  def profile(self, request: Request, steps: int) -> str:
    """Writes a JAX profiler trace of sampling to OUT's folder; returns a line that says where.

    Args:
      request: what to sample.
      steps: of the solver, if their number is free.
    """
    is_fixed = self.arguments.get("sigmas") or self.arguments.get("solver") == "distilled"
    arguments = dict(self.arguments) if is_fixed else {**self.arguments, "num_inference_steps": steps}
    self.pipeline.sample([clip.frames for clip in self._read(request)], **arguments)  # compiles
    folder = request.out.parent / "profile"
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's calls would crowd out everything else
    with jax.profiler.trace(str(folder), profiler_options=options):
      with jax.profiler.TraceAnnotation("data"):
        clips = self._read(request)
      with jax.profiler.TraceAnnotation("step"):
        frames = self.pipeline.sample([clip.frames for clip in clips], **arguments).frames
      with jax.profiler.TraceAnnotation("save"), tempfile.TemporaryDirectory() as scratch:
        write_clip(Path(scratch) / "sample.mp4", frames, fps=frame_rate(clips))
    steps = len(arguments.get("sigmas") or ()) or arguments["num_inference_steps"]
    return f"wrote a profile of {steps} steps: {folder}"

  def _form(self, request: Request) -> ClipFormat:
    """Returns the form in which the clips of a request are read."""
    if not self.keep_size:
      return self.form
    return dataclasses.replace(
      self.form, size=padded_size(probe(self._shown_last(request)).size, self.pipeline), buckets=()
    )

  def _shown_last(self, request: Request) -> str:
    """Returns the clip whose size decides about the result's: the query, or without one the first frame."""
    path = request.clips[-1] if request.clips else self.first_frame
    assert path is not None
    return path

  def _read(self, request: Request) -> list[ContextClip]:
    """Reads the context of a request, and reports once what makes a clip differ from its file."""
    if not request.clips:
      return []
    clips = read_context(request.clips, self._form(request), extend_query=self.keep_size)
    for clip in clips:
      self._report(clip.path, clip.changes)
    return clips

  def _read_first_frame(self, request: Request) -> ContextClip | None:
    if self.first_frame is None:
      return None
    form = self._form(request).for_shape(probe(self._shown_last(request)).size)
    (clip,) = read_context([self.first_frame], form, videos=[False], extend_query=self.keep_size and not request.clips)
    self._report(clip.path, clip.changes)
    return clip

  def _report(self, path: str, changes: Sequence[str]) -> None:
    if changes and path not in self._reported:
      self._reported.add(path)
      log.info("%s: %s", path, "; ".join(changes))

  def _choose_path(self, request: Request, frames: Sequence[Frames], num_frames: int | None) -> Path:
    """Returns the path of the result, after checking that it can be written there."""
    count = num_frames or infer_length([len(clip) for clip in frames])
    path = request.out
    if request.needs_suffix:
      path = path.with_name(path.name + (".png" if count == 1 else ".mp4"))
    self.pipeline.latent_shape((count, *frames[-1].shape[1:]))
    check_request(path, request, count)
    require_writable(path.parent, num_bytes=count * frames[-1][0].size)
    return path


def _describe_step_cache(cache: StepCache) -> dict[str, Any]:
  """Returns its settings; the ratios are those of the weights, steps and guidance of the record."""
  return {name: value for name, value in dataclasses.asdict(cache).items() if name != "ratios"}


def _write_record(path: Path, record: Mapping[str, Any]) -> str:
  """Writes how a result was made next to it; returns a line that describes the result."""
  text = json.dumps(record, indent=2, ensure_ascii=False, default=_describe_step_cache)
  path.with_name(f"{path.stem}.json").write_text(text + "\n")
  count = record["num_frames"]
  return f"wrote {count} frame{'s' * (count > 1)} of {record['width']}x{record['height']}: {path}"


def _write_grid(path: Path, clips: Sequence[np.ndarray], fps: float | None) -> None:
  """Writes clips side by side, next to `path`, as an image if all are, else as a video."""
  grid = concatenate_clips(clips)
  write_clip(_grid_path(path, len(grid)), grid, fps=fps)


def _grid_path(path: Path, num_frames: int) -> Path:
  suffix = path.suffix if path.suffix in VIDEO_SUFFIXES else ".mp4"
  if num_frames == 1:
    suffix = path.suffix if path.suffix in IMAGE_SUFFIXES else ".png"
  return path.with_name(f"{path.stem}_grid{suffix}")
