"""Natural clips of a folder of images and videos."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from univid_jax.core.errors import UserError
from univid_jax.core.text import count_noun, is_or_are
from univid_jax.data.identities import WatchedFile
from univid_jax.data.media.reader import CLIP_KINDS, CLIP_SUFFIXES, Frames, is_foreign, probe, read_clip
from univid_jax.data.sources.base import Dropped, drop, is_text, report_texts
from univid_jax.data.sources.photos import crop_box, moving_window

log = logging.getLogger(__name__)

# Bytes of decoded frames that stay in memory, and those of the largest file whose frames stay there.
KEPT_BYTES = 2**31
LARGEST_KEPT_FILE = 2**28

# Frames that are read at once when a whole file is checked.
CHECKED_FRAMES = 32


@dataclasses.dataclass(frozen=True)
class FolderClip:
  """An image or a video of a folder.

  Attributes:
    file: which must not change while it is used.
    num_frames: at the source's frame rate.
    size: height and width in pixels.
    is_kept: whether its decoded frames stay in memory.
  """

  file: WatchedFile
  num_frames: int
  size: tuple[int, int]
  is_kept: bool

  @property
  def path(self) -> Path:
    return self.file.path


@dataclasses.dataclass(frozen=True)
class FolderSource:
  """Windows on the images and videos of a folder.

  Attributes:
    clips: the files.
    fps: frame rate that videos are resampled to; 0 keeps theirs.
    side: the most pixels of a frame's short side; larger frames are reduced before windows are cut out of them.
    dropped: files that cannot be read.
  """

  clips: Sequence[FolderClip]
  fps: float
  side: int
  dropped: Sequence[Dropped]
  _kept: dict[Path, Frames] = dataclasses.field(default_factory=dict, repr=False, compare=False)

  @classmethod
  def open(cls, folder: str, *, side: int, fps: float = 0.0) -> "FolderSource":
    """Opens a folder, without its subfolders, which it reports; files that are not clips are ignored.

    Raises:
      FileNotFoundError: there is no such folder.
      UserError: it contains no clip that can be read.
    """
    root = Path(folder)
    if not root.is_dir():
      raise FileNotFoundError(f"no such folder: {folder}")
    paths = sorted(path for path in root.iterdir() if not is_foreign(path))
    folders = {path for path in paths if path.is_dir()}
    texts = [path for path in paths if is_text(path)]
    paths = [path for path in paths if path.suffix.lower() in CLIP_SUFFIXES and path not in folders]
    clips: list[FolderClip] = []
    dropped: list[Dropped] = []
    kept = total = 0
    for path in paths:
      try:
        found = probe(path)
      except (OSError, UserError) as error:
        dropped.append(drop(path.name, error))
        continue
      count = found.count_at(fps)
      num_bytes = 3 * count * int(np.prod(_reduced_size(found.size, side)))
      is_kept = 3 * count * int(np.prod(found.size)) <= LARGEST_KEPT_FILE and kept + num_bytes <= KEPT_BYTES
      kept, total = kept + num_bytes * is_kept, total + num_bytes
      clips.append(FolderClip(WatchedFile(path), count, found.size, is_kept))
    if not clips:
      reason = f": {dropped[0]}" if dropped else f"; a clip is {CLIP_KINDS}"
      reason = f", but folders, such as {min(folders)}{reason}" if folders else reason
      raise UserError(f"no images or videos in {folder}{reason}")
    if folders:
      what = f"{count_noun(len(folders), 'folder')} in it {is_or_are(len(folders))}"
      log.warning("%s: %s left out, only its own files are read", folder, what)
    stems = {path.stem for path in paths}
    report_texts(folder, [path for path in texts if path.stem in stems])
    if kept < total:
      log.warning(
        "the decoded frames of %s are %.1f GB, of which %.1f GB are kept in memory: the other clips are decoded each "
        "time they are drawn",
        folder,
        total / 1e9,
        kept / 1e9,
      )
    return cls(clips, fps, side, dropped)

  def __len__(self) -> int:
    return len(self.clips)

  def clip(self, index: int, rng: np.random.Generator, *, num_frames: int, size: tuple[int, int]) -> Frames:
    """See `ClipSource.clip`; of a video that is too short, the first frame is used as a photograph.

    Raises:
      UserError: a frame is damaged, or the file has changed.
    """
    clip = self.clips[index]
    if clip.num_frames < num_frames:
      photo = Image.fromarray(self._read(clip, 0, 1)[0])
      return moving_window(photo, rng, num_frames=num_frames, size=size)
    start = int(rng.integers(clip.num_frames - num_frames + 1))
    frames = self._read(clip, start, num_frames)
    height, width = size
    largest = min(frames.shape[2] * height / width, frames.shape[1])
    side = rng.uniform(largest / 2, largest)
    box = np.array([side * width / height, side])
    whole = np.array([frames.shape[2], frames.shape[1]])
    corner = rng.uniform(size=2) * np.maximum(whole - box, 0)  # rounding may give less than zero
    edges = crop_box(corner, np.minimum(corner + box, whole))
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box=edges) for frame in frames]
    return np.stack([np.asarray(frame) for frame in resized])

  def find_damaged(self) -> Iterator[Dropped]:
    """Decodes all frames of all files, and yields the files that cannot be read."""
    for clip in self.clips:
      try:
        for start in range(0, clip.num_frames, CHECKED_FRAMES):
          read_clip(clip.path, start, min(CHECKED_FRAMES, clip.num_frames - start), self.fps or None)
      except (OSError, UserError) as error:
        yield drop(clip.path.name, error)

  def _read(self, clip: FolderClip, start: int, count: int) -> Frames:
    """Returns frames at the reduced size."""
    if clip.path in self._kept:
      return self._kept[clip.path][start : start + count]
    first, length = (0, clip.num_frames) if clip.is_kept else (start, count)
    frames = _reduce(read_clip(clip.path, first, length, self.fps or None).frames, self.side)
    clip.file.require_unchanged()
    if clip.is_kept:
      self._kept[clip.path] = frames
    return frames[start - first : start - first + count]


def _reduced_size(size: tuple[int, int], side: int) -> tuple[int, int]:
  scale = min(side / min(size), 1)
  return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def _reduce(frames: Frames, side: int) -> Frames:
  height, width = _reduced_size((frames.shape[1], frames.shape[2]), side)
  if frames.shape[1:3] == (height, width):
    return frames
  images = [Image.fromarray(frame).resize((width, height), Image.Resampling.BOX) for frame in frames]
  return np.stack([np.asarray(image) for image in images])
