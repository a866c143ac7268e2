"""Manufacturers' figures for the chips that JAX runs on."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Protocol, runtime_checkable


@runtime_checkable
class Device(Protocol):
  """What `jax.Device` provides; type checkers do not accept that name as a type."""

  @property
  def platform(self) -> str: ...
  @property
  def device_kind(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip, with its manufacturer's figures.

  Attributes:
    flops: dense operations per second in `dtype`.
    memory: bytes; for v5e and v6e, what their compiler reports as available.
    bandwidth: bytes per second from memory.
    network: bytes per second to and from the other chips of a slice or machine, summed over links.
    dtype: dtype for training; bfloat16 if supported.
  """

  flops: float
  memory: float
  bandwidth: float
  network: float
  dtype: str = "bfloat16"


# Chips by JAX's name of the device or a prefix of it, longer prefixes first: PCIe and NVL cards are slower than SXM
# modules. Sources: Google Cloud's TPU pages, NVIDIA's data sheets.
CHIPS: Mapping[str, Chip] = {
  "TPU v4": Chip(275e12, 34.4e9, 1228e9, 300e9),
  "TPU v5 lite": Chip(197e12, 16.9e9, 819e9, 200e9),
  "TPU v5": Chip(459e12, 102.0e9, 2765e9, 600e9),
  "TPU v6 lite": Chip(918e12, 33.5e9, 1640e9, 448e9),
  "Tesla T4": Chip(8.1e12, 16.1e9, 320e9, 32e9, "float32"),
  "NVIDIA L4": Chip(121e12, 24.2e9, 300e9, 64e9),
  "NVIDIA GeForce RTX 4090": Chip(165e12, 25.8e9, 1008e9, 64e9),
  "NVIDIA A100-SXM4-40GB": Chip(312e12, 42.9e9, 1555e9, 600e9),
  "NVIDIA A100-PCIE-40GB": Chip(312e12, 42.9e9, 1555e9, 600e9),
  "NVIDIA A100 80GB PCIe": Chip(312e12, 85.0e9, 1935e9, 600e9),
  "NVIDIA A100": Chip(312e12, 85.0e9, 2039e9, 600e9),
  "NVIDIA H100 PCIe": Chip(756e12, 85.0e9, 2000e9, 600e9),
  "NVIDIA H100 NVL": Chip(835e12, 100.0e9, 3900e9, 600e9),
  "NVIDIA H100": Chip(989e12, 85.0e9, 3350e9, 900e9),
  "NVIDIA H200 NVL": Chip(835e12, 150.0e9, 4800e9, 900e9),
  "NVIDIA H200": Chip(989e12, 150.0e9, 4800e9, 900e9),
}


# Chips that `univid-forecast --chip` takes, by its names.
NAMES: Mapping[str, str] = {
  "v5e": "TPU v5 lite",
  "v6e": "TPU v6 lite",
  "v5p": "TPU v5",
  "t4": "Tesla T4",
  "l4": "NVIDIA L4",
  "rtx4090": "NVIDIA GeForce RTX 4090",
  "a100-40": "NVIDIA A100-SXM4-40GB",
  "a100-80": "NVIDIA A100",
  "h100": "NVIDIA H100",
  "h200": "NVIDIA H200",
}


# Share of a GPU's memory that JAX may use; its own default is 0.75. The rest is for CUDA itself.
GPU_SHARE = 0.92


def is_tpu(name: str) -> bool:
  """Returns whether a chip of `NAMES` is a TPU; the others are NVIDIA GPUs."""
  return NAMES[name].startswith("TPU")


def find_chip(device: Device) -> Chip | None:
  """Returns the chip of a device, or None if it is not in the table."""
  return find_chip_by_name(device.device_kind)


def find_chip_by_name(kind: str) -> Chip | None:
  """Returns a chip by JAX's or PyTorch's name of the device, which for NVIDIA ends in memory size and form factor."""
  if kind in CHIPS:
    return CHIPS[kind]
  matches = (chip for name, chip in CHIPS.items() if name.startswith("NVIDIA") and re.match(rf"{name}\b", kind))
  return next(matches, None)
