"""The computed tasks by name. To add one, write `draw` and `apply` functions and an entry here."""

from collections.abc import Mapping
from types import MappingProxyType

from univid_jax.config.data import TASK_MOTIONS
from univid_jax.data.tasks.base import Task, draw_nothing
from univid_jax.data.tasks.camera import camera_movement, draw_camera_movement, draw_flip, flip, reverse_time
from univid_jax.data.tasks.masks import draw_mask_colors, moving_mask, salient_mask
from univid_jax.data.tasks.photometric import (
  draw_duotone,
  draw_low_light,
  draw_scribble,
  duotone,
  greyscale,
  invert,
  invert_brightness,
  low_light,
  scribble,
  swap_channels,
)
from univid_jax.data.tasks.restoration import (
  add_noise,
  add_rain,
  blur,
  cover,
  draw_blur,
  draw_factor,
  draw_holes,
  draw_noise,
  draw_rain,
  shrink,
)

TASKS: dict[str, Task] = {
  "greyscale": Task(draw=draw_nothing, apply=greyscale, prompt_name="greyscale version"),
  "invert": Task(draw=draw_nothing, apply=invert, prompt_name="negative"),
  "invert_brightness": Task(
    draw=draw_nothing, apply=invert_brightness, prompt_name="version with its brightness inverted"
  ),
  "swap_channels": Task(draw=draw_nothing, apply=swap_channels, prompt_name="version with red and blue swapped"),
  "duotone": Task(draw=draw_duotone, apply=duotone, prompt_name="duotone version"),
  "low_light": Task(draw=draw_low_light, apply=low_light, prompt_name="low-light version"),
  "scribble": Task(draw=draw_scribble, apply=scribble, prompt_name="scribble map"),
  "inpainting": Task(draw=draw_holes, apply=cover, restores=True, prompt_name="completed version"),
  "colorization": Task(draw=draw_nothing, apply=greyscale, restores=True, prompt_name="colour version"),
  "super_resolution": Task(draw=draw_factor, apply=shrink, restores=True, prompt_name="high-resolution version"),
  "deblurring": Task(draw=draw_blur, apply=blur, restores=True, prompt_name="sharp version"),
  "denoising": Task(draw=draw_noise, apply=add_noise, varies=True, restores=True, prompt_name="version without noise"),
  "deraining": Task(draw=draw_rain, apply=add_rain, varies=True, restores=True, prompt_name="version without rain"),
  "flip": Task(draw=draw_flip, apply=flip, prompt_name="mirrored version"),
  "time_reversal": Task(
    draw=draw_nothing, apply=reverse_time, motion=TASK_MOTIONS["time_reversal"], prompt_name="version played backwards"
  ),
  "salient_object": Task(draw=draw_mask_colors, apply=salient_mask, prompt_name="salient object map"),
  "moving_object": Task(
    draw=draw_mask_colors, apply=moving_mask, motion=TASK_MOTIONS["moving_object"], prompt_name="moving object map"
  ),
  "camera_movement": Task(
    draw=draw_camera_movement,
    apply=camera_movement,
    reversible=False,
    motion=TASK_MOTIONS["camera_movement"],
    prompt_name="camera movement",
  ),
}

# The package's own, whatever is registered later.
BUILT_IN: Mapping[str, Task] = MappingProxyType(dict(TASKS))
