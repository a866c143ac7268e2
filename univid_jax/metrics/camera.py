"""Camera movement: which zoom, turn and shift lead from one picture to another."""

from collections.abc import Sequence

import numpy as np
import scipy

from univid_jax.metrics.image import psnr

# Pictures are compared at this height; more costs time and finds no more.
SIDE = 64
# Starts of the search: log zoom, radians.
ZOOMS = (0.0, 0.15, 0.3)
ANGLES = tuple(np.radians((-10.0, 0.0, 10.0)))

# Log zoom, angle in radians, and shift of the centre in shares of width and height.
Pose = np.ndarray


def warp(picture: np.ndarray, pose: Pose) -> np.ndarray:
  """What a camera at a pose sees of a picture (H, W[, C]); cubic, edges held."""
  height, width = picture.shape[:2]
  log_zoom, angle, x, y = pose
  cos, sin = np.cos(angle) / np.exp(log_zoom), np.sin(angle) / np.exp(log_zoom)
  matrix = np.array([[cos, sin], [-sin, cos]])  # rows, columns
  middle = np.array([height / 2 - 0.5, width / 2 - 0.5])
  offset = middle + np.array([y * height, x * width]) - matrix @ middle
  channels = np.atleast_3d(picture)
  out = np.stack([scipy.ndimage.affine_transform(channels[..., c], matrix, offset, order=3, mode="nearest")
                  for c in range(channels.shape[-1])], axis=-1)
  return out.reshape(picture.shape)


def recover_pose(seen: np.ndarray, picture: np.ndarray, *, start: Pose | None = None) -> Pose:
  """The pose at which a camera sees of a picture what `seen` shows; both uint8 (H, W, 3).

  The correlation of brightness is maximised from several starts, or from one that is known to be near.
  """
  scale = min(SIDE / picture.shape[0], 1.0)
  seen, picture = (scipy.ndimage.zoom(x.astype(np.float64).mean(-1), scale, order=1) for x in (seen, picture))
  target = seen - seen.mean()

  def unlikeness(pose):
    view = warp(picture, pose)
    view = view - view.mean()
    return 1 - np.sum(view * target) / max(np.linalg.norm(view) * np.linalg.norm(target), 1e-12)

  starts = [start] if start is not None else [np.array([zoom, angle, 0.0, 0.0]) for zoom in ZOOMS for angle in ANGLES]
  best = min(starts, key=unlikeness)
  simplex = best + np.concatenate([np.zeros((1, 4)), np.diag([0.08, 0.08, 0.05, 0.05])])
  found = scipy.optimize.minimize(unlikeness, best, method="Nelder-Mead", options={"initial_simplex": simplex, "xatol": 1e-4,
                                                                            "fatol": 1e-7, "maxiter": 400})
  return found.x


def camera_metrics(predicted: np.ndarray, source: np.ndarray, poses: Sequence[Pose]) -> dict[str, float]:
  """Errors of the recovered against the known path: zoom_error (in percent), angle_error (degrees) and shift_error (percent of
  the diagonal), lower is better; and warped_psnr of the painted frames against the source seen from the recovered poses, which
  tells wrong pictures from wrong paths: higher is better. Each is the mean over all frames but the first.

  Args:
    predicted: uint8 (T, H, W, 3).
    source: what the camera moves over, likewise; or one picture.
    poses: of each frame.
  """
  height, width = predicted.shape[1:3]
  errors, found = [], None
  for i in range(1, len(predicted)):
    picture = source[min(i, len(source) - 1)]
    found = recover_pose(predicted[i], picture, start=found)
    difference = found - poses[i]
    shift = np.hypot(difference[2] * width, difference[3] * height) / np.hypot(width, height)
    view = np.clip(np.round(warp(picture.astype(np.float64), found)), 0, 255).astype(np.uint8)
    errors.append((100 * abs(np.expm1(difference[0])), abs(np.degrees(difference[1])), 100 * shift,
                   psnr(predicted[i:i + 1], view[None])))
  return dict(zip(("zoom_error", "angle_error", "shift_error", "warped_psnr"), map(float, np.mean(errors, axis=0))))
