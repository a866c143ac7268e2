"""Arrays that Python code passes to a pipeline, checked where they come in."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from univid_jax.core.checks import require_list
from univid_jax.core.errors import UserError
from univid_jax.core.text import describe_value
from univid_jax.models.variants import DiTConfig

# How far rounding takes float frames out of [-1, 1].
TOLERANCE = 1e-2


def to_numpy(name: str, value: Any, expected: str = "an array of numbers") -> np.ndarray:
  """Returns an argument as a NumPy array of numbers.

  Raises:
    UserError: it is none, or a tracer of JAX.
  """
  if isinstance(value, Tracer):
    raise UserError(
      f"{name} is traced, but a pipeline runs on the host, outside of jit, grad and vmap; what can be traced is the "
      "transformer, nnx.merge(expert.graph, expert.load()) of an expert in pipeline.experts.transformers"
    )
  try:
    array = np.asarray(value)
  except (ValueError, TypeError, RuntimeError):  # lists of different lengths, and tensors that NumPy cannot hold
    array = None
  if array is None or not (_is_float(array.dtype) or np.issubdtype(array.dtype, np.integer)):
    raise UserError(f"{name} must be {expected}, got {describe_value(value)}")
  return array


def list_clips(name: str, clips: Any) -> list[Any]:
  """Returns the clips of an argument, which `check_frames` has yet to check; raises UserError if they are no list."""
  return [as_numpy_clip(clip) for clip in require_list(name, clips, "clips, uint8 arrays (T, H, W, 3)")]


def as_numpy_clip(clip: Any) -> Any:
  """Returns an array of any library as one of NumPy, and anything else as it is; raises UserError for tracers."""
  return to_numpy("a clip", clip) if isinstance(clip, Tracer) or hasattr(clip, "__array__") else clip


def check_frames(clip: object) -> None:
  """Raises UserError unless a clip is frames, uint8 (T, H, W, 3)."""
  shape, dtype = np.shape(clip) if isinstance(clip, np.ndarray) else None, getattr(clip, "dtype", None)
  if shape is None or dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
    found = f"{dtype} {shape}" if shape is not None else type(clip).__name__
    raise UserError(f"clips are uint8 arrays (T, H, W, 3), as univid_jax.read_clip(path).frames is, got {found}")


def check_image(name: str, image: Any) -> np.ndarray:
  """Returns an image; raises UserError unless it is uint8 (H, W, 3)."""
  expected = "an image, uint8 (H, W, 3)"
  array = to_numpy(name, image, expected)
  if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
    raise UserError(f"{name} must be {expected}, got {describe_value(array)}")
  return array


def check_encodable(frames: Any) -> np.ndarray:
  """Returns a clip to encode; raises UserError unless it is (T, H, W, 3), uint8 or float within [-1, 1]."""
  expected = "a clip (T, H, W, 3), uint8 or float within [-1, 1]"
  array = to_numpy("frames", frames, expected)
  if array.ndim != 4 or array.shape[-1] != 3 or not (array.dtype == np.uint8 or _is_float(array.dtype)):
    raise UserError(f"frames must be {expected}, got {describe_value(array)}")
  if array.dtype != np.uint8 and array.size:
    low, high = float(array.min()), float(array.max())
    if not -1 - TOLERANCE <= low <= high <= 1 + TOLERANCE:
      raise UserError(f"frames must be {expected}, got {array.dtype} from {low:g} to {high:g}")
  return array


def check_latents(latents: Any, channels: int) -> np.ndarray:
  """Returns latents of any clip; raises UserError unless they are (t, y, x, c) with the model's channels."""
  array = to_numpy("latents", latents)
  if array.ndim != 4 or not array.size:
    raise UserError(f"latents must be an array (t, y, x, {channels}), got {describe_value(array)}")
  if array.shape[-1] != channels:
    raise UserError(f"latents of this model have {channels} channels, got {array.shape[-1]}")
  return np.asarray(array, np.float32)


def check_embedding(name: str, value: Any, config: DiTConfig, *, or_text: bool = False) -> np.ndarray:
  """Returns the embedding of a prompt; raises UserError unless it is (n, text_dim)."""
  expected = f"{'text, or ' if or_text else ''}an embedding (n, {config.text_dim})"
  array = to_numpy(name, value, expected)
  if array.ndim != 2 or array.shape[1] != config.text_dim:
    raise UserError(f"{name} must be {expected}, got {describe_value(array)}")
  return array


def choose_prompt(name: str, text: Any, embeds: Any, config: DiTConfig) -> Any:
  """Returns the embedding, an argument of this name, that replaces a text; the text itself if there is none."""
  return text if embeds is None else check_embedding(name, embeds, config)


def _is_float(dtype: DTypeLike) -> bool:
  return jnp.issubdtype(dtype, jnp.floating)  # bfloat16 too, which NumPy does not know as one
