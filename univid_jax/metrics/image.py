"""Metrics of pictures against pictures: uint8 clips (T, H, W, 3) of one shape."""

import functools

import numpy as np
import skimage

# What identical pictures score: that of an error of 1e-5 of the range.
PSNR_CEILING = 100.0
# The window of Gaussian weights of Wang et al. 2004, and the smallest side that it fits.
SSIM_SIDE = 11


def rmse(predicted: np.ndarray, truth: np.ndarray) -> float:
  """Root of the mean squared difference, 0 to 255, lower is better; the paper's figure for maps."""
  _check(predicted, truth)
  return float(np.sqrt(np.mean(np.square(predicted.astype(np.float64) - truth))))


def psnr(predicted: np.ndarray, truth: np.ndarray) -> float:
  """Peak signal-to-noise ratio in dB, higher is better; 100 where the clips are identical.

  Raises:
    ValueError: the shapes differ.
  """
  _check(predicted, truth)
  error = np.mean(np.square(predicted.astype(np.float64) - truth)) / 255**2
  return float(min(-10 * np.log10(max(error, 1e-30)), PSNR_CEILING))


def ssim(predicted: np.ndarray, truth: np.ndarray) -> float:
  """Structural similarity (Wang et al. 2004: Gaussian window of deviation 1.5, population covariance), mean over frames; 1 is
  best.

  Raises:
    ValueError: the shapes differ, or a side is below 11 pixels.
  """
  _check(predicted, truth)
  if min(truth.shape[1:3]) < SSIM_SIDE:
    raise ValueError(f"SSIM needs sides of at least {SSIM_SIDE} pixels, got {truth.shape[1]}x{truth.shape[2]}")
  compare = functools.partial(skimage.metrics.structural_similarity, channel_axis=-1, data_range=255, gaussian_weights=True,
                              sigma=1.5, use_sample_covariance=False)
  return float(np.mean([compare(a, b) for a, b in zip(predicted, truth)]))


def _check(predicted: np.ndarray, truth: np.ndarray) -> None:
  if predicted.shape != truth.shape:
    raise ValueError(f"clips of different shapes: {predicted.shape} and {truth.shape}")
