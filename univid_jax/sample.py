"""Paints B': python -m univid_jax.sample --checkpoint=DIR --clips=A.mp4,A2.mp4,B.mp4 --out=B2.mp4

A clip is an image (png, jpg), a video (mp4, webm, mov, mkv, gif), a folder of frames, or a .npy of uint8 (T, H, W, 3), of
any size and rate: it is resized and its middle cut out to the size that the model was trained on, and of a video the first
frames are used.
"""

from absl import flags

from univid_jax import cli

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a training run.", required=True)
CLIPS = flags.DEFINE_list("clips", None, "The context in order: A, A', B (or any odd number of clips).", required=True)
OUT = flags.DEFINE_string("out", None, "Where the painted clip goes: .png (an image), .mp4 (a video) or .npy.", required=True)
PROMPT = flags.DEFINE_string("prompt", "", "The text of the sentence.")
NUM_FRAMES = flags.DEFINE_integer("num_frames", None, "Frames to paint, 4n + 1; inferred by default.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 50, "Steps of the sampler.", lower_bound=1)
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", 1.0, "Classifier-free guidance; 1 is none.")
SHIFT = flags.DEFINE_float("shift", 5.0, "Shift of the noise levels toward noise.", lower_bound=0.0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")


def main() -> None:
  # After the flags: --help and wrong flags answer at once, without waiting for JAX.
  from univid_jax.data.video import fit_clip, read_clip, write_clip
  from univid_jax.pipeline import load_pipeline

  pipeline = load_pipeline(CHECKPOINT.value)
  clips, rates = [], []
  for path in CLIPS.value:
    clip = read_clip(path, max_frames=pipeline.num_frames)
    usable = 4 * ((len(clip.frames) - 1) // 4) + 1
    clips.append(fit_clip(clip.frames[:usable], pipeline.size))
    rates.append(clip.fps)
  out = pipeline.sample(clips, PROMPT.value, num_frames=NUM_FRAMES.value, num_inference_steps=STEPS.value,
                        guidance_scale=GUIDANCE_SCALE.value, shift=SHIFT.value, seed=SEED.value)
  write_clip(OUT.value, out.frames, fps=rates[-1] or next(filter(None, rates), None))
  height, width = out.frames.shape[1:3]
  print(f"painted {len(out.frames)} frame{'s' * (len(out.frames) > 1)} of {width}x{height}: {OUT.value}")


if __name__ == "__main__":
  cli.run(main)
