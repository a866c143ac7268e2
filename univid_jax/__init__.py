"""UniVid in JAX: a video diffusion transformer (Wan2.1) that learns image and video tasks from visual sentences."""

__version__ = "0.1.0"


def __getattr__(name: str):
  """`load_pipeline` on first use: importing the package alone starts nothing."""
  if name == "load_pipeline":
    from univid_jax.pipeline import load_pipeline
    return load_pipeline
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
