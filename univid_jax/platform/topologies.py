"""Descriptions of TPUs that need not be present: their compiler runs on a CPU.

The only module that uses `jax.experimental.topologies`.
tests/test_topologies.py fails if an upgrade of JAX or libtpu changes what this relies on.
"""

import importlib.resources
import math
import os
from collections.abc import Mapping, Sequence

from univid_jax.core.errors import UserError
from univid_jax.core.installation import install_command
from univid_jax.platform.chips import Device


def use_tpu_compiler() -> None:
  """Prepares JAX, before its first import, to compile for a TPU on this machine's CPU.

  Raises:
    UserError: libtpu is not installed.
  """
  try:
    library = importlib.resources.files("libtpu") / "libtpu.so"
  except ModuleNotFoundError as error:
    raise UserError(f"compiling for a TPU needs its compiler, libtpu: {install_command('tpu')}") from error
  os.environ["TPU_LIBRARY_PATH"] = str(library)
  os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}


# Slices that exist, by libtpu's name of the chip: Google Cloud's TPU pages.
_TWO_DIMS = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_THREE_DIMS = (
  *("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
  *("16x16x16", "16x16x24"),
)
SLICES: Mapping[str, Sequence[str]] = {"v5e": _TWO_DIMS, "v6e": _TWO_DIMS, "v5p": _THREE_DIMS}


def find_topology(chip: str, num_chips: int) -> str:
  """Returns the topology of the slice with a number of chips of a kind, such as v5e.

  Raises:
    UserError: there is none; the message names the nearest.
  """
  sizes = {math.prod(_parse_dims(dims)): dims for dims in SLICES[chip]}
  if num_chips in sizes:
    return f"{chip}:{sizes[num_chips]}"
  nearest = [
    max((n for n in sizes if n < num_chips), default=None),
    min((n for n in sizes if n > num_chips), default=None),
  ]
  names = " and ".join(f"{n} ({chip}:{sizes[n]})" for n in nearest if n is not None)
  raise UserError(f"there is no slice of {num_chips} {chip}; the nearest have {names}")


def count_chips(topology: str) -> int:
  """Returns the chips of a topology, such as v5e:2x4.

  Raises:
    UserError: it is not a topology; the message names those that exist.
  """
  kind, _, size = topology.partition(":")
  if kind not in SLICES:
    raise UserError(f"{topology!r} is not a topology: it starts with {', '.join(SLICES)}, for example v5e:2x4")
  dims = _parse_dims(size)
  if len(dims) != len(_parse_dims(SLICES[kind][0])) or 0 in dims:
    raise UserError(f"{topology!r} is not a topology: slices of {kind} are {', '.join(SLICES[kind])}")
  return math.prod(dims)


def describe_devices(topology: str) -> Sequence[Device]:
  """Returns descriptions of the chips of a topology that libtpu knows, such as v5e:2x4.

  Raises:
    UserError: libtpu does not know it, or does not describe its devices as JAX does.
  """
  import jax  # after `use_tpu_compiler`
  from jax.experimental import topologies

  examples = "such as v5e:2x4, v5p:2x2x2 or v6e:2x4"
  kind, _, size = topology.partition(":")
  dims = _parse_dims(size)
  if kind in SLICES and len(dims) != len(_parse_dims(SLICES[kind][0])):
    raise UserError(
      f"{topology!r} is not a topology of TPUs {examples}: slices of {kind} are {', '.join(SLICES[kind])}"
    )
  if kind == "v4":
    raise UserError(f"{topology!r}: libtpu describes the two cores of a v4, which JAX joins on real ones; take v5p")
  # libtpu assumes 2 x 2 chips per host, unless it is told that there are fewer.
  options = {}
  if 1 in dims[:2]:
    options["chips_per_host_bounds"] = (*(min(length, 2) for length in dims[:2]), 1)
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).removeprefix("INVALID_ARGUMENT: ")
    raise UserError(f"{topology!r} is not a topology of TPUs that libtpu knows, {examples}: {reason}") from error


def _parse_dims(size: str) -> list[int]:
  """Returns the lengths in a size such as 2x4; [] if it is not a size."""
  lengths = size.split("x")
  return [int(length) for length in lengths] if all(length.isdecimal() for length in lengths) else []
