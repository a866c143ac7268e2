"""Previews: what a sample looks like while it is sampled, at a fraction of the cost of a step."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, UInt8

from univid_jax.core.packed_row import PackedRow
from univid_jax.core.pixels import to_float, to_uint8
from univid_jax.core.protocols import Codec
from univid_jax.data.rows.packing import select_target_tokens
from univid_jax.inference.jobs import Job
from univid_jax.inference.sampler import Estimates

# Draws the current estimate of a result, uint8 (T, H, W, 3).
Draw = Callable[[], np.ndarray]
# Called after each step with the number of steps taken; drawing is left to it, because it takes time.
Preview = Callable[[int, Draw], None]

# Keeps the map well-defined when clips are of one colour; small next to latents of about unit power.
RIDGE = 1e-3


@dataclasses.dataclass(frozen=True)
class DrawnPreview:
  """Draws estimates for a preview.

  A codec without weights decodes the latents. Autoencoders would take longer than a step: instead a linear map from
  latents to colours, fitted to the context, draws one pixel per latent.

  Attributes:
    preview: to call.
    codec: of the model.
    context: the clips before the target, uint8 (T, H, W, 3).
    job: the sentence, with the latents of these clips.
  """

  preview: Preview
  codec: Codec
  context: Sequence[np.ndarray]
  job: Job

  def of_row(self, row: PackedRow, patch_size: tuple[int, int, int]) -> Estimates:
    """Returns what the sampler calls with the tokens of the job's row."""

    def estimates(taken: int, tokens: Float[np.ndarray, "b l p"]) -> None:
      target = select_target_tokens(tokens, row, (0, 1))
      self.preview(taken, lambda: to_uint8(self._draw(self.job.finish(target, patch_size))))

    return estimates

  def _draw(self, latents: Float[np.ndarray, "t y x c"]) -> Float[np.ndarray, "_T _H _W 3"]:
    return apply_colors(self._colors, latents) if self.codec.has_weights else self.codec.decode(latents)

  @functools.cached_property
  def _colors(self) -> Float[np.ndarray, "d 3"]:
    return fit_colors(self.codec, self.context, [np.asarray(clip) for clip in self.job.sentence.clips[:-1]])


def fit_colors(
  codec: Codec, clips: Sequence[UInt8[np.ndarray, "_T H W 3"]], latents: Sequence[Float[np.ndarray, "_t y x c"]]
) -> Float[np.ndarray, "d 3"]:
  """Fits the map from latents, and a constant, to the mean colours of the pixels in [-1, 1] that they encode."""
  x = np.concatenate([_with_constant(clip).reshape(-1, clip.shape[-1] + 1) for clip in latents]).astype(np.float64)
  y = np.concatenate([_mean_colors(codec, clip).reshape(-1, 3) for clip in clips])
  return np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y).astype(np.float32)


def apply_colors(
  colors: Float[np.ndarray, "d 3"], latents: Float[np.ndarray, "t y x c"]
) -> Float[np.ndarray, "t y x 3"]:
  """Maps latents to colours, about in [-1, 1]."""
  return _with_constant(latents) @ colors


def _with_constant(latents: Float[np.ndarray, "t y x c"]) -> Float[np.ndarray, "t y x d"]:
  return np.concatenate([latents, np.ones((*latents.shape[:-1], 1), np.float32)], axis=-1)


def _mean_colors(codec: Codec, clip: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, "t y x 3"]:
  """Averages pixels over what a latent encodes: the first frame, then groups of frames, in blocks."""
  frames, side, time = to_float(clip), codec.spatial_stride, codec.temporal_stride
  first, rest = frames[:1], frames[1:].reshape(-1, time, *frames.shape[1:]).mean(axis=1)
  means = np.concatenate([first, rest])
  t, height, width, _ = means.shape
  return means.reshape(t, height // side, side, width // side, side, 3).mean(axis=(2, 4))
