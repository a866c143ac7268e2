"""Clips of one sentence that are parts of one video are read together, which decodes what lies between them once."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from univid_jax.core.sentence import ClipRef
from univid_jax.data.clips import Footage
from univid_jax.data.media.reader import Frames, read_parts


def make_clips(footage: Sequence[Footage], lengths: Sequence[int]) -> list[ClipRef]:
  """Returns a clip of the first frames of each footage, in order; the lengths are given in frames."""
  by_path: dict[Path, list[int]] = {}
  for index, part in enumerate(footage):
    if part.path is not None:
      by_path.setdefault(part.path, []).append(index)
  joint: dict[int, _JointReading] = {}
  for indices in by_path.values():
    if len(indices) > 1:
      parts = {index: (footage[index], lengths[index]) for index in indices}
      joint |= dict.fromkeys(indices, _JointReading(parts))
  clips = [part.clip(length) for part, length in zip(footage, lengths)]
  return [
    dataclasses.replace(clip, read=functools.partial(joint[index].read, index)) if index in joint else clip
    for index, clip in enumerate(clips)
  ]


class _JointReading:
  """Reads all parts when the first is needed, and keeps each of the others until it is.

  Args:
    parts: footage of one file and numbers of frames, by the clip's index in its sentence.
  """

  def __init__(self, parts: Mapping[int, tuple[Footage, int]]):
    self._parts = parts
    self._waiting: dict[int, Frames] = {}

  def read(self, index: int) -> Frames:
    footage, _ = self._parts[index]
    if index not in self._waiting:
      assert footage.path is not None
      spans = [part.span(count) for part, count in self._parts.values()]
      self._waiting = dict(zip(self._parts, read_parts(footage.path, spans, fps=footage.form.fps or None)))
    footage.require_unchanged()
    return footage.form.resize(self._waiting.pop(index))
