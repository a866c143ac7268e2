"""Seams of whole videos: how much B' changes between windows, compared with the same positions within a window.

  python -m benchmarks.seams --videos=FOLDER [--checkpoint=small] [--frames=150] [--steps=4]

B is the centre of the first frames of each video, played back and forth if there are too few; A' is the negative of A.
A change is the mean absolute difference of neighbouring frames, divided by that of B. Latent frames follow each other
within windows, too, so a seam is what a border between windows adds to that.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from univid_jax.cli import app
from univid_jax.cli.flags import CommandFlags
from univid_jax.core.dims import latent_frames
from univid_jax.core.errors import UserError

FLAGS = CommandFlags(__doc__)
VIDEOS = FLAGS.string("videos", None, "Folder of videos.", required=True)
CHECKPOINT = FLAGS.string("checkpoint", "small", "As of sample.")
FRAMES = FLAGS.integer("frames", 150, "Of B.", lower_bound=20)
STEPS = FLAGS.integer("steps", 4, "Euler steps.", lower_bound=1)

NUM_SAMPLES = 10  # of a single window, spread over a video
SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi")


def changes(frames: np.ndarray) -> np.ndarray:
  return np.abs(np.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3))


@app.command(FLAGS)
def main() -> None:
  from univid_jax import load_pipeline, read_clip
  from univid_jax.data.resizing import resize_and_crop
  from univid_jax.data.sources.photos import PhotoSource
  from univid_jax.inference.windows import Windows

  paths = sorted(path for path in Path(VIDEOS.value).iterdir() if path.suffix in SUFFIXES)
  if not paths:
    raise UserError(f"{VIDEOS.value} has no videos")
  pipe, count = load_pipeline(CHECKPOINT.value), FRAMES.value
  assert pipe.usage is not None
  (size, *_), length, stride = pipe.usage.sizes, pipe.usage.num_frames, pipe.encoders.codec.temporal_stride
  a = PhotoSource.bundled("train").clip(0, np.random.default_rng(0), num_frames=length, size=size)
  options: dict[str, Any] = {"num_inference_steps": STEPS.value, "seed": 0}
  print("| video | windows | between windows | within a window | ratio |\n|---|---|---|---|---|")
  for path in paths:
    clip = resize_and_crop(read_clip(path).frames, size)
    b = np.concatenate([clip, clip[-2:0:-1]] * -(-count // len(clip)))[:count]
    video = pipe.sample_video([a, 255 - a], b, **options)
    made = np.concatenate(list(video))
    groups = latent_frames(length, temporal_stride=stride) - 1
    windows = Windows.spread(count, length=1 + groups, temporal_stride=stride, overlap=groups // 2)
    borders = [stride * start for start in windows.starts[1:] if stride * start < count - 1]
    between = changes(made)[borders].sum() / changes(b)[borders].sum()
    starts = np.linspace(0, count - length, NUM_SAMPLES).astype(int)
    alone = [
      pipe.sample([a, 255 - a, b[start : start + length]], num_frames=length, **options).frames for start in starts
    ]
    inner = np.arange(stride, length - 1, stride)
    within = sum(changes(frames)[inner].sum() for frames in alone) / sum(
      changes(b[start : start + length])[inner].sum() for start in starts
    )
    print(f"| {path.name} | {video.num_windows} | {between:.2f} | {within:.2f} | {between / within:.2f} |", flush=True)


if __name__ == "__main__":
  sys.exit(main())
