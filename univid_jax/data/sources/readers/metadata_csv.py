"""Reads the reference's format: a table of file names and texts; each mp4 has its four clips one after another."""

import csv
import dataclasses
from pathlib import Path

from univid_jax.core.errors import UserError
from univid_jax.core.options import PromptStyle
from univid_jax.core.paths import resolve_inside
from univid_jax.core.sentence import reference_roles
from univid_jax.data.clips import ClipFormat, file_footage
from univid_jax.data.reader import probe
from univid_jax.data.sources.base import DrawOptions, Dropped
from univid_jax.data.sources.listed import ListedSentences, Record

COLUMNS = ("file_name", "text")
CLIPS_PER_FILE = 4


def open_metadata(path: str, form: ClipFormat, options: DrawOptions) -> tuple[ListedSentences, list[Dropped]]:
  """Opens a metadata.csv, or the one in a folder, and checks every line.

  Returns:
    The sentences, and the lines that cannot be used.

  Raises:
    FileNotFoundError: there is no such table.
    UserError: it lacks a column or has it twice, or is not a table.
  """
  table = Path(path)
  if table.is_dir():
    table = table / "metadata.csv"
  if not table.is_file():
    raise FileNotFoundError(f"no such table: {table}")
  records: list[Record] = []
  dropped: list[Dropped] = []
  seen: set[str] = set()
  for number, line in enumerate(_read_lines(table), 2):
    file = line["file_name"]
    name = f"{table.name} line {number} ({file})"
    try:
      if file in seen:
        raise UserError("the file is listed twice")
      seen.add(file)
      records.append(_make_record(name, _find(table.parent, file), line["text"], form))
    except (OSError, ValueError) as error:
      dropped.append(Dropped(name, str(error)))
  if options.prompt == PromptStyle.NULL:
    records = [dataclasses.replace(record, prompt="") for record in records]
  return ListedSentences(records, form, options), dropped


def _read_lines(table: Path) -> list[dict[str, str]]:
  """Returns the columns of each line; what a line lacks is empty."""
  try:
    with table.open(newline="", encoding="utf-8-sig") as file:
      reader = csv.DictReader(file, restval="")
      found = list(reader.fieldnames or ())
      if missing := sorted(set(COLUMNS) - set(found)):
        raise UserError(f"{table} has no column {' and '.join(missing)}; its columns are {', '.join(found) or 'none'}")
      if repeated := [name for name in COLUMNS if found.count(name) > 1]:
        raise UserError(f"{table} has several columns {' and '.join(repeated)}")
      return [{name: line[name] for name in COLUMNS} for line in reader]
  except (UnicodeDecodeError, csv.Error) as error:
    raise UserError(f"{table} is not a table in UTF-8: {error}") from error


def _find(root: Path, name: str) -> Path:
  """Returns a listed file, which is beside the table or in train/."""
  for folder in (root, root / "train"):
    path = resolve_inside(folder, name)
    if path.exists():
      return path
  raise FileNotFoundError(f"no such file: {root / name}")


def _make_record(name: str, path: Path, text: str, form: ClipFormat) -> Record:
  found = probe(path)
  length, rest = divmod(found.num_frames, CLIPS_PER_FILE)
  if rest:
    raise UserError(
      f"{path} has {found.num_frames} frames, which are not four clips of equal length: cut it to a multiple of 4, or "
      "name the start of each clip in a manifest"
    )
  parts = [found.schedule.part_at(i * length, (i + 1) * length, form.fps) for i in range(CLIPS_PER_FILE)]
  shortest = min(count for _, count in parts)
  if shortest < form.num_frames:
    total = found.count_at(form.fps)
    raise UserError(
      f"{path} has {total} frames, {shortest} for each of its four clips, and {form.num_frames} are needed"
    )
  footage = [file_footage(path, found, form, start=start, num_frames=shortest) for start, _ in parts]
  return Record(name, tuple(footage), reference_roles(CLIPS_PER_FILE), text, "", None)
