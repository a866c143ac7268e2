"""What training has not shown a model is said before it samples."""

import dataclasses
import types

import numpy as np
import pytest

from tests.clip_files import write_image
from univid_jax.checkpoints.usage import Usage
from univid_jax.cli.training_differences import find_differences
from univid_jax.core.options import ClipFit
from univid_jax.data.clips import ContextClip

USAGE = Usage(sizes=((16, 24), (24, 16)), num_frames=17, fit=ClipFit.PAD, fps=8.0)


def find(folder, *, usage=USAGE, lengths=(17, 1), **changes):
  """Compares clips as in training, except for some changes."""
  clips = [
    ContextClip("", np.zeros((length, 1, 1, 3), np.uint8), 8.0 if length > 1 else None, "", ()) for length in lengths
  ]
  pipeline = types.SimpleNamespace(usage=usage)
  fitted = [str(write_image(folder / "wide.png", size=(30, 60)))]
  shown = dict(size=(24, 16), num_frames=17, fps=8.0, fit=ClipFit.PAD, fitted=fitted, videos=())
  return list(find_differences(pipeline, clips, **shown | changes).values())


@pytest.mark.parametrize(
  "changes, expected",
  [
    ({}, []),
    ({"num_frames": 1, "lengths": (1, 1)}, []),
    ({"num_frames": 5}, ["5 frames instead of 1 or 17"]),
    ({"lengths": (9, 5, 17)}, ["5 and 9 frames instead of 1 or 17"]),
    (
      {"size": (32, 48)},
      [
        "48 x 32 pixels (width x height) instead of 24 x 16 or 16 x 24, 4 times as many, "
        "which take at least 4 times as long"
      ],
    ),
    ({"size": (16, 16)}, ["16 x 16 pixels (width x height) instead of 24 x 16 or 16 x 24"]),
    ({"fit": ClipFit.CROP}, ["cropped instead of padded with black"]),
    ({"fit": ClipFit.CROP, "fitted": []}, []),
    (
      {"fit": ClipFit.CROP, "size": (30, 60)},
      [
        "60 x 30 pixels (width x height) instead of 24 x 16 or 16 x 24, 4.7 times as many, "
        "which take at least 4.7 times as long"
      ],
    ),
    ({"fps": 24000 / 1001}, ["23.976 frames per second instead of 8"]),
    ({"fps": 8 / 1.001}, []),
    ({"fps": None}, []),
  ],
)
def test_only_what_differs_is_found(tmp_path, changes, expected):
  assert find(tmp_path, **changes) == expected


def test_nothing_is_compared_with_a_training_that_is_not_known(tmp_path):
  changes = {"size": (32, 48), "num_frames": 5, "fit": ClipFit.CROP, "fps": 4.0}
  assert len(find(tmp_path, **changes)) == 4
  assert find(tmp_path, usage=Usage(is_known=False), **changes) == []
  assert len(find(tmp_path, usage=Usage(), **changes)) == 2, "any rate was known, and clips were cropped"


@pytest.mark.parametrize(
  "videos, expected",
  [
    ("iiii", []),
    ("iivv", []),
    ("iiiiii", []),
    ("ii", ["2 clips, the result included, instead of 4 or 6 (there is no example pair)"]),
    ("iiiiiiii", ["8 clips, the result included, instead of 4 or 6"]),
    ("viii", ["a sentence of video, image, image, image instead of those of context II or III"]),
    ("vvvv", ["a sentence of video, video, video, video instead of those of context II or III"]),
  ],
)
def test_kinds_of_sentences(tmp_path, videos, expected):
  """Known from the record of a run; nothing is said if that lacks them."""
  shown = [letter == "v" for letter in videos]
  usage = dataclasses.replace(USAGE, contexts=("II", "III"), clip_counts=(4, 6))
  assert find(tmp_path, usage=usage, videos=shown) == expected
  assert find(tmp_path, videos=shown) == []
