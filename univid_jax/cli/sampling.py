"""Sampling from files: which clips belong together, and what is written for each of them."""

import dataclasses
import itertools
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from univid_jax import Pipeline
from univid_jax.checkpoints.experts import split_expert
from univid_jax.cli.flags import UsageError
from univid_jax.cli.results import check_result, require_short_names
from univid_jax.core.errors import UserError
from univid_jax.core.options import ClipFit, SolverName
from univid_jax.core.paths import explain_missing, require_local, require_writable
from univid_jax.core.text import count_noun, is_or_are, list_first
from univid_jax.data.clips import ClipFormat
from univid_jax.data.media.color import MAX_PIXELS
from univid_jax.data.media.reader import CLIP_SUFFIXES, is_foreign, probe, require_clip
from univid_jax.data.media.writer import check_target
from univid_jax.inference.plan import SamplingOptions

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Request:
  """What to sample.

  Attributes:
    clips: the context, in order.
    out: path of the result.
    needs_suffix: `out` gets one that suits the result: .png or .mp4.
  """

  clips: tuple[str, ...]
  out: Path
  needs_suffix: bool = False

  def path_for(self, num_frames: int) -> Path:
    """Returns the path of a result of as many frames."""
    if not self.needs_suffix:
      return self.out
    return self.out.with_name(self.out.name + (".png" if num_frames == 1 else ".mp4"))

  def inputs(self, first_frame: str | None) -> list[str]:
    """Returns the clips, and the first frame of the result if it is given."""
    return [*self.clips, *([first_frame] if first_frame else [])]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingArguments:
  """Arguments of `Pipeline.sample` besides the context.

  Attributes:
    num_frames, negative_prompt, seed, prompt: see there.
    steps: how to integrate.
  """

  num_frames: int | None = None
  negative_prompt: str = ""
  seed: int = 0
  prompt: str = ""
  steps: SamplingOptions = SamplingOptions()

  @property
  def sentence(self) -> dict[str, Any]:
    """The arguments that are not about steps, as keywords."""
    return {name: getattr(self, name) for name in ("num_frames", "negative_prompt", "seed", "prompt")}

  def to_keywords(self) -> dict[str, Any]:
    return self.sentence | self.steps.to_keywords()

  def to_record(self) -> dict[str, Any]:
    """Returns what is written next to a result; records of results without a step cache do not mention it."""
    values = self.to_keywords()
    if self.steps.step_cache is None:
      del values["step_cache"]
    return values

  def replace_steps(self, num_inference_steps: int | None) -> "SamplingArguments":
    """Returns the arguments with another number of steps."""
    return dataclasses.replace(self, steps=dataclasses.replace(self.steps, num_inference_steps=num_inference_steps))


def group_loras(loras: Sequence[tuple[str, float]]) -> list[tuple[str, float]] | dict[str, list[tuple[str, float]]]:
  """Returns LoRAs as `load_pipeline` takes them: by expert if their paths begin with high=, low= or both=.

  Raises:
    UsageError: only some of them do.
  """
  groups: dict[str, list[tuple[str, float]]] = {}
  for text, weight in loras:
    expert, path = split_expert(text)
    groups.setdefault(expert or "", []).append((path, weight))
  if "" not in groups:
    return groups or []
  if len(groups) > 1:
    raise UsageError(f"--lora needs high=, low= or both= before every path or before none, got {groups[''][0][0]}")
  return groups[""]


def parse_guidance_scale(text: str) -> float | tuple[float, ...]:
  """Splits LOW,HIGH; one number is that of both experts, or of the only transformer.

  Raises:
    UsageError: it has another form.
  """
  try:
    scales = tuple(float(part) for part in text.split(","))
  except ValueError as error:
    raise UsageError(f"--guidance_scale is a number, or two numbers LOW,HIGH, got {text!r}") from error
  return scales[0] if len(scales) == 1 else scales


def parse_guidance_range(text: str) -> tuple[float, float]:
  """Splits FROM,TO.

  Raises:
    UsageError: it has another form.
  """
  try:
    low, high = map(float, text.split(","))
  except ValueError as error:
    raise UsageError(f"--guidance_range is two noise levels FROM,TO, got {text!r}") from error
  return low, high


