"""Tasks that change colours and brightness, and scribbles."""

import numpy as np
import scipy

from univid_jax.data.tasks.base import Params, UnitClip, blend, compute_luma, mix_channels


def greyscale(clip: UnitClip) -> UnitClip:
  return np.concatenate([compute_luma(clip)] * 3, axis=-1)


def invert(clip: UnitClip) -> UnitClip:
  return 1 - clip


def invert_brightness(clip: UnitClip) -> UnitClip:
  """Makes dark pixels light and light ones dark; keeps hues as far as the range of values allows."""
  out = mix_channels(clip, np.eye(3) - 2 / 3)
  out += 1
  return np.clip(out, 0, 1, out=out)


def swap_channels(clip: UnitClip) -> UnitClip:
  """Swaps red and blue."""
  return clip[..., ::-1]


def draw_duotone(rng: np.random.Generator) -> Params:
  """Draws a dark colour and its light complement, swapped half of the time."""
  dark = rng.uniform(0, 0.3, 3)
  colors = [dark.tolist(), (1 - dark).tolist()]
  dark, light = colors if rng.random() < 0.5 else colors[::-1]
  return {"dark": dark, "light": light}


def duotone(clip: UnitClip, *, dark, light) -> UnitClip:
  """Maps brightness to a gradient from one colour to another."""
  return blend(compute_luma(clip)[..., 0], dark, light)


def draw_low_light(rng: np.random.Generator) -> Params:
  return {"gain": float(rng.uniform(0.15, 0.5)), "gamma": float(rng.uniform(1.0, 1.8))}


def low_light(clip: UnitClip, *, gain: float, gamma: float) -> UnitClip:
  """Simulates a short exposure."""
  out = clip**gamma
  out *= gain
  return out


def draw_scribble(rng: np.random.Generator) -> Params:
  """Draws ink on paper or chalk on a board, each in a random colour."""
  paper, ink = rng.uniform(0.75, 1, 3), rng.uniform(0, 0.4, 3)
  if rng.random() < 0.5:
    paper, ink = 1 - paper, 1 - ink
  return {"paper": paper.tolist(), "ink": ink.tolist()}


def scribble(clip: UnitClip, *, paper, ink) -> UnitClip:
  """Draws soft edges (the gradient of the smoothed brightness) in one colour on another."""
  grey = compute_luma(clip)[..., 0]
  down, across = (scipy.ndimage.gaussian_filter(grey, (0, 1, 1), order=order) for order in ((0, 1, 0), (0, 0, 1)))
  return blend(np.clip(4 * np.hypot(down, across), 0, 1), paper, ink)
