"""Images, animations, folders of frames and arrays are read as viewers show them, or rejected by name and reason."""

import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.numbered_videos import encode_video, numbered_frames
from univid_jax.core.errors import UserError
from univid_jax.data.media import color
from univid_jax.data.media.images import EXIF_ORIENTATION, TIFF_COLORS, TIFF_EXTRA_SAMPLES
from univid_jax.data.media.reader import probe, read_clip
from univid_jax.data.media.schedule import Schedule
from univid_jax.data.media.writer import write_clip


def test_images_of_all_modes(tmp_path: Path):
  rgb = numbered_frames(1)[0]
  grey16 = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
  clear = np.dstack([rgb, np.zeros(rgb.shape[:2], np.uint8)])
  palette = Image.fromarray(np.arange(64, dtype=np.uint8)[None].repeat(48, axis=0) // 32)
  palette.putpalette([10, 20, 30, 40, 50, 60])
  palette.info["transparency"] = 0
  images = {
    "rgb.png": Image.fromarray(rgb),
    "rgb.bmp": Image.fromarray(rgb),
    "rgb.avif": Image.fromarray(rgb),
    "grey.png": Image.fromarray(rgb).convert("L"),
    "deep.png": Image.fromarray(grey16),
    "clear.png": Image.fromarray(clear),
    "clear.webp": Image.fromarray(clear),
    "half.png": Image.fromarray(np.dstack([np.zeros_like(rgb), np.full(rgb.shape[:2], 128, np.uint8)])),
    "palette.png": palette,
    "cmyk.jpg": Image.fromarray(rgb).convert("CMYK"),
  }
  for name, image in images.items():
    image.save(tmp_path / name)
    clip, info = read_clip(tmp_path / name), probe(tmp_path / name)
    assert clip.frames.shape == (1, 48, 64, 3) and clip.fps is None
    assert (info.num_frames, info.size, info.fps, info.duration) == (1, (48, 64), None, None)
  for name in ("rgb.png", "rgb.bmp"):
    np.testing.assert_array_equal(read_clip(tmp_path / name).frames[0], rgb)
  np.testing.assert_allclose(read_clip(tmp_path / "deep.png").frames[0, ..., 0], grey16 / 257, atol=0.5)
  assert (read_clip(tmp_path / "clear.png").frames == 255).all() and (
    read_clip(tmp_path / "clear.webp").frames == 255
  ).all()
  np.testing.assert_allclose(read_clip(tmp_path / "half.png").frames, 127, atol=1)
  assert (read_clip(tmp_path / "palette.png").frames[0, 0, ::32] == [[255, 255, 255], [40, 50, 60]]).all()


def write_png(path: Path, samples: np.ndarray, *, bits: int, transparent: bytes | None) -> Path:
  """Writes samples (H, W) or (H, W, 3) with the given number of bits, and with a transparent colour if one is given."""
  height, width = samples.shape[:2]
  shifts = np.arange(bits)[::-1]
  planes = np.packbits((samples.reshape(height, -1, 1) >> shifts & 1).astype(np.uint8).reshape(height, -1), axis=1)
  header = struct.pack(">IIBBBBB", width, height, bits, 2 * (samples.ndim == 3), 0, 0, 0)
  parts = [
    (b"IHDR", header),
    (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in planes))),
    (b"IEND", b""),
  ]
  parts[1:1] = [] if transparent is None else [(b"tRNS", transparent)]
  chunks = [
    struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
  ]
  path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
  return path


@pytest.mark.parametrize("bits, channels", [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 3), (16, 3)])
def test_transparent_colours_of_pngs(tmp_path: Path, bits: int, channels: int):
  """Pixels of a PNG's transparent colour are white, and all others as in the same file without it."""
  levels = 2**bits
  samples = np.linspace(0, levels - 1, 64).round().astype(np.int64).reshape(4, 16)
  samples = samples if channels == 1 else np.stack([samples, samples[::-1], samples[:, ::-1]], axis=-1)
  opaque = read_clip(write_png(tmp_path / "opaque.png", samples, bits=bits, transparent=None)).frames[0]
  for clear in (samples[1, 3], samples[0, 0], samples[3, 15]):
    chunk = struct.pack(f">{channels}H", *np.atleast_1d(clear).tolist())
    frame = read_clip(write_png(tmp_path / "clear.png", samples, bits=bits, transparent=chunk)).frames[0]
    is_clear = (samples == clear).reshape(4, 16, -1).all(-1)
    assert is_clear.any() and not is_clear.all()
    np.testing.assert_array_equal(frame, np.where(is_clear[..., None], 255, opaque))


