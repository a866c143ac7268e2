"""Tasks that find salient or moving objects, and draw them in one colour on another."""

import numpy as np
import scipy
import skimage
from jaxtyping import Float

from univid_jax.data.tasks.base import Params, UnitClip, compute_luma


def draw_mask_colors(rng: np.random.Generator) -> Params:
  """Draws a bright colour for the object and a dark one for the background."""
  return {"object_color": rng.uniform(0.6, 1, 3).tolist(), "background": rng.uniform(0, 0.25, 3).tolist()}


def salient_mask(clip: UnitClip, *, object_color, background) -> UnitClip:
  """Finds what differs most from the mean colour (Achanta et al. 2009, "Frequency-tuned salient region detection")."""
  lab = skimage.color.rgb2lab(clip)
  smooth = scipy.ndimage.gaussian_filter(lab, (0, 1, 1, 0))
  saliency = np.linalg.norm(smooth - lab.mean(axis=(1, 2), keepdims=True), axis=-1)
  return color_mask(saliency, object_color, background)


def moving_mask(clip: UnitClip, *, object_color, background) -> UnitClip:
  """Finds what moves within the scene: aligns all frames to the middle one, and compares them with their median."""
  grey = compute_luma(clip)[..., 0]
  middle = grey[len(grey) // 2]
  shifts = [skimage.registration.phase_cross_correlation(middle, frame, upsample_factor=4)[0] for frame in grey]
  aligned = np.stack([scipy.ndimage.shift(frame, shift, order=1, mode="nearest") for frame, shift in zip(grey, shifts)])
  difference = np.abs(aligned - np.median(aligned, axis=0))
  back = np.stack(
    [scipy.ndimage.shift(part, -shift, order=1, mode="nearest") for part, shift in zip(difference, shifts)]
  )
  sigma = max(clip.shape[1] / 120, 1)
  return color_mask(scipy.ndimage.gaussian_filter(back, (0.5, sigma, sigma)), object_color, background)


def color_mask(strength: Float[np.ndarray, "T H W"], object_color, background) -> UnitClip:
  """Splits a map at Otsu's threshold, removes small specks and holes, and colours both parts."""
  mask = (
    strength > skimage.filters.threshold_otsu(strength) if np.ptp(strength) > 1e-6 else np.zeros(strength.shape, bool)
  )
  square, reach = np.ones((3, 3), bool), max(strength.shape[1] // 60, 1)

  def clean(frame):
    opened = scipy.ndimage.binary_opening(frame, square)
    return scipy.ndimage.binary_fill_holes(scipy.ndimage.binary_closing(opened, square, reach))

  mask = np.stack([clean(frame) for frame in mask])
  return np.where(mask[..., None], np.asarray(object_color, np.float32), np.asarray(background, np.float32))
