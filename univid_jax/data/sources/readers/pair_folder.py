"""Reads a folder of pairs: FOLDER/TASK/NAME/source.* and target.*, each an image, a video or a folder of frames."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from univid_jax.core.errors import UserError
from univid_jax.core.options import TargetKind
from univid_jax.data.clips import ClipFormat, open_footage
from univid_jax.data.reader import CLIP_SUFFIXES, is_foreign
from univid_jax.data.sources.base import DrawOptions, Dropped
from univid_jax.data.sources.pairs import Pair, PairSentences, join_pairs
from univid_jax.data.target_kinds import resampling

# How far the aspect ratios of source and target may differ: cropping would misalign them.
MAX_ASPECT_DIFFERENCE = 1.02


def open_pairs(
  folder: str, form: ClipFormat, options: DrawOptions, *, kinds: Mapping[str, TargetKind] | None = None
) -> tuple[PairSentences, list[Dropped]]:
  """Opens a folder of pairs and checks every pair.

  Args:
    folder: contains the tasks.
    form: of the clips.
    options: how pairs are joined.
    kinds: of the targets, by task; images by default.

  Returns:
    The sentences, and the pairs and tasks that cannot be used.

  Raises:
    FileNotFoundError: there is no such folder.
    UserError: it contains no pair.
  """
  root = Path(folder)
  if not root.is_dir():
    raise FileNotFoundError(f"no such folder: {folder}")
  names = [name for task in _list_folders(root) for name in _list_folders(task)]
  if not names:
    raise UserError(f"no pairs in {folder}: a pair is TASK/NAME/source.* and TASK/NAME/target.*")
  pairs, dropped = [], []
  for name in names:
    kind = (kinds or {}).get(name.parent.name, TargetKind.IMAGE)
    try:
      pairs.append(_open_pair(name, form, kind))
    except (OSError, ValueError) as error:
      dropped.append(Dropped(f"{name.parent.name}/{name.name}", str(error)))
  return join_pairs(pairs, dropped, form, options)


def _list_folders(folder: Path) -> list[Path]:
  return sorted(path for path in folder.iterdir() if path.is_dir() and not is_foreign(path))


def _open_pair(folder: Path, form: ClipFormat, kind: TargetKind) -> Pair:
  source = open_footage(_find_only(folder, "source"), form)
  target = open_footage(_find_only(folder, "target"), dataclasses.replace(form, resample=resampling(kind)))
  aspects = sorted(footage.size[1] / footage.size[0] for footage in (source, target))
  if aspects[1] > MAX_ASPECT_DIFFERENCE * aspects[0]:
    raise UserError(
      f"the source is {source.size[0]}x{source.size[1]} and the target {target.size[0]}x{target.size[1]}: cropped to "
      "one size they would not be aligned"
    )
  short, long = sorted((source.num_frames, target.num_frames))
  if 1 < short < min(form.num_frames, long):
    raise UserError(
      f"the source has {source.num_frames} frames and the target {target.num_frames}; {form.num_frames} of each are "
      "needed"
    )
  return Pair(folder.parent.name, folder.name, source, target, form.for_shape(source.size).size)


def _find_only(folder: Path, stem: str) -> Path:
  found = [
    path
    for path in sorted(folder.iterdir())
    if path.stem == stem and (path.is_dir() or path.suffix.lower() in CLIP_SUFFIXES)
  ]
  if len(found) != 1:
    raise UserError(f"{folder} must have one {stem}.*, an image or a video, and has {len(found)}")
  return found[0]