def test_photos_are_upright(tmp_path: Path):
  image = Image.fromarray(numbered_frames(1)[0])
  exif = image.getexif()
  exif[0x0112] = 6  # turn clockwise
  image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
  frame = read_clip(tmp_path / "turned.jpg").frames[0]
  assert frame.shape == (64, 48, 3) and probe(tmp_path / "turned.jpg").size == (64, 48)
  assert frame[40:, 28:].mean() > 245  # what was above on the right is below on the right


@pytest.mark.parametrize(
  "orientation, turn",
  [
    (1, lambda x: x),
    (2, np.fliplr),
    (3, lambda x: np.rot90(x, 2)),
    (4, np.flipud),
    (5, lambda x: x.swapaxes(0, 1)),
    (6, lambda x: np.rot90(x, -1)),
    (7, lambda x: np.rot90(x, 2).swapaxes(0, 1)),
    (8, np.rot90),
  ],
)
def test_sizes_are_those_of_upright_photos(tmp_path: Path, orientation: int, turn):
  image = Image.fromarray(numbered_frames(1)[0])
  exif = image.getexif()
  exif[EXIF_ORIENTATION] = orientation
  image.save(tmp_path / "photo.png", exif=exif)
  expected = turn(numbered_frames(1)[0])
  np.testing.assert_array_equal(read_clip(tmp_path / "photo.png").frames[0], expected)
  assert probe(tmp_path / "photo.png").size == expected.shape[:2]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "avif"])
def test_animations_keep_their_delays(tmp_path: Path, suffix: str):
  path = tmp_path / f"animation.{suffix}"
  images = [Image.fromarray(frame) for frame in numbered_frames(4)]
  options = {} if suffix == "gif" else {"lossless": True} if suffix == "webp" else {}
  images[0].save(path, save_all=True, append_images=images[1:], duration=[100, 200, 100, 400], loop=0, **options)
  clip, info = read_clip(path), probe(path)
  np.testing.assert_allclose(clip.frames[:, :, :28].mean(axis=(1, 2, 3)), 20 + 4 * np.arange(4), atol=1.5)
  assert clip.fps == info.fps == pytest.approx(5) and info.duration == pytest.approx(0.8)
  # Shown from 0, 100, 300 and 400 ms.
  levels = read_clip(path, fps=10).frames[:, 24, 10, 0].astype(float)
  np.testing.assert_allclose(levels, [20, 24, 24, 28, 32], atol=1.5)
  assert info.count_at(10) == 5
  np.testing.assert_array_equal(read_clip(path, 2, 1).frames, clip.frames[2:3])


def test_short_delays_are_those_of_browsers(tmp_path: Path):
  images = [Image.fromarray(frame) for frame in numbered_frames(3)]
  images[0].save(tmp_path / "fast.gif", save_all=True, append_images=images[1:], duration=10, loop=0)
  assert read_clip(tmp_path / "fast.gif").fps == pytest.approx(10)


def test_folders_are_in_natural_order_without_foreign_files(tmp_path: Path):
  frames = numbered_frames(12)
  for index, frame in enumerate(frames):
    Image.fromarray(frame).save(tmp_path / f"f{index}.png")
  for name in ("._f0.png", "Thumbs.db", ".hidden.png", "notes.txt"):
    (tmp_path / name).write_bytes(b"nothing")
  np.testing.assert_array_equal(read_clip(tmp_path).frames, frames)
  np.testing.assert_array_equal(read_clip(tmp_path, 9, 2, fps=16).frames, frames[9:11])
  assert probe(tmp_path).num_frames == 12
  Image.fromarray(frames[0, :20]).save(tmp_path / "f99.png")
  with pytest.raises(UserError, match="different sizes"):
    read_clip(tmp_path)


def test_arrays(tmp_path: Path):
  frames = numbered_frames(12)
  np.save(tmp_path / "clip.npy", frames)
  np.testing.assert_array_equal(read_clip(tmp_path / "clip.npy").frames, frames)
  part = read_clip(tmp_path / "clip.npy", 3, 4).frames
  np.testing.assert_array_equal(part, frames[3:7])
  assert part.flags.writeable and type(part) is np.ndarray
  assert probe(tmp_path / "clip.npy").size == (48, 64)


