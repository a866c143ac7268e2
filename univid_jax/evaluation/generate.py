"""Samples held-out sentences under every variant and stores the frames, which takes most of an evaluation's time."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from univid_jax.config.schema import EvalConfig
from univid_jax.core.paths import atomic_write, exists, read_bytes
from univid_jax.core.sentence import Sentence, read_frames
from univid_jax.evaluation.candidates import Candidate
from univid_jax.evaluation.controls import has_pairs, replace_pairs, round_trip, show_inverse_task
from univid_jax.evaluation.sentences import PlannedSentence
from univid_jax.inference.pipeline import Pipeline
from univid_jax.inference.sampler import Progress

# Prefixes of the names of variants with another number of inference steps, and of repetitions with other noise. Samples
# are stored under these names.
_STEPS, _SEED = "steps_", "seed_"


def steps_variant(num_steps: int) -> str:
  """Returns the name of the variant with this number of inference steps."""
  return f"{_STEPS}{num_steps}"


def is_repetition(name: str) -> bool:
  """Returns whether a variant is the prediction with other noise."""
  return name.startswith(_SEED)


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way of sampling sentences.

  Attributes:
    name: "prediction" (the sentence as it is), the controls "swapped" (example pairs of another task) and "inverse"
      (A', A instead of A, A'), "steps_N" (other number of inference steps), "seed_N" (other noise) or "accelerated"
      (with a distillation LoRA).
    num_steps: inference steps; None lets the model decide.
    first_seed: seed of the first sentence's noise; the next sentence has the next seed.
    alter: given the number of a sentence and the sentence, returns the sentence that the model sees.
    needs_pairs: whether sentences without example pairs are left out.
    pipeline: model that replaces that of the other variants.
  """

  name: str
  num_steps: int | None
  first_seed: int
  alter: Callable[[int, Sentence], Sentence] = lambda number, sentence: sentence
  needs_pairs: bool = False
  pipeline: Pipeline | None = None


@dataclasses.dataclass(frozen=True)
class SentenceInfo:
  """Properties of a sentence besides its clips; see `core.sentence.Sentence`.

  Attributes:
    num_frames: frames of each clip.
  """

  task: str
  context: str
  num_clips: int
  num_frames: Sequence[int]
  prompt: str
  reverse: bool
  params: Mapping[str, Any] | None

  @property
  def label(self) -> str:
    """The task as tables name it; reversed sentences count as a task of their own."""
    return f"{self.task} reversed" if self.reverse else self.task

  @property
  def is_image(self) -> bool:
    """Whether all clips are images."""
    return all(length == 1 for length in self.num_frames)


@dataclasses.dataclass(frozen=True)
class Generated:
  """A sentence with everything sampled for it.

  Attributes:
    info: its task, context and so on.
    clips: context and ground truth, uint8 (T, H, W, 3).
    codec: the ground truth, encoded and decoded.
    samples: samples by variant; see `Variant.needs_pairs`.
  """

  info: SentenceInfo
  clips: Sequence[np.ndarray]
  codec: np.ndarray
  samples: Mapping[str, np.ndarray]

  @property
  def pair(self) -> frozenset[bytes]:
    """Identifies the pair B, B', regardless of direction and number of frames."""
    return frozenset(hashlib.sha256(clip[0].tobytes()).digest() for clip in self.clips[-2:])


def make_variants(
  options: EvalConfig, other_pairs: Sequence[Callable[[], Sentence]], *, accelerated: Pipeline | None = None
) -> list[Variant]:
  """Returns all variants.

  Args:
    options: section `eval` of the config.
    other_pairs: reads a sentence of another task for each sentence, see `plan_other_pairs`.
    accelerated: the model with a distillation LoRA, if there is one to compare with.
  """
  steps, seed = options.num_inference_steps, _noise_seed(options.seed)

  def swap(number: int, sentence: Sentence) -> Sentence:
    return replace_pairs(sentence, other_pairs[number]())

  return [
    Variant(Candidate.PREDICTION, steps, seed),
    Variant(Candidate.SWAPPED, steps, seed, swap, needs_pairs=True),
    Variant(Candidate.INVERSE, steps, seed, lambda _, sentence: show_inverse_task(sentence), needs_pairs=True),
    *(Variant(steps_variant(more), more, seed) for more in options.more_steps),
    *(Variant(f"{_SEED}{n}", steps, _noise_seed(options.seed, n)) for n in range(1, options.num_seeds)),
    *([] if accelerated is None else [Variant(Candidate.ACCELERATED, None, seed, pipeline=accelerated)]),
  ]


def split_batches(num_sentences: int, batch_size: int) -> list[range]:
  """Splits sentences into batches; the same on every run, because the other sentences of a batch affect rounding."""
  return [range(start, min(start + batch_size, num_sentences)) for start in range(0, num_sentences, batch_size)]


