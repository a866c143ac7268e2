"""Conversion of tensors to another dtype that refuses to turn finite numbers into infinite ones."""

import numpy as np

from univid_jax.core.errors import UserError


def cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns a tensor in a dtype; the array itself if it has this dtype.

  Args:
    name: name of the tensor, for the error.
    array: the tensor, of any shape.
    dtype: to convert to.

  Raises:
    UserError: finite numbers are too large for the dtype.
  """
  if array.dtype == dtype:
    return array
  with np.errstate(all="ignore"):
    converted = array.astype(dtype)
  if (overflows := count_nonfinite(converted) - count_nonfinite(array)) > 0:
    raise UserError(f"{overflows:,} numbers of {name} are too large for {dtype}; choose another --dtype")
  return converted


def count_nonfinite(array: np.ndarray) -> int:
  """Returns how many numbers are NaN or infinite."""
  return array.size - int(np.count_nonzero(np.isfinite(array)))
