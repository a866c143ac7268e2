"""Images and animations, read by Pillow: upright, 8-bit RGB, over white where they are transparent."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from univid_jax.core.errors import UserError
from univid_jax.core.paths import file_state
from univid_jax.data.media.color import MAX_PIXELS, TRANSFER_HLG, TRANSFER_PQ, Frame
from univid_jax.data.media.content import describe_content
from univid_jax.data.media.schedule import Schedule

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "AVIF", "TIFF")
# MPO holds several views of one photograph.
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF")

# Browsers and FFmpeg show frames with a shorter delay for 100 ms.
SHORTEST_DELAY_MS = 11
DEFAULT_DELAY_MS = 100

MILLISECOND = Fraction(1, 1000)
EXIF_ORIENTATION = 0x0112
TIFF_BITS, TIFF_COLORS, TIFF_EXTRA_SAMPLES, TIFF_SAMPLE_FORMAT = 258, 262, 338, 339
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TIFF_SIGNATURES = (b"II*\0", b"MM\0*")
TIFF_COLOR_KINDS = (0, 1, 2)  # grey with white as 0, grey, RGB
READ_TIFFS = "of TIFFs only those with one page of 8-bit RGB, RGBA or grey are read"


@dataclasses.dataclass(frozen=True)
class Animation:
  """The frames of an animation; an image is an animation of one frame.

  Attributes:
    schedule: when frames are shown.
    first: position of the first frame in the file: some PNGs have a still image before it.
    size: height and width as shown.
  """

  schedule: Schedule
  first: int
  size: tuple[int, int]


def read_animation(path: Path) -> Animation:
  """Reads sizes and delays.

  Raises:
    UserError: the file is not an image, or is damaged.
  """
  return _read_animation(path, file_state(path))


def read_image_frames(path: Path, indices: Sequence[int]) -> list[Frame]:
  """Reads certain frames of an image or animation; `indices` are sorted.

  Raises:
    UserError: the file is not an image, or is damaged.
  """
  first, bits = read_animation(path).first, _bits_per_sample(path)
  frames: dict[int, Frame] = {}
  with _open_image(path) as image:
    for index in indices:
      if index not in frames:
        if index + first:
          image.seek(index + first)
        frames[index] = _to_rgb(image, bits)
  return [frames[index] for index in indices]


def is_transparent(path: Path) -> bool:
  """Returns whether pixels of an image, or of an animation's first frame, are transparent, and thus become white."""
  with _open_image(path) as image:
    if not image.has_transparency_data or image.mode.startswith("I"):
      return False
    return bool((np.asarray(image.convert("RGBA").getchannel("A")) < 255).any())


@functools.lru_cache(maxsize=65536)
def _read_animation(path: Path, state: tuple[int, ...]) -> Animation:
  """Reads sizes and delays; the argument `state` ensures that a changed file is read again."""
  del state
  with _open_image(path) as image:
    is_turned = image.format != "TIFF" and image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    size = (image.width, image.height) if is_turned else (image.height, image.width)
    count = getattr(image, "n_frames", 1) if image.format in ANIMATED_FORMATS else 1
    first = int(count > 1 and bool(image.info.get("default_image")))
    if count == first + 1:
      return Animation(Schedule.untimed(1), first, size)
    delays = []
    for index in range(first, count):
      image.seek(index)
      if image.format in ("WEBP", "AVIF"):
        image.load()  # delays are stored with the frames
      delay = round(float(image.info.get("duration") or 0))
      delays.append(delay if delay >= SHORTEST_DELAY_MS else DEFAULT_DELAY_MS)
    times = np.cumsum([0, *delays[:-1]])
    fps = 1000 * len(delays) / sum(delays)
    return Animation(Schedule(times, delays[-1], MILLISECOND, fps), first, size)


@contextlib.contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
  """Opens an image and turns the errors of decoders, whose types vary, into user errors."""
  Image.init()
  try:
    with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
      if image.width * image.height > MAX_PIXELS:
        raise UserError(f"images of {image.width} x {image.height} pixels (width x height) are too large")
      if image.format == "AVIF":
        _reject_hdr(path)
      if isinstance(image, TiffImageFile):
        _reject_inexact(image)
      yield image
  except (FileNotFoundError, PermissionError, UserError):
    raise
  except Image.UnidentifiedImageError as error:
    if not path.stat().st_size:
      raise UserError("the file is empty") from error
    if _is_tiff(path):
      raise UserError(f"{READ_TIFFS}, and this one has unknown pixels, or is damaged") from error
    if found := describe_content(path):
      raise UserError(found) from error
    raise UserError(f"not an image in one of the formats {', '.join(FORMATS)}") from error
  except Exception as error:  # plugins raise all kinds of errors for damaged data
    raise UserError(str(error) or "damaged image") from error


def _reject_hdr(path: Path) -> None:
  """Rejects AVIF images in HDR, whose transfer function Pillow ignores."""
  with path.open("rb") as file:
    _, found, color = file.read(2**16).partition(b"colrnclx")
  if found and int.from_bytes(color[2:4], "big") in (TRANSFER_PQ, TRANSFER_HLG):
    raise UserError("HDR images are not supported; convert it to sRGB")


def _reject_inexact(image: TiffImageFile) -> None:
  """Rejects TIFFs of several pages, and those whose pixels Pillow does not read exactly."""
  tags = image.tag_v2
  bits, colors = max(tags.get(TIFF_BITS, (1,))), tags.get(TIFF_COLORS)
  found = ""
  if image.n_frames > 1:
    found = f"{image.n_frames} pages"
  elif set(tags.get(TIFF_SAMPLE_FORMAT, (1,))) != {1}:
    found = f"{bits}-bit samples that are signed or floating-point"
  elif bits != 8:
    found = f"{bits}-bit samples"
  elif colors not in TIFF_COLOR_KINDS:
    found = "other colours, such as CMYK, YCbCr or a palette"
  elif 1 in tags.get(TIFF_EXTRA_SAMPLES, ()):
    found = "premultiplied transparency"
  if found:
    raise UserError(f"{READ_TIFFS}, and this one has {found}: convert it to PNG")


def _to_rgb(image: Image.Image, bits: int) -> Frame:
  """Converts an image, given its bits per sample; Pillow compares a PNG's transparent colour as if it had 8 bits."""
  image = ImageOps.exif_transpose(image)
  transparent = image.info.get("transparency")
  if image.mode.startswith("I"):
    # 16-bit grey, which Pillow would clip at 255.
    values = np.asarray(image)
    grey = (values.astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8)
    if isinstance(transparent, int):
      grey[values == transparent] = 255
    return np.asarray(Image.fromarray(grey).convert("RGB"))
  if image.mode == "L" and isinstance(transparent, int):
    image.info["transparency"] = transparent * 255 // (2**bits - 1)
  if image.mode == "RGB" and bits == 16 and isinstance(transparent, tuple):
    image.info["transparency"] = tuple(value >> 8 for value in transparent)  # pixels keep no more bits, either
  if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or transparent is not None:
    rgba = image.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
  return np.asarray(image.convert("RGB"))


def _is_tiff(path: Path) -> bool:
  with path.open("rb") as file:
    return file.read(4) in TIFF_SIGNATURES


def _bits_per_sample(path: Path) -> int:
  """Returns the bits per sample in the header of a PNG; 8 for other files."""
  with path.open("rb") as file:
    header = file.read(25)
  return header[24] if header.startswith(PNG_SIGNATURE) and len(header) == 25 else 8
