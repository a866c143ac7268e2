"""The platform that programs are traced for."""

import enum

import jax


class Platform(enum.StrEnum):
  """A kind of device for which this package has code of its own."""

  CPU = "cpu"
  GPU = "gpu"  # NVIDIA
  TPU = "tpu"
  OTHER = "other"


def current_platform() -> Platform:
  """Returns the platform that a function traced now runs on: the mesh's (`jax.set_mesh`), else JAX's default.

  The devices of a mesh may be absent: forecasts compile for TPUs on a CPU.
  """
  mesh = jax.sharding.get_abstract_mesh()
  name = mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()
  return _PLATFORMS.get(name, Platform.OTHER)


_PLATFORMS = {"cpu": Platform.CPU, "gpu": Platform.GPU, "cuda": Platform.GPU, "tpu": Platform.TPU}