def parse_sigmas(texts: Sequence[str]) -> tuple[float, ...] | None:
  """Converts noise levels; None if there are none.

  Raises:
    UsageError: one is not a number.
  """
  try:
    return tuple(map(float, texts)) or None
  except ValueError as error:
    raise UsageError(f"--sigmas are numbers, separated by commas, got {','.join(texts)!r}") from error


def resolve_steps(pipeline: Pipeline, options: SamplingOptions) -> SamplingOptions:
  """Returns options with those that the model decides about filled in, to be recorded."""
  plan, decided = pipeline.make_plan(options), pipeline.distillation
  shift = pipeline.usage.shift if options.shift is None else options.shift
  return dataclasses.replace(
    options,
    num_inference_steps=None if options.sigmas else len(plan.sigmas),
    guidance_scale=plan.guidance_scale,
    shift=decided.shift if decided else None if options.sigmas else shift,
    solver=decided.solver if decided else options.solver or SolverName.EULER,
  )


def parse_size(text: str) -> tuple[int, int]:
  """Splits HEIGHTxWIDTH.

  Raises:
    UsageError: it has another form, or is larger than clips may be.
  """
  match = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text)
  if not match:
    raise UsageError(f"--size is HEIGHTxWIDTH, for instance 480x832, got {text!r}")
  height, width = int(match[1]), int(match[2])
  if height * width > MAX_PIXELS:
    raise UsageError(f"--size={text} is more than {MAX_PIXELS:,} pixels")
  return height, width


def plan_requests(
  clips: Sequence[str], queries: Sequence[str], out: str, *, first_frame: str | None = None
) -> list[Request]:
  """Returns one request for clips that include their query, else one per query.

  Args:
    clips: the context; example pairs alone if there are queries.
    queries: clips, or one folder of clips.
    out: path of the result, which gets a suffix if it has none; a folder of PNGs ends in / or exists; with queries a
      folder of results.
    first_frame: of the result, if it is given; the context may then be empty.

  Raises:
    UsageError: there is no context or no query, the result is no file or folder or with queries that of a clip, an
      example pair is incomplete, or two queries have the same name.
    UserError: `out` is in a bucket.
  """
  require_local(out)
  if not clips and not first_frame:
    raise UsageError("--clips is missing: the context in order, A, A', B")
  if queries and first_frame:
    raise UsageError("--first_frame is that of one result: it excludes --queries")
  if not queries:
    if Path(out).name in ("", "..", "-") or (Path(out).exists() and not Path(out).is_file() and not Path(out).is_dir()):
      raise UsageError(f"--out must name a file or folder, not standard output or a device, got {out!r}")
    if clips and len(clips) % 2 == 0:
      raise UsageError(f"--clips must be an odd number of clips (A, A', B), got {len(clips)}")
    is_folder = out.endswith("/") or Path(out).is_dir()
    return [Request(tuple(clips), Path(out), needs_suffix=not Path(out).suffix and not is_folder)]
  if len(clips) % 2:
    raise UsageError(f"with --queries, --clips are example pairs A, A', an even number; got {len(clips)}")
  if Path(out).suffix.lower() in CLIP_SUFFIXES and not Path(out).is_dir():
    raise UsageError(f"with --queries, --out is a folder of results, and {out!r} is the name of one result")
  if len(queries) == 1 and Path(queries[0]).is_dir():
    queries = _list_queries(Path(queries[0]))
  names: dict[str, str] = {}
  for query in queries:
    name = Path(query).stem
    if name in names:
      raise UsageError(f"the results of {names[name]} and {query} would both be named {name!r}: rename one of them")
    names[name] = query
  return [Request((*clips, query), Path(out) / name, needs_suffix=True) for name, query in names.items()]


def _list_queries(folder: Path) -> list[str]:
  """Returns the clips in a folder, and says how many folders in it are left out; these may be folders of frames.

  Raises:
    UsageError: there are no clips.
  """
  paths = [path for path in sorted(folder.iterdir()) if not is_foreign(path)]
  folders = {path for path in paths if path.is_dir()}
  clips = [str(path) for path in paths if path not in folders and path.suffix.lower() in CLIP_SUFFIXES]
  if not clips:
    only = f", but folders, such as {min(folders)}: name one of clips, or list those of frames" if folders else ""
    raise UsageError(f"no clips in --queries={folder}{only}")
  if folders:
    what = f"{count_noun(len(folders), 'folder')} in it {is_or_are(len(folders))}"
    log.warning("--queries=%s: %s left out; to sample folders of frames, name each of them", folder, what)
  return clips


