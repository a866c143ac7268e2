"""Tasks that find objects: salient and moving ones, in one colour on another."""

import math
from collections.abc import Callable

import numpy as np
import scipy
import skimage
from jaxtyping import Bool, Float

from univid_jax.data.tasks.base import Params, UnitClip, compute_luma, mix_channels

# From linear sRGB to CIE XYZ as shares of the white D65, and from their roots to L*a*b* up to a constant.
XYZ_FROM_RGB = np.array(
  [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
)
RELATIVE_XYZ = XYZ_FROM_RGB / np.array([[0.95047], [1.0], [1.08883]])
LAB_FROM_ROOTS = np.array([[0, 116, 0], [500, -500, 0], [0, 200, -200]])

# Otsu's threshold is one of so many.
NUM_BINS = 256

# Frames are aligned in steps of 1 / UPSAMPLING pixels.
UPSAMPLING = 4


def draw_mask_colors(rng: np.random.Generator) -> Params:
  """Draws a bright colour for the object and a dark one for the background."""
  return {"object_color": rng.uniform(0.6, 1, 3).tolist(), "background": rng.uniform(0, 0.25, 3).tolist()}


def salient_mask(clip: UnitClip, *, object_color, background) -> UnitClip:
  """Finds what differs most from the mean colour (Achanta et al. 2009, "Frequency-tuned salient region detection")."""
  lab = np.ascontiguousarray(np.moveaxis(_compute_lab(clip), -1, 0))
  difference = scipy.ndimage.gaussian_filter(lab, (0, 0, 1, 1))
  difference -= lab.mean(axis=(2, 3), keepdims=True)
  difference **= 2
  return color_mask(np.sqrt(difference.sum(axis=0)), object_color, background)


def _compute_lab(clip: UnitClip) -> Float[np.ndarray, "T H W 3"]:
  """Returns the colours in L*a*b*, but for a constant."""
  linear = np.where(clip > 0.04045, ((clip + 0.055) / 1.055) ** 2.4, clip / 12.92)
  xyz = mix_channels(linear, RELATIVE_XYZ)
  return mix_channels(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116), LAB_FROM_ROOTS)


def moving_mask(clip: UnitClip, *, object_color, background) -> UnitClip:
  """Finds what moves against the scene: aligns all frames to the middle one, and compares them with their median."""
  grey = compute_luma(clip)[..., 0]
  shifts = find_shifts(grey)
  aligned = np.stack([_shift(frame, shift) for frame, shift in zip(grey, shifts)])
  difference = np.abs(aligned - np.median(aligned, axis=0))
  back = np.stack([_shift(part, -shift) for part, shift in zip(difference, shifts)])
  sigma = max(clip.shape[1] / 120, 1)
  return color_mask(scipy.ndimage.gaussian_filter(back, (0.5, sigma, sigma)), object_color, background)


def find_shifts(grey: Float[np.ndarray, "T H W"]) -> Float[np.ndarray, "T 2"]:
  """Returns how far to shift each frame down and right to match the middle one.

  By phase correlation, refined around its peak (Guizar-Sicairos et al. 2008, "Efficient subpixel image registration
  algorithms").
  """
  spectra, size = scipy.fft.fft2(grey), np.array(grey.shape[1:])
  product = spectra[len(grey) // 2] * spectra.conj()
  product /= np.maximum(np.abs(product), 100 * np.finfo(np.float32).eps)
  peaks = _find_peaks(scipy.fft.ifft2(product))
  shifts = np.where(peaks > size // 2, peaks - size, peaks)
  offsets = np.arange(-3, 3) / UPSAMPLING
  down, across = (
    np.exp(2j * np.pi * (shifts[:, [axis]] + offsets)[..., None] * np.fft.fftfreq(size[axis])).astype(np.complex64)
    for axis in range(2)
  )
  return shifts + offsets[_find_peaks(down @ product @ across.swapaxes(1, 2))]


def _find_peaks(correlation: np.ndarray) -> np.ndarray:
  """Returns (row, column) of the largest absolute value of each map."""
  largest = np.abs(correlation).reshape(len(correlation), -1).argmax(axis=1)
  return np.stack(np.unravel_index(largest, correlation.shape[1:]), axis=-1)


def _shift(frame: Float[np.ndarray, "H W"], shift: Float[np.ndarray, "2"]) -> Float[np.ndarray, "H W"]:
  """Shifts a frame, interpolating linearly; what comes from outside repeats the edge."""
  for axis, distance in enumerate(shift.tolist()):
    whole = math.floor(-distance)
    index = np.arange(frame.shape[axis]) + whole
    frame, following = (frame.take(index + i, axis, mode="clip") for i in range(2))
    frame = frame + (following - frame) * (-distance - whole)
  return frame


def color_mask(strength: Float[np.ndarray, "T H W"], object_color, background) -> UnitClip:
  """Splits a map at Otsu's threshold, removes small specks and holes, and colours both parts."""
  mask = strength > _otsu_threshold(strength)
  reach = max(strength.shape[1] // 60, 1)
  for combine in (np.logical_and, np.logical_or, *[np.logical_or] * reach, *[np.logical_and] * reach):
    mask = _combine_neighbors(mask, combine)
  return np.stack([background, object_color]).astype(np.float32).take(_fill_holes(mask).astype(np.intp), axis=0)


def _otsu_threshold(strength: Float[np.ndarray, "T H W"]) -> float:
  """Returns Otsu's threshold, or the maximum of a map that is almost constant."""
  low, high = float(strength.min()), float(strength.max())
  if high - low <= 1e-6:
    return high
  bins = ((strength.ravel() - low) * (NUM_BINS / (high - low))).astype(np.intp)
  counts = np.bincount(np.minimum(bins, NUM_BINS - 1), minlength=NUM_BINS)
  centers = low + (np.arange(NUM_BINS) + 0.5) * ((high - low) / NUM_BINS)
  return float(skimage.filters.threshold_otsu(hist=(counts, centers)))


def _combine_neighbors(mask: Bool[np.ndarray, "T H W"], combine: Callable) -> Bool[np.ndarray, "T H W"]:
  """Combines each pixel with its eight neighbours, which are false outside the frame: erodes with "and"."""
  padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
  rows = combine(combine(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
  return combine(combine(rows[..., :-2], rows[..., 1:-1]), rows[..., 2:])


def _fill_holes(mask: Bool[np.ndarray, "T H W"]) -> Bool[np.ndarray, "T H W"]:
  """Fills what is not connected with the outside of its frame."""
  cross = np.pad(scipy.ndimage.generate_binary_structure(2, 1)[None], ((1, 1), (0, 0), (0, 0)))
  background, count = scipy.ndimage.label(~np.pad(mask, ((0, 0), (1, 1), (1, 1))), cross)
  is_filled = np.ones(count + 1, bool)
  is_filled[background[:, 0, 0]] = False
  return is_filled[background[:, 1:-1, 1:-1]]
