"""Metrics of pictures against pictures."""

import numpy as np

# What identical pictures score: that of an error of 1e-5 of the range.
PSNR_CEILING = 100.0


def psnr(predicted: np.ndarray, truth: np.ndarray) -> float:
  """Peak signal-to-noise ratio of uint8 clips of one shape, in dB, higher is better; 100 where they are identical.

  Raises:
    ValueError: the shapes differ.
  """
  if predicted.shape != truth.shape:
    raise ValueError(f"clips of different shapes: {predicted.shape} and {truth.shape}")
  error = np.mean(np.square(predicted.astype(np.float64) - truth)) / 255**2
  return float(min(-10 * np.log10(max(error, 1e-30)), PSNR_CEILING))
