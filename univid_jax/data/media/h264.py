"""Parses as much of H.264 (ITU-T H.264, 7.3) as reveals lost reference frames, which FFmpeg's decoder conceals."""

import dataclasses
from collections.abc import Iterator

SLICE, IDR_SLICE, SEQUENCE_PARAMETERS = 1, 5, 7
# Profiles whose sequence parameters have a chroma format.
HIGH_PROFILES = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)
# Maximum bits of a frame's number.
MAX_NUMBER_BITS = 16
# More than the fields that are read from a slice.
HEADER_BYTES = 40


@dataclasses.dataclass(frozen=True)
class Picture:
  """What the packet of a picture says about it.

  Attributes:
    is_idr: no later picture refers to one before it.
    lacks_reference: a reference picture before it is missing, in whose place the decoder would repeat another.
  """

  is_idr: bool
  lacks_reference: bool


class PictureReader:
  """Reads the pictures of a stream in the order of decoding."""

  def __init__(self, extradata: bytes | None):
    """Parses the parameters outside packets: an avcC box, or units with start codes."""
    extradata = extradata or b""
    self._length_size = (extradata[4] & 3) + 1 if extradata[:1] == b"\x01" and len(extradata) > 6 else 0
    self._number_bits, self._has_planes, self._may_skip = 0, False, False
    self._last_number: int | None = None
    units = _split_parameters(extradata) if self._length_size else self._split(extradata)
    for unit in units:
      self._read_unit(unit)

  def read(self, data: bytes) -> Picture:
    """Reads the packet that follows the last one read."""
    picture = Picture(is_idr=False, lacks_reference=False)
    for unit in self._split(data):
      if unit[0] & 0x1F in (SLICE, IDR_SLICE):
        return self._read_slice(unit)
      self._read_unit(unit)
    return picture

  def _split(self, data: bytes) -> Iterator[bytes]:
    """Yields the beginnings of units that are not empty."""
    if not self._length_size:
      yield from (unit for unit in data.split(b"\0\0\1")[1:] if unit)
      return
    position = 0
    while position + self._length_size < len(data):
      start = position + self._length_size
      length = int.from_bytes(data[position:start], "big")
      if length:
        yield data[start : start + length]
      position = start + length

  def _read_unit(self, unit: bytes) -> None:
    if unit[0] & 0x1F != SEQUENCE_PARAMETERS:
      return
    bits = _Bits(unit[1:])
    profile = bits.take(8)
    bits.take(16)
    bits.take_golomb()
    self._has_planes = False
    if profile in HIGH_PROFILES:
      chroma_format = bits.take_golomb()
      self._has_planes = chroma_format == 3 and bool(bits.take(1))
      bits.take_golomb(2)
      bits.take(1)
      if bits.take(1):
        _skip_scaling_lists(bits, 12 if chroma_format == 3 else 8)
    number_bits = bits.take_golomb() + 4
    self._number_bits = number_bits if number_bits <= MAX_NUMBER_BITS else 0  # damaged
    order_type = bits.take_golomb()
    if order_type == 0:
      bits.take_golomb()
    elif order_type == 1:
      bits.take(1)
      bits.take_golomb(2)
      bits.take_golomb(min(bits.take_golomb(), 255))
    bits.take_golomb()
    self._may_skip = bool(bits.take(1))

  def _read_slice(self, unit: bytes) -> Picture:
    is_idr = unit[0] & 0x1F == IDR_SLICE
    if not self._number_bits:
      return Picture(is_idr, lacks_reference=False)
    bits = _Bits(unit[1:HEADER_BYTES])
    bits.take_golomb(3)
    bits.take(2 if self._has_planes else 0)
    number = bits.take(self._number_bits)
    following = (number - 1) % (1 << self._number_bits)
    is_known = is_idr or self._last_number is None or self._last_number in (number, following)
    if unit[0] & 0x60:  # others may refer to it
      self._last_number = number
    return Picture(is_idr, lacks_reference=not is_known and not self._may_skip)


def _split_parameters(avcc: bytes) -> Iterator[bytes]:
  """Yields the sequence parameters in an avcC box."""
  position = 6
  for _ in range(avcc[5] & 0x1F):
    length = int.from_bytes(avcc[position : position + 2], "big")
    if length:
      yield avcc[position + 2 : position + 2 + length]
    position += 2 + length


def _skip_scaling_lists(bits: "_Bits", count: int) -> None:
  for index in range(count):
    if bits.take(1):
      last = following = 8
      for _ in range(16 if index < 6 else 64):
        if following:
          code = bits.take_golomb()
          following = (last + ((code + 1) // 2 if code % 2 else -code // 2)) % 256
          last = following or last


class _Bits:
  """Takes bits from the front of a unit; zeros follow its end, so that damaged units cost no memory or time."""

  def __init__(self, data: bytes):
    self._data = data.replace(b"\0\0\3", b"\0\0")
    self._value, self._left = int.from_bytes(self._data, "big"), 8 * len(self._data)

  def take(self, count: int) -> int:
    if count > self._left:
      self._left = 0
      return 0
    self._left -= count
    return (self._value >> self._left) & ((1 << count) - 1)

  def take_golomb(self, count: int = 1) -> int:
    """Takes Exp-Golomb codes, and returns the last."""
    code = 0
    for _ in range(count):
      zeros = 0
      while zeros < 32 and self._left and not self.take(1):
        zeros += 1
      code = (1 << zeros) - 1 + self.take(zeros)
    return code
