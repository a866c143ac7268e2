"""Names of array dims, used in every shape annotation, and the arithmetic between pixels and latents.

b  row of a batch          l  token of a row           n  text token of a row
s  sentence slot of a row  m  modulation slot of a row q  target token of a row
p  values of a patch       h  head                     k  channel of a head
d  embedding channel       f  feed-forward channel     i  image feature, or step of a solver
t, y, x  latent frame, row, column    c  latent channel    T, H, W  frames, height and width in pixels
"""

from univid_jax.core.errors import UserError


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
  if frames < 1 or (frames - 1) % temporal_stride:
    nearest = _nearest((frames - 1) // temporal_stride * temporal_stride + 1, temporal_stride)
    raise UserError(f"a clip needs {temporal_stride}n + 1 frames, got {frames}; the nearest are {nearest}")
  for name, side in (("height", height), ("width", width)):
    if side < 1 or side % spatial_stride:
      nearest = _nearest(side // spatial_stride * spatial_stride, spatial_stride)
      raise UserError(f"the {name} must be a multiple of {spatial_stride}, got {side}; the nearest are {nearest}")
  return 1 + (frames - 1) // temporal_stride, height // spatial_stride, width // spatial_stride


def _nearest(below: int, step: int) -> str:
  return " and ".join(str(value) for value in (below, below + step) if value > 0)
