"""Reads a manifest: a JSONL file with one sentence per line, given clip by clip.

  {"clips": [{"path": ..., "role": ..., "num_frames": ..., "start": ...}, ...], "prompt": ..., "task": ...}

Paths are relative to the file. A role is "context" (the default) or "target". `num_frames` is 1 or 4n + 1; by default
it is as many as the clip has, up to the config's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from univid_jax.core.errors import UserError
from univid_jax.core.options import PromptStyle
from univid_jax.core.sentence import Role, check_roles
from univid_jax.data.clips import ClipFormat
from univid_jax.data.sources.base import DrawOptions, Dropped, Footage, open_footage
from univid_jax.data.sources.listed import ListedSentences, Record
from univid_jax.data.video import probe

KEYS = ("clips", "prompt", "task", "context")


def open_manifest(path: str, form: ClipFormat, options: DrawOptions) -> tuple[ListedSentences, list[Dropped]]:
  """Opens a manifest and checks every line.

  Returns:
    The sentences, and the lines that cannot be used.

  Raises:
    FileNotFoundError: there is no such file.
  """
  file = Path(path)
  if not file.exists():
    raise FileNotFoundError(f"no such manifest: {file}")
  records, dropped = [], []
  for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
    if not line.strip():
      continue
    try:
      records.append(_make_record(file.parent, json.loads(line), form, options))
    except (OSError, ValueError, KeyError, TypeError) as error:
      reason = f"no {error}" if isinstance(error, KeyError) else str(error)
      dropped.append(Dropped(f"{file.name} line {number}", reason))
  return ListedSentences(records, form, options), dropped


def _make_record(root: Path, values: Mapping[str, Any], form: ClipFormat, options: DrawOptions) -> Record:
  unknown = sorted(set(values) - set(KEYS))
  if unknown:
    raise UserError(f"unknown key {unknown[0]!r}; there are {', '.join(KEYS)}")
  clips = values["clips"]
  if clips:  # one size for the whole sentence
    form = form.for_shape(probe(root / clips[0]["path"]).size)
  footage, roles, lengths = [], [], []
  for clip in clips:
    footage.append(open_footage(root / clip["path"], form, start=int(clip.get("start", 0))))
    roles.append(_read_role(clip))
    lengths.append(_read_length(clip, footage[-1], form))
  check_roles(len(footage), tuple(roles))
  prompt = "" if options.prompt == PromptStyle.NULL else str(values.get("prompt", ""))
  return Record(tuple(footage), tuple(roles), prompt, str(values.get("task", "")), tuple(lengths))


def _read_role(clip: Mapping[str, Any]) -> Role:
  role = clip.get("role", "context")
  if role not in ("context", "target"):
    raise UserError(f"{clip['path']}: a role must be context or target, got {role!r}")
  return Role[role.upper()]


def _read_length(clip: Mapping[str, Any], footage: Footage, form: ClipFormat) -> int:
  longest = (min(footage.num_frames, form.num_frames) - 1) // 4 * 4 + 1
  count = int(clip.get("num_frames", longest))
  if count % 4 != 1 or count < 1:
    raise UserError(f"{clip['path']}: a clip must have 1 or 4n + 1 frames, got num_frames {count}")
  if count > footage.num_frames:
    raise UserError(f"{clip['path']} has {footage.num_frames} frames, but num_frames is {count}")
  return count
