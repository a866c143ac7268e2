"""Paints what an evaluation looks at: held-out sentences, with the right and with wrong example pairs, into files."""

import dataclasses
import functools
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from univid_jax import build
from univid_jax.data.cache import read_frames
from univid_jax.data.sentences import CONTEXTS
from univid_jax.evaluation import foreign_sentences, with_pairs_of
from univid_jax.files import local_file
from univid_jax.pipeline import Pipeline, to_uint8
from univid_jax.types import Sentence

SAMPLES = "samples"

# Whose example pairs a sentence is shown where the data has no other task.
FOREIGN_TASKS = ("invert", "swap_channels")


@dataclasses.dataclass(frozen=True)
class Planned:
  """A sentence before its clips are read.

  Attributes:
    task: its name.
    context: its name.
    num_clips: with the target.
    read: gives it with its pixels.
  """

  task: str
  context: str
  num_clips: int
  read: Callable[[], Sentence]


@dataclasses.dataclass(frozen=True)
class Condition:
  """One way to paint the sentences.

  Attributes:
    name: "painted" (as it should be), "swapped" (another task's example pairs), "reversed" (A', A instead of A, A'), "steps_N",
      or "seed_N".
    num_steps: of the sampler.
    seed: added to the number of the sentence.
    pairs_of: by sentence, what gives the one whose example pairs it is shown; None: its own.
  """

  name: str
  num_steps: int
  seed: int
  pairs_of: Sequence[Callable[[], Sentence]] | None = None

  def shown(self, number: int, sentence: Sentence) -> Sentence:
    """What the model sees of a sentence, given its number."""
    if self.name == "reversed":
      return with_reversed_pairs(sentence)
    return with_pairs_of(sentence, self.pairs_of[number]()) if self.pairs_of else sentence


@dataclasses.dataclass(frozen=True)
class Painted:
  """A sentence with everything that was painted for it, as it stands in its file.

  Attributes:
    number: of the sentence.
    info: its task, context, number of clips, prompt, params, and whether its pairs are turned round.
    clips: its context and truth.
    codec: the truth through the codec.
    painted: by condition.
  """

  number: int
  info: Mapping[str, Any]
  clips: Sequence[np.ndarray]
  codec: np.ndarray
  painted: Mapping[str, np.ndarray]


def study_sentences(config: Mapping[str, Any], data: build.DataSources) -> list[Planned]:
  """For each case of task, context and number of clips the same number of sentences that training does not see.

  Of data of one's own: of what is held out (or of the test set) as many as there are cases in the config, each once before any
  comes again.

  Raises:
    ValueError: there are none.
  """
  per_case, seed = config["eval"]["sentences_per_case"], config["eval"]["seed"]
  sentences: list[Planned] = []
  for name, source in data.held_out.items():
    if name != "computed":
      count = min(len(source), per_case * max(len(source.task_names), 1))
      sentences += [_planned(source, i) for i in range(count)]
      continue
    clip_counts = [count for count, weight in build.clip_counts(config).items() if weight > 0]
    cases = [(task, context, count) for task, weight in source.tasks.items() if weight > 0
             for context, share in source.contexts_of(task).items() if share > 0 for count in clip_counts]
    for number, (task, context, count) in enumerate(cases):
      only = {context: 1.0}
      case = dataclasses.replace(source, tasks={task: 1.0}, contexts=only, animating_contexts=only, num_clips={count: 1.0},
                                 seed=seed * 1000 + number)
      sentences += [Planned(task, context, count, functools.partial(case.__getitem__, i)) for i in range(per_case)]
  if not sentences:
    raise ValueError("there is nothing to evaluate on: config.eval.sentences_per_case is 0, or no data is held out "
                     "(config.data.held_out)")
  return sentences


def _planned(source: Sequence[Sentence], index: int) -> Planned:
  sentence = source[index]

  def read() -> Sentence:
    return sentence.replace(clips=tuple(read_frames(clip) for clip in sentence.clips))
  return Planned(sentence.task, sentence.context, len(sentence.clips), read)


def conditions(config: Mapping[str, Any], sentences: Sequence[Planned]) -> list[Condition]:
  """What to paint."""
  options = config["eval"]
  steps, seed = options["num_inference_steps"], options["seed"] * 1_000_000
  chosen = [Condition("painted", steps, seed), Condition("swapped", steps, seed, foreign_pairs(config, sentences)),
            Condition("reversed", steps, seed)]
  chosen += [Condition(f"steps_{n}", n, seed) for n in options["more_steps"]]
  chosen += [Condition(f"seed_{n}", steps, seed + n * 100_000) for n in range(1, options["num_seeds"])]
  return chosen


