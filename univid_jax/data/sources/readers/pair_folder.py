"""Reads a folder of pairs: FOLDER/TASK/NAME/source.* and target.*, each an image, a video or a folder of frames."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from univid_jax.core.errors import UserError
from univid_jax.core.options import TargetKind
from univid_jax.data.clips import ClipFormat, open_footage
from univid_jax.data.media.reader import CLIP_SUFFIXES, is_foreign
from univid_jax.data.sources.base import DrawOptions, Dropped, drop, is_text, printable, report_texts
from univid_jax.data.sources.pairs import Pair, PairSentences, check_aligned, join_pairs
from univid_jax.data.target_kinds import resampling

log = logging.getLogger(__name__)


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
    hint = ""
    if next(root.glob("source.*"), None):
      hint = "; this is a pair itself, so name the folder that contains those of the tasks, two levels above it"
    elif any(next(path.glob("source.*"), None) for path in _list_folders(root)):
      hint = "; the level of tasks is missing, so move its folders into one with the task's name"
    raise UserError(f"no pairs in {folder}: a pair is TASK/NAME/source.* and TASK/NAME/target.*{hint}")
  for task in _list_folders(root):
    if not _list_folders(task):
      log.warning("%s is left out: the folder of a task, which has no folders of pairs", printable(str(task)))
  pairs, dropped = [], []
  own = set(names)
  texts = [file for task in _list_folders(root) for file in task.iterdir() if is_text(file) and task / file.stem in own]
  for name in names:
    kind = (kinds or {}).get(name.parent.name, TargetKind.IMAGE)
    try:
      files = sorted(name.iterdir())
      texts += [file for file in files if file.stem in ("prompt", "source", "target", name.name) and is_text(file)]
      pairs.append(_open_pair(name, files, form, kind, num_frames=form.num_frames if options.has_videos else 1))
    except (OSError, ValueError) as error:
      dropped.append(drop(f"{name.parent.name}/{name.name}", error))
  report_texts(folder, texts)
  return join_pairs(pairs, dropped, form, options)


def _list_folders(folder: Path) -> list[Path]:
  return sorted(path for path in folder.iterdir() if path.is_dir() and not is_foreign(path))


def _open_pair(folder: Path, files: Sequence[Path], form: ClipFormat, kind: TargetKind, *, num_frames: int) -> Pair:
  source = open_footage(_find_only(folder, files, "source"), form)
  target_form = dataclasses.replace(source.form, resample=resampling(kind))  # of the same size
  target = open_footage(_find_only(folder, files, "target"), target_form)
  check_aligned(source, target, num_frames)
  return Pair(folder.parent.name, folder.name, source, target, source.form.size)


def _find_only(folder: Path, files: Sequence[Path], stem: str) -> Path:
  clips = [path for path in files if path.is_dir() or path.suffix.lower() in CLIP_SUFFIXES]
  found = [path for path in clips if path.stem == stem]
  if len(found) != 1:
    other = next((path.name for path in clips if not found and path.stem.lower() == stem), None)
    hint = f"; the name is in lower case, so rename {other}" if other else ""
    raise UserError(f"{folder} must have one {stem}.*, an image or a video, and has {len(found)}{hint}")
  return found[0]
