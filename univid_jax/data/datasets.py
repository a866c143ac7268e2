"""Data sets of pairs and of whole sentences: the reference's metadata.csv, folders of pairs, JSONL manifests, TFDS.

Each is opened into the same two forms. `ListedSentences` are sentences as somebody wrote them down; `PairSentences` are drawn by
joining pairs of one task. Opening checks every row: what cannot be used is reported, by name and reason.
"""

import csv
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from univid_jax.data.clips import (
    ClipFormat,
    ClipRef,
    available,
    file_clip,
    natural_path,
    probe,
)
from univid_jax.data.kinds import resampling
from univid_jax.data.sentences import CONTEXTS, make_sentence, prompt_for, video_pattern
from univid_jax.data.sources import draw
from univid_jax.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from univid_jax.types import Role, Sentence


@dataclasses.dataclass(frozen=True)
class Dropped:
  """A row that cannot be used, and why."""

  row: str
  reason: str

  def __str__(self) -> str:
    return f"{self.row}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Shot:
  """What one clip of a sentence may be made from.

  Attributes:
    frames: that it can give.
    clip: gives a clip of its first so many frames.
    size: height and width in the file, where they are known.
  """

  frames: int
  clip: Callable[[int], ClipRef]
  size: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Drawing:
  """How sentences are drawn from what is there; see the config's `data`."""

  contexts: Mapping[str, float]
  num_clips: Mapping[int, float]
  reverse_probability: float
  prompt: str
  prompt_dropout: float
  variants: int
  seed: int


@dataclasses.dataclass(frozen=True)
class Row:
  """A sentence that somebody wrote down.

  Attributes:
    shots: one a clip.
    roles: one a clip.
    prompt: the text.
    task: its name, or "".
    lengths: frames of each clip; None where the context decides.
  """

  shots: tuple[Shot, ...]
  roles: tuple[Role, ...]
  prompt: str
  task: str
  lengths: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class ListedSentences:
  """Rows, each in `variants` variants that differ in context, direction and dropped prompts."""

  rows: Sequence[Row]
  form: ClipFormat
  drawing: Drawing

  def __len__(self) -> int:
    return len(self.rows) * self.drawing.variants

  @property
  def task_names(self) -> tuple[str, ...]:
    return tuple(sorted({row.task for row in self.rows} - {""}))

  def split(self, share: float) -> tuple["ListedSentences", "ListedSentences"]:
    """Those to train on, and a share of the rows that is held out (of each task, rounded down)."""
    kept, held_out = split_by_task(self.rows, share, task=lambda row: row.task)
    return dataclasses.replace(self, rows=kept), dataclasses.replace(self, rows=held_out)

  def prompts(self) -> set[str]:
    """All texts that sentences may come with."""
    return {row.prompt for row in self.rows} | {""}

  def clips(self) -> Iterator[ClipRef]:
    """All clips that sentences may have."""
    for row in self.rows:
      for i, shot in enumerate(row.shots):
        yield from (shot.clip(n) for n in ({row.lengths[i]} if row.lengths else {1, self.form.num_frames}))

  def __getitem__(self, index: int) -> Sentence:
    rng = np.random.default_rng((self.drawing.seed, int(index)))
    row = self.rows[int(index) % len(self.rows)]
    context, lengths = "", row.lengths
    if lengths is None:
      context = draw(rng, self.drawing.contexts)
      lengths = [self.form.num_frames if is_video else 1 for is_video in video_pattern(context, len(row.shots))]
    clips = [shot.clip(n) for shot, n in zip(row.shots, lengths)]
    reverse = row.lengths is None and rng.random() < self.drawing.reverse_probability
    if reverse:
      clips = [clips[i ^ 1] for i in range(len(clips))]
    prompt = "" if rng.random() < self.drawing.prompt_dropout else row.prompt
    return Sentence(clips=tuple(clips), roles=row.roles, prompt=prompt, task=row.task, context=context, reverse=reverse)