def choose_format(
  trained: ClipFormat, *, size: tuple[int, int] | None, num_frames: int | None, fit: str | None, fps: float | None
) -> ClipFormat:
  """Returns the form in which clips are read: that of training, except for what is given.

  Args:
    trained: the form of training.
    size: height and width in pixels.
    num_frames: of the result; videos of the context have as many, if the result is a video.
    fit, fps: see `ClipFormat`.
  """
  form = trained if size is None else dataclasses.replace(trained, size=size, buckets=())
  if num_frames is not None and num_frames > 1:
    form = dataclasses.replace(form, num_frames=num_frames)
  return dataclasses.replace(form, fit=ClipFit(fit or form.fit), fps=form.fps if fps is None else fps)


def check_clips(paths: Sequence[str]) -> None:
  """Checks that the clips of a list are there, before a model is loaded.

  Raises:
    FileNotFoundError: one is not; the message says so if its name was split at a comma.
    UserError: one has no name, or is in a bucket.
  """
  for index, path in enumerate(paths):
    try:
      require_clip(path)
    except FileNotFoundError as error:
      for first, second in itertools.pairwise(paths[max(index - 1, 0) : index + 2]):
        if whole := next((name for name in (f"{first},{second}", f"{first}, {second}") if Path(name).exists()), None):
          hint = f"a name with a comma is written in double quotes within the list, as '\"{whole}\",B.png'"
          raise FileNotFoundError(f"{error}; {hint}") from error
      raise FileNotFoundError(f"{error}{explain_missing(path)}") from error


def check_readable(paths: Iterable[str]) -> None:
  """Checks that clips can be read, as far as their headers tell, before a model is loaded.

  Raises:
    OSError, UserError: some cannot; the message names them.
  """
  errors: dict[str, Exception] = {}
  for path in dict.fromkeys(paths):
    try:
      probe(path)
    except (OSError, UserError) as error:
      errors[path] = error
  if len(errors) > 1:
    raise UserError(f"{len(errors)} clips cannot be read ({list_first(errors, 8)}): {next(iter(errors.values()))}")
  for error in errors.values():
    raise error


def _becomes_video(clips: Sequence[str]) -> bool:
  """Returns whether a result certainly has several frames, whatever the model: B has, and the target of its example."""
  try:
    found = [probe(path) for path in clips[-3:]]
  except (OSError, UserError):
    return False  # which is reported when they are read
  # Not short videos, which a model may resample to a single frame.
  videos = [info.num_frames >= 5 and (info.duration is None or info.duration >= 1) for info in found]
  return videos[-1] and (len(found) < 3 or videos[-2] or all(info.num_frames == 1 for info in found[:-1]))


def check_outputs(
  requests: Sequence[Request], *, first_frame: str | None = None, num_frames: int | None = None, grid: bool = False
) -> None:
  """Checks that the results can be written, before a model is loaded.

  Args:
    requests: what is sampled.
    first_frame: of the result, if it is given.
    num_frames: of the result, if it is given.
    grid: whether the whole sentences are written, too.

  Raises:
    UsageError: the sentence of one query would replace the result of another.
    UserError, OSError: a suffix is unknown, a result would replace a clip, or a folder cannot be written to.
  """
  names = {request.out.name for request in requests}
  for request in requests:
    if grid and f"{request.out.name}_grid" in names:
      raise UsageError(f"with --grid the sentence of query {request.out.name!r} would replace another query's result")
    if request.needs_suffix:
      require_short_names(request.path_for(1), grid=grid)
    else:
      check_result(request.out, request.inputs(first_frame), num_frames, grid=grid)
      if num_frames is None and first_frame is None:
        check_target(request.out, None, is_video=_becomes_video(request.clips))
  for folder in dict.fromkeys(request.out.parent for request in requests):
    require_writable(folder)
