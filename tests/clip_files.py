"""Small clips and data sets on disk, and what tests read back from them."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from univid_jax.core.options import PromptStyle
from univid_jax.core.sentence import read_frames
from univid_jax.data.clips import ClipFormat
from univid_jax.data.media.writer import write_clip
from univid_jax.data.sources.base import DrawOptions

FORM = ClipFormat(size=(16, 24), num_frames=5)


def draw_options(**changes) -> DrawOptions:
  defaults = dict(
    contexts={"I": 1.0, "II": 1.0, "III": 1.0, "IV": 1.0},
    num_clips={4: 1.0},
    max_video_clips=0,
    reverse_probability=0.0,
    prompt_style=PromptStyle.DETAILED,
    prompt_dropout=0.0,
    variants=8,
    seed=0,
  )
  return DrawOptions(**(defaults | changes))


def write_video(path, count, *, shade=0, size=(32, 48), fps=8):
  """Writes a video whose frame i has the grey value shade + 8 i, modulo 256."""
  frames = np.stack([np.full((*size, 3), (shade + 8 * i) % 256, np.uint8) for i in range(count)])
  write_clip(path, frames, fps=fps)
  return path


def write_image(path, *, shade=0, size=(30, 40)):
  Image.fromarray(np.full((*size, 3), shade, np.uint8)).save(path)
  return path


def write_table(folder, records, header=("file_name", "text")):
  with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([header, *records])


def write_metadata(folder: Path) -> Path:
  """Writes a table of two files, one beside it and one in train/."""
  (folder / "train").mkdir(parents=True)
  write_video(folder / "one é.mp4", 24)
  write_video(folder / "train" / "two.mp4", 28)
  write_table(folder, [("one é.mp4", "first"), ("two.mp4", "second")])
  return folder


def write_pairs(folder: Path) -> Path:
  """Writes three pairs of each of two tasks: videos to videos, images to images."""
  for number, name in enumerate(("a", "b b", "c")):
    pair = folder / "depth map" / name
    pair.mkdir(parents=True)
    write_video(pair / "source.mp4", 6, shade=40 * number)
    write_video(pair / "target.mp4", 7, shade=40 * number + 4)
    pair = folder / "edges" / name
    pair.mkdir(parents=True)
    for part in ("source.png", "target.jpg"):
      write_image(pair / part, shade=40 * number)
  return folder


def read_greys(clip):
  """Returns the grey value of each frame, rounded to a multiple of 4."""
  return [int(round(float(frame.mean()) / 4) * 4) for frame in read_frames(clip)]


def read_lengths(sentence):
  return [len(read_frames(clip)) for clip in sentence.clips]


def write_tfds(folder: Path, *, seed: int = 0) -> str:
  """Builds the TFDS data set `scenes` of eight images with labels and depth, and returns its `data_dir`."""
  tfds = pytest.importorskip("tensorflow_datasets")
  rng = np.random.default_rng(seed)
  folder.mkdir(exist_ok=True)
  paths = []
  for index in range(8):
    path = folder / f"{index}.png"
    Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(path)
    paths.append(path)

  with tfds.core.registered.skip_registration():

    class Scenes(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")

      def _info(self):
        return self.dataset_info_from_configs(
          features=tfds.features.FeaturesDict(
            {
              "image": tfds.features.Image(shape=(None, None, 3)),
              "labels": tfds.features.Tensor(shape=(20, 30), dtype=np.uint8),
              "depth": tfds.features.Tensor(shape=(20, 30, 1), dtype=np.float32),
            }
          )
        )

      def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

      def _generate_examples(self):
        for index, path in enumerate(paths):
          yield (
            index,
            {
              "image": str(path),
              "labels": np.full((20, 30), index, np.uint8),
              "depth": np.linspace(1, 2, 600, dtype=np.float32).reshape(20, 30, 1),
            },
          )

  Scenes(data_dir=str(folder / "data"), file_format="array_record").download_and_prepare()
  return str(folder / "data")