def bad_files(folder: Path) -> None:
  encode_video(folder / "whole.mp4", numbered_frames(9))
  data = (folder / "whole.mp4").read_bytes()
  (folder / "cut.mp4").write_bytes(data[:300])
  for name in ("empty.mp4", "empty.png", "empty.npy"):
    (folder / name).write_bytes(b"")
  (folder / "text.png").write_text("not an image")
  (folder / "text.mp4").write_text("not a video")
  (folder / "notes.txt").write_text("neither")
  (folder / "folder").mkdir()
  np.save(folder / "float.npy", np.zeros((2, 4, 4, 3)))
  np.save(folder / "no_frames.npy", np.zeros((0, 4, 4, 3), np.uint8))
  np.save(folder / "objects.npy", np.array([{}]), allow_pickle=True)
  (folder / "bad.npy").write_bytes(b"nonsense")
  with (folder / "huge.npy").open("wb") as file:
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**4, 10**4, 3)}
    np.lib.format.write_array_header_1_0(file, header)
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(folder / "cut.jpg")
  (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])
  Image.new("L", (8, 8)).save(folder / "bomb.png")
  data = bytearray((folder / "bomb.png").read_bytes())
  data[16:24] = struct.pack(">II", 20_000, 20_000)
  data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
  (folder / "bomb.png").write_bytes(data)


BAD_FILES = (
  "cut.mp4 empty.mp4 empty.png empty.npy text.png text.mp4 notes.txt folder float.npy no_frames.npy objects.npy "
  "bad.npy huge.npy cut.jpg bomb.png"
)


@pytest.mark.parametrize("name", BAD_FILES.split())
def test_what_is_not_a_clip_is_named(tmp_path: Path, name: str):
  bad_files(tmp_path)
  with pytest.raises(UserError, match=f"cannot read .*{name}: "):
    read_clip(tmp_path / name)


def test_missing_files_and_wrong_arguments(tmp_path: Path):
  for read in (read_clip, probe):
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4"):
      read(tmp_path / "missing.mp4")
  np.save(tmp_path / "clip.npy", numbered_frames(3))
  for arguments in ({"start": -1}, {"num_frames": 0}, {"fps": 0.0}, {"fps": float("nan")}):
    with pytest.raises(UserError, match="positive"):
      read_clip(tmp_path / "clip.npy", **arguments)


def test_schedules():
  """Times rounded to milliseconds do not repeat or skip frames at the clip's own rate."""
  for fps in (24.0, 30000 / 1001, 29.97, 60.0):
    rounded = Schedule(np.round(np.arange(1000) * 1000 / fps).astype(int), 33, Fraction(1, 1000), fps)
    np.testing.assert_array_equal(rounded.select(0, None, fps), np.arange(1000))
    assert rounded.count_at(fps) == 1000
  held = Schedule(np.array([0, 1, 2]), 1, Fraction(1, 16), 16.0)
  assert held.select(0, None, 10.0).tolist() == [0, 1]
  assert held.select(0, None, 32.0).tolist() == [0, 0, 1, 1, 2]
  # Asked for, the last frame is shown as long as it lasts.
  assert held.select(3, 3, 32.0).tolist() == [1, 2, 2]
  with pytest.raises(UserError, match="it has 5 frames at 32 frames per second, and frame 6 is needed"):
    held.select(3, 4, 32.0)


def test_frames_are_not_shown_before_their_time():
  """Only rounding to ticks is allowed for: a frame at 3,050 of 90,000 ticks is not shown yet at 1/30.2 s, or 2,980."""
  varying = Schedule(np.array([0, 3050, 7000]), 3000, Fraction(1, 90_000), 30.0)
  assert varying.select(0, 4, 30.2).tolist() == [0, 0, 1, 2]


def test_times_at_a_rate_that_is_no_whole_number():
  """A frame takes 1,001 of 30,000 ticks, so that a million take 1,001 s longer than at 30 frames per second."""
  times = Schedule.regular(1001, fps=30_000 / 1001, tick=Fraction(1, 30_000)).times
  np.testing.assert_array_equal(times, 1001 * np.arange(1001))


def test_blending_over_white_rounds():
  levels, alphas = np.meshgrid(np.arange(256), np.arange(256))
  pixels = np.stack([levels, levels, levels, alphas], axis=-1).astype(np.uint8)
  share = alphas / 255
  expected = np.rint(levels * share + 255 * (1 - share))
  np.testing.assert_array_equal(color.blend_over_white(pixels), expected[..., None].repeat(3, axis=-1))


