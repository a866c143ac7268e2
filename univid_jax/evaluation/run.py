"""The evaluator: quick after training, full by `python -m univid_jax.evaluate`.

Both use the same sentences, noise and sampling, so their numbers agree. Quick evaluation samples only the prediction
and the control "swapped", computes only PSNR, and keeps no samples.
"""

import logging
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

import univid_jax
from univid_jax.checkpoints.origin import Origin
from univid_jax.config.boundary import to_json
from univid_jax.config.schema import RunConfig
from univid_jax.core.checks import require_folder, require_instance
from univid_jax.core.errors import UserError
from univid_jax.core.json_files import format_json, parse_json
from univid_jax.core.paths import read_bytes, write_text
from univid_jax.core.sentence import NOT_COMPLETABLE
from univid_jax.core.text import count_noun
from univid_jax.data.sources.open import DataSources, open_data, require_config, require_sources
from univid_jax.data.sources.readers.arc import ARCSentences
from univid_jax.data.target_kinds import own_kinds
from univid_jax.data.tasks.grids.rendering import Rendering
from univid_jax.evaluation.candidates import Candidate
from univid_jax.evaluation.exact import Failures, exact_report, score_grids
from univid_jax.evaluation.generate import (
  Generated,
  SentenceInfo,
  generate,
  generate_files,
  make_variants,
  progress_bar,
  read_generated,
  split_batches,
)
from univid_jax.evaluation.report import Gallery, full_report, quick_report, write_report
from univid_jax.evaluation.score import Score, Scorer, score_psnr
from univid_jax.evaluation.sentences import PlannedSentence, plan_other_pairs, plan_sentences
from univid_jax.evaluation.stored_samples import open_samples_folder
from univid_jax.inference.pipeline import Pipeline
from univid_jax.runtime.processes import wait_for_processes

log = logging.getLogger(__name__)

EVAL_FILE = "eval.json"

_PIPELINE_HINT = "univid_jax.load_pipeline returns one, and so does the result of train, as its pipeline"


def evaluate_quick(
  pipeline: Pipeline, config: RunConfig, folder: epath.PathLike, *, data: DataSources | None = None
) -> dict[str, Any] | None:
  """Evaluates a trained model and writes eval.json, grid.png and, if there are videos, grid.webp.

  Args:
    pipeline: the model.
    config: config of the run.
    folder: the workdir of the run.
    data: data whose held-out part is used; by default what the config names.

  Returns:
    The contents of eval.json; None, with a warning, if nothing is held out.

  Raises:
    UserError: an argument has another type.
  """
  folder = _check_arguments(pipeline, config, folder)
  data = open_data(config) if data is None else data
  require_sources(data)
  sentences = plan_sentences(config, data.held_out)
  if not sentences:
    log.warning("%s", nothing_held_out(config, data))
    return None
  variants = make_variants(config.eval, plan_other_pairs(config, sentences))
  variants = [variant for variant in variants if variant.name in (Candidate.PREDICTION, Candidate.SWAPPED)]
  kinds, rendering = own_kinds(config.data), Rendering.from_config(config.data)
  scored, results = [], _Results(rendering)
  with progress_bar(len(sentences)) as bar:
    for numbers in split_batches(len(sentences), config.eval.batch_size):
      for generated in generate(pipeline, sentences, variants, numbers).values():
        scored.append((generated.info, score_psnr(generated)))
        results.add(generated, score_grids(generated, kinds, rendering))
      bar.update(len(numbers))
  report = quick_report(config, scored, num_pairs=len(results.pairs))
  if found := exact_report(results.scored, **_count_arc(data)):
    report["exact"] = found
  write_text(folder / EVAL_FILE, format_json(report) + "\n")
  results.gallery.draw(folder, with_swapped=False, fps=config.data.fps)
  results.failures.draw(folder / "failures.png")
  return report


def is_evaluated(config: RunConfig, folder: epath.PathLike) -> bool:
  """Returns whether the eval.json of a run is for its last step and the config's options."""
  try:
    report = parse_json(read_bytes(epath.Path(folder) / EVAL_FILE))
    return report["steps"] == config.num_steps and report["eval"] == to_json(config)["eval"]
  except (FileNotFoundError, ValueError, TypeError, KeyError):  # there is none, or one of an earlier version
    return False


