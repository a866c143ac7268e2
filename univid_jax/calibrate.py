"""Measures what step caching needs to know about a model, in one sample, and stores it with the checkpoint.

  python -m univid_jax.calibrate --checkpoint=DIR [--lora=PATH] --clips=A.mp4,A2.mp4,B.mp4 [--steps=50]

Give the flags of the samples to come: ratios are those of one model, solver, noise levels and guidance. They hardly
depend on clips and seed. `sample --step_cache=magcache` finds them in CHECKPOINT/step_cache.json
(for a base in the package in ~/.cache/univid_jax/bases).
"""

import os
import sys
from pathlib import Path

from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.cli.sampling_flags import SamplingFlags

FLAGS = CommandFlags(__doc__)
SAMPLING = SamplingFlags(FLAGS)


@app.command(FLAGS)
def main() -> None:
  from univid_jax.checkpoints.built_in import BUILT_IN, measurements_folder
  from univid_jax.cli.compilation import enable_compilation_cache
  from univid_jax.cli.context_reader import ContextReader
  from univid_jax.cli.sampling import Request, SamplingArguments, check_clips, check_readable
  from univid_jax.cli.step_caches import describe_schedules, measure_ratios
  from univid_jax.core.paths import require_writable
  from univid_jax.inference.ratio_tables import TableKey, write_table

  enable_compilation_cache()
  SAMPLING.check()
  SAMPLING.check_steps()
  check_clips(SAMPLING.clips.value)
  check_readable(SAMPLING.clips.value)
  folder = measurements_folder(SAMPLING.checkpoint.value)
  if SAMPLING.checkpoint.value in BUILT_IN or os.path.isdir(folder):  # else in a bucket, or missing: loading reports it
    require_writable(folder)
  pipeline, origin = SAMPLING.load()
  reader = ContextReader(pipeline, SAMPLING.choose_format(pipeline), keep_size=SAMPLING.keep_size)
  clips = [clip.frames for clip in reader.read(Request(tuple(SAMPLING.clips.value or ()), Path()))]
  arguments = SamplingArguments(
    num_frames=SAMPLING.num_frames.value,
    prompt=SAMPLING.choose_prompt(pipeline),
    negative_prompt=SAMPLING.negative_prompt.value,
    seed=SAMPLING.seed.value,
    steps=SAMPLING.steps,
  )
  ratios = measure_ratios(pipeline, clips, arguments)
  plan = pipeline.make_plan(arguments.steps)
  for line in describe_schedules(pipeline, plan, ratios):
    print(line)
  print(f"ratios: {write_table(SAMPLING.checkpoint.value, TableKey.for_plan(pipeline, origin, plan), ratios)}")


if __name__ == "__main__":
  sys.exit(main())
