"""How good a model is on computed tasks, beside what asks nothing of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from univid_jax import build
from univid_jax.data.sentences import CONTEXTS, video_pattern
from univid_jax.data.video import fit_clip
from univid_jax.metrics.image import psnr
from univid_jax.pipeline import Pipeline, to_uint8
from univid_jax.types import Sentence

METRICS = ("psnr", "psnr_copy_b", "psnr_copy_a2", "psnr_mean_a2", "psnr_codec", "psnr_swapped")


@dataclasses.dataclass(frozen=True)
class Example:
  """A sentence, what the model painted for it, and its scores in dB."""

  sentence: Sentence
  painted: np.ndarray
  scores: Mapping[str, float]


def held_out_sentences(config: Mapping[str, Any]) -> list[Sentence]:
  """The same number of sentences for each task and each of its contexts, on photographs that no training sees."""
  source = build.sentences(config, "held_out", seed=config["eval"]["seed"])
  rng = np.random.default_rng(config["eval"]["seed"])
  cases = [(task, context) for task, task_weight in source.tasks.items() if task_weight > 0
           for context, weight in source.contexts_of(task).items() if weight > 0]
  return [source.sentence(rng, task=task, context=context)
          for task, context in cases for _ in range(config["eval"]["sentences_per_case"])]


def with_swapped_pairs(sentences: Sequence[Sentence], rng: np.random.Generator) -> list[Sentence]:
  """The sentences with their example pairs taken from another task's.

  Raises:
    ValueError: some sentence has no such other.
  """
  others = foreign_sentences([(s.task, s.context, len(s.clips)) for s in sentences], rng)
  if None in others:
    raise ValueError("swapping example pairs takes at least two tasks")
  return [with_pairs_of(sentence, sentences[other]) for sentence, other in zip(sentences, others)]


def foreign_sentences(cases: Sequence[tuple[str, str, int]], rng: np.random.Generator) -> list[int | None]:
  """For each sentence another of another task, with example pairs of the same pattern of images and videos where there is one.

  Args:
    cases: task, context and number of clips of each sentence.
    rng: chooses.

  Returns:
    Its index; None where no other task has a sentence of so many clips.
  """
  patterns = [video_pattern(context, count)[:-2] if context in CONTEXTS else context for _, context, count in cases]
  chosen = []
  for (task, _, count), pattern in zip(cases, patterns):
    foreign = [i for i, other in enumerate(cases) if other[0] != task and other[2] == count]
    found = [i for i in foreign if patterns[i] == pattern] or foreign
    chosen.append(found[rng.integers(len(found))] if found else None)
  return chosen


def with_pairs_of(sentence: Sentence, other: Sentence) -> Sentence:
  """A sentence with another's example pairs, at its own lengths and sizes."""
  size = sentence.clips[0].shape[1:3]
  pairs = tuple(fit_clip(matched(theirs, len(own)), size) for theirs, own in zip(other.clips[:-2], sentence.clips))
  return sentence.replace(clips=pairs + sentence.clips[-2:])


def matched(clip: np.ndarray, num_frames: int) -> np.ndarray:
  """A clip cut to so many frames, or its last frame held."""
  return clip[np.minimum(np.arange(num_frames), len(clip) - 1)]


def evaluate(pipeline: Pipeline) -> tuple[dict[str, Any], list[Example]]:
  """Samples the held-out sentences of the model's config, with the right and with swapped example pairs.

  Returns:
    The report that stands in eval.json, and the examples.
  """
  config = pipeline.run
  sentences = held_out_sentences(config)
  options = dict(num_inference_steps=config["eval"]["num_inference_steps"], seed=config["eval"]["seed"])
  painted = pipeline.sample_sentences(sentences, **options)
  swapped = pipeline.sample_sentences(with_swapped_pairs(sentences, np.random.default_rng(config["eval"]["seed"])), **options)
  examples = []
  for sentence, clip, wrong in zip(sentences, painted, swapped):
    truth, (_, a2, b) = sentence.clips[-1], sentence.clips[-4:-1]
    mean = np.broadcast_to(np.round(a2.mean(axis=(0, 1, 2))), truth.shape).astype(np.uint8)
    examples.append(Example(sentence, clip, {
        "psnr": psnr(clip, truth),
        "psnr_copy_b": psnr(matched(b, len(truth)), truth),
        "psnr_copy_a2": psnr(matched(a2, len(truth)), truth),
        "psnr_mean_a2": psnr(mean, truth),
        "psnr_codec": psnr(to_uint8(pipeline.decode(pipeline.encode(truth))), truth),
        "psnr_swapped": psnr(wrong, truth),
    }))

  def mean_of(chosen):
    return {name: round(float(np.mean([e.scores[name] for e in chosen])), 3) for name in METRICS} | {"count": len(chosen)}

  def by(key):
    groups: dict[str, list[Example]] = {}
    for example in examples:
      groups.setdefault(key(example.sentence), []).append(example)
    return {name: mean_of(group) for name, group in sorted(groups.items())}

  images = [e for e in examples if all(len(clip) == 1 for clip in e.sentence.clips)]
  report = {"overall": mean_of(examples), "image": mean_of(images) if images else None, "by_task": by(lambda s: s.task),
            "by_context": by(lambda s: s.context), "seed": config["seed"], "steps": config["num_steps"]}
  return report, examples
