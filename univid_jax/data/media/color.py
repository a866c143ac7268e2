"""Converts decoded video frames to RGB as a player shows them: colours, transparency, pixel shape and orientation.

Frames are converted by the matrix and range that the stream is tagged with; as in players, an untagged stream is BT.709
if it is HD and BT.601 otherwise, and its range is limited. Grey video without a tag is full-range unless its codec has
another default: H.264, HEVC and AV1 have one, which their decoders apply; FFV1, JPEG 2000 and raw video have none.
Primaries of SDR video are not converted.
"""

import functools
import math
from fractions import Fraction
from typing import Literal

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from jaxtyping import Float, UInt8, UInt16

from univid_jax.core.errors import UserError

# ITU-T H.273 codes.
UNSPECIFIED = 2
MATRIX_BT709, MATRIX_BT601 = 1, 6
CONVERTIBLE_MATRICES = {0: "RGB", 1: "BT.709", 4: "FCC", 5: "BT.601", 6: "BT.601", 7: "SMPTE 240M", 9: "BT.2020"}
TRANSFER_PQ, TRANSFER_HLG = 16, 18

# Grey formats, with and without alpha, and formats with neutral chroma that hold the same luma. swscale treats the
# former as full-range, whatever their tag says.
FORMATS_WITH_CHROMA = {
  "gray": "yuv444p",
  "ya8": "yuva444p",
  **{f"gray{bits}{order}": f"yuv444p{bits}le" for bits in (9, 10, 12, 14, 16) for order in ("le", "be")},
  **{f"ya16{order}": "yuva444p16le" for order in ("le", "be")},
}

# Interpolates chroma at full width: where it is halved, swscale's fast path turns white of more than 8 bits into 253.
INTERPOLATION = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT

# In cd/m2: diffuse white in HDR (BT.2408), and the peak of a reference HLG display (BT.2100). PQ is mostly graded for
# the same peak; brighter highlights are clipped.
HDR_WHITE = 203.0
HDR_PEAK = 1000.0

# Linear RGB to linear BT.709 RGB, by H.273 code of the primaries (BT.2087; display P3 by the same derivation).
TO_BT709 = {
  1: np.eye(3, dtype=np.float32),
  9: np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32),
  12: np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]], np.float32),
}
LUMA_BT2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)

# Upper left of display matrices that rotate anticlockwise by multiples of 90 degrees.
RIGHT_ANGLES = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))

# Larger frames than 16,384 x 8,192 are rejected before memory is allocated for them.
MAX_PIXELS = 2**27
MAX_PIXEL_ASPECT = 8

# Sizes are not checked against each other: frames of a file may differ, and some are rotated.
Frame = UInt8[np.ndarray, "_H _W 3"]


class FrameConverter:
  """Converts the frames of one video; reused, since setting up a conversion costs more than converting a frame.

  Attributes:
    pixel_aspect: width of a pixel over its height; frames are resized horizontally to square pixels.
  """

  def __init__(self, pixel_aspect: Fraction | None = None):
    self.pixel_aspect = pixel_aspect or Fraction(1)
    # One per kind of conversion, since each keeps the setup of its latest one.
    self._reformatter, self._chroma_adder = VideoReformatter(), VideoReformatter()

  def convert(self, frame: av.VideoFrame) -> Frame:
    """Converts a frame.

    Raises:
      UserError: the colours or the orientation cannot be converted.
    """
    _check_colors(frame)
    if frame.colorspace == UNSPECIFIED and not frame.format.is_rgb:
      frame.colorspace = MATRIX_BT709 if frame.width >= 1280 or frame.height > 576 else MATRIX_BT601
    if frame.color_trc in (TRANSFER_PQ, TRANSFER_HLG):
      pixels = tone_map(
        self._reformat(frame, "rgb48le"), is_hlg=frame.color_trc == TRANSFER_HLG, primaries=frame.color_primaries
      )
    elif frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
      pixels = blend_over_white(self._reformat(frame, "rgba"))
    else:
      pixels = self._reformat(frame, "rgb24")
    return orient(pixels, _display_matrix(frame))

  def _reformat(self, frame: av.VideoFrame, pixel_format: str) -> np.ndarray:
    if frame.color_range == ColorRange.MPEG and frame.format.name in FORMATS_WITH_CHROMA:
      frame = self._add_chroma(frame)
    if not 1 / MAX_PIXEL_ASPECT <= self.pixel_aspect <= MAX_PIXEL_ASPECT:
      raise UserError(f"pixels of width {float(self.pixel_aspect):g} and height 1 are not plausible")
    width = max(round(frame.width * self.pixel_aspect), 1)
    if width * frame.height > MAX_PIXELS:
      raise UserError(f"frames of {width} x {frame.height} pixels (width x height) are too large")
    converted = self._reformatter.reformat(
      frame, format=pixel_format, width=width, interpolation=INTERPOLATION, threads=1
    )
    return converted.to_ndarray()

  def _add_chroma(self, frame: av.VideoFrame) -> av.VideoFrame:
    """Returns a grey frame of limited range in a format whose range is respected, with the same luma."""
    colored = self._chroma_adder.reformat(
      frame, format=FORMATS_WITH_CHROMA[frame.format.name], dst_color_range=ColorRange.JPEG, threads=1
    )
    colored.color_range = ColorRange.MPEG
    return colored


