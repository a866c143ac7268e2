"""Checksums of weights that do not depend on the layout of their files."""

import hashlib
from collections.abc import Mapping

import numpy as np


def tensor_digest(name: str, tensor: np.ndarray) -> str:
  """Returns the SHA-256 of a tensor's official name, dtype, shape and bytes.

  Dims of size 1 are left out of the shape, because layouts differ in them.
  """
  shape = tuple(n for n in tensor.shape if n != 1)
  sha = hashlib.sha256(f"{name} {tensor.dtype} {shape}\n".encode())
  sha.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
  return sha.hexdigest()


def combine_digests(digests: Mapping[str, str]) -> str:
  """Returns one checksum for the tensors whose digests are given by name."""
  return hashlib.sha256("".join(f"{name} {value}\n" for name, value in sorted(digests.items())).encode()).hexdigest()
