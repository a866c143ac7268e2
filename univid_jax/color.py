"""Colours as brightness and two differences."""

import numpy as np

# Brightness, red against blue, green against both: orthonormal rows.
OPPONENT_COLORS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
