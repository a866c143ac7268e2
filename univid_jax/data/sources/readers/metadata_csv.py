"""Reads the reference's format: a table of file names and texts; each mp4 has its four clips one after another."""

import csv
import dataclasses
import functools
from pathlib import Path

from univid_jax.core.errors import UserError
from univid_jax.core.options import PromptStyle
from univid_jax.core.sentence import reference_roles
from univid_jax.data.clips import ClipFormat, file_clip
from univid_jax.data.sources.base import DrawOptions, Dropped, Footage
from univid_jax.data.sources.listed import ListedSentences, Record
from univid_jax.data.video import count_resampled, probe

COLUMNS = ("file_name", "text")
CLIPS_PER_FILE = 4


def open_metadata(path: str, form: ClipFormat, options: DrawOptions) -> tuple[ListedSentences, list[Dropped]]:
  """Opens a metadata.csv, or the one in a folder, and checks every line.

  Returns:
    The sentences, and the lines that cannot be used.

  Raises:
    FileNotFoundError: there is no such table.
    UserError: it lacks a column.
  """
  table = Path(path)
  if table.is_dir():
    table = table / "metadata.csv"
  if not table.exists():
    raise FileNotFoundError(f"no such table: {table}")
  records: list[Record] = []
  dropped: list[Dropped] = []
  seen: set[str] = set()
  for number, line in enumerate(_read_lines(table), 2):
    name = line["file_name"] or ""
    try:
      if name in seen:
        raise UserError("the file is listed twice")
      seen.add(name)
      records.append(_make_record(_find(table.parent, name), line["text"] or "", form))
    except (OSError, ValueError) as error:
      dropped.append(Dropped(f"{table.name} line {number} ({name})", str(error)))
  if options.prompt == PromptStyle.NULL:
    records = [dataclasses.replace(record, prompt="") for record in records]
  return ListedSentences(records, form, options), dropped


def _read_lines(table: Path) -> list[dict[str, str]]:
  with table.open(newline="", encoding="utf-8-sig") as file:
    reader = csv.DictReader(file)
    missing = sorted(set(COLUMNS) - set(reader.fieldnames or ()))
    if missing:
      found = ", ".join(reader.fieldnames or ("none",))
      raise UserError(f"{table} has no column {' and '.join(missing)}; its columns are {found}")
    return list(reader)


def _find(root: Path, name: str) -> Path:
  """Returns a listed file, which is beside the table or in train/."""
  for path in (root / name, root / "train" / name):
    if path.exists():
      return path
  raise FileNotFoundError(f"no such file: {root / name}")


def _make_record(path: Path, text: str, form: ClipFormat) -> Record:
  found = probe(path)
  form = form.for_shape(found.size)
  length = found.num_frames // CLIPS_PER_FILE
  usable = count_resampled(length, fps=found.fps, target_fps=form.fps)
  if usable < form.num_frames:
    raise UserError(
      f"{path} has {found.num_frames} frames, {usable} for each of its four clips, and {form.num_frames} are needed"
    )

  def clip(start: int, count: int):
    return file_clip(path, start=start, count=count, form=form, fps=found.fps)

  footage = [Footage(usable, functools.partial(clip, i * length), found.size) for i in range(CLIPS_PER_FILE)]
  return Record(tuple(footage), reference_roles(CLIPS_PER_FILE), text, "", None)
