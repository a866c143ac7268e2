"""Paints B': python -m univid_jax.sample --checkpoint=DIR [--lora=PATH] --clips=A.mp4,A2.mp4,B.mp4 --out=B2.mp4

A clip is an image (png, jpg), a video (mp4, webm, mov, mkv, gif), a folder of frames, or a .npy of uint8 (T, H, W, 3), of
any size and rate: it is resized and its middle cut out to the size that the model was trained on, and of a video the first
frames are used.
"""

import re

from absl import flags

from univid_jax import cli

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A converted checkpoint, or the workdir of a training run.", required=True)
LORA = flags.DEFINE_list("lora", [], "LoRA files or folders; PATH:WEIGHT gives one a weight other than 1.")
MERGE_LORA = flags.DEFINE_bool("merge_lora", False, "Add LoRAs to the weights: a little faster, the same result to rounding.")
DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Of the model; bfloat16, or what a run was trained in.")
CLIPS = flags.DEFINE_list("clips", None, "The context in order: A, A', B (or any odd number of clips).", required=True)
OUT = flags.DEFINE_string("out", None, "Where the painted clip goes: .png (an image), .mp4 (a video) or .npy.", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "The text of the sentence; none by default.")
TASK = flags.DEFINE_string("task", None, "Name of a task, for the paper's detailed prompt: depth map, camera movement, ...")
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", "", "What guidance leads away from.")
SIZE = flags.DEFINE_string("size", None, "HEIGHTxWIDTH in pixels; that of the training by default.")
NUM_FRAMES = flags.DEFINE_integer("num_frames", None, "Frames to paint, 4n + 1; inferred by default.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 50, "Steps of the sampler.", lower_bound=1)
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", 1.0, "Classifier-free guidance; 1 is none.")
SHIFT = flags.DEFINE_float("shift", 5.0, "Shift of the noise levels toward noise.", lower_bound=0.0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")


def main() -> None:
  # After the flags: --help and wrong flags answer at once, without waiting for JAX.
  from tqdm import tqdm

  from univid_jax.data.sentences import prompt_for
  from univid_jax.data.video import read_context, write_clip
  from univid_jax.pipeline import load_pipeline

  if PROMPT.value is not None and TASK.value is not None:
    raise cli.UserError("give --prompt or --task, not both")
  prompt = prompt_for(TASK.value.replace("_", " "), "detailed") if TASK.value else PROMPT.value or ""
  pipeline = load_pipeline(CHECKPOINT.value, lora=[weighted(item) for item in LORA.value], dtype=DTYPE.value,
                           merge_lora=MERGE_LORA.value)
  size = parse_size(SIZE.value) if SIZE.value else pipeline.size
  clips, fps = read_context(CLIPS.value, num_frames=pipeline.num_frames, size=size)
  with tqdm(total=STEPS.value, desc="sample", unit="step") as bar:
    out = pipeline.sample(clips, prompt, num_frames=NUM_FRAMES.value, num_inference_steps=STEPS.value,
                          guidance_scale=GUIDANCE_SCALE.value, negative_prompt=NEGATIVE_PROMPT.value, shift=SHIFT.value,
                          seed=SEED.value, progress=lambda taken: bar.update(taken - bar.n))
  write_clip(OUT.value, out.frames, fps=fps)
  height, width = out.frames.shape[1:3]
  print(f"painted {len(out.frames)} frame{'s' * (len(out.frames) > 1)} of {width}x{height}: {OUT.value}")


def weighted(item: str) -> tuple[str, float]:
  """A LoRA's path and weight."""
  path, _, weight = item.rpartition(":")
  try:
    return (path, float(weight)) if path else (item, 1.0)
  except ValueError:
    return item, 1.0


def parse_size(text: str) -> tuple[int, int]:
  """HEIGHTxWIDTH as numbers.

  Raises:
    ValueError: it is something else.
  """
  match = re.fullmatch(r"(\d+)x(\d+)", text)
  if not match:
    raise ValueError(f"a size is HEIGHTxWIDTH, for instance 480x832, got {text!r}")
  return int(match[1]), int(match[2])


if __name__ == "__main__":
  cli.run(main)
