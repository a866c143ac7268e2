"""Sentences listed in a file: lines of a table or of a manifest."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from univid_jax.core.contexts import video_pattern
from univid_jax.core.options import TargetKind
from univid_jax.core.sentence import Role, Sentence, is_completable
from univid_jax.data.clips import ClipFormat, Footage
from univid_jax.data.identities import identify_all
from univid_jax.data.joint_reading import make_clips
from univid_jax.data.sources.base import DrawOptions, draw, group_indices, hold_out
from univid_jax.data.target_kinds import resampling


def forms_of_pairs(form: ClipFormat, kind: TargetKind, roles: Sequence[Role]) -> list[ClipFormat]:
  """Returns the form of each clip: that of every second one, and of targets, resizes them as their kind asks."""
  target = dataclasses.replace(form, resample=resampling(kind))
  return [target if index % 2 or role == Role.TARGET else form for index, role in enumerate(roles)]


@dataclasses.dataclass(frozen=True)
class Record:
  """A line of a table or of a manifest.

  Attributes:
    name: of the line, for messages.
    footage: one per clip.
    roles: one per clip.
    prompt: its text.
    task: its name, or "".
    lengths: frames of each clip; None if the context decides.
  """

  name: str
  footage: tuple[Footage, ...]
  roles: tuple[Role, ...]
  prompt: str
  task: str
  lengths: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class ListedSentences:
  """Records, each in `options.variants` variants that differ in context, direction and dropped prompts."""

  records: Sequence[Record]
  form: ClipFormat
  options: DrawOptions

  def __len__(self) -> int:
    return len(self.records) * self.options.variants

  @property
  def task_names(self) -> tuple[str, ...]:
    return tuple(sorted({record.task for record in self.records} - {""}))

  def indices_by_task(self) -> dict[str, Iterator[int]]:
    """See `GroupsByTask`."""
    return group_indices([record.task for record in self.records], self.options.variants)

  def identify_records(self) -> dict[str, object]:
    """See `IdentifiesRecords`."""
    identities = iter(identify_all([part.identify for record in self.records for part in record.footage]))
    return {
      record.name: (
        [
          (next(identities), part.start, part.num_frames, *([part.first] if part.has_own_time else []))
          for part in record.footage
        ],
        [int(role) for role in record.roles],
        record.prompt,
        record.task,
        record.lengths,
      )
      for record in self.records
    }

  def split(self, share: float) -> tuple["ListedSentences", "ListedSentences"]:
    """Holds out a share of the records of each task, rounded down; held-out ones have their prompts."""
    kept, held_out = hold_out(self.records, share, group=lambda record: record.task)
    options = self.options.with_prompts()
    return dataclasses.replace(self, records=kept), dataclasses.replace(self, records=held_out, options=options)

  def completable(self) -> "ListedSentences":
    """Returns the records whose targets can be sampled."""
    return dataclasses.replace(self, records=[record for record in self.records if is_completable(record.roles)])

  def __getitem__(self, index: int) -> Sentence:
    rng = np.random.default_rng((self.options.seed, int(index)))
    record = self.records[int(index) % len(self.records)]
    context, lengths = "", record.lengths
    if lengths is None:
      context = draw(rng, self.options.contexts)
      is_video = video_pattern(context, len(record.footage))
      lengths = [self.form.num_frames if video else 1 for video in is_video]
    clips = make_clips(record.footage, lengths)
    reverse = record.lengths is None and rng.random() < self.options.reverse_probability
    if reverse:
      clips = [clip for source, target in zip(clips[::2], clips[1::2], strict=True) for clip in (target, source)]
    prompt = "" if rng.random() < self.options.prompt_dropout else record.prompt
    return Sentence(
      clips=tuple(clips),
      roles=record.roles,
      prompt=prompt,
      task=record.task,
      context=context,
      reverse=reverse,
      record=record.name,
    )


def count_shown_targets(held_out: ListedSentences, training: ListedSentences) -> int:
  """Counts the held-out records of which a target is shown in training, by any record and in any role."""
  shown = {(part.path, part.start) for record in training.records for part in record.footage}
  return sum(
    any(role == Role.TARGET and (part.path, part.start) in shown for part, role in zip(record.footage, record.roles))
    for record in held_out.records
  )
