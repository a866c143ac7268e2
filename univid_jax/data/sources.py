"""Where clips come from. A source is random-access: an index and a generator of random numbers give a clip or a sentence."""

import dataclasses
import functools
import hashlib
import importlib.resources
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from univid_jax.color import OPPONENT_COLORS
from univid_jax.data.clips import ClipRef
from univid_jax.data.sentences import PAPER_CAMERA_CONTEXTS, PAPER_CONTEXTS, make_sentence, prompt_for, video_pattern
from univid_jax.data.tasks import TASKS
from univid_jax.data.video import CLIP_KINDS, IMAGE_SUFFIXES, VIDEO_SUFFIXES, read_clip
from univid_jax.types import Sentence, reference_roles

# Photographs that come with scikit-image; the held-out ones show nothing that the others show.
TRAIN_PHOTOS = ("astronaut.png", "brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
                "ihc.png", "moon.png", "retina.jpg", "rocket.jpg")
HELD_OUT_PHOTOS = ("chelsea.png", "coffee.png", "motorcycle_left.png")

# Sides of the windows that are cut from a photograph, in heights of the clip, and how far one drifts and grows over a video.
WINDOW_RANGE = (0.875, 2.25)
WINDOW_DRIFT = 0.05
WINDOW_ZOOM = 0.07


class ClipSource(Protocol):
  """Natural clips by index; neither images nor videos have to be of any size."""

  def __len__(self) -> int: ...

  def clip(self, index: int, rng: np.random.Generator, *, num_frames: int, size: tuple[int, int]) -> np.ndarray:
    """A random part of what stands at an index: uint8 (num_frames, *size, 3)."""
    ...


@dataclasses.dataclass(frozen=True)
class PhotoSource:
  """Crops of photographs; a video is a slow movement of the crop.

  Attributes:
    photos: RGB pictures.
    jitter: whether colours are varied at random, and grey pictures coloured in two tones.
  """

  photos: Sequence[Image.Image]
  jitter: bool = True

  @classmethod
  def bundled(cls, split: str, *, jitter: bool = True) -> "PhotoSource":
    """The photographs inside scikit-image, "train" (their colours varied or not) or "held_out"."""
    names = {"train": TRAIN_PHOTOS, "held_out": HELD_OUT_PHOTOS}[split]
    folder = importlib.resources.files("skimage.data")
    photos = []
    for name in names:
      with importlib.resources.as_file(folder / name) as path, Image.open(path) as photo:
        photos.append(photo.convert("RGB"))
    return cls(photos, jitter=jitter and split == "train")

  def __len__(self) -> int:
    return len(self.photos)

  def clip(self, index: int, rng: np.random.Generator, *, num_frames: int, size: tuple[int, int]) -> np.ndarray:
    photo = self.photos[index]
    frames = moving_window(photo, rng, num_frames=num_frames, size=size)
    return jitter_colors(frames, rng) if self.jitter else frames