def _check_colors(frame: av.VideoFrame) -> None:
  if frame.colorspace not in CONVERTIBLE_MATRICES and frame.colorspace != UNSPECIFIED:
    raise UserError(
      f"the colour matrix with H.273 code {frame.colorspace} is not supported; convert the file to BT.709, "
      "for instance with ffmpeg"
    )
  if frame.color_trc == UNSPECIFIED and _side_data(frame, "DOVI_METADATA") is not None:
    raise UserError("Dolby Vision without an HDR10 or HLG base is not supported; convert the file to BT.709")


def blend_over_white(pixels: UInt8[np.ndarray, "H W 4"]) -> Frame:
  """Composites RGB with straight alpha over white, rounding."""
  alpha = pixels[..., 3:].astype(np.uint16)
  total = pixels[..., :3] * alpha + 255 * (255 - alpha)
  return ((total + 127) // 255).astype(np.uint8)


def orient(pixels: Frame, matrix: tuple[int, int, int, int]) -> Frame:
  """Flips and transposes a frame by the upper left (a, b, c, d) of its display matrix: x' = ax + cy, y' = bx + dy.

  Raises:
    UserError: the angle is not a multiple of 90 degrees.
  """
  a, b, c, d = matrix
  if max(abs(a), abs(d)) * math.tan(math.radians(1)) >= max(abs(b), abs(c)):
    flip_x, flip_y = a < 0, d < 0
  elif max(abs(b), abs(c)) * math.tan(math.radians(1)) >= max(abs(a), abs(d)):
    pixels = pixels.swapaxes(0, 1)
    flip_x, flip_y = c < 0, b < 0
  else:
    raise UserError(f"the display matrix rotates by {math.degrees(math.atan2(b, a)):.0f} degrees, not a multiple of 90")
  return np.ascontiguousarray(pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
  data = _side_data(frame, "DISPLAYMATRIX")
  if data is None:
    return RIGHT_ANGLES[round(frame.rotation / 90) % 4]
  a, b, _, c, d = (int(value) for value in np.frombuffer(data, np.int32)[:5])
  return (a, b, c, d) if (a or b) and (c or d) else RIGHT_ANGLES[0]


def _side_data(frame: av.VideoFrame, kind: Literal["DISPLAYMATRIX", "DOVI_METADATA"]) -> bytes | None:
  try:
    data = frame.side_data.get(kind)
    return None if data is None else bytes(data)
  except ValueError:  # up to version 18 PyAV does not know all kinds, and then returns none
    return None


def tone_map(pixels: UInt16[np.ndarray, "H W 3"], *, is_hlg: bool, primaries: int) -> Frame:
  """Converts full-range HDR to SDR: BT.2100 to linear light, BT.2390's curve, BT.709 primaries, BT.1886 gamma.

  Raises:
    UserError: the primaries are not supported.
  """
  matrix = TO_BT709.get(9 if primaries == UNSPECIFIED else primaries)
  if matrix is None:
    raise UserError(f"HDR with the primaries of H.273 code {primaries} is not supported; convert the file to BT.709")
  if is_hlg:
    linear = _hlg_table()[pixels]
    luma = linear @ LUMA_BT2020
    linear *= (HDR_PEAK / HDR_WHITE * luma**0.2)[..., None]
  else:
    linear = _pq_table()[pixels]
  brightness, gain = _tone_curve()
  linear *= np.interp(linear.max(axis=-1), brightness, gain).astype(np.float32)[..., None]
  linear = np.clip(linear @ matrix.T, 0, 1)
  return _gamma_table()[(linear * 65535 + 0.5).astype(np.uint16)]


@functools.cache
def _hlg_table() -> Float[np.ndarray, "65536"]:
  """Maps 16-bit HLG code values to scene light in [0, 1]."""
  code = np.linspace(0, 1, 65536)
  a, b, c = 0.17883277, 0.28466892, 0.55991073
  return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)


@functools.cache
def _pq_table() -> Float[np.ndarray, "65536"]:
  """Maps 16-bit PQ code values to display light in units of diffuse white."""
  return (_pq_to_light(np.linspace(0, 1, 65536)) / HDR_WHITE).astype(np.float32)


@functools.cache
def _gamma_table() -> UInt8[np.ndarray, "65536"]:
  """Maps 16-bit linear light to 8-bit code values of an SDR display."""
  return (np.linspace(0, 1, 65536) ** (1 / 2.4) * 255 + 0.5).astype(np.uint8)


@functools.cache
def _tone_curve() -> tuple[np.ndarray, np.ndarray]:
  """Tabulates BT.2390's curve from HDR_PEAK down to HDR_WHITE: brightness in units of diffuse white, and gain."""
  peak = _light_to_pq(HDR_PEAK)
  target = _light_to_pq(HDR_WHITE) / peak
  code = np.linspace(0, 1, 1025)[1:]
  knee = 1.5 * target - 0.5
  t = (code - knee) / (1 - knee)
  spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * target
  brightness = _pq_to_light(code * peak) / HDR_WHITE
  mapped = _pq_to_light(np.where(code < knee, code, spline) * peak) / HDR_WHITE
  # Beyond the peak, everything is white.
  beyond = np.geomspace(HDR_PEAK, 10_000, 65)[1:] / HDR_WHITE
  return np.append(brightness, beyond), np.append(mapped / brightness, 1 / beyond)


def _pq_to_light(code: np.ndarray) -> np.ndarray:
  """Converts PQ code values in [0, 1] to cd/m2 (SMPTE ST 2084)."""
  power = code ** (1 / 78.84375)
  return 10_000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)


def _light_to_pq(light: float) -> float:
  """Converts cd/m2 to PQ code values in [0, 1]."""
  power = (light / 10_000) ** 0.1593017578125
  return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
