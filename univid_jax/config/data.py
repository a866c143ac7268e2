"""The config of the data."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

from univid_jax.config.grids import ARCConfig, GridsConfig
from univid_jax.config.section import MAX_COUNT, MAX_HOST_COUNT, Section
from univid_jax.core.contexts import PAPER_CAMERA_CONTEXTS, Motion
from univid_jax.core.dims import is_clip_length, nearest_clip_lengths
from univid_jax.core.errors import UserError
from univid_jax.core.options import MAX_FPS, ClipFit, PromptStyle, TargetKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class TFDSConfig(Section):
  """A TFDS data set of pairs.

  Attributes:
    name: name of the data set; "" for none.
    split, data_dir: arguments of TFDS.
    task: name given to the task.
    source, target: names of the features.
    kind: what the target's values represent.
    test_split: split whose pairs are held out; "" holds out `data.held_out` of `split`.
  """

  KEY: ClassVar[str] = "data.tfds."

  name: str = ""
  split: str = "train"
  data_dir: str = ""
  task: str = ""
  source: str = "image"
  target: str = "target"
  kind: TargetKind = TargetKind.IMAGE
  test_split: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceWeights(Section):
  """How often each kind of data is drawn; data with weight 0 is not opened."""

  KEY: ClassVar[str] = "data.weights."

  computed: float = 1.0
  metadata: float = 1.0
  pairs: float = 1.0
  manifest: float = 1.0
  tfds: float = 1.0
  arc: float = 1.0
  grids: float = 1.0

  def check(self) -> None:
    for field in dataclasses.fields(self):
      self.require(field.name, 0 <= getattr(self, field.name) < math.inf, "at least 0, and finite")


_TASKS = {"invert": 1.0, "swap_channels": 1.0, "duotone": 1.0}


_OTHER_TASKS = (
  "camera_movement",
  "scribble",
  "moving_object",
  "salient_object",
  "inpainting",
  "colorization",
  "super_resolution",
  "deblurring",
  "denoising",
  "deraining",
  "low_light",
  "greyscale",
  "invert_brightness",
  "flip",
  "time_reversal",
)


# The motion of computed tasks where it is not `OPTIONAL`; `data.tasks` reads it from here.
TASK_MOTIONS: Mapping[str, Motion] = {
  "camera_movement": Motion.ANIMATES,
  "moving_object": Motion.NEEDED,
  "time_reversal": Motion.NEEDED,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
  """Where sentences come from and how they are drawn.

  Attributes:
    bundled: whether computed tasks use the photographs that come with scikit-image.
    jitter: whether the colours of these photographs are varied.
    folder: images and videos of your own for computed tasks, in training only; `bundled` photographs are added to them.
    test_folder: images and videos of your own that held-out sentences of computed tasks show, instead of bundled
      photographs.
    metadata: the reference's metadata.csv.
    pairs: a folder TASK/NAME/source.* and target.*.
    manifest: a JSONL file with one sentence per line.
    tfds: a TFDS data set of pairs. Where any of these four is given, computed tasks are only used with `folder`.
    arc: tasks of the ARC benchmark.
    grids: computed tasks on grids of coloured cells, and how grids are drawn.
    kinds: what the targets of your tasks represent, by task; selects their metrics and how they are resized. Computed
      tasks, grids and ARC have kinds of their own.
    depth_range: metres that white and black represent in images of depth; black itself is unknown.
    weights: how often each kind of data is drawn; 0 switches it off.
    held_out: share of your records or pairs held out of training.
    test_pairs: a folder like `pairs` that is held out instead, with examples from the training pairs.
    allow_dropped: leave out records that cannot be used, held-out ones too, instead of stopping. Where processes share
      rows, a file that cannot be read still stops training.
    allow_changed: resume a run, or evaluate it, although its data has changed since it started.
    variants: sentences per record or pair that differ in context, direction and examples.
    num_threads: threads that read and encode, in each stream of rows.
    stream_processes: whether each stream of rows (`rows.streams`) is made in a process of its own, which uses one more
      core; for runs without a pre-trained autoencoder.
    buckets: further sizes, HEIGHTxWIDTH; a pair gets the size whose aspect ratio is nearest to its source's.
    fit: how clips are adapted to the model's size.
    fps: frame rate that videos are resampled to; 0 keeps theirs.
    prompt_dropout: share of sentences that get the null prompt, in training only.
    cache: folder of cached latents and prompt embeddings; WORKDIR/cache by default.
    height, width: of every clip, in pixels.
    num_frames: of a video clip, 4n + 1.
    tasks: weights of the computed tasks.
    contexts: weights of the contexts I to IV.
    animating_contexts: the same for tasks that make a video of an image (camera movement).
    num_clips: weights of sentences with 4, 6 or 8 clips, under `clips_4` and so on.
    max_video_clips: the most clips that a sentence with videos has, so that rows can be short; more are cut. Records
      that list their clips keep all of them. 0 is no limit.
    reverse_probability: share of sentences with swapped pairs, so that the task is inverted; grids and ARC are never
      reversed.
    prompt: style of the prompts; with `null`, texts of tables and manifests are not used either.
    num_sentences: computed sentences before they repeat.
  """

  KEY: ClassVar[str] = "data."

  bundled: bool = True
  jitter: bool = True
  folder: str = ""
  test_folder: str = ""
  metadata: str = ""
  pairs: str = ""
  manifest: str = ""
  tfds: TFDSConfig = TFDSConfig()
  arc: ARCConfig = ARCConfig()
  grids: GridsConfig = dataclasses.field(default_factory=GridsConfig)
  kinds: Mapping[str, TargetKind] = dataclasses.field(default_factory=dict)
  depth_range: tuple[float, float] = (0.5, 10.0)
  weights: SourceWeights = SourceWeights()
  held_out: float = 0.05
  test_pairs: str = ""
  allow_dropped: bool = False
  allow_changed: bool = False
  variants: int = 16
  num_threads: int = 1
  stream_processes: bool = False
  buckets: tuple[str, ...] = ()
  fit: ClipFit = ClipFit.CROP
  fps: float = 0.0
  prompt_dropout: float = 0.0
  cache: str = ""
  height: int = 32
  width: int = 32
  num_frames: int = 5
  tasks: Mapping[str, float] = dataclasses.field(default_factory=lambda: _TASKS | dict.fromkeys(_OTHER_TASKS, 0.0))
  contexts: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: {"I": 0.2, "II": 0.5, "III": 0.3, "IV": 0.0}
  )
  animating_contexts: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(PAPER_CAMERA_CONTEXTS))
  num_clips: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: {"clips_4": 1.0, "clips_6": 0.0, "clips_8": 0.0}
  )
  max_video_clips: int = 0
  reverse_probability: float = 0.0
  prompt: PromptStyle = PromptStyle.NULL
  num_sentences: int = 1_000_000

  def check(self) -> None:
    self.require_at_least(1, "height", "width", "num_frames", "variants", "num_threads")
    self.require_at_least(1, "num_sentences", maximum=MAX_HOST_COUNT)
    self.require_at_least(0, "fps")
    self.require("fps", self.fps <= MAX_FPS, f"at most {MAX_FPS:g}")
    self.require_share("held_out")
    self.require_share("reverse_probability", "prompt_dropout", closed=True)
    nearest = " or ".join(map(str, nearest_clip_lengths(self.num_frames)))
    self.require("num_frames", is_clip_length(self.num_frames), f"4n + 1 ({nearest})")
    near, far = self.depth_range
    self.require("depth_range", 0 < near < far < math.inf, "two increasing positive distances in metres")
    self.require_weights("tasks", "contexts", "animating_contexts", "num_clips")
    for task, kind in self.kinds.items():
      if kind in (TargetKind.IMAGE, TargetKind.CAMERA):
        kinds = ", ".join(k for k in TargetKind if k not in (TargetKind.IMAGE, TargetKind.CAMERA))
        raise UserError(f"config.data.kinds.{task} must be one of {kinds}, got {str(kind)!r}")
      if self.tfds.name and task == self.tfds.task and self.tfds.kind not in (TargetKind.IMAGE, kind):
        raise UserError(
          f"config.data.kinds.{task} is {kind}, but config.data.tfds.kind of the same task is {self.tfds.kind}: leave "
          "one out"
        )
    has_unnamed_kind = self.tfds.name and not self.tfds.task and self.tfds.kind != TargetKind.IMAGE
    if has_unnamed_kind and (self.metadata or self.manifest):
      raise UserError(
        f"config.data.tfds.kind = {self.tfds.kind} would also be that of the records of config.data.metadata and "
        "manifest that have no task: give config.data.tfds.task"
      )
    for name, given, option, training in (
      ("test_pairs", self.test_pairs, "pairs", self.pairs),
      ("tfds.test_split", self.tfds.test_split, "tfds.name", self.tfds.name),
    ):
      if given and not training:
        raise UserError(
          f"config.data.{name} is a test set, and there is no training data for its examples: give config.data.{option}"
        )
    if self.test_folder and not self.has_computed:
      raise UserError("config.data.test_folder is for computed tasks, and there are none: give config.data.folder")
    self._check_grids()
    limit = self.max_video_clips
    self.require("max_video_clips", limit == 0 or (4 <= limit <= MAX_COUNT and limit % 2 == 0), "0, 4, 6, 8, ...")
    _ = self.sizes, self.clip_counts  # parsed once here, so that mistakes are reported

  def _check_grids(self) -> None:
    room, needed = min(self.height, self.width) // self.grids.cell, self.grids.max_side
    if self.grids.enabled and room < needed:
      raise UserError(
        f"config.data.grids.max_side = {needed} cells of {self.grids.cell} pixels do not fit into config.data.height "
        f"and width = {self.height}x{self.width}: at most {room} do"
      )

  @property
  def has_computed(self) -> bool:
    """Whether there are computed tasks, unless their weight is 0: bundled photographs give way to your own records."""
    has_records = any((self.metadata, self.pairs, self.manifest, self.tfds.name))
    return bool(self.folder) or (self.bundled and not has_records)

  @property
  def sizes(self) -> tuple[tuple[int, int], ...]:
    """All sizes as (height, width): `height` and `width`, then the buckets."""
    sizes = [(self.height, self.width)]
    for text in self.buckets:
      height, _, width = text.partition("x")
      valid = all(part.isdecimal() and 0 < int(part) <= MAX_COUNT for part in (height, width))
      self.require("buckets", valid, "sizes HEIGHTxWIDTH, for example 480x832")
      sizes.append((int(height), int(width)))
    return tuple(sizes)

  @property
  def clip_counts(self) -> Mapping[int, float]:
    """Weights by number of clips in a sentence."""
    for name in self.num_clips:
      count = name.removeprefix("clips_")
      if not (count.isdecimal() and 4 <= int(count) <= MAX_COUNT and int(count) % 2 == 0):
        raise UserError(f"config.data.num_clips must have keys clips_4, clips_6, clips_8, ..., got {name!r}")
    return {int(name.removeprefix("clips_")): weight for name, weight in self.num_clips.items()}
