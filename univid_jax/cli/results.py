"""The files of a result: the clip, with --grid the whole sentence, and the record of how they were made.

The record is a .json next to the result. It is removed before anything of the result is written, and written last with
the checksums of the other files, so that a result with a record is complete and the record's own.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from univid_jax.core.errors import UserError
from univid_jax.core.json_files import read_json_object
from univid_jax.core.paths import write_text
from univid_jax.core.text import count_noun, size_text
from univid_jax.data.media.reader import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from univid_jax.data.media.writer import check_target, require_short_name
from univid_jax.diffusion.step_cache import StepCache

log = logging.getLogger(__name__)

# Key of a record under which the checksums are, and keys that tell a record from other JSON files.
FILES = "files"
RECORD_KEYS = frozenset(("version", "clips", "num_frames"))


def record_path(result: Path) -> Path:
  """Returns the path of the .json that says how a result was made."""
  return result.with_name(f"{result.stem}.json")


def grid_path(result: Path, num_frames: int) -> Path:
  """Returns the path of the picture, or of the video if there are several frames, of the whole sentence."""
  suffixes, default = (IMAGE_SUFFIXES, ".png") if num_frames == 1 else (VIDEO_SUFFIXES, ".mp4")
  return result.with_name(f"{result.stem}_grid{result.suffix if result.suffix in suffixes else default}")


def check_result(result: Path, inputs: Sequence[str], num_frames: int | None, *, grid: bool = False) -> None:
  """Checks that a result can be written, and replaces nothing but an earlier result.

  Args:
    result: its path.
    inputs: paths of the clips that it is made of.
    num_frames: of the result; None if it is not known yet.
    grid: whether the whole sentence is written, too.

  Raises:
    UserError: it cannot be written, or would replace one of the inputs or a file that is no record; see `check_target`.
    OSError: its name, or that of a file next to it, is too long.
  """
  check_target(result, num_frames)
  require_short_names(result, grid=grid)
  for path in [result, *([grid_path(result, num_frames)] if grid and num_frames else [])]:
    if any(path.exists() and Path(each).exists() and path.samefile(each) for each in inputs):
      raise UserError(f"cannot write {path}: it is one of the clips")
  path = record_path(result)
  if path.exists() and not (_read_record(path) or {}).keys() >= RECORD_KEYS:
    raise UserError(f"cannot write {result}: its record would replace {path.name}, which is another file")


def require_short_names(result: Path, *, grid: bool) -> None:
  """Raises OSError if the name of a result, of its record or of the whole sentence is too long."""
  for path in [result, record_path(result), *(grid_path(result, num_frames) for num_frames in (1, 2) if grid)]:
    require_short_name(path)


def remove_record(result: Path) -> None:
  """Removes the record of an earlier result, before any of its files is replaced.

  A result of the same name in another format, which shares the record, is left without one; the log says so.
  """
  path = record_path(result)
  names = {name.partition("/")[0] for name in (_read_record(path) or {}).get(FILES, {})}
  for name in sorted(names - {result.name}):
    if Path(name).stem == result.stem and result.with_name(name).exists():
      log.warning("%s was the record of %s, and becomes that of %s", path, name, result.name)
  path.unlink(missing_ok=True)


def write_record(result: Path, record: Mapping[str, Any], files: Iterable[Path]) -> str:
  """Writes how a result was made next to it; returns a line that describes the result.

  Args:
    result: its path.
    record: how it was made.
    files: all that was written, the result included.
  """
  files = list(files)
  write_text(record_path(result), _to_text({**record, FILES: _checksums(files)}))
  size = size_text((record["height"], record["width"]))
  paths = " and ".join(map(str, files))
  return f"wrote {count_noun(record['num_frames'], 'frame')} of {size} pixels (width x height): {paths}"


def is_finished(result: Path, record: Mapping[str, Any], files: Sequence[Path]) -> bool:
  """Returns whether an earlier command has written this very result, with all of these files."""
  if not record_path(result).is_file() or not all(path.exists() for path in files):
    return False
  written = _read_record(record_path(result)) or {}
  return written == json.loads(_to_text({**record, FILES: _checksums(files)}))


def _read_record(path: Path) -> dict[str, Any] | None:
  """Returns what a file holds; None if it is no JSON object."""
  try:
    return read_json_object(path)
  except (OSError, ValueError):
    return None


def _to_text(record: Mapping[str, Any]) -> str:
  text = json.dumps(record, indent=2, ensure_ascii=False, default=_describe_step_cache) + "\n"
  try:
    text.encode()
  except UnicodeEncodeError:  # the name of a clip is not UTF-8
    text = json.dumps(record, indent=2, default=_describe_step_cache) + "\n"
  return text


def _describe_step_cache(cache: StepCache) -> dict[str, Any]:
  """Returns its settings; the ratios are those of the weights, steps and guidance of the record."""
  return {name: value for name, value in dataclasses.asdict(cache).items() if name != "ratios"}


def _checksums(files: Iterable[Path]) -> dict[str, str]:
  """Returns the SHA-256 of files by name; of a folder the files in it."""
  parts = [(path.name, path) for path in files if not path.is_dir()]
  parts += [(f"{path.name}/{part.name}", part) for path in files if path.is_dir() for part in sorted(path.iterdir())]
  checksums = {}
  for name, path in parts:
    with path.open("rb") as file:
      checksums[name] = hashlib.file_digest(file, "sha256").hexdigest()
  return checksums