@dataclasses.dataclass(frozen=True)
class Pair:
  """A source and its target under a task; pairs of one bucket have one size."""

  task: str
  name: str
  source: Shot
  target: Shot
  bucket: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class PairSentences:
  """Sentences drawn by joining pairs of one task and different names, as the paper joins its 20 samples.

  Attributes:
    pairs: example pairs, and queries where `queries` is None.
    form: of the clips.
    drawing: how they are joined.
    queries: pairs that are to be painted, each with others as its examples.
  """

  pairs: Sequence[Pair]
  form: ClipFormat
  drawing: Drawing
  queries: Sequence[Pair] | None = None

  def __len__(self) -> int:
    return len(self.asked) * self.drawing.variants

  @property
  def asked(self) -> Sequence[Pair]:
    """The pairs whose second clip is painted."""
    return self.pairs if self.queries is None else self.queries

  def split(self, share: float) -> tuple["PairSentences", "PairSentences"]:
    """Those to train on, and those that ask for a share of the pairs that is held out (of each task and size, rounded down, and
    never so many that fewer than two are left); their examples are pairs of the training."""
    kept, held_out = split_by_task(self.pairs, share, task=lambda pair: (pair.task, pair.bucket), at_least=2)
    return dataclasses.replace(self, pairs=kept), dataclasses.replace(self, pairs=kept, queries=held_out)

  def asked_by(self, test: "PairSentences") -> tuple["PairSentences", list[Dropped]]:
    """Those that ask for the pairs of a test set, with these pairs as examples; and the test pairs that cannot be asked for."""
    asked, dropped = [], []
    for pair in test.pairs:
      group = self.groups.get((pair.task, pair.bucket), ())
      if any(weight > 0 and self.fits((*group, pair), name) for name, weight in self.drawing.contexts.items()) and group:
        asked.append(pair)
      else:
        dropped.append(Dropped(f"{pair.task}/{pair.name}", "the training has no example of its task, size and length"))
    return dataclasses.replace(self, queries=asked), dropped

  @functools.cached_property
  def groups(self) -> Mapping[tuple[str, tuple[int, int]], Sequence[Pair]]:
    """Pairs that may be joined: those of one task and one size."""
    groups: dict[tuple[str, tuple[int, int]], list[Pair]] = {}
    for pair in self.pairs:
      groups.setdefault((pair.task, pair.bucket), []).append(pair)
    return groups

  @property
  def task_names(self) -> tuple[str, ...]:
    return tuple(sorted({task for task, _ in self.groups}))

  def prompts(self) -> set[str]:
    """All texts that sentences may come with."""
    return {self._prompt(task) for task in self.task_names} | {""}

  def clips(self) -> Iterator[ClipRef]:
    """All clips that sentences may have."""
    for pair in (*self.pairs, *(self.queries or ())):
      for shot in (pair.source, pair.target):
        yield from (shot.clip(n) for n in {1, self.form.num_frames} if n <= shot.frames)

  def __getitem__(self, index: int) -> Sentence:
    rng = np.random.default_rng((self.drawing.seed, int(index)))
    query = self.asked[int(index) % len(self.asked)]
    group = self.groups[query.task, query.bucket]
    num_clips = int(draw(rng, self.drawing.num_clips))
    contexts = {name: weight for name, weight in self.drawing.contexts.items() if self.fits((*group, query), name)}
    context = draw(rng, contexts)
    pattern = video_pattern(context, num_clips)
    others = [pair for pair in group if pair.name != query.name and self._long_enough(pair, pattern[:2])]
    examples = [others[i] for i in rng.choice(len(others), size=num_clips // 2 - 1, replace=len(others) < num_clips // 2 - 1)]
    pairs = []
    for pair, is_video, target_is_video in zip((*examples, query), pattern[::2], pattern[1::2]):
      source, target = (shot.clip(self.form.num_frames if video else 1)
                        for shot, video in ((pair.source, is_video), (pair.target, target_is_video)))
      pairs.append((source, target))
    prompt = "" if rng.random() < self.drawing.prompt_dropout else self._prompt(query.task)
    return make_sentence(pairs, reverse=rng.random() < self.drawing.reverse_probability, prompt=prompt, task=query.task,
                         context=context)

  def _prompt(self, task: str) -> str:
    return prompt_for(task.replace("_", " "), self.drawing.prompt)

  def _long_enough(self, pair: Pair, pattern: Sequence[bool]) -> bool:
    return all(shot.frames >= self.form.num_frames for shot, video in zip((pair.source, pair.target), pattern) if video)

  def fits(self, group: Sequence[Pair], context: str) -> bool:
    """Whether every pair of a group is long enough for a context: images make no videos."""
    return all(self._long_enough(pair, part) for pair in group for part in CONTEXTS[context])


def split_by_task(items: Sequence, share: float, *, task: Callable, at_least: int = 1) -> tuple[list, list]:
  """Sets aside every so-many-th item of each task, in the order in which they stand; the same each time."""
  groups: dict[Any, list] = {}
  for item in items:
    groups.setdefault(task(item), []).append(item)
  kept, held_out = [], []
  for group in groups.values():
    count = max(min(int(share * len(group)), len(group) - at_least), 0)
    chosen = {round((i + 0.5) * len(group) / count - 0.5) for i in range(count)}
    for i, item in enumerate(group):
      (held_out if i in chosen else kept).append(item)
  return kept, held_out


# Opening: each gives what can be used, and what was dropped.


def open_metadata(path: str, form: ClipFormat, drawing: Drawing) -> tuple[ListedSentences, list[Dropped]]:
  """The reference's format: a table of file_name and text; each mp4 holds its four clips one after another, equally long.

  Raises:
    FileNotFoundError: there is no such table.
    ValueError: it has no column file_name or text.
  """
  table = Path(path)
  if table.is_dir():
    table = table / "metadata.csv"
  if not table.exists():
    raise FileNotFoundError(f"no such table: {table}")
  with table.open(newline="", encoding="utf-8-sig") as file:
    reader = csv.DictReader(file)
    missing = {"file_name", "text"} - set(reader.fieldnames or ())
    if missing:
      there = ", ".join(reader.fieldnames or ("nothing",))
      raise ValueError(f"{table} has no column {' and '.join(sorted(missing))}, only {there}")
    lines = list(reader)
  rows, dropped, seen = [], [], set()
  for number, line in enumerate(lines, 2):
    name = line["file_name"] or ""
    label = f"{table.name} line {number} ({name})"
    try:
      if name in seen:
        raise ValueError("the same file stands there twice")
      seen.add(name)
      rows.append(_metadata_row(natural_path(table.parent, name, folders=("", "train")), line["text"] or "", form))
    except (OSError, ValueError) as error:
      dropped.append(Dropped(label, str(error)))
  if drawing.prompt == "null":
    rows = [dataclasses.replace(row, prompt="") for row in rows]
  return ListedSentences(rows, form, drawing), dropped


def _metadata_row(path: Path, text: str, form: ClipFormat) -> Row:
  found = probe(path)
  frames, fps, form = found.frames, found.fps, form.for_shape(found.size)
  quarter = frames // 4
  usable = available(quarter, fps=fps, target_fps=form.fps)
  if usable < form.num_frames:
    raise ValueError(f"{path} has {frames} frames, {usable} for each of its four clips, and {form.num_frames} are needed")

  def shot(i):
    return Shot(usable, lambda count: file_clip(path, start=i * quarter, count=count, form=form, fps=fps))

  return Row(tuple(shot(i) for i in range(4)), (Role.CONTEXT,) * 3 + (Role.TARGET,), text, "", None)


def file_shot(path: Path, form: ClipFormat, *, start: int = 0) -> Shot:
  """A file as a clip of any length that it can give, of the size that is nearest to its shape.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no clip, or shorter than its start.
  """
  found = probe(path)
  if found.frames <= start:
    raise ValueError(f"{path} has {found.frames} frames and cannot start at frame {start}")
  form = form.for_shape(found.size)
  usable = available(found.frames - start, fps=found.fps, target_fps=form.fps)
  return Shot(usable, lambda count: file_clip(path, start=start, count=count, form=form, fps=found.fps), found.size)


def open_pairs(folder: str, form: ClipFormat, drawing: Drawing, *,
               kinds: Mapping[str, str] | None = None) -> tuple[PairSentences, list[Dropped]]:
  """A folder of pairs: FOLDER/TASK/NAME/source.* and target.*, each an image or a video (or a folder of frames).

  Args:
    folder: of the tasks.
    form: size and lengths.
    drawing: how sentences are drawn.
    kinds: what the targets of a task are, see `data.kinds`; pictures by default.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: it holds no task.
  """
  root = Path(folder)
  if not root.is_dir():
    raise FileNotFoundError(f"no such folder: {folder}")
  names = [name for task in sorted(root.iterdir()) if task.is_dir() for name in sorted(task.iterdir()) if name.is_dir()]
  if not names:
    raise ValueError(f"no pairs in {folder}: they are TASK/NAME/source.* and TASK/NAME/target.*")
  pairs, dropped = [], []
  for name in names:
    try:
      target_form = dataclasses.replace(form, resample=resampling((kinds or {}).get(name.parent.name)))
      source, target = (file_shot(_only(name, part), of) for part, of in (("source", form), ("target", target_form)))
      shapes = [shot.size[1] / shot.size[0] for shot in (source, target)]
      if max(shapes) > 1.02 * min(shapes):
        raise ValueError("the source is {}x{} and the target {}x{}: cut to one size they would not lie upon each other".format(
            *source.size, *target.size))
      short, long = sorted((source.frames, target.frames))
      if long > 1 and short < min(form.num_frames, long) and short > 1:
        raise ValueError(f"the source has {source.frames} frames and the target {target.frames}; {form.num_frames} of each are "
                         "needed")
      pairs.append(Pair(name.parent.name, name.name, source, target, form.for_shape(source.size).size))
    except (OSError, ValueError) as error:
      dropped.append(Dropped(f"{name.parent.name}/{name.name}", str(error)))
  return joined(pairs, dropped, form, drawing)


def _only(folder: Path, stem: str) -> Path:
  found = [path for path in sorted(folder.iterdir()) if path.stem == stem
           and (path.is_dir() or path.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, ".npy"))]
  if len(found) != 1:
    raise ValueError(f"{folder} needs one {stem}.*, an image or a video, and has {len(found)}")
  return found[0]


def joined(pairs: list[Pair], dropped: list[Dropped], form: ClipFormat, drawing: Drawing) -> tuple[PairSentences, list[Dropped]]:
  """Leaves out tasks that cannot make a sentence."""
  sentences = PairSentences(pairs, form, drawing)
  kept = []
  for (task, bucket), group in sentences.groups.items():
    if len({pair.name for pair in group}) < 2:
      size = " at {}x{}".format(*bucket) if form.buckets else ""
      dropped.append(Dropped(task, f"a task needs pairs of at least two names{size}"))
    elif not any(weight > 0 and sentences.fits(group, context) for context, weight in drawing.contexts.items()):
      dropped.append(Dropped(task, f"its pairs are too short for {form.num_frames} frames, and no context of images is drawn"))
    else:
      kept += group
  return dataclasses.replace(sentences, pairs=kept), dropped


def open_manifest(path: str, form: ClipFormat, drawing: Drawing) -> tuple[ListedSentences, list[Dropped]]:
  """A JSONL file with a sentence a line: {"clips": [{"path", "role", "num_frames", "start"}, ...], "prompt", "task"}.

  Paths are relative to the file; role is "context" (the default) or "target"; num_frames is 1 or 4n + 1, by default all that
  the clip can give up to the config's.

  Raises:
    FileNotFoundError: there is no such file.
  """
  file = Path(path)
  if not file.exists():
    raise FileNotFoundError(f"no such manifest: {file}")
  rows, dropped = [], []
  for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
    if not line.strip():
      continue
    try:
      rows.append(_manifest_row(file.parent, json.loads(line), form, drawing))
    except (OSError, ValueError, KeyError, TypeError) as error:
      reason = f"no {error}" if isinstance(error, KeyError) else str(error)
      dropped.append(Dropped(f"{file.name} line {number}", reason))
  return ListedSentences(rows, form, drawing), dropped


def _manifest_row(root: Path, values: Mapping[str, Any], form: ClipFormat, drawing: Drawing) -> Row:
  unknown = set(values) - {"clips", "prompt", "task", "context"}
  if unknown:
    raise ValueError(f"unknown key {sorted(unknown)[0]!r}; there are clips, prompt, task, context")
  shots, roles, lengths = [], [], []
  if values["clips"]:
    form = form.for_shape(probe(root / values["clips"][0]["path"]).size)  # one size for the whole sentence
  for clip in values["clips"]:
    shot = file_shot(root / clip["path"], form, start=int(clip.get("start", 0)))
    longest = (min(shot.frames, form.num_frames) - 1) // 4 * 4 + 1
    count = int(clip.get("num_frames", longest))
    if count % 4 != 1 or count < 1:
      raise ValueError(f"{clip['path']}: a clip has 1 or 4n + 1 frames, got num_frames {count}")
    if count > shot.frames:
      raise ValueError(f"{clip['path']} gives {shot.frames} frames, {count} are asked for")
    role = clip.get("role", "context")
    if role not in ("context", "target"):
      raise ValueError(f"{clip['path']}: a role is context or target, got {role!r}")
    shots.append(shot)
    roles.append(Role[role.upper()])
    lengths.append(count)
  Sentence(clips=tuple(shots), roles=tuple(roles))  # checks roles
  prompt = "" if drawing.prompt == "null" else str(values.get("prompt", ""))
  return Row(tuple(shots), tuple(roles), prompt, str(values.get("task", "")), tuple(lengths))
