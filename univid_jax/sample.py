"""Samples B' from clips A, A', B.

  python -m univid_jax.sample --checkpoint=DIR [--lora=PATH] --clips=A.mp4,A2.mp4,B.mp4 --out=B2.mp4

A clip is an image, a video, a folder of frames, or a .npy of uint8 (T, H, W, 3), of any size and frame rate. It is read
as in training: resized to the size and resampled to the frame rate of training, if it had one; of a video the first
frames are used. What that changes is logged, and a .json next to the result says how it was made. Of a B that is longer
than the clips of training, all frames are sampled at its own frame rate, unless --num_frames says how many; if that is
interrupted, the same command resumes it.

With --queries=B1.mp4,B2.mp4 (or a folder), --clips are the example pairs alone, and --out is a folder. Queries are
sampled in batches, which several processes share; results that are there already are kept.
"""

import logging
import sys

from tqdm import tqdm

from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags, UsageError
from univid_jax.cli.sample_command import SampleCommand

FLAGS = CommandFlags(__doc__)
SAMPLE = SampleCommand(FLAGS)
WARM_UP = FLAGS.switch("warm_up", False, "Compile the programs, for the compilation cache, and write no result.")
PROFILE = FLAGS.profile("OUT's folder")
PROCESSES = FLAGS.processes()

log = logging.getLogger("univid_jax.sample")  # also when run as __main__


@app.command(FLAGS)
def main() -> None:
  from univid_jax.cli.compilation import enable_compilation_cache
  from univid_jax.cli.distributed import start_processes
  from univid_jax.runtime import supervisor

  if WARM_UP.value:
    FLAGS.refuse("--warm_up samples nothing", [PROFILE.name])
  requests = SAMPLE.plan_requests()
  if SAMPLE.has_queries:
    start_processes(PROCESSES)
  elif any(PROCESSES.given):
    raise UsageError("several processes share the queries of --queries, and there are none")
  enable_compilation_cache()
  log.info("loading %s", SAMPLE.sampling.checkpoint.value)
  runner = SAMPLE.runner(*SAMPLE.load())
  if WARM_UP.value:
    print(SAMPLE.warm_up(runner, requests))
    return
  supervisor.current().can_continue = SAMPLE.has_queries or runner.find_whole(requests[0]) is not None
  log.info("compiling with the first step: seconds if it is cached, else up to several minutes")
  for line in SAMPLE.run(runner, requests):
    tqdm.write(line)  # above the bar
  if PROFILE.value:
    print(runner.profile(requests[0], PROFILE.value))


if __name__ == "__main__":
  sys.exit(main())
