"""UniVid in JAX: a video diffusion transformer (Wan) that learns image and video tasks from visual sentences."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from univid_jax.config.schema import RunConfig
  from univid_jax.data.media.reader import read_clip
  from univid_jax.data.media.writer import write_clip
  from univid_jax.inference.load import load_pipeline
  from univid_jax.inference.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline", "RunConfig", "load_pipeline", "read_clip", "write_clip"]

_MODULES = {
  "Pipeline": "univid_jax.inference.pipeline",
  "RunConfig": "univid_jax.config.schema",
  "load_pipeline": "univid_jax.inference.load",
  "read_clip": "univid_jax.data.media.reader",
  "write_clip": "univid_jax.data.media.writer",
}


def __getattr__(name: str) -> Any:
  """Imports the public names on first use, so that importing the package does not import JAX."""
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
  return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