@dataclasses.dataclass(frozen=True)
class FolderSource:
  """Crops of the videos and photos of a folder.

  Videos are decoded once, at a reduced size, into arrays that stay on disk, so that any frame is at hand at once.

  Attributes:
    clips: each uint8 (T, H, W, 3), mapped from disk.
  """

  clips: Sequence[np.ndarray]

  @classmethod
  def open(cls, folder: str, *, cache: str, side: int) -> "FolderSource":
    """Reads a folder (not its subfolders).

    Args:
      folder: with images and videos; other files are passed over.
      cache: folder for the reduced frames.
      side: the short side of the reduced frames, in pixels.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds no clip, or one that cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
      raise FileNotFoundError(f"no such folder: {folder}")
    paths = sorted(path for path in root.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES)
    if not paths:
      raise ValueError(f"no images or videos in {folder}; a clip is {CLIP_KINDS}")
    return cls([cached_clip(path, cache=Path(cache), short_side=side) for path in paths])

  def __len__(self) -> int:
    return len(self.clips)

  def clip(self, index: int, rng: np.random.Generator, *, num_frames: int, size: tuple[int, int]) -> np.ndarray:
    frames = self.clips[index]
    if len(frames) < num_frames:
      return moving_window(Image.fromarray(frames[0]), rng, num_frames=num_frames, size=size)
    start = rng.integers(len(frames) - num_frames + 1)
    height, width = size
    largest = min(frames.shape[2] * height / width, frames.shape[1])
    side = rng.uniform(largest / 2, largest)
    box = np.array([side * width / height, side])
    whole = np.array([frames.shape[2], frames.shape[1]])
    corner = rng.uniform(size=2) * np.maximum(whole - box, 0)  # rounding may leave less than nothing
    edges = tuple(map(float, (*corner, *np.minimum(corner + box, whole))))
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box=edges))
                     for frame in frames[start:start + num_frames]])


def cached_clip(path: Path, *, cache: Path, short_side: int) -> np.ndarray:
  """The frames of a file at a reduced size, decoded on first use, mapped from disk after."""
  status = path.stat()
  key = hashlib.sha256(f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{short_side}".encode()).hexdigest()[:16]
  cached = cache / f"{path.stem}-{key}.npy"
  if not cached.exists():
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = cached.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as file:
      np.save(file, read_clip(path, short_side=short_side).frames)
    unfinished.replace(cached)
  return np.load(cached, mmap_mode="r")


def moving_window(photo: Image.Image, rng: np.random.Generator, *, num_frames: int, size: tuple[int, int]) -> np.ndarray:
  """Cuts a window out of a picture that, over a video, drifts and grows or shrinks a little."""
  height, width = size
  largest = min(photo.width * height / width, photo.height)
  first = min(height * rng.uniform(*WINDOW_RANGE), largest)
  last = min(first * np.exp(rng.uniform(-WINDOW_ZOOM, WINDOW_ZOOM)), largest)
  sides = np.geomspace(first, last, num_frames)
  direction, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0, WINDOW_DRIFT) * first
  start, end = np.array([0.0, 0.0]), distance * np.array([np.cos(direction), np.sin(direction)])
  origin = rng.uniform(size=2)
  frames = []
  for side, progress in zip(sides, np.linspace(0, 1, num_frames)):
    box = np.array([side * width / height, side])
    room = np.maximum(np.array([photo.width, photo.height]) - box, 0)  # rounding may leave less than nothing
    corner = np.clip(origin * room + start + (end - start) * progress, 0, room)
    edges = (*corner, *np.minimum(corner + box, (photo.width, photo.height)))
    frames.append(np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC, box=tuple(map(float, edges)))))
  return np.stack(frames)


def jitter_colors(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Gives a clip other colours: any hue, more or less saturated and bright; a grey one two random tones first.

  A few photographs thus show the colours of many.
  """
  clip = frames.astype(np.float32) / 255
  if np.ptp(frames.astype(np.int16), axis=-1).max() < 3:
    clip = TASKS["duotone"].apply(clip, **TASKS["duotone"].draw(rng))
  angle, saturation = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 2.0)
  cos, sin = saturation * np.cos(angle), saturation * np.sin(angle)
  turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
  mix = OPPONENT_COLORS.T @ turn @ OPPONENT_COLORS
  clip = np.clip(clip @ mix.T.astype(np.float32), 0, 1)
  return to_uint8(clip ** rng.uniform(0.7, 1.4) * rng.uniform(0.8, 1.1))


