"""Paints what an evaluation looks at: held-out sentences, with the right and with wrong example pairs, into files."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from univid_jax import build
from univid_jax.data.cache import read_frames
from univid_jax.evaluation import with_swapped_pairs
from univid_jax.files import local_file
from univid_jax.pipeline import Pipeline, to_uint8
from univid_jax.types import Sentence

SAMPLES = "samples"


@dataclasses.dataclass(frozen=True)
class Condition:
  """One way to paint the sentences.

  Attributes:
    name: "painted" (as it should be), "swapped" (another task's example pairs), "reversed" (A', A instead of A, A'), "steps_N",
      or "seed_N".
    sentences: with the example pairs of this condition.
    num_steps: of the sampler.
    seed: added to the number of the sentence.
  """

  name: str
  sentences: Sequence[Sentence]
  num_steps: int
  seed: int


@dataclasses.dataclass(frozen=True)
class Painted:
  """A sentence with everything that was painted for it, as it stands in its file.

  Attributes:
    number: of the sentence.
    info: its task, context, number of clips, prompt and params.
    clips: its context and truth.
    codec: the truth through the codec.
    painted: by condition.
  """

  number: int
  info: Mapping[str, Any]
  clips: Sequence[np.ndarray]
  codec: np.ndarray
  painted: Mapping[str, np.ndarray]


def study_sentences(config: Mapping[str, Any], data: build.DataSources) -> list[Sentence]:
  """For each case of task, context and number of clips the same number of sentences that training does not see.

  Of data of one's own: as many as there are cases in the config, of what is held out, or of all where nothing is.

  Raises:
    ValueError: there are none.
  """
  per_case, seed = config["eval"]["sentences_per_case"], config["eval"]["seed"]
  sentences: list[Sentence] = []
  for name, source in data.held_out.items():
    if name != "computed":
      count = min(len(source), per_case * max(len(source.task_names), 1))
      sentences += [source[i] for i in range(count)]
      continue
    rng = np.random.default_rng(seed)
    clip_counts = [count for count, weight in build.clip_counts(config).items() if weight > 0]
    for task, weight in source.tasks.items():
      for context, share in source.contexts_of(task).items():
        for count in clip_counts:
          if weight > 0 and share > 0:
            shots = dataclasses.replace(source, num_clips={count: 1.0})
            sentences += [shots.sentence(rng, task=task, context=context) for _ in range(per_case)]
  if not sentences:
    raise ValueError("there is nothing to evaluate on: config.eval.sentences_per_case is 0, or no data is held out "
                     "(config.data.held_out)")
  return [sentence.replace(clips=tuple(read_frames(clip) for clip in sentence.clips)) for sentence in sentences]


def conditions(config: Mapping[str, Any], sentences: Sequence[Sentence]) -> list[Condition]:
  """What to paint; swapping takes two tasks, so with one it is left out."""
  options = config["eval"]
  steps, seed = options["num_inference_steps"], options["seed"] * 1_000_000
  chosen = [Condition("painted", sentences, steps, seed)]
  if len({sentence.task for sentence in sentences}) > 1:
    chosen.append(Condition("swapped", with_swapped_pairs(sentences, np.random.default_rng(options["seed"])), steps, seed))
  chosen.append(Condition("reversed", [with_reversed_pairs(sentence) for sentence in sentences], steps, seed))
  chosen += [Condition(f"steps_{n}", sentences, n, seed) for n in options["more_steps"]]
  chosen += [Condition(f"seed_{n}", sentences, steps, seed + n * 100_000) for n in range(1, options["num_seeds"])]
  return chosen


def with_reversed_pairs(sentence: Sentence) -> Sentence:
  """The example pairs turned round, the query as it is: what the pairs show is then the inverse task."""
  *examples, query, truth = sentence.clips
  turned = [clip for a, b in zip(examples[::2], examples[1::2]) for clip in (b, a)]
  return sentence.replace(clips=(*turned, query, truth))


def paint(pipeline: Pipeline, config: Mapping[str, Any], sentences: Sequence[Sentence], folder: Path) -> None:
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
        painted = {condition.name: _painted(pipeline, condition, group) for condition in todo}
        for place, number in enumerate(group):
          sentence = sentences[number]
          codec = to_frames(pipeline, sentence.clips[-1])
          _write(sample_path(folder, number), sentence, codec, {name: frames[place] for name, frames in painted.items()})
      bar.update(len(group))


def to_frames(pipeline: Pipeline, clip: np.ndarray) -> np.ndarray:
  """A clip through the codec and back."""
  return to_uint8(pipeline.decode(pipeline.encode(clip)))


def _painted(pipeline: Pipeline, condition: Condition, group: Sequence[int]) -> list[np.ndarray]:
  """The group's targets; those of one length together, for a length has to be told."""
  frames: dict[int, np.ndarray] = {}
  lengths = {len(condition.sentences[number].clips[-1]) for number in group}
  for length in sorted(lengths):
    chosen = [number for number in group if len(condition.sentences[number].clips[-1]) == length]
    samples = pipeline.sample_batch([condition.sentences[n].clips[:-1] for n in chosen], num_frames=length,
                                    prompts=[condition.sentences[n].prompt for n in chosen],
                                    num_inference_steps=condition.num_steps, seeds=[condition.seed + n for n in chosen])
    frames |= {number: sample.frames for number, sample in zip(chosen, samples)}
  return [frames[number] for number in group]


def sample_path(folder: Path, number: int) -> Path:
  return folder / SAMPLES / f"{number:05d}.npz"


def _write(path: Path, sentence: Sentence, codec: np.ndarray, painted: Mapping[str, np.ndarray]) -> None:
  info = {"task": sentence.task, "context": sentence.context, "num_clips": len(sentence.clips), "prompt": sentence.prompt,
          "params": sentence.params}
  with local_file(path) as unfinished, unfinished.open("wb") as file:
    np.savez_compressed(file, info=json.dumps(info), codec=codec, **{f"clip_{i}": clip for i, clip in enumerate(sentence.clips)},
                        **{f"condition_{name}": frames for name, frames in painted.items()})


def read_study(folder: Path, count: int) -> Iterator[Painted]:
  """The files of `paint`, in order.

  Raises:
    FileNotFoundError: one is missing.
  """
  for number in range(count):
    with np.load(sample_path(folder, number)) as file:
      clips = [file[f"clip_{i}"] for i in range(sum(name.startswith("clip_") for name in file))]
      painted = {name.removeprefix("condition_"): file[name] for name in file if name.startswith("condition_")}
      yield Painted(number, json.loads(str(file["info"])), clips, file["codec"], painted)
