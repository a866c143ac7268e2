"""UniVid in JAX: a video diffusion transformer (Wan2.1) that learns image and video tasks from visual sentences."""

__version__ = "0.1.0"
