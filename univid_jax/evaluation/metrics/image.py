"""Metrics between uint8 clips (T, H, W, 3) of the same shape."""

import functools

import numpy as np
from skimage.metrics import structural_similarity

# PSNR of identical clips; equals that of an error of 1e-5 of the range.
PSNR_CEILING = 100.0
# Side of the Gaussian window of Wang et al. 2004, and thus of the smallest image.
SSIM_SIDE = 11


def rmse(predicted: np.ndarray, truth: np.ndarray) -> float:
  """Returns the root mean squared error, 0 to 255; lower is better. The paper reports it for maps."""
  _check_shapes(predicted, truth)
  return float(np.sqrt(np.mean(np.square(predicted.astype(np.float64) - truth))))


def psnr(predicted: np.ndarray, truth: np.ndarray) -> float:
  """Returns the peak signal-to-noise ratio in dB; higher is better, 100 for identical clips.

  Raises:
    ValueError: the shapes differ.
  """
  _check_shapes(predicted, truth)
  error = np.mean(np.square(predicted.astype(np.float64) - truth)) / 255**2
  return float(min(-10 * np.log10(max(error, 1e-30)), PSNR_CEILING))


def ssim(predicted: np.ndarray, truth: np.ndarray) -> float:
  """Returns the structural similarity, averaged over frames; 1 is best.

  As in Wang et al. 2004: Gaussian window with a standard deviation of 1.5, population covariance.

  Raises:
    ValueError: the shapes differ, or a side is shorter than 11 pixels.
  """
  _check_shapes(predicted, truth)
  if min(truth.shape[1:3]) < SSIM_SIDE:
    raise ValueError(f"SSIM needs sides of at least {SSIM_SIDE} pixels, got {truth.shape[1]}x{truth.shape[2]}")
  compare = functools.partial(
    structural_similarity,
    channel_axis=-1,
    data_range=255,
    gaussian_weights=True,
    sigma=1.5,
    use_sample_covariance=False,
  )
  return float(np.mean([compare(a, b) for a, b in zip(predicted, truth)]))


def _check_shapes(predicted: np.ndarray, truth: np.ndarray) -> None:
  if predicted.shape != truth.shape:
    raise ValueError(f"clips must have the same shape, got {predicted.shape} and {truth.shape}")