@pytest.mark.parametrize("is_hlg", [False, True])
def test_tone_mapping(is_hlg: bool):
  """Grey stays grey, brighter is not darker, and diffuse white is bright but leaves room for highlights."""
  codes = np.linspace(0, 65535, 256).astype(np.uint16)
  grey = color.tone_map(np.repeat(codes[None, :, None], 3, axis=2), is_hlg=is_hlg, primaries=9)[0].astype(int)
  assert np.ptp(grey, axis=1).max() <= 1 and (np.diff(grey[:, 0]) >= 0).all()
  assert grey[0, 0] == 0 and grey[-1, 0] == 255
  white = round(255 * (0.75 if is_hlg else 0.58))  # 203 cd/m2, by BT.2408
  assert 190 < grey[white, 0] < 245
  with pytest.raises(UserError, match="primaries"):
    color.tone_map(np.zeros((1, 1, 3), np.uint16), is_hlg=is_hlg, primaries=5)


TIFF = "of TIFFs only those with one page of 8-bit RGB, RGBA or grey are read, and this one has "


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_tiffs_are_read_exactly(tmp_path: Path, compression: str | None):
  rgb = numbered_frames(1)[0]
  clear = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
  clear[:9, :, 3] = 0
  images = {"rgb.tif": rgb, "clear.tiff": clear, "grey.TIF": rgb[..., 0]}
  for name, pixels in images.items():
    info = {TIFF_COLORS: 0} if name == "grey.TIF" else {}  # white is 0
    Image.fromarray(pixels).save(tmp_path / name, "TIFF", compression=compression, tiffinfo=info)
  expected = {
    "rgb.tif": rgb,
    "clear.tiff": np.where(clear[..., 3:] > 0, rgb, 255),
    "grey.TIF": rgb[..., :1].repeat(3, axis=-1),
  }
  for name, pixels in expected.items():
    np.testing.assert_array_equal(read_clip(tmp_path / name).frames, pixels[None])
    assert probe(tmp_path / name).size == (48, 64)


@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_tiffs_are_upright(tmp_path: Path, orientation: int, turns: int):
  rgb = numbered_frames(1)[0]
  Image.fromarray(rgb).save(tmp_path / "turned.tiff", tiffinfo={EXIF_ORIENTATION: orientation})
  expected = np.rot90(rgb, turns)
  np.testing.assert_array_equal(read_clip(tmp_path / "turned.tiff").frames[0], expected)
  assert probe(tmp_path / "turned.tiff").size == expected.shape[:2]


def test_other_tiffs_are_refused_with_the_reason(tmp_path: Path):
  rgb = Image.fromarray(numbered_frames(1)[0])
  grey = np.asarray(rgb.convert("L"))
  pages = {"save_all": True, "append_images": [rgb, rgb]}
  for image, options, reason in (
    (rgb, pages, "3 pages"),
    (Image.fromarray(grey.astype(np.float32)), {}, "32-bit samples that are signed or floating-point"),
    (Image.fromarray(grey.astype(np.uint16)), {}, "16-bit samples"),
    (rgb.convert("1"), {}, "1-bit samples"),
    (rgb.convert("CMYK"), {}, "other colours, such as CMYK, YCbCr or a palette"),
    (rgb.quantize(8), {}, "other colours, such as CMYK, YCbCr or a palette"),
    (rgb.convert("RGBA"), {}, "premultiplied transparency"),
  ):
    image.save(tmp_path / "x.tiff", **options)
    if image.mode == "RGBA":
      plain, premultiplied = (struct.pack("<HHIHH", TIFF_EXTRA_SAMPLES, 3, 1, value, 0) for value in (2, 1))
      (tmp_path / "x.tiff").write_bytes((tmp_path / "x.tiff").read_bytes().replace(plain, premultiplied))
    for read in (read_clip, probe):
      with pytest.raises(UserError, match=rf"cannot read .*x\.tiff: {TIFF}{reason}: convert it to PNG"):
        read(tmp_path / "x.tiff")
  rgb.save(tmp_path / "x.tiff")
  content = (tmp_path / "x.tiff").read_bytes()
  (tmp_path / "x.tiff").write_bytes(content[: len(content) // 2])
  with pytest.raises(UserError, match=r"cannot read .*x\.tiff"):
    read_clip(tmp_path / "x.tiff")


def test_broken_links_in_a_folder_of_frames_are_named(tmp_path):
  folder = tmp_path / "clip"
  write_clip(folder, np.zeros((2, 8, 8, 3), np.uint8))
  (folder / "9.png").symlink_to("nowhere.png")
  with pytest.raises(UserError, match=r"cannot read .*clip: 9\.png is a link to a file that does not exist"):
    read_clip(folder)
