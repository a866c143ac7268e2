"""Reads a manifest: a JSONL file with one sentence per line, given clip by clip.

  {"clips": [{"path": ..., "role": ..., "num_frames": ..., "start": ...}, ...], "prompt": ..., "task": ...}

Paths are relative to the file's folder and inside it. A role is "context" (the default) or "target". `start` is counted
at `config.data.fps` if that is set, and the clip is resampled from the frame shown there. `num_frames` is 1 or 4n + 1;
by default it is as many as the clip has, up to the config's, and of two videos that are a pair as many as the shorter
has; given for one of them, it is that of both. A key whose value is null counts as absent. Clips 1 and 2, 3 and 4, ...
are pairs, which must be aligned unless both are targets.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from univid_jax.core.dims import floor_clip_length, is_clip_length
from univid_jax.core.errors import UserError
from univid_jax.core.json_files import parse_json
from univid_jax.core.options import PromptStyle, TargetKind
from univid_jax.core.paths import explain_missing, resolve_inside
from univid_jax.core.sentence import Role, check_roles
from univid_jax.core.text import count_noun
from univid_jax.data.clips import ClipFormat, Footage, open_footage
from univid_jax.data.media.reader import probe
from univid_jax.data.sources.base import DrawOptions, Dropped, drop, printable, report_unused_texts
from univid_jax.data.sources.listed import ListedSentences, Record, forms_of_pairs
from univid_jax.data.sources.pairs import check_aligned

KEYS = ("clips", "prompt", "task")
CLIP_KEYS = ("path", "role", "num_frames", "start")


def open_manifest(
  path: str, form: ClipFormat, options: DrawOptions, *, kinds: Mapping[str, TargetKind] | None = None
) -> tuple[ListedSentences, list[Dropped]]:
  """Opens a manifest and checks every line.

  Args:
    path: of the file.
    form: of the clips.
    options: how sentences are drawn.
    kinds: of the targets, by task; images by default.

  Returns:
    The sentences, and the lines that cannot be used.

  Raises:
    FileNotFoundError: there is no such file.
    UserError: it is not text.
  """
  file = Path(path)
  if not file.is_file():
    raise FileNotFoundError(f"no such manifest: {file}")
  try:
    # Not splitlines: JSON may contain the line separators of Unicode.
    lines = file.read_text(encoding="utf-8-sig").split("\n")
  except UnicodeDecodeError as error:
    raise UserError(f"{file} is not UTF-8 text: {error}") from error
  records, dropped = [], []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    name = printable(f"{file.name} line {number}")
    try:
      records.append(_make_record(name, file.parent, _parse(line), form, kinds or {}))
    except (OSError, ValueError) as error:
      dropped.append(drop(name, error))
  if options.prompt_style == PromptStyle.NULL:
    report_unused_texts(str(file), sum(bool(record.prompt) for record in records))
    records = [dataclasses.replace(record, prompt="") for record in records]
  return ListedSentences(records, form, options), dropped


def _parse(line: str) -> Mapping[str, Any]:
  """Parses a line, and leaves out keys whose value is null.

  Raises:
    ValueError: it is not JSON, or not a sentence.
  """
  try:
    values = parse_json(line)
  except json.JSONDecodeError as error:
    raise UserError(f"{error.msg} at character {error.pos + 1}; a line must be a whole sentence in JSON") from error
  if not isinstance(values, dict):
    raise UserError(f"a line must be an object with the keys {', '.join(KEYS)}")
  values = _require_keys(values, KEYS)
  for key in ("prompt", "task"):
    if not isinstance(values.get(key, ""), str):
      raise UserError(f"{key} must be a string, got {values[key]!r}")
    if not _is_text(values.get(key, "")):
      raise UserError(f"{key} has half of a surrogate pair, which is no character: {values[key]!r}")
  clips = values.get("clips")
  if not isinstance(clips, list) or not clips or not all(isinstance(clip, dict) for clip in clips):
    raise UserError("clips must be a list of objects with the keys " + ", ".join(CLIP_KEYS))
  return values | {"clips": [_parse_clip(clip) for clip in clips]}


def _is_text(value: str) -> bool:
  """Returns whether a string can be written as UTF-8; an escape in JSON can be half of a surrogate pair."""
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True


def _parse_clip(values: Mapping[str, Any]) -> Mapping[str, Any]:
  clip = _require_keys(values, CLIP_KEYS)
  if "path" not in clip:
    raise UserError("a clip has no path")
  if not isinstance(clip["path"], str):
    raise UserError(f"path must be a string, got {clip['path']!r}")
  for key in ("start", "num_frames"):
    if type(clip.get(key, 0)) is not int:  # true and false are numbers in Python
      raise UserError(f"{clip['path']}: {key} must be a whole number, got {clip[key]!r}")
  if clip.get("start", 0) < 0:
    raise UserError(f"{clip['path']}: start must be at least 0, got {clip['start']}")
  return clip


def _require_keys(values: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
  """Returns what is not null; raises UserError for other keys than the known ones."""
  unknown = [key for key in values if key not in known]
  if unknown:
    raise UserError(f"unknown key {unknown[0]!r}; there are {', '.join(known)}")
  return {key: value for key, value in values.items() if value is not None}


def _make_record(
  name: str, root: Path, values: Mapping[str, Any], form: ClipFormat, kinds: Mapping[str, TargetKind]
) -> Record:
  clips, task = values["clips"], values.get("task", "")
  paths = [_find(root, clip["path"]) for clip in clips]
  form = form.for_shape(probe(paths[0]).size)  # one size for the whole sentence
  roles = tuple(_read_role(clip) for clip in clips)
  check_roles(len(clips), roles)
  forms = forms_of_pairs(form, kinds.get(task, TargetKind.IMAGE), roles)
  footage = [
    # Clips of a pair that are parts of one video are aligned frame by frame, those of two videos in time.
    open_footage(path, own, start=clip.get("start", 0), has_own_time=path in paths[i ^ 1 : (i ^ 1) + 1])
    for i, (path, own, clip) in enumerate(zip(paths, forms, clips))
  ]
  lengths = _read_lengths(clips, footage, roles, form)
  _check_pairs(clips, footage, roles, lengths)
  return Record(name, tuple(footage), roles, values.get("prompt", ""), task, lengths)


def _find(root: Path, name: str) -> Path:
  path = resolve_inside(root, name)
  if not path.exists():
    raise FileNotFoundError(f"no such clip: {path}{explain_missing(path)}")
  return path


def _check_pairs(
  clips: Sequence[Mapping[str, Any]], footage: Sequence[Footage], roles: Sequence[Role], lengths: Sequence[int]
) -> None:
  """Raises UserError if the clips of a pair are not aligned; two targets are no source and target of each other."""
  for first in range(0, len(clips) - 1, 2):
    if roles[first] == Role.CONTEXT:
      source, target = footage[first : first + 2]
      try:
        check_aligned(source, target, min(lengths[first : first + 2]))
      except UserError as error:
        raise UserError(f"{clips[first]['path']} and {clips[first + 1]['path']}: {error}") from error


def _read_role(clip: Mapping[str, Any]) -> Role:
  role = clip.get("role", "context")
  if role not in ("context", "target"):
    raise UserError(f"{clip['path']}: a role must be context or target, got {role!r}")
  return Role[role.upper()]


def _read_lengths(
  clips: Sequence[Mapping[str, Any]], footage: Sequence[Footage], roles: Sequence[Role], form: ClipFormat
) -> tuple[int, ...]:
  longest = [floor_clip_length(min(part.num_frames, form.num_frames)) for part in footage]
  lengths = []
  for index, (clip, part) in enumerate(zip(clips, footage)):
    first = index // 2 * 2
    pair = slice(first, first + 2) if roles[first] == Role.CONTEXT else slice(index, index + 1)
    given = [count for other in clips[pair] if (count := other.get("num_frames", 1)) > 1 and is_clip_length(count)]
    shortest = min([longest[index], *(length for length in longest[pair] if length > 1)])
    count = clip.get("num_frames", given[0] if given and longest[index] > 1 else shortest)
    is_beside_video = any(length > 1 != other.get("num_frames") for length, other in zip(longest[pair], clips[pair]))
    of_video = part.start + part.num_frames > 1  # its file, of which too few may be left
    if count == 1 and of_video and "num_frames" not in clip and is_beside_video:
      left = f"{count_noun(part.num_frames, 'frame')}{f' from {part.start} on' if part.start else ''}"
      raise UserError(
        f"{clip['path']} has {left}, too few for a video, and its pair is one: with num_frames = 1 it is an image"
      )
    if not is_clip_length(count):
      raise UserError(f"{clip['path']}: a clip must have 1 or 4n + 1 frames, got num_frames {count}")
    if count > part.num_frames:
      whose = "" if "num_frames" in clip else " of the other clip of the pair"
      raise UserError(f"{clip['path']} has {count_noun(part.num_frames, 'frame')}, but num_frames{whose} is {count}")
    lengths.append(count)
  return tuple(lengths)
