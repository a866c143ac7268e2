"""Camera movement: the zoom, rotation and shift that lead from one image to another."""

from collections.abc import Sequence

import numpy as np
import scipy

from univid_jax.evaluation.metrics.image import psnr

# Height at which images are compared; larger images cost time without better matches.
SIDE = 64
# Starting points of the search: log zoom, and angle in radians.
ZOOMS = (0.0, 0.15, 0.3)
ANGLES = tuple(np.radians((-10.0, 0.0, 10.0)))

# Log zoom, angle in radians, and shift of the centre in fractions of width and height; float64 (4,).
Pose = np.ndarray


def warp(image: np.ndarray, pose: Pose) -> np.ndarray:
  """Renders an image (H, W[, C]) as seen by a camera at a pose; bicubic, with repeated edges."""
  height, width = image.shape[:2]
  log_zoom, angle, x, y = pose
  cos, sin = np.cos(angle) / np.exp(log_zoom), np.sin(angle) / np.exp(log_zoom)
  matrix = np.array([[cos, sin], [-sin, cos]])  # rows, columns
  middle = np.array([height / 2 - 0.5, width / 2 - 0.5])
  offset = middle + np.array([y * height, x * width]) - matrix @ middle
  channels = np.atleast_3d(image)
  out = np.stack(
    [
      scipy.ndimage.affine_transform(channels[..., c], matrix, offset, order=3, mode="nearest")
      for c in range(channels.shape[-1])
    ],
    axis=-1,
  )
  return out.reshape(image.shape)


def recover_pose(view: np.ndarray, image: np.ndarray, *, start: Pose | None = None) -> Pose:
  """Finds the pose at which a camera sees `view` in `image`, both uint8 (H, W, 3).

  Maximises the correlation of brightness.

  Args:
    view: what the camera sees.
    image: what it moves over.
    start: a nearby pose to start the search from; by default it starts from several.
  """
  scale = min(SIDE / image.shape[0], 1.0)
  small_view, small_image = (scipy.ndimage.zoom(x.astype(np.float64).mean(-1), scale, order=1) for x in (view, image))
  target = small_view - small_view.mean()

  def dissimilarity(pose: Pose) -> float:
    warped = warp(small_image, pose)
    warped = warped - warped.mean()
    return 1 - np.sum(warped * target) / max(np.linalg.norm(warped) * np.linalg.norm(target), 1e-12)

  starts = [start] if start is not None else [np.array([zoom, angle, 0.0, 0.0]) for zoom in ZOOMS for angle in ANGLES]
  best = min(starts, key=dissimilarity)
  simplex = best + np.concatenate([np.zeros((1, 4)), np.diag([0.08, 0.08, 0.05, 0.05])])
  result = scipy.optimize.minimize(
    dissimilarity,
    best,
    method="Nelder-Mead",
    options={"initial_simplex": simplex, "xatol": 1e-4, "fatol": 1e-7, "maxiter": 400},
  )
  return result.x


def camera_metrics(predicted: np.ndarray, source: np.ndarray, poses: Sequence[Pose] | np.ndarray) -> dict[str, float]:
  """Compares the recovered camera path with the true one; means over all frames but the first.

  zoom_error (percent), angle_error (degrees) and shift_error (percent of the diagonal): lower is better. warped_psnr
  compares the predicted frames with the source as seen from the recovered poses, which separates wrong content from a
  wrong path: higher is better.

  Args:
    predicted: uint8 (T, H, W, 3).
    source: the clip that the camera moves over, uint8 (T or 1, H, W, 3).
    poses: the true pose of each frame.
  """
  height, width = predicted.shape[1:3]
  errors: list[tuple[float, float, float, float]] = []
  found = None
  for i in range(1, len(predicted)):
    image = source[min(i, len(source) - 1)]
    found = recover_pose(predicted[i], image, start=found)
    difference = found - poses[i]
    shift = np.hypot(difference[2] * width, difference[3] * height) / np.hypot(width, height)
    view = np.clip(np.round(warp(image.astype(np.float64), found)), 0, 255).astype(np.uint8)
    errors.append(
      (
        100 * abs(np.expm1(difference[0])),
        abs(np.degrees(difference[1])),
        100 * shift,
        psnr(predicted[i : i + 1], view[None]),
      )
    )
  return dict(zip(("zoom_error", "angle_error", "shift_error", "warped_psnr"), map(float, np.mean(errors, axis=0))))
