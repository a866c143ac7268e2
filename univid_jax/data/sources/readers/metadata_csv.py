"""Reads the reference's format: a table of file names and texts; each mp4 has its four clips one after another."""

import csv
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from univid_jax.core.errors import UserError
from univid_jax.core.options import PromptStyle, TargetKind
from univid_jax.core.paths import explain_missing, resolve_inside
from univid_jax.core.sentence import reference_roles
from univid_jax.data.clips import ClipFormat, file_footage
from univid_jax.data.media.reader import probe
from univid_jax.data.sources.base import DrawOptions, Dropped, drop, printable, report_unused_texts
from univid_jax.data.sources.listed import ListedSentences, Record, forms_of_pairs

COLUMNS = ("file_name", "text")
CLIPS_PER_FILE = 4


def open_metadata(
  path: str, form: ClipFormat, options: DrawOptions, *, kind: TargetKind = TargetKind.IMAGE
) -> tuple[ListedSentences, list[Dropped]]:
  """Opens a metadata.csv, or the one in a folder, and checks every line.

  Args:
    path: of the table or its folder.
    form: of the clips.
    options: how sentences are drawn.
    kind: what the targets represent.

  Returns:
    The sentences, and the lines that cannot be used.

  Raises:
    FileNotFoundError: there is no such table.
    UserError: it lacks a column or has it twice, or is not a table, as one whose last quote is not closed.
  """
  table = Path(path)
  if table.is_dir():
    table = table / "metadata.csv"
  if not table.is_file():
    raise FileNotFoundError(f"no such table: {table}")
  records: list[Record] = []
  dropped: list[Dropped] = []
  seen: set[Path] = set()
  for row in list(_read_rows(table)):  # what is wrong with the table is found before files are opened
    name = printable(f"{table.name} line {row.line} ({row.file_name})")
    try:
      if row.surplus:
        raise UserError(f"the header has no column for {row.surplus[0]!r}: a text with commas needs quotes around it")
      if row.missing:
        raise UserError(f"the record ends before the column {row.missing[0]}: empty fields need their commas, too")
      found = _find(table.parent, row.file_name)
      if found in seen:
        raise UserError("the file is listed twice")
      seen.add(found)
      records.append(_make_record(name, found, row.text, form, kind))
    except (OSError, ValueError) as error:
      dropped.append(drop(name, error))
  if options.prompt_style == PromptStyle.NULL:
    report_unused_texts(str(table), sum(bool(record.prompt) for record in records))
    records = [dataclasses.replace(record, prompt="") for record in records]
  return ListedSentences(records, form, options), dropped


@dataclasses.dataclass(frozen=True)
class _Row:
  """A record of the table.

  Attributes:
    line: where it begins in the file; records may be several lines long.
    file_name, text: its columns.
    surplus: fields beyond those of the header that are not empty.
    missing: columns that it ends before.
  """

  line: int
  file_name: str
  text: str
  surplus: Sequence[str]
  missing: Sequence[str]


def _read_rows(table: Path) -> Iterator[_Row]:
  with table.open(newline="", encoding="utf-8-sig") as file:
    reader, line = csv.reader(file, strict=True), 1
    header: list[str] | None = None
    try:
      for row in reader:
        if not row:
          pass
        elif header is None:
          header = _check_header(table, row)
        else:
          values = dict(zip(header, row))
          surplus = [field for field in row[len(header) :] if field.strip()]
          missing = [name for name in COLUMNS if name not in values]
          yield _Row(line, values.get("file_name", ""), values.get("text", ""), surplus, missing)
        line = reader.line_num + 1
    except UnicodeDecodeError as error:
      raise UserError(f"{table} is not a table in UTF-8: {error}") from error
    except csv.Error as error:
      raise UserError(f"{table} is not a table: the record that begins in line {line} has a fault, {error}") from error
    if header is None:
      _check_header(table, [])


def _check_header(table: Path, columns: list[str]) -> list[str]:
  if missing := sorted(set(COLUMNS) - set(columns)):
    names = ", ".join(map(repr, columns)) or "none"
    hint = "; fields are separated by commas" if len(columns) == 1 and re.search(r"[;\t|]", columns[0]) else ""
    raise UserError(f"{table} has no column {' and '.join(missing)}; its columns are {names}{hint}")
  if repeated := [name for name in COLUMNS if columns.count(name) > 1]:
    raise UserError(f"{table} has several columns {' and '.join(repeated)}")
  return columns


def _find(root: Path, name: str) -> Path:
  """Returns a listed file, which is beside the table or in train/."""
  for folder in (root, root / "train"):
    path = resolve_inside(folder, name)
    if path.exists():
      return path
  hint = explain_missing(root / name) or explain_missing(root / "train" / name)
  raise FileNotFoundError(f"no such file: {root / name}{hint}")


def _make_record(name: str, path: Path, text: str, form: ClipFormat, kind: TargetKind) -> Record:
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
  roles = reference_roles(CLIPS_PER_FILE)
  forms = forms_of_pairs(form, kind, roles)
  footage = [
    file_footage(path, found, own, start=start, first=i * length, num_frames=shortest)
    for i, (own, (start, _)) in enumerate(zip(forms, parts))
  ]
  return Record(name, tuple(footage), roles, text, "", None)
