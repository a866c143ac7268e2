"""Pixel conversions, and colours as brightness and two differences."""

import numpy as np

# Orthonormal rows: brightness, red minus blue, red and blue minus green.
OPPONENT_COLORS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])


def to_float(frames: np.ndarray) -> np.ndarray:
  """Converts uint8 frames to float32 in [-1, 1]; float frames are only cast to float32."""
  frames = np.asarray(frames)
  values = frames.astype(np.float32)
  if frames.dtype == np.uint8:
    values /= 127.5
    values -= 1
  return values


def to_uint8(frames: np.ndarray) -> np.ndarray:
  """Converts frames in [-1, 1] to uint8, rounding and clipping."""
  return np.clip((frames + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)
