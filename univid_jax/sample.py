"""Samples B' from clips A, A', B.

  python -m univid_jax.sample --checkpoint=DIR [--lora=PATH] --clips=A.mp4,A2.mp4,B.mp4 --out=B2.mp4

A clip is an image, a video, a folder of frames, or a .npy of uint8 (T, H, W, 3), of any size and frame rate. It is read
as in training: resized to the size and resampled to the frame rate of training, if it had one; of a video the first
frames are used. What that changes is logged, and a .json next to the result says how it was made. Of a B that is longer
than the clips of training, all frames are sampled at its own frame rate, unless --num_frames says how many; if that is
interrupted, the same command resumes it.

With --queries=B1.mp4,B2.mp4 (or a folder), --clips are the example pairs alone, and --out is a folder.
"""

import dataclasses
import sys
from typing import Any

from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.cli.sampling_flags import SamplingFlags

FLAGS = CommandFlags(__doc__)
SAMPLING = SamplingFlags(FLAGS, clips_required=False)
ACCELERATE = FLAGS.accelerate()
STEP_CACHE = FLAGS.string(
  "step_cache",
  None,
  "magcache[:THRESHOLD[:MAX_SKIP[:RETENTION]]], by default 0.12, 2 and 0.2: skip steps, after univid-calibrate.",
)
QUERIES = FLAGS.strings("queries", [], "Several B for the same example pairs: clips, or a folder of clips.")
FIRST_FRAME = FLAGS.string(
  "first_frame", None, "An image: the first frame of B', for models that keep it (TI2V); --clips may then be empty."
)
OUT = FLAGS.string("out", None, "The result: .png, .mp4 (or another video), .npy, or FOLDER/ for PNGs.", required=True)
GRID = FLAGS.switch("grid", False, "Also write A | A' | B | B' side by side, with _grid in its name.")
COPY_AUDIO = FLAGS.switch("copy_audio", False, "Give B' the sound of B.")
CARRY_CONTEXT = FLAGS.switch(
  "carry_context",
  False,
  "Sample the windows of a whole video one after the other, each with the last one as an example.",
)
WARM_UP = FLAGS.switch("warm_up", False, "Compile the programs, for the compilation cache, and write no result.")
PROFILE = FLAGS.profile("OUT's folder")


@app.command(FLAGS)
def main() -> None:
  from univid_jax.cli import sampling
  from univid_jax.cli.compilation import enable_compilation_cache
  from univid_jax.cli.requests import RequestRunner
  from univid_jax.cli.step_caches import parse_step_cache
  from univid_jax.inference.accelerate import read_accelerator
  from univid_jax.inference.plan import SamplingPlan
  from univid_jax.inference.ratio_tables import TableKey, read_table, require_tables

  enable_compilation_cache()
  # What is wrong is reported before a model is loaded.
  SAMPLING.check()
  requests = sampling.plan_requests(SAMPLING.clips.value or [], QUERIES.value, OUT.value, first_frame=FIRST_FRAME.value)
  sampling.check_outputs(requests)
  cache = parse_step_cache(STEP_CACHE.value) if STEP_CACHE.value else None
  verify = SAMPLING.verification.verify_weights
  accelerator = read_accelerator(ACCELERATE.value, verify=verify) if ACCELERATE.value else None
  SamplingPlan.of(accelerator and accelerator.kind, **SAMPLING.steps, step_cache=cache)
  if cache is not None:
    require_tables(SAMPLING.checkpoint.value)

  pipeline, origin = SAMPLING.load(accelerator)
  arguments: dict[str, Any] = {
    "num_frames": SAMPLING.num_frames.value,
    "negative_prompt": SAMPLING.negative_prompt.value,
    "seed": SAMPLING.seed.value,
    "prompt": SAMPLING.choose_prompt(pipeline),
    **sampling.resolve_steps(pipeline, SAMPLING.steps),
  }
  if cache is not None:
    key = TableKey.of(pipeline, origin, pipeline.plan(**SAMPLING.steps))
    arguments["step_cache"] = dataclasses.replace(cache, ratios=read_table(SAMPLING.checkpoint.value, key))
  runner = RequestRunner(
    pipeline,
    SAMPLING.choose_format(pipeline),
    arguments,
    {**origin.to_json(), "merge_lora": SAMPLING.merge_lora.value},
    grid=GRID.value,
    copy_audio=COPY_AUDIO.value,
    keep_size=SAMPLING.keep_size,
    video_fps=SAMPLING.fps,
    carry_context=CARRY_CONTEXT.value,
    first_frame=FIRST_FRAME.value,
  )
  if WARM_UP.value:
    print(runner.warm_up(requests))
    return
  for request in requests:
    print(runner.run(request))
  if PROFILE.value:
    print(runner.profile(requests[0], PROFILE.value))


if __name__ == "__main__":
  sys.exit(main())
