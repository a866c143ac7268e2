"""What `sample` is asked for, so that the demo runs the very commands that it shows."""

import dataclasses
import logging
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from univid_jax.cli.flags import CommandFlags, UsageError
from univid_jax.cli.sampling_flags import SamplingFlags
from univid_jax.core.text import count_noun

if TYPE_CHECKING:
  from univid_jax import Pipeline
  from univid_jax.checkpoints.origin import Origin
  from univid_jax.cli.requests import RequestRunner
  from univid_jax.cli.sampling import Request

log = logging.getLogger(__name__)


class SampleCommand:
  """The flags of `sample`.

  Once they are parsed: plan the requests, load the model, make the runner.
  """

  def __init__(self, command: CommandFlags):
    self._command, self.sampling = command, SamplingFlags(command, clips_required=False)
    self._accelerate = command.accelerate()
    self._step_cache = command.string(
      "step_cache",
      None,
      "magcache[:THRESHOLD[:MAX_SKIP[:RETENTION]]], by default 0.12, 2 and 0.2: skip steps, after univid-calibrate.",
    )
    self._queries = command.paths("queries", [], "Several B for the same example pairs: clips, or a folder of clips.")
    self._batch_size = command.string(
      "batch_size", "auto", "Maximum queries per batch; auto: as many as keep the devices busy and fit in memory."
    )
    self._first_frame = command.path(
      "first_frame", None, "An image: the first frame of B', for models that keep it (TI2V); --clips may then be empty."
    )
    self._out = command.path(
      "out", None, "The result: .png, .mp4 (or another video), .npy, or FOLDER/ for PNGs.", required=True
    )
    self._grid = command.switch("grid", False, "Also write A | A' | B | B' side by side, with _grid in its name.")
    self._copy_audio = command.switch("copy_audio", False, "Give B' the sound of B.")
    self._carry_context = command.switch(
      "carry_context",
      False,
      "Sample the windows of a whole video one after the other, each with the last one as an example.",
    )

  def plan_requests(self) -> "list[Request]":
    """Returns what to sample, after checking that the clips can be read and the results be written."""
    from univid_jax.cli import sampling
    from univid_jax.data.media.writer import CODECS

    self.sampling.check(is_accelerated=bool(self._accelerate.value))
    self._parse_batch_size()
    self._refuse_without_effect()
    clips, queries = self.sampling.clips.value or [], self._queries.value
    first_frames = [self._first_frame.value] if self._first_frame.value else []
    for paths in (clips, queries, first_frames):  # before they are counted, as a name may have been split at a comma
      sampling.check_clips(paths)
    requests = sampling.plan_requests(clips, queries, self._out.value, first_frame=self._first_frame.value)
    if any(request.path_for(2).suffix.lower() not in CODECS for request in requests):
      self._command.refuse(f"--out={self._out.value} has no sound, .mp4 and other videos have", ["copy_audio"])
    sampling.check_readable([*(path for request in requests for path in request.clips), *first_frames])
    sampling.check_outputs(  # which makes the folder of results
      requests, first_frame=self._first_frame.value, num_frames=self.sampling.num_frames.value, grid=self._grid.value
    )
    return requests

  def _refuse_without_effect(self) -> None:
    """Raises UsageError if flags have no effect without others, or beside them."""
    if not self.has_queries:
      self._command.refuse("there are no --queries to sample in batches", ["batch_size"])
      if not self.sampling.clips.value:
        self._command.refuse("there are no --clips", ["copy_audio", "carry_context"])
    for flag in (self.sampling.num_frames, self._first_frame):
      if flag.value is not None:
        self._command.refuse(f"with --{flag.name}, no whole video is sampled", ["carry_context"])

  @property
  def has_queries(self) -> bool:
    return bool(self._queries.value)

  def run(self, runner: "RequestRunner", requests: "Sequence[Request]") -> Iterator[str]:
    """Samples requests, and yields a line for each."""
    from univid_jax.cli.queries import QueryRunner

    if self._carry_context.value and not any(map(runner.find_whole, requests)):
      longest = f"the {count_noun(runner.form.num_frames, 'frame')} of the model's clips"
      log.warning("--carry_context has no effect: no B is longer than %s", longest)
    if self.has_queries:
      yield from QueryRunner(runner, self._parse_batch_size()).run(requests)
    else:
      yield from map(runner.run, requests)

  def warm_up(self, runner: "RequestRunner", requests: "Sequence[Request]") -> str:
    """Compiles the programs of requests; returns a line that says so."""
    from univid_jax.cli.queries import QueryRunner

    chosen = QueryRunner(runner, self._parse_batch_size()) if self.has_queries else runner
    return chosen.warm_up(requests)

  def _parse_batch_size(self) -> int | None:
    text = self._batch_size.value
    if text == "auto":
      return None
    if not re.fullmatch(r"[1-9]\d*", text):
      raise UsageError(f"--batch_size must be auto or a positive integer, got {text!r}")
    return int(text)

  def load(self) -> "tuple[Pipeline, Origin]":
    """Loads the model, after checking what is wrong without it."""
    from univid_jax.cli.step_caches import parse_step_cache
    from univid_jax.inference.distillation_loras import read_distillation
    from univid_jax.inference.ratio_tables import require_tables

    flags, items = self.sampling, self._accelerate.value
    cache = parse_step_cache(self._step_cache.value) if self._step_cache.value else None
    distillation = read_distillation(items, verify=flags.verification.verify_weights) if items else None
    flags.check_steps(distillation, step_cache=cache)
    if cache is not None:
      require_tables(flags.checkpoint.value)
    return flags.load(distillation)

  def runner(self, pipeline: "Pipeline", origin: "Origin") -> "RequestRunner":
    """Returns what samples the requests with a model that is loaded."""
    from univid_jax.cli import sampling
    from univid_jax.cli.requests import RequestRunner
    from univid_jax.cli.step_caches import parse_step_cache
    from univid_jax.inference.ratio_tables import TableKey, read_table

    flags = self.sampling
    steps = sampling.resolve_steps(pipeline, flags.steps)
    if self._step_cache.value:
      key = TableKey.for_plan(pipeline, origin, pipeline.make_plan(flags.steps))
      ratios = read_table(flags.checkpoint.value, key)
      cache = dataclasses.replace(parse_step_cache(self._step_cache.value), ratios=ratios)
      steps = dataclasses.replace(steps, step_cache=cache)
    arguments = sampling.SamplingArguments(
      num_frames=flags.num_frames.value,
      negative_prompt=flags.negative_prompt.value,
      seed=flags.seed.value,
      prompt=flags.choose_prompt(pipeline),
      steps=steps,
    )
    return RequestRunner(
      pipeline,
      flags.choose_format(pipeline),
      arguments,
      {**origin.to_json(), "merge_lora": flags.merge_lora.value},
      grid=self._grid.value,
      copy_audio=self._copy_audio.value,
      keep_size=flags.keep_size,
      video_fps=flags.fps,
      carry_context=self._carry_context.value,
      first_frame=self._first_frame.value,
    )
