"""Names of array dims, used in every shape annotation, and the arithmetic between pixels and latents.

b  row of a batch          l  token of a row or prompt  n  text token of a row, or key
s  sentence slot of a row  m  modulation slot of a row  q  target token of a row
p  value of a patch        v  channel of a condition    w  weight of a solver's step
h  head                    k  channel of a head         r  rank of an adapter
d  embedding channel       e  channel of a feature      i  image feature, step of a solver, input of a Linear
o  output of a Linear
t, y, x  latent frame, row, column    c  latent channel    T, H, W  frames, height and width in pixels

Dims that only one module uses are named by words. Names that begin with an underscore may differ in size: `_t` for the
output's frames where `t` is the input's.
"""

from univid_jax.core.errors import UserError
from univid_jax.core.numbers import ceil_div

# Rotary positions along each dim, as in Wan's code.
MAX_POSITION = 1024

# Frames per latent frame of every published codec, after the first one, which is a single frame. Code that must not
# load a codec computes the lengths of clips from it; code that has a codec uses the codec's stride.
TEMPORAL_STRIDE = 4


def is_clip_length(num_frames: int, *, temporal_stride: int = TEMPORAL_STRIDE) -> bool:
  """Returns whether a clip may have a number of frames: 4n + 1. An image is a clip of one frame."""
  return num_frames >= 1 and (num_frames - 1) % temporal_stride == 0


def floor_clip_length(num_frames: int, *, temporal_stride: int = TEMPORAL_STRIDE) -> int:
  """Returns the length of the longest clip that fits into a number of frames."""
  return (num_frames - 1) // temporal_stride * temporal_stride + 1


def nearest_clip_lengths(num_frames: int) -> tuple[int, int]:
  """Returns the lengths of clips below and above a number of frames, at least 1."""
  below = floor_clip_length(num_frames)
  return below, below + TEMPORAL_STRIDE


def latent_frames(num_frames: int, *, temporal_stride: int = TEMPORAL_STRIDE) -> int:
  """Returns how many latent frames encode a video, rounded up to whole ones."""
  return 1 + ceil_div(num_frames - 1, temporal_stride)


def pixel_frames(num_latent_frames: int, *, temporal_stride: int = TEMPORAL_STRIDE) -> int:
  """Returns how many frames a clip has; inverts `latent_frames`."""
  return 1 + (num_latent_frames - 1) * temporal_stride


def latent_shape(shape: tuple[int, ...], *, temporal_stride: int, spatial_stride: int) -> tuple[int, int, int]:
  """Returns (t, y, x) of the latents of a clip.

  Args:
    shape: of the clip in pixels, (T, H, W, ...).
    temporal_stride: frames per latent frame, after the first frame.
    spatial_stride: pixels per latent, vertically and horizontally.

  Raises:
    UserError: T is not temporal_stride * n + 1, or a side is not a multiple of spatial_stride. The message names the
      nearest valid values.
  """
  frames, height, width = shape[:3]
  if not is_clip_length(frames, temporal_stride=temporal_stride):
    nearest = _nearest(floor_clip_length(frames, temporal_stride=temporal_stride), temporal_stride)
    raise UserError(f"a clip needs {temporal_stride}n + 1 frames, got {frames}; the nearest are {nearest}")
  wrong = {name: side for name, side in (("height", height), ("width", width)) if side < 1 or side % spatial_stride}
  if wrong:
    sides = [
      f"the {name} must be a multiple of {spatial_stride}, got {side}; the nearest are "
      + _nearest(side // spatial_stride * spatial_stride, spatial_stride)
      for name, side in wrong.items()
    ]
    raise UserError("; ".join(sides))
  return latent_frames(frames, temporal_stride=temporal_stride), height // spatial_stride, width // spatial_stride


def _nearest(below: int, step: int) -> str:
  return " and ".join(str(value) for value in (below, below + step) if value > 0)
