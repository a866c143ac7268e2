"""Detects files that are shorter than their own headers say: interrupted copies and downloads."""

import struct
from pathlib import Path
from typing import BinaryIO


def missing_bytes(path: Path) -> int:
  """Returns how many bytes an MP4, MOV, AVI, WEBP, MKV or WebM file lacks by its own headers; 0 for other formats."""
  size = path.stat().st_size
  with path.open("rb") as file:
    start = file.read(12)
    if start[:4] == b"RIFF":
      return max(8 + int.from_bytes(start[4:8], "little") - size, 0)
    if start[:4] == b"\x1a\x45\xdf\xa3":
      return max(_matroska_end(file) - size, 0)
    if start[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
      return max(_last_box_end(file, size) - size, 0)
  return 0


def _last_box_end(file: BinaryIO, size: int) -> int:
  """Returns where the last top-level box of an MP4 or MOV file ends."""
  position = 0
  while position + 8 <= size:
    file.seek(position)
    header = file.read(16)
    length, kind = struct.unpack(">I4s", header[:8])
    if length == 1 and len(header) == 16:
      length = int.from_bytes(header[8:], "big")
    # A length of 0 means "to the end of the file"; anything after the last box is padding.
    if length < 8 or not kind.isascii():
      return size
    position += length
  return position


def _matroska_end(file: BinaryIO) -> int:
  """Returns where the segment of a Matroska file ends; 0 if its length is unknown, as in live recordings."""
  file.seek(4)
  header = _read_length(file)
  if header is None:
    return 0
  file.seek(header, 1)
  if file.read(4) != b"\x18\x53\x80\x67":
    return 0
  length = _read_length(file)
  return 0 if length is None else file.tell() + length


def _read_length(file: BinaryIO) -> int | None:
  """Reads an EBML length: the leading zeros of its first byte say how many bytes follow; all ones is "unknown"."""
  first = file.read(1)
  if not first or not first[0]:
    return None
  following = 8 - first[0].bit_length()
  data = bytes([first[0] & ((1 << (7 - following)) - 1)]) + file.read(following)
  length = int.from_bytes(data, "big")
  return None if length == (1 << (7 * (following + 1))) - 1 else length