def generate(
  pipeline: Pipeline, sentences: Sequence[PlannedSentence], variants: Sequence[Variant], numbers: Sequence[int]
) -> dict[int, Generated]:
  """Samples the sentences with these numbers together, under every variant."""
  chosen = {number: sentences[number].read() for number in numbers}
  samples = {
    variant.name: sample_targets(
      variant.pipeline or pipeline,
      {
        number: variant.alter(number, sentence)
        for number, sentence in chosen.items()
        if has_pairs(len(sentence.clips)) or not variant.needs_pairs
      },
      num_inference_steps=variant.num_steps,
      first_seed=variant.first_seed,
    )
    for variant in variants
  }
  generated = {}
  for number, sentence in chosen.items():
    clips = [read_frames(clip) for clip in sentence.clips]
    info = SentenceInfo(
      task=sentence.task,
      context=sentence.context,
      num_clips=len(clips),
      num_frames=[len(clip) for clip in clips],
      prompt=sentence.prompt,
      reverse=sentence.reverse,
      params=sentence.params,
    )
    frames = {name: by_number[number] for name, by_number in samples.items() if number in by_number}
    generated[number] = Generated(info, clips, round_trip(pipeline, clips[-1]), frames)
  return generated


def generate_files(
  pipeline: Pipeline,
  sentences: Sequence[PlannedSentence],
  variants: Sequence[Variant],
  *,
  folder: epath.Path,
  batch_size: int,
) -> None:
  """Samples all sentences into files and skips batches that are complete; several processes share the batches.

  Args:
    pipeline: the model, on this process's own devices.
    sentences: result of `plan_sentences`.
    variants: result of `make_variants`.
    folder: receives NNNNN.npz.
    batch_size: sentences sampled together.
  """
  batches = split_batches(len(sentences), batch_size)[jax.process_index() :: jax.process_count()]
  with progress_bar(sum(map(len, batches))) as bar:
    for numbers in batches:
      is_stored = all(exists(sample_path(folder, number)) for number in numbers)
      if not is_stored:
        for number, generated in generate(pipeline, sentences, variants, numbers).items():
          _write(sample_path(folder, number), generated)
      bar.update(len(numbers))


def read_generated(folder: epath.Path, num_sentences: int) -> Iterator[Generated]:
  """Reads the files of `generate_files` in order.

  Raises:
    FileNotFoundError: a file is missing.
  """
  for number in range(num_sentences):
    with np.load(io.BytesIO(read_bytes(sample_path(folder, number)))) as file:
      clips = [file[f"clip_{i}"] for i in range(sum(name.startswith("clip_") for name in file))]
      samples = {name.removeprefix("sample_"): file[name] for name in file if name.startswith("sample_")}
      yield Generated(SentenceInfo(**json.loads(str(file["info"]))), clips, file["codec"], samples)


def sample_path(folder: epath.Path, number: int) -> epath.Path:
  return folder / f"{number:05d}.npz"


def progress_bar(num_sentences: int) -> tqdm:
  return tqdm(total=num_sentences, desc="evaluate", unit="sentence", disable=jax.process_index() > 0)


def sample_targets(
  pipeline: Pipeline,
  sentences: Mapping[int, Sentence],
  *,
  num_inference_steps: int | None,
  first_seed: int = 0,
  progress: Progress | None = None,
) -> dict[int, np.ndarray]:
  """Samples targets by sentence number; those of one length together, because `sample_batch` takes one length.

  Args:
    pipeline: the model.
    sentences: sentences by number; of their targets only the lengths are used.
    num_inference_steps: steps of the solver; None lets the model decide.
    first_seed: seed of sentence 0's noise; the next sentence has the next seed.
    progress: see `Pipeline.sample_batch`.

  Returns:
    Frames by number, uint8 (T, H, W, 3).
  """
  lengths = {number: len(read_frames(sentence.clips[-1])) for number, sentence in sentences.items()}
  frames: dict[int, np.ndarray] = {}
  for length in sorted(set(lengths.values())):
    numbers = [number for number in sentences if lengths[number] == length]
    samples = pipeline.sample_batch(
      [[read_frames(clip) for clip in sentences[number].clips[:-1]] for number in numbers],
      num_frames=length,
      prompts=[sentences[number].prompt for number in numbers],
      num_inference_steps=num_inference_steps,
      seeds=[first_seed + number for number in numbers],
      progress=progress,
    )
    frames |= {number: sample.frames for number, sample in zip(numbers, samples)}
  return frames


def _noise_seed(seed: int, repetition: int = 0) -> int:
  """Returns the seed of the first sentence's noise; no two of up to 100,000 sentences and 10 repetitions share one.

  Changing these numbers changes reports.
  """
  return seed * 1_000_000 + repetition * 100_000


def _write(path: epath.Path, generated: Generated) -> None:
  with atomic_write(path) as unfinished, unfinished.open("wb") as file:
    arrays = {
      "info": np.array(json.dumps(dataclasses.asdict(generated.info))),
      "codec": generated.codec,
      **{f"clip_{i}": clip for i, clip in enumerate(generated.clips)},
      **{f"sample_{name}": frames for name, frames in generated.samples.items()},
    }
    np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType] (no array is named allow_pickle)
