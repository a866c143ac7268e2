"""Reads the clips of requests as a model was trained on clips, and reports what differs."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from univid_jax import Pipeline
from univid_jax.cli.sampling import Request
from univid_jax.cli.training_differences import find_differences
from univid_jax.cli.whole_videos import padded_size
from univid_jax.data.clips import ClipFormat, ContextClip, read_context
from univid_jax.data.media.reader import probe

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ContextReader:
  """Reads the clips of requests; what it has reported of a file or a model is not reported again.

  Attributes:
    pipeline: the model.
    form: in which clips are read.
    keep_size: whether results have the size of their query; the model's is the least that holds it.
    first_frame: an image that results begin with; the context may then be empty.
  """

  pipeline: Pipeline
  form: ClipFormat
  keep_size: bool = False
  first_frame: str | None = None
  _reported: set[str] = dataclasses.field(default_factory=set, init=False)
  _differences: set[str] = dataclasses.field(default_factory=set, init=False)
  _examples: dict[Any, list[ContextClip]] = dataclasses.field(default_factory=dict, init=False)

  def form_of(self, request: Request) -> ClipFormat:
    """Returns the form in which the clips of a request are read."""
    if not self.keep_size:
      return self.form
    return dataclasses.replace(
      self.form, size=padded_size(probe(self.shown_last(request)).size, self.pipeline), buckets=()
    )

  def shown_last(self, request: Request) -> str:
    """Returns the clip whose size decides about the result's: the query, or without one the first frame."""
    path = request.clips[-1] if request.clips else self.first_frame
    assert path is not None
    return path

  def read(self, request: Request) -> list[ContextClip]:
    """Reads the context of a request, and reports once what makes a clip differ from its file."""
    if not request.clips:
      return []
    form = self.form_of(request).for_shape(probe(request.clips[-1]).size)
    (query,) = read_context(request.clips[-1:], form, extend_query=self.keep_size)
    clips = [*self.read_examples(request, form), query]
    for clip in clips:
      self.report(clip.path, clip.changes)
    return clips

  def read_examples(self, request: Request, form: ClipFormat) -> list[ContextClip]:
    """Reads the example pairs at the size of the query; those that were read last are kept."""
    pairs, key = request.clips[:-1], (request.clips[:-1], form.size)
    if key not in self._examples:
      self._examples.clear()
      own = dataclasses.replace(self.form, size=form.size, buckets=())
      self._examples[key] = [clip for path in pairs for clip in read_context([path], own)]
    return self._examples[key]

  def read_first_frame(self, request: Request) -> ContextClip | None:
    """Reads the first frame of a result, if it is given, at the size of the query, and extended like it."""
    if self.first_frame is None:
      return None
    size = probe(self.shown_last(request)).size
    form = self.form_of(request).for_shape(size)
    own = dataclasses.replace(form, size=size) if self.keep_size and request.clips else form
    (clip,) = read_context([self.first_frame], own, videos=[False], extend_query=self.keep_size and not request.clips)
    self.report(clip.path, clip.changes)
    return dataclasses.replace(clip, frames=dataclasses.replace(form, extend=True).resize(clip.frames))

  def report(self, path: str, changes: Sequence[str]) -> None:
    """Reports what makes a clip differ from its file, each difference once."""
    text = f"{path}: {'; '.join(changes)}"
    if changes and text not in self._reported:
      self._reported.add(text)
      log.info("%s", text)

  def report_differences(self, request: Request, clips: Sequence[ContextClip], **shown: Any) -> None:
    """Reports what training has not shown the model, each kind of difference once; see `find_differences`."""
    fitted = request.inputs(self.first_frame)
    videos = [len(clip.frames) > 1 for clip in clips]
    videos += [True] * (len(request.clips) - len(clips)) + [shown["num_frames"] > 1]  # a query in windows, the result
    if self.keep_size:
      fitted.remove(self.shown_last(request))
    found = find_differences(self.pipeline, clips, fit=self.form.fit, fitted=fitted, videos=videos, **shown)
    if new := [text for kind, text in found.items() if kind not in self._differences]:
      self._differences.update(found)
      log.warning("the model was not trained on this, expect worse results: %s", "; ".join(new))
