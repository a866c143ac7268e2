"""Windows of a video: clips of the model's length that share groups of frames with the video and with each other.

A window is a clip as in training: its first latent frame is a single frame, and each of the others a group of four. The
video is such a clip too, so that all windows share their groups with it, but the first frame of a window that does not
start the video is in the middle of one of the video's groups. It belongs to this window alone: an anchor, which is
generated like the rest and then dropped.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, Int

from univid_jax.core.dims import latent_frames
from univid_jax.core.numbers import ceil_div


@dataclasses.dataclass(frozen=True)
class Windows:
  """Places of windows in a video, in latent frames.

  Attributes:
    total: latent frames of the video.
    length: of each window.
    starts: the first latent frame of each window, ascending from 0.
  """

  total: int
  length: int
  starts: tuple[int, ...]

  @classmethod
  def spread(cls, num_frames: int, *, length: int, temporal_stride: int, overlap: int) -> "Windows":
    """Spreads windows over a video.

    Args:
      num_frames: of the video.
      length: of a window, in latent frames; a shorter video is extended to it.
      temporal_stride: frames per group.
      overlap: groups that neighbouring windows share, at least, if windows are long enough.
    """
    total = max(latent_frames(num_frames, temporal_stride=temporal_stride), length)
    advance = max(length - 1 - overlap, 1)
    count = 1 + ceil_div(total - length, advance)
    starts = np.linspace(0, total - length, count).round().astype(int)
    return cls(total, length, tuple(starts.tolist()))

  @property
  def num_entries(self) -> int:
    """Latent frames of the video and anchors of all windows but the first."""
    return self.total + len(self.starts) - 1

  def entries(self, window: int) -> Int[np.ndarray, "t"]:
    """Returns where the latent frames of a window are among the entries: anchors follow the video."""
    entries = self.starts[window] + np.arange(self.length)
    if window:
      entries[0] = self.total + window - 1
    return entries

  @functools.cached_property
  def weights(self) -> list[Float[np.ndarray, "t"]]:
    """The share of each window in the velocity of its latent frames; the shares of all windows sum to 1."""
    ramps = [self._ramps(window) for window in range(len(self.starts))]
    total = np.zeros(self.num_entries)
    for window, ramp in enumerate(ramps):
      total[self.entries(window)] += ramp
    return [(ramp / total[self.entries(window)]).astype(np.float32) for window, ramp in enumerate(ramps)]

  def _ramps(self, window: int) -> Float[np.ndarray, "t"]:
    weights = np.ones(self.length)
    for other, forward in ((window - 1, True), (window + 1, False)):
      if 0 <= other < len(self.starts):
        shared = self.length - 1 - abs(self.starts[other] - self.starts[window])
        ramp = np.arange(1, shared + 1) / (shared + 1)
        part = slice(1, 1 + shared) if forward else slice(self.length - shared, None)
        weights[part] *= ramp if forward else ramp[::-1]
    return weights
