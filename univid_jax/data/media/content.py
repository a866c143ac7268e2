"""Identifies a file by its first bytes, for messages about files whose suffix does not match."""

from pathlib import Path

# Offset and bytes, the kind of file that has them there, and its suffixes if it is a clip; messages suggest the first.
_BEGINNINGS = (
  (0, b"\x89PNG\r\n\x1a\n", "a PNG", (".png", ".apng")),
  (0, b"\xff\xd8\xff", "a JPEG", (".jpg", ".jpeg")),
  (0, b"GIF8", "a GIF", (".gif",)),
  (8, b"WEBP", "a WebP", (".webp",)),
  (0, b"BM", "a BMP", (".bmp",)),
  (0, b"II*\x00", "a TIFF", (".tiff", ".tif")),
  (0, b"MM\x00*", "a TIFF", (".tiff", ".tif")),
  (4, b"ftypavi", "an AVIF", (".avif",)),
  (4, b"ftypheic", "a HEIC image", ()),
  (4, b"ftypqt", "a MOV", (".mov", ".mp4", ".m4v")),
  (4, b"ftyp", "an MP4", (".mp4", ".m4v", ".mov")),
  (0, b"\x1aE\xdf\xa3", "an MKV or WebM", (".mkv", ".webm")),
  (8, b"AVI ", "an AVI", (".avi",)),
  (0, b"\x93NUMPY", "a .npy", (".npy",)),
  (0, b"PK\x03\x04", "a ZIP archive", ()),
  (0, b"%PDF", "a PDF", ()),
  (0, b"<!DOCTYPE html", "a web page", ()),
  (0, b"<html", "a web page", ()),
)


def describe_content(path: Path) -> str:
  """Describes the content of a file and how to name it, if its suffix is of another kind; else returns ""."""
  try:
    with path.open("rb") as file:
      beginning = file.read(32)
  except OSError:
    return ""
  for place, expected, name, suffixes in _BEGINNINGS:
    if beginning[place : place + len(expected)].lower() == expected.lower():
      if path.suffix.lower() in suffixes:
        return ""
      advice = f"rename it to {suffixes[0]}" if suffixes else "convert it"
      return f"by its content it is {name}, not {path.suffix.lower()}: {advice}"
  return ""
