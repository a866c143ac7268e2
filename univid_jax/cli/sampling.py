"""Sampling from files: which clips belong together, and what is written for each of them."""

import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import univid_jax
from univid_jax import Pipeline
from univid_jax.cli.flags import UsageError
from univid_jax.core.options import PromptStyle
from univid_jax.data.clips import file_hash, read_context
from univid_jax.data.prompts import prompt_for
from univid_jax.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, write_clip
from univid_jax.evaluation.figures import concatenate_clips

# What a folder of queries is searched for.
QUERY_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".mp4", ".webm", ".mov", ".mkv", ".gif", ".npy")


@dataclasses.dataclass(frozen=True)
class Request:
  """Clips to sample from, in order, and the path of the result; a path without a suffix gets one: .png or .mp4."""

  clips: tuple[str, ...]
  out: Path


def parse_lora(text: str) -> tuple[str, float]:
  """Splits PATH[:WEIGHT]; the weight is 1 by default."""
  path, _, weight = text.rpartition(":")
  try:
    return (path, float(weight)) if path else (text, 1.0)
  except ValueError:
    return text, 1.0


def parse_size(text: str) -> tuple[int, int]:
  """Splits HEIGHTxWIDTH.

  Raises:
    UsageError: it has another form.
  """
  match = re.fullmatch(r"(\d+)x(\d+)", text)
  if not match:
    raise UsageError(f"--size is HEIGHTxWIDTH, for instance 480x832, got {text!r}")
  return int(match[1]), int(match[2])


def choose_prompt(prompt: str | None, task: str | None) -> str:
  """Returns the given prompt, or the paper's detailed prompt of a task.

  Raises:
    UsageError: both are given.
  """
  if prompt is not None and task is not None:
    raise UsageError("--prompt and --task exclude each other")
  return prompt_for(task.replace("_", " "), PromptStyle.DETAILED) if task else prompt or ""


def plan_requests(clips: Sequence[str], queries: Sequence[str], out: str) -> list[Request]:
  """Returns one request for clips that include their query, else one per query.

  Args:
    clips: the context; example pairs alone if there are queries.
    queries: clips, or one folder of clips.
    out: path of the result; with queries a folder.

  Raises:
    UsageError: an example pair is incomplete, or two queries have the same name.
  """
  if not queries:
    return [Request(tuple(clips), Path(out))]
  if len(clips) % 2:
    raise UsageError(f"with --queries, --clips are example pairs A, A', an even number; got {len(clips)}")
  if len(queries) == 1 and Path(queries[0]).is_dir():
    queries = [str(path) for path in sorted(Path(queries[0]).iterdir()) if path.suffix.lower() in QUERY_SUFFIXES]
    if not queries:
      raise UsageError("no clips in the folder of --queries")
  names = [Path(query).stem for query in queries]
  for name in names:
    if names.count(name) > 1:
      raise UsageError(f"two queries are named {name!r}; results are named after their query")
  return [Request((*clips, query), Path(out) / name) for query, name in zip(queries, names)]


def run_request(
  pipeline: Pipeline,
  request: Request,
  arguments: Mapping[str, Any],
  *,
  size: tuple[int, int] | None,
  grid: bool,
  origin: Mapping[str, Any],
) -> str:
  """Samples, and writes the clip, a .json that says how it was made, and with `grid` the whole sentence.

  Args:
    arguments: of `Pipeline.sample`.
    size: height and width in pixels; None is the size of training.
    origin: of the model, for the .json.

  Returns:
    A line that describes the result.
  """
  clips, fps = read_context(request.clips, num_frames=pipeline.num_frames, size=size or pipeline.size)
  with tqdm(total=arguments["num_inference_steps"], desc="sample", unit="step") as bar:

    def show(taken: int) -> None:
      bar.update(taken - bar.n)

    out = pipeline.sample(clips, **arguments, progress=show)
  path = request.out
  if not path.suffix:
    path = path.with_name(path.name + (".png" if len(out.frames) == 1 else ".mp4"))
  write_clip(path, out.frames, fps=fps)
  if grid:
    _write_grid(path, [*clips, out.frames], fps)
  num_frames, height, width = out.frames.shape[:3]
  record = {
    "version": univid_jax.__version__,
    **origin,
    "dtype": str(pipeline.dtype),
    "clips": [{"path": clip, "sha256": file_hash(Path(clip))} for clip in request.clips],
    "height": height,
    "width": width,
    **arguments,
    "num_frames": num_frames,
    "fps": fps,
  }
  path.with_suffix(".json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
  return f"wrote {num_frames} frame{'s' * (num_frames > 1)} of {width}x{height}: {path}"


def profile_request(
  pipeline: Pipeline, request: Request, arguments: Mapping[str, Any], *, size: tuple[int, int] | None, steps: int
) -> str:
  """Writes a JAX profiler trace of sampling in this many steps to OUT's folder; returns a line that says where."""
  arguments = {**arguments, "num_inference_steps": steps}
  clips, _ = read_context(request.clips, num_frames=pipeline.num_frames, size=size or pipeline.size)
  pipeline.sample(clips, **arguments)  # compiles
  folder = request.out.parent / "profile"
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # Python's calls would crowd out everything else
  with jax.profiler.trace(str(folder), profiler_options=options):
    with jax.profiler.TraceAnnotation("data"):
      clips, fps = read_context(request.clips, num_frames=pipeline.num_frames, size=size or pipeline.size)
    with jax.profiler.TraceAnnotation("step"):
      frames = pipeline.sample(clips, **arguments).frames
    with jax.profiler.TraceAnnotation("save"), tempfile.TemporaryDirectory() as scratch:
      write_clip(Path(scratch) / "sample.mp4", frames, fps=fps)
  return f"wrote a profile of {steps} steps: {folder}"


def _write_grid(path: Path, clips: Sequence[np.ndarray], fps: float | None) -> None:
  """Writes clips side by side, next to `path`, as an image if all are, else as a video."""
  grid = concatenate_clips(clips)
  suffix = path.suffix if path.suffix in VIDEO_SUFFIXES else ".mp4"
  if len(grid) == 1:
    suffix = path.suffix if path.suffix in IMAGE_SUFFIXES else ".png"
  write_clip(path.with_name(f"{path.stem}_grid{suffix}"), grid, fps=fps)