def evaluate(
  pipeline: Pipeline,
  config: RunConfig,
  *,
  data: DataSources,
  folder: epath.PathLike,
  origin: Origin,
  command: str = "",
  accelerated: Pipeline | None = None,
) -> dict[str, Any] | None:
  """Evaluates a model with all controls and metrics; continues from samples that are already stored.

  Writes samples/, report.json, report.md, grid.png, grid.webp if there are videos, and curves.png. Several processes
  share the work. Samples are stored by what determines them: those of other models, configs or data are kept, but not
  used.

  Args:
    pipeline: the model, on this process's own devices.
    config: config of the evaluation.
    data: data whose held-out part is used.
    folder: folder of the results.
    origin: origin of the model.
    command: how to repeat the evaluation, for the report.
    accelerated: the same model with a distillation LoRA, which becomes the row "accelerated".

  Returns:
    The contents of report.json; None on all processes but the first.

  Raises:
    UserError: nothing is held out, or an argument has another type.
  """
  folder = _check_arguments(pipeline, config, folder)
  require_sources(data)
  require_instance("origin", origin, Origin, "univid_jax.checkpoints.origin.Origin.resolve(CHECKPOINT) returns it")
  if accelerated is not None:
    require_instance("accelerated", accelerated, Pipeline, _PIPELINE_HINT)
  sentences = plan_sentences(config, data.held_out)
  if not sentences:
    raise UserError(nothing_held_out(config, data))
  log.info("%s", _announce(config, sentences))
  scorer = Scorer(config)  # a wrong palette is reported before hours of sampling
  kind = accelerated and accelerated.distillation
  samples = open_samples_folder(folder, config, sentences, origin, distillation=kind, write=jax.process_index() == 0)
  variants = make_variants(config.eval, plan_other_pairs(config, sentences), accelerated=accelerated)
  generate_files(pipeline, sentences, variants, folder=samples, batch_size=config.eval.batch_size)
  wait_for_processes("samples are stored")
  if jax.process_index() > 0:
    return None
  results = _Results(Rendering.from_config(config.data))
  for generated in read_generated(samples, len(sentences)):
    results.add(generated, scorer(generated))
  reproduce = {
    "command": command,
    **origin.to_json(),
    "samples": str(samples.relative_to(folder)),
    "version": univid_jax.__version__,
  }
  results.failures.draw(folder / "failures.png")
  exact = exact_report(results.scored, **_count_arc(data))
  report = full_report(config, scorer, results.scored, exact=exact, held_out_pairs=len(results.pairs), **reproduce)
  write_report(folder, report, results.gallery, fps=config.data.fps)
  return report


def _check_arguments(pipeline: Pipeline, config: RunConfig, folder: epath.PathLike) -> epath.Path:
  """Returns the folder; raises UserError if an argument has another type."""
  require_instance("pipeline", pipeline, Pipeline, _PIPELINE_HINT)
  require_config(config)
  return epath.Path(require_folder("folder", folder))


def nothing_held_out(config: RunConfig, data: DataSources) -> str:
  """Describes why there are no sentences to evaluate on, and how to get some."""
  if not config.eval.sentences_per_case:
    reason = "config.eval.sentences_per_case is 0"
  elif data.held_out:
    reason = f"no held-out sentence can be completed: {NOT_COMPLETABLE}"
  else:
    reason = data.explain_nothing_held_out(config.data)
  return f"there is nothing to evaluate on: {reason}"


class _Results:
  """Collects what reports and pictures need from sentences.

  Attributes:
    scored: the scores of each sentence.
    pairs: the different pairs B, B' in them.
    gallery: examples.
    failures: grids that were predicted wrongly.
  """

  def __init__(self, rendering: Rendering):
    self.scored: list[tuple[SentenceInfo, list[Score]]] = []
    self.pairs: set[frozenset[bytes]] = set()
    self.gallery, self.failures = Gallery(), Failures(rendering)

  def add(self, generated: Generated, scores: list[Score]) -> None:
    self.scored.append((generated.info, scores))
    self.pairs.add(generated.pair)
    self.gallery.add(generated)
    self.failures.add(generated, scores)


def _announce(config: RunConfig, sentences: Sequence[PlannedSentence]) -> str:
  """Describes how much will be sampled, and how to sample less."""
  fewer = "--config.eval.sentences_per_case=N, or " if config.eval.sentences_per_case > 1 else ""
  num_cases = len({sentence.group for sentence in sentences})
  return (
    f"evaluating {count_noun(len(sentences), 'sentence')}, at most {config.eval.sentences_per_case:,} of each of "
    f"{count_noun(num_cases, 'case')} (task, context, number of clips, split of grids; for your own data task); "
    f"fewer: {fewer}weights of 0 for tasks"
  )


def _count_arc(data: DataSources) -> dict[str, int]:
  """Returns the arguments of `exact_report`: how many tests of ARC are held out, and how many tasks cannot be used."""
  sources = [source for source in data.held_out.values() if isinstance(source, ARCSentences)]
  return {"num_arc_tests": sum(map(len, sources)), "num_left_out": sum(source.num_dropped for source in sources)}