def foreign_pairs(config: Mapping[str, Any], sentences: Sequence[Planned]) -> list[Callable[[], Sentence]]:
  """For each sentence one of another task; where there is none, of a computed task on held-out photographs."""
  rng, seed = np.random.default_rng(config["eval"]["seed"]), config["eval"]["seed"]
  others = foreign_sentences([(s.task, s.context, s.num_clips) for s in sentences], rng)

  def computed(index: int) -> Callable[[], Sentence]:
    sentence = sentences[index]
    task = next(task for task in FOREIGN_TASKS if task != sentence.task)
    source = dataclasses.replace(build.sentences(config, "held_out", seed=seed), tasks={task: 1.0},
                                 contexts={sentence.context if sentence.context in CONTEXTS else "II": 1.0},
                                 num_clips={sentence.num_clips: 1.0})
    return functools.partial(source.__getitem__, index)

  return [computed(i) if other is None else sentences[other].read for i, other in enumerate(others)]


def with_reversed_pairs(sentence: Sentence) -> Sentence:
  """The example pairs turned round, the query as it is: what the pairs show is then the inverse task."""
  *examples, query, truth = sentence.clips
  turned = [clip for a, b in zip(examples[::2], examples[1::2]) for clip in (b, a)]
  return sentence.replace(clips=(*turned, query, truth))


def paint(pipeline: Pipeline, config: Mapping[str, Any], sentences: Sequence[Planned], folder: epath.Path) -> None:
  """Paints all conditions of all sentences into files; what is there already is left. Several processes share the work.

  Args:
    pipeline: on this process's own devices.
    config: its `eval` says how.
    sentences: of `study_sentences`.
    folder: gets samples/NNNNN.npz.
  """
  todo = conditions(config, sentences)
  # Always the same ones together, so that a run that was stopped and goes on paints the same.
  size = config["eval"]["batch_size"]
  groups = [range(start, min(start + size, len(sentences))) for start in range(0, len(sentences), size)]
  mine = groups[jax.process_index()::jax.process_count()]
  with tqdm(total=sum(map(len, mine)), desc="evaluate", unit="sentence", disable=jax.process_index() > 0) as bar:
    for group in mine:
      if not all(sample_path(folder, number).exists() for number in group):
        own = {number: sentences[number].read() for number in group}
        painted = {condition.name: _painted(pipeline, condition, {
            number: condition.shown(number, sentence) for number, sentence in own.items()}) for condition in todo}
        for number, sentence in own.items():
          codec = to_frames(pipeline, sentence.clips[-1])
          _write(sample_path(folder, number), sentence, codec, {name: frames[number] for name, frames in painted.items()})
      bar.update(len(group))


def to_frames(pipeline: Pipeline, clip: np.ndarray) -> np.ndarray:
  """A clip through the codec and back."""
  return to_uint8(pipeline.decode(pipeline.encode(clip)))


def _painted(pipeline: Pipeline, condition: Condition, sentences: Mapping[int, Sentence]) -> dict[int, np.ndarray]:
  """The targets of sentences by number; those of one length are painted together, for a length has to be told."""
  frames: dict[int, np.ndarray] = {}
  for length in sorted({len(sentence.clips[-1]) for sentence in sentences.values()}):
    chosen = {number: sentence for number, sentence in sentences.items() if len(sentence.clips[-1]) == length}
    samples = pipeline.sample_batch([sentence.clips[:-1] for sentence in chosen.values()], num_frames=length,
                                    prompts=[sentence.prompt for sentence in chosen.values()],
                                    num_inference_steps=condition.num_steps, seeds=[condition.seed + n for n in chosen])
    frames |= {number: sample.frames for number, sample in zip(chosen, samples)}
  return frames


def sample_path(folder: epath.Path, number: int) -> epath.Path:
  return folder / SAMPLES / f"{number:05d}.npz"


def _write(path: epath.Path, sentence: Sentence, codec: np.ndarray, painted: Mapping[str, np.ndarray]) -> None:
  info = {"task": sentence.task, "context": sentence.context, "num_clips": len(sentence.clips), "prompt": sentence.prompt,
          "reverse": sentence.reverse, "params": sentence.params}
  with local_file(path) as unfinished, unfinished.open("wb") as file:
    np.savez_compressed(file, info=json.dumps(info), codec=codec, **{f"clip_{i}": clip for i, clip in enumerate(sentence.clips)},
                        **{f"condition_{name}": frames for name, frames in painted.items()})


def read_study(folder: epath.Path, count: int) -> Iterator[Painted]:
  """The files of `paint`, in order.

  Raises:
    FileNotFoundError: one is missing.
  """
  for number in range(count):
    with np.load(io.BytesIO(sample_path(folder, number).read_bytes())) as file:
      clips = [file[f"clip_{i}"] for i in range(sum(name.startswith("clip_") for name in file))]
      painted = {name.removeprefix("condition_"): file[name] for name in file if name.startswith("condition_")}
      yield Painted(number, json.loads(str(file["info"])), clips, file["codec"], painted)
