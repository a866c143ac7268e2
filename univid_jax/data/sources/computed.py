"""Sentences of computed tasks over natural clips."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from univid_jax.config.schema import DataConfig, RunConfig
from univid_jax.core.bucket_files import copy_to_local
from univid_jax.core.contexts import (
  PAPER_CAMERA_CONTEXTS,
  PAPER_CONTEXTS,
  limit_clips,
  make_sentence,
  possible_contexts,
  video_pattern,
)
from univid_jax.core.errors import UserError, name_key
from univid_jax.core.options import PromptStyle
from univid_jax.core.sentence import Clip, ClipRef, Sentence, read_frames, reference_roles
from univid_jax.core.text import count_noun
from univid_jax.data.identities import identify_all
from univid_jax.data.media.reader import Frames
from univid_jax.data.prompts import prompt_for
from univid_jax.data.sources import own_tasks
from univid_jax.data.sources.base import draw, sort_weights
from univid_jax.data.sources.folder import FolderClip, FolderSource
from univid_jax.data.sources.photos import ClipSource, PhotoSource, Split
from univid_jax.data.tasks import TASKS
from univid_jax.data.tasks.base import check_draw, check_result, from_unit, to_unit

# Part of the keys of lazy clips: raise it when the same config and seed give other pixels.
COMPUTING_VERSION = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputedSentences:
  """Sentences of computed tasks; the seed and the index determine a sentence.

  Attributes:
    clips: natural clips; those of one sentence differ if there are enough.
    tasks: weights by name.
    contexts: weights by name; that of IV counts for II, because these tasks make no video of an image. Tasks that need
      videos are always in context I.
    animating_contexts: the same for tasks that make a video of an image, such as camera movement.
    num_frames: of a video clip, 4n + 1.
    size: height and width of every clip in pixels.
    num_clips: weights by number of clips in a sentence.
    max_video_clips: see `DataConfig`.
    reverse_probability: share of sentences of reversible tasks that are reversed.
    prompt_style: of the prompts.
    prompt_dropout: share of sentences with the null prompt.
    num_sentences: how many there are.
    seed: of all draws.
  """

  clips: Sequence[ClipSource]
  tasks: Mapping[str, float]
  num_frames: int
  size: tuple[int, int]
  num_sentences: int
  seed: int
  contexts: Mapping[str, float] = dataclasses.field(default_factory=lambda: PAPER_CONTEXTS)
  animating_contexts: Mapping[str, float] = dataclasses.field(default_factory=lambda: PAPER_CAMERA_CONTEXTS)
  num_clips: Mapping[int, float] = dataclasses.field(default_factory=lambda: {4: 1.0})
  max_video_clips: int = 0
  reverse_probability: float = 0.0
  prompt_style: PromptStyle = PromptStyle.NULL
  prompt_dropout: float = 0.0

  def __post_init__(self):
    unknown = set(self.tasks) - set(TASKS)
    if unknown:
      raise UserError(f"unknown task {sorted(unknown)[0]!r}; there are {', '.join(TASKS)}")

  @property
  def task_names(self) -> tuple[str, ...]:
    return tuple(self.tasks)

  @property
  def prompts(self) -> dict[str, str]:
    """The prompt of each task."""
    return {
      task: prompt_for(TASKS[task].prompt_name, self.prompt_style) for task, weight in self.tasks.items() if weight
    }

  def identify_records(self) -> dict[str, object]:
    """See `IdentifiesRecords`: the files of the folders."""
    return {clip.path.name: identity for clip, identity in zip(self._files, self.identify_files(), strict=True)}

  def identify_files(self) -> list[str]:
    """Returns what identifies each file of the folders."""
    return identify_all([clip.file.identify for clip in self._files])

  def identify_own_tasks(self) -> dict[str, str]:
    """Returns a hash of what each task that is not the package's makes of noise, which its functions determine."""
    shown = dataclasses.replace(self, clips=[own_tasks.Noise()], num_clips={4: 1.0}, seed=0)
    only = {task: dataclasses.replace(shown, tasks={task: 1.0}) for task in own_tasks.own_tasks(self.tasks)}
    return {task: own_tasks.identify(task, of.__getitem__) for task, of in only.items()}

  @property
  def _files(self) -> list[FolderClip]:
    return [clip for folder in self.folders for clip in folder.clips]

  def describe_clips(self) -> str:
    """Says what the sentences are made of if some of it is the user's; otherwise ""."""
    if not self.folders:
      return ""
    own = count_noun(sum(map(len, self.folders)), "file")
    num_photos = sum(len(source) for source in self.clips if isinstance(source, PhotoSource))
    bundled = f" and {num_photos} bundled photographs (config.data.bundled=False leaves these out)"
    return f"made from your {own}{bundled if num_photos else ''}"

  @property
  def folders(self) -> list[FolderSource]:
    """The folders among the natural clips."""
    return [source for source in self.clips if isinstance(source, FolderSource)]

  def __len__(self) -> int:
    return self.num_sentences

  def __getitem__(self, index: int) -> Sentence:
    rng, plan = self._plan(index)
    return self._compute(rng, plan).replace(record=_name(index))

  def plan(self, index: int) -> "Plan":
    """Returns what the sentence at an index will be, without making any clip."""
    return self._plan(index)[1]

  def contexts_of(self, task: str) -> Mapping[str, float]:
    """Returns the weights of the contexts that the sentences of a task have."""
    return possible_contexts(self._drawn_contexts(task), TASKS[task].motion)

  def _drawn_contexts(self, task: str) -> Mapping[str, float]:
    return self.animating_contexts if TASKS[task].animates else self.contexts

  def sentence(self, rng: np.random.Generator, *, task: str, context: str) -> Sentence:
    """Draws a sentence of a task and context."""
    prompt = prompt_for(TASKS[task].prompt_name, self.prompt_style)
    context = TASKS[task].motion.context_of(context)
    return self._compute(rng, Plan(task, context, self._draw_count(rng, context), prompt))

  def _draw_count(self, rng: np.random.Generator, context: str) -> int:
    """Draws the number of clips of a sentence."""
    return limit_clips(int(draw(rng, self.num_clips)), context, self.max_video_clips)

  def _plan(self, index: int) -> "tuple[np.random.Generator, Plan]":
    """Returns the plan of a sentence, and the random generator that goes on to draw its clips."""
    rng = np.random.default_rng((self.seed, int(index)))
    task = draw(rng, self.tasks)
    context = TASKS[task].motion.context_of(draw(rng, self._drawn_contexts(task)))
    num_clips = self._draw_count(rng, context)
    prompt = prompt_for(TASKS[task].prompt_name, self.prompt_style)
    # A stream of its own, so that dropping prompts changes nothing else.
    if self.prompt_dropout and np.random.default_rng((self.seed, int(index), 1)).random() < self.prompt_dropout:
      prompt = ""
    return rng, Plan(task, context, num_clips, prompt)

  def _compute(self, rng: np.random.Generator, plan: "Plan") -> Sentence:
    task = TASKS[plan.task]
    check_draw(plan.task, task)
    params = task.draw(rng)
    lengths = plan.lengths(self.num_frames)
    pairs = []
    for number, ((source, index), length, target_length) in enumerate(
      zip(self._draw_clips(rng, plan.num_clips // 2), lengths[::2], lengths[1::2])
    ):
      clip = source.clip(index, rng, num_frames=length, size=self.size)
      options = ({"num_frames": target_length} if task.animates else {}) | ({"pair": number} if task.varies else {})
      result = task.apply(to_unit(clip), **params, **options)
      if number == 0:
        check_result(plan.task, result, (target_length if task.animates else length, *self.size, 3))
      target = from_unit(result)
      pairs.append((target, clip) if task.restores else (clip, target))
    reverse = task.reversible and rng.random() < self.reverse_probability
    sentence = make_sentence(pairs, reverse=reverse, prompt=plan.prompt, task=plan.task, context=plan.context)
    return sentence.replace(params=None if reverse else params)

  def _draw_clips(self, rng: np.random.Generator, count: int) -> list[tuple[ClipSource, int]]:
    everything = [(source, index) for source in self.clips for index in range(len(source))]
    chosen = rng.choice(len(everything), size=count, replace=len(everything) < count)
    return [everything[i] for i in chosen]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a computed sentence will be."""

  task: str
  context: str
  num_clips: int
  prompt: str

  def lengths(self, num_frames: int) -> list[int]:
    """Returns the frames of each clip, given those of a video."""
    pattern = video_pattern(self.context, self.num_clips)
    return [num_frames if is_video else 1 for is_video in pattern]


@dataclasses.dataclass(frozen=True)
class LazySentences:
  """Computed sentences whose clips are made on demand, so that cached ones are not made again.

  Attributes:
    sentences: the same, made immediately.
    identity: identifies the natural clips and options that determine the sentences.
  """

  sentences: ComputedSentences
  identity: str

  def __len__(self) -> int:
    return len(self.sentences)

  @property
  def task_names(self) -> tuple[str, ...]:
    return self.sentences.task_names

  @property
  def prompts(self) -> dict[str, str]:
    """See `ComputedSentences.prompts`."""
    return self.sentences.prompts

  def identify_records(self) -> dict[str, object]:
    """See `ComputedSentences.identify_records`."""
    return self.sentences.identify_records()

  def describe_clips(self) -> str:
    """See `ComputedSentences.describe_clips`."""
    return self.sentences.describe_clips()

  def __getitem__(self, index: int) -> Sentence:
    plan, computation = self.sentences.plan(index), _Computation(self.sentences, index)
    clips = tuple(
      ClipRef(
        functools.partial("{}|{}|{}".format, self.identity, int(index), number),
        functools.partial(computation.clip, number),
        length,
        self.sentences.size,
      )
      for number, length in enumerate(plan.lengths(self.sentences.num_frames))
    )
    return Sentence(
      clips=clips,
      roles=reference_roles(len(clips)),
      prompt=plan.prompt,
      task=plan.task,
      context=plan.context,
      record=_name(index),
    )


class _Computation:
  """Computes a sentence when the first of its clips is read."""

  def __init__(self, sentences: ComputedSentences, index: int):
    self._sentences, self._index = sentences, index
    self._clips: tuple[Clip, ...] | None = None

  def clip(self, number: int) -> Frames:
    if self._clips is None:
      self._clips = self._sentences[self._index].clips
    return read_frames(self._clips[number])


def _name(index: int) -> str:
  return f"computed sentence {int(index)}"


def open_computed(config: RunConfig, split: Split, *, seed: int) -> ComputedSentences:
  """Opens the computed sentences of a config.

  Args:
    config: of the run.
    split: held-out sentences show the files of `data.test_folder`, or else bundled photographs, and all have prompts.
    seed: of all draws.

  Raises:
    OSError, UserError: a folder is missing, or contains no clip that can be read.
  """
  data = config.data
  trains = split == "train"
  folder = data.folder if trains else data.test_folder
  clips: list[ClipSource] = []
  if data.bundled if trains else not folder:
    clips.append(PhotoSource.bundled(split, jitter=data.jitter))
  if folder:
    side = 4 * max(data.height, data.width)
    with name_key("data.folder" if trains else "data.test_folder"):
      clips.append(FolderSource.open(copy_to_local(folder), side=side, fps=data.fps))
  return ComputedSentences(
    clips=clips,
    tasks=sort_weights(data.tasks),
    contexts=sort_weights(data.contexts),
    animating_contexts=sort_weights(data.animating_contexts),
    num_frames=data.num_frames,
    size=(data.height, data.width),
    num_clips=sort_weights(data.clip_counts),
    max_video_clips=data.max_video_clips,
    reverse_probability=data.reverse_probability,
    prompt_style=data.prompt,
    prompt_dropout=data.prompt_dropout if trains else 0.0,
    num_sentences=data.num_sentences,
    seed=seed,
  )


def describe_held_out(data: DataConfig) -> str:
  """Says what the held-out sentences of computed tasks show if files of the user are concerned; otherwise ""."""
  if not data.weights.computed or not data.has_computed:
    return ""
  if data.test_folder:
    return "held-out sentences show the files of config.data.test_folder"
  others = "held-out sentences show other bundled photographs, not the files of config.data.folder"
  return f"{others} (config.data.test_folder names files of your own)" if data.folder else ""


def computed_identity(config: RunConfig, sentences: ComputedSentences) -> str:
  """Identifies everything that determines the computed clips of a config."""
  data = config.data
  weights = [
    {name: weight for name, weight in sort_weights(each).items() if weight}
    for each in (data.tasks, data.contexts, data.animating_contexts)
  ]
  options = (
    *(data.height, data.width, data.num_frames, data.max_video_clips, data.fps),
    *(data.reverse_probability, data.bundled, data.jitter),
  )
  values = (COMPUTING_VERSION, config.seed, weights, sort_weights(data.clip_counts), options)
  own = sentences.identify_own_tasks()
  return repr((*values, sentences.identify_files(), *([own] if own else [])))
