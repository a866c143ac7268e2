"""Compares what a model is about to sample with what it was trained on."""

import math
from collections.abc import Sequence

from univid_jax import Pipeline
from univid_jax.checkpoints.usage import Usage
from univid_jax.core.contexts import CONTEXTS, video_pattern
from univid_jax.core.options import ClipFit
from univid_jax.core.text import join_words, size_text
from univid_jax.data.clips import ContextClip
from univid_jax.data.media.reader import probe
from univid_jax.data.media.schedule import is_same_rate

_FITS = {ClipFit.CROP: "cropped", ClipFit.PAD: "padded with black"}


def find_differences(
  pipeline: Pipeline,
  clips: Sequence[ContextClip],
  *,
  size: tuple[int, int],
  num_frames: int,
  fps: float | None,
  fit: ClipFit,
  fitted: Sequence[str],
  videos: Sequence[bool],
) -> dict[str, str]:
  """Returns what differs from the training of a model, by kind; nothing if it is not known how the model was trained.

  Args:
    pipeline: the model.
    clips: the context, without a query that is sampled in windows.
    size: height and width of all clips in pixels.
    num_frames: of the result, or of a window.
    fps: frame rate of the query, if it has one.
    fit: how clips are brought to the size.
    fitted: the files that are brought to it in this way; others are extended.
    videos: whether each clip of the sentence is a video, those of windows and the result included.
  """
  usage = pipeline.usage
  found: dict[str, str] = {}
  if not usage.is_known:
    return found
  if size not in usage.sizes:
    found["size"] = _describe_size(size, usage)
  trained = sorted({1, usage.num_frames})
  if others := sorted({num_frames, *(len(clip.frames) for clip in clips)} - set(trained)):
    found["frames"] = f"{join_words(others, 'and')} frames instead of {join_words(trained, 'or')}"
  found |= _compare_sentences(videos, usage)
  if fit != usage.fit and any(_has_other_shape(path, size) for path in fitted):
    found["fit"] = f"{_FITS[fit]} instead of {_FITS[usage.fit]}"
  if others := _other_rates([fps, *(clip.fps for clip in clips)], usage):
    found["rate"] = f"{join_words(others, 'and')} frames per second instead of {usage.fps:.5g}"
  return found


def _compare_sentences(videos: Sequence[bool], usage: Usage) -> dict[str, str]:
  """Returns what differs in the number of clips, or else in which of them are videos."""
  count = len(videos)
  if usage.clip_counts and count not in usage.clip_counts:
    missing = " (there is no example pair)" if count < 4 else ""
    return {"clips": f"{count} clips, the result included, instead of {join_words(usage.clip_counts, 'or')}{missing}"}
  if count < 4 or count % 2 or not usage.contexts:
    return {}
  trained = [video_pattern(name, count) for name in usage.contexts if name in CONTEXTS]
  if not trained or tuple(videos) in trained:
    return {}
  shown = ", ".join("video" if is_video else "image" for is_video in videos)
  return {"context": f"a sentence of {shown} instead of those of context {join_words(usage.contexts, 'or')}"}


def _other_rates(rates: Sequence[float | None], usage: Usage) -> list[str]:
  """Returns the rates that are not that of training, if there was one."""
  known = usage.fps
  return sorted({f"{rate:.5g}" for rate in rates if rate and known and not is_same_rate(rate, known)}, key=float)


def _has_other_shape(path: str, size: tuple[int, int]) -> bool:
  """Returns whether a file has another aspect ratio, so that fitting it to a size crops or pads it."""
  height, width = probe(path).size
  return height * size[1] != width * size[0]


def _describe_size(size: tuple[int, int], usage: Usage) -> str:
  """Returns a size next to those of training, and how many times as many pixels it has, which take at least as long."""
  trained = join_words(map(size_text, usage.sizes), "or")
  factor = math.prod(size) / max(map(math.prod, usage.sizes))
  times = f"{round(factor, 1):,g} times as"
  more = f", {times} many, which take at least {times} long" if factor >= 1.5 else ""
  return f"{size_text(size)} pixels (width x height) instead of {trained}{more}"
