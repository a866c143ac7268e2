"""Samples B' from clips A, A', B.

  python -m univid_jax.sample --checkpoint=DIR [--lora=PATH] --clips=A.mp4,A2.mp4,B.mp4 --out=B2.mp4

A clip is an image, a video, a folder of frames, or a .npy of uint8 (T, H, W, 3), of any size and frame rate. It is read
as in training: resized to the size and resampled to the frame rate of training, if it had one; of a video the first
frames are used. What that changes is logged, and a .json next to the result says how it was made.

With --queries=B1.mp4,B2.mp4 (or a folder), --clips are the example pairs alone, and --out is a folder.
"""

import sys
from typing import Any

from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags, UsageError
from univid_jax.core.options import MAX_SEED, MAX_STEPS, Attention, ClipFit

FLAGS = CommandFlags(__doc__)
CHECKPOINT, LORA, DTYPE, STEP = FLAGS.checkpoint(), FLAGS.lora(), FLAGS.dtype(), FLAGS.step()
MERGE_LORA = FLAGS.switch("merge_lora", False, "Add LoRAs to the weights: faster, equal up to rounding.")
LORA_SKIP_UNMATCHED, VERIFICATION = FLAGS.lora_skip_unmatched(), FLAGS.verification()
ATTENTION = FLAGS.choice("attention", None, list(Attention), "Default: what the model was trained with.")
OFFLOAD_INACTIVE = FLAGS.switch(
  "offload_inactive", False, "Keep only the expert that is in use in device memory, of a base with two."
)
CONTEXT_TIMESTEP = FLAGS.choice(
  "context_timestep", None, ["target", "zero"], "Timestep of the context; default: what the model was trained with."
)
CLIPS = FLAGS.strings("clips", None, "The context in order: A, A', B, or any odd number of clips.", required=True)
QUERIES = FLAGS.strings("queries", [], "Several B for the same example pairs: clips, or a folder of clips.")
OUT = FLAGS.string("out", None, "The result: .png, .mp4 (or another video), .npy, or FOLDER/ for PNGs.", required=True)
GRID = FLAGS.switch("grid", False, "Also write A | A' | B | B' side by side, with _grid in its name.")
PROMPT = FLAGS.string("prompt", None, "Text of the sentence; default: none.")
TASK = FLAGS.string(
  "task", None, "Use the prompt of this task: a task of training, or one of the paper, such as depth map."
)
NEGATIVE_PROMPT = FLAGS.string("negative_prompt", "", "What guidance moves away from.")
SIZE = FLAGS.string("size", None, "HEIGHTxWIDTH in pixels; default: as in training.")
NUM_FRAMES = FLAGS.integer(
  "num_frames", None, "Frames of B', 4n + 1, and of videos in the context; default: as in training.", lower_bound=1
)
FIT = FLAGS.choice("fit", None, list(ClipFit), "How clips are brought to the size; default: as in training.")
FPS = FLAGS.number("fps", None, "Frame rate that videos are resampled to; 0 keeps theirs; default: as in training.")
COPY_AUDIO = FLAGS.switch("copy_audio", False, "Give B' the sound of B.")
SOLVER = FLAGS.choice(
  "solver",
  None,
  ["euler", "unipc", "distilled"],
  "euler (default) is the reference's; unipc needs fewer steps; distilled is the four steps of step-distilled models.",
)
STEPS = FLAGS.integer(
  "steps", None, "Sampling steps; default: 50, or those of the solver.", lower_bound=1, upper_bound=MAX_STEPS
)
SIGMAS = FLAGS.strings(
  "sigmas", [], "The noise level before each Euler step, descending within (0, 1], instead of --steps and --shift."
)
GUIDANCE_SCALE = FLAGS.string(
  "guidance_scale", None, "Classifier-free guidance; 1 (default) is none. LOW,HIGH are those of two experts, by noise."
)
ACCELERATE = FLAGS.accelerate()
SHIFT = FLAGS.number("shift", None, "Shift of the noise levels toward noise; default: as in training.")
SEED = FLAGS.integer("seed", 0, "Seed of the noise.", lower_bound=-MAX_SEED - 1, upper_bound=MAX_SEED)
PROFILE = FLAGS.profile("OUT's folder")


@app.command(FLAGS)
def main() -> None:
  import univid_jax
  from univid_jax.checkpoints.origin import Origin
  from univid_jax.cli import sampling
  from univid_jax.cli.compilation import enable_compilation_cache
  from univid_jax.inference.accelerate import read_accelerator
  from univid_jax.inference.plan import SamplingPlan

  enable_compilation_cache()
  arguments: dict[str, Any] = {flag.name: flag.value for flag in (NUM_FRAMES, NEGATIVE_PROMPT, SEED)}
  steps: dict[str, Any] = {"num_inference_steps": STEPS.value, "shift": SHIFT.value, "solver": SOLVER.value}
  steps["guidance_scale"] = sampling.parse_guidance_scale(GUIDANCE_SCALE.value) if GUIDANCE_SCALE.value else None
  steps["sigmas"] = sampling.parse_sigmas(SIGMAS.value)
  if PROMPT.value is not None and TASK.value is not None:
    raise UsageError("--prompt and --task exclude each other")
  requests = sampling.plan_requests(CLIPS.value, QUERIES.value, OUT.value)
  sampling.check_outputs(requests)
  size = sampling.parse_size(SIZE.value) if SIZE.value else None
  options = (DTYPE, MERGE_LORA, LORA_SKIP_UNMATCHED, ATTENTION, CONTEXT_TIMESTEP, OFFLOAD_INACTIVE)
  loading: dict[str, Any] = {flag.name: flag.value for flag in options} | VERIFICATION.value
  loras = [sampling.parse_lora(item) for item in LORA.value]
  verify = VERIFICATION.verify_weights
  accelerator = read_accelerator(ACCELERATE.value, verify=verify) if ACCELERATE.value else None
  SamplingPlan.of(accelerator and accelerator.kind, **steps)  # what is wrong is reported before a model is loaded
  origin = Origin.of(
    CHECKPOINT.value, step=STEP.value, loras=loras, accelerator=accelerator and accelerator.files, **VERIFICATION.value
  )
  pipeline = univid_jax.load_pipeline(
    CHECKPOINT.value, lora=sampling.group_loras(loras), accelerate=accelerator, step=origin.step, **loading
  )
  arguments |= sampling.resolve_steps(pipeline, steps)
  if TASK.value is not None:
    arguments["prompt"] = sampling.task_prompt(TASK.value, pipeline.usage.prompts)
  else:
    arguments["prompt"] = PROMPT.value or ""
  form = sampling.choose_format(
    pipeline.clip_format, size=size, num_frames=NUM_FRAMES.value, fit=FIT.value, fps=FPS.value
  )
  runner = sampling.RequestRunner(
    pipeline,
    form,
    arguments,
    {**origin.to_json(), "merge_lora": MERGE_LORA.value},
    grid=GRID.value,
    copy_audio=COPY_AUDIO.value,
  )
  for request in requests:
    print(runner.run(request))
  if PROFILE.value:
    print(runner.profile(requests[0], PROFILE.value))


if __name__ == "__main__":
  sys.exit(main())