def to_uint8(clip: np.ndarray) -> np.ndarray:
  """[0, 1] to 0 .. 255."""
  return (np.clip(clip, 0, 1) * 255 + 0.5).astype(np.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputedSentences:
  """Sentences of computed tasks over natural clips: index i is always the same sentence for the same seed.

  Attributes:
    clips: where the natural clips come from; those of one sentence differ whenever there are two.
    tasks: weights by name of the task.
    contexts: weights by name of the context.
    animating_contexts: the same for tasks that make a video of an image, as camera movement does.
    num_frames: frames of a video clip, 4n + 1.
    size: height and width of every clip in pixels.
    num_clips: weights by number of clips in a sentence (shots).
    reverse_probability: how often a reversible task is turned round.
    prompt_style: "detailed", "rough" or "null".
    prompt_dropout: share of sentences that come without their prompt.
    num_sentences: how many there are.
    seed: makes another set of them.
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
  reverse_probability: float = 0.0
  prompt_style: str = "null"
  prompt_dropout: float = 0.0

  def __post_init__(self):
    unknown = set(self.tasks) - set(TASKS)
    if unknown:
      raise ValueError(f"unknown task {sorted(unknown)[0]!r}; there are {', '.join(TASKS)}")

  @property
  def task_names(self) -> tuple[str, ...]:
    return tuple(self.tasks)

  def __len__(self) -> int:
    return self.num_sentences

  def __getitem__(self, index: int) -> Sentence:
    rng = np.random.default_rng((self.seed, int(index)))
    task = draw(rng, self.tasks)
    sentence = self.sentence(rng, task=task, context=draw(rng, self.contexts_of(task)))
    return sentence.replace(prompt=self._prompt(task, index))

  def plan(self, index: int) -> "Plan":
    """What the sentence at an index is, without its pictures: the first draws of `self[index]`, in the same order."""
    rng = np.random.default_rng((self.seed, int(index)))
    task = draw(rng, self.tasks)
    context = draw(rng, self.contexts_of(task))
    num_clips = int(draw(rng, self.num_clips))
    return Plan(task, context, num_clips, self._prompt(task, index))

  def _prompt(self, task: str, index: int) -> str:
    dropped = self.prompt_dropout and np.random.default_rng((self.seed, int(index), 1)).random() < self.prompt_dropout
    return "" if dropped else prompt_for(TASKS[task].prompt_name, self.prompt_style)

  def contexts_of(self, task: str) -> Mapping[str, float]:
    """How often a task's sentences have each context."""
    if TASKS[task].videos_only:
      return {"I": 1.0}
    return self.animating_contexts if TASKS[task].animates else self.contexts

  def sentence(self, rng: np.random.Generator, *, task: str, context: str) -> Sentence:
    """A random sentence of a task and context."""
    spec, num_clips = TASKS[task], int(draw(rng, self.num_clips))
    params = spec.draw(rng)
    pattern = video_pattern(context, num_clips)
    sources = self._different_clips(rng, num_clips // 2)
    pairs = []
    for (source, index), is_video, target_is_video in zip(sources, pattern[::2], pattern[1::2]):
      clip = source.clip(index, rng, num_frames=self.num_frames if is_video else 1, size=self.size)
      length = {"num_frames": self.num_frames if target_is_video else 1} if spec.animates else {}
      target = to_uint8(spec.apply(clip.astype(np.float32) / 255, **params, **length))
      pairs.append((target, clip) if spec.restores else (clip, target))
    reverse = spec.reversible and rng.random() < self.reverse_probability
    prompt = prompt_for(spec.prompt_name, self.prompt_style)
    return make_sentence(pairs, reverse=reverse, prompt=prompt, task=task, context=context).replace(
        params=None if reverse else params)

  def _different_clips(self, rng, count: int):
    everything = self._all_clips
    chosen = rng.choice(len(everything), size=count, replace=len(everything) < count)
    return [everything[i] for i in chosen]

  @functools.cached_property
  def _all_clips(self):
    return [(source, index) for source in self.clips for index in range(len(source))]


@dataclasses.dataclass(frozen=True)
class LazySentences:
  """Computed sentences whose clips are computed when they are needed, so that what is kept of them need not be computed again.

  Attributes:
    sentences: what there is.
    identity: names the natural clips and options that they are computed from.
  """

  sentences: ComputedSentences
  identity: str

  def __len__(self) -> int:
    return len(self.sentences)

  @property
  def task_names(self) -> tuple[str, ...]:
    return self.sentences.task_names

  def __getitem__(self, index: int) -> Sentence:
    whole = _LastSentence(self.sentences, int(index))
    plan = self.sentences.plan(int(index))
    clips = tuple(ClipRef(f"{self.identity}|{index}|{number}", functools.partial(whole.clip, number))
                  for number in range(plan.num_clips))
    return Sentence(clips=clips, roles=reference_roles(plan.num_clips), prompt=plan.prompt, task=plan.task, context=plan.context)

  def prompts(self) -> set[str]:
    """All texts that sentences may come with."""
    return {prompt_for(TASKS[task].prompt_name, self.sentences.prompt_style) for task in self.task_names} | {""}

  def clips(self) -> Iterator[ClipRef]:
    """All clips of all sentences, sentence by sentence."""
    for index in range(len(self)):
      yield from self[index].clips


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a computed sentence will be, before any picture is made."""

  task: str
  context: str
  num_clips: int
  prompt: str


class _LastSentence:
  """Computes a sentence once for all its clips."""

  def __init__(self, sentences: ComputedSentences, index: int):
    self._compute = functools.lru_cache(maxsize=1)(lambda: sentences[index])

  def clip(self, number: int) -> np.ndarray:
    return self._compute().clips[number]


def draw(rng: np.random.Generator, weights: Mapping):
  """A key at random, by weight."""
  values = np.asarray(list(weights.values()), np.float64)
  if not len(values) or (values < 0).any() or not values.sum() > 0:
    raise ValueError(f"weights must not be negative and not all zero, got {dict(weights)}")
  return list(weights)[rng.choice(len(values), p=values / values.sum())]
