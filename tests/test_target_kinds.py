"""Labels, depth and normals as colours, and back."""

import math

import numpy as np
import pytest

from univid_jax.config.boundary import override
from univid_jax.config.presets import tiny
from univid_jax.core.errors import UserError
from univid_jax.core.options import TargetKind
from univid_jax.data.resizing import resize_and_crop, resize_and_pad
from univid_jax.data.target_kinds import (
  COMPUTED_KINDS,
  depth_to_image,
  image_to_depth,
  image_to_normals,
  known_pixels,
  label_colors,
  normals_to_image,
  own_kinds,
  read_palette,
  resampling,
)


def test_labels_have_the_colors_of_pascal_voc():
  assert label_colors(np.array([0, 1, 2, 3, 8, 15])).tolist() == [
    [0, 0, 0],
    [128, 0, 0],
    [0, 128, 0],
    [128, 128, 0],
    [64, 0, 0],
    [192, 128, 128],
  ]


def test_depth_survives_the_round_trip():
  """To 1/200 of the range; unknown depth stays unknown, and depth beyond the range is clipped."""
  depth = np.array([0.5, 0.7, 3.0, 9.9, 10.0, 0.0, np.nan, np.inf, -1.0, 20.0])[:, None]
  image = depth_to_image(depth, (0.5, 10.0))
  assert known_pixels(image).tolist() == [True] * 5 + [False] * 4 + [True]
  np.testing.assert_allclose(image_to_depth(image, (0.5, 10.0))[:5], depth[:5, 0], atol=9.5 / 200)
  assert image_to_depth(image, (0.5, 10.0))[9] == pytest.approx(10, abs=0.05)


def test_normals_survive_the_round_trip():
  normals = np.array([[0.0, 0.6, 0.8], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
  image = normals_to_image(normals)
  assert known_pixels(image).tolist() == [True, True, False]
  np.testing.assert_allclose(image_to_normals(image)[:2], normals[:2], atol=1 / 127)


def test_palettes(tmp_path):
  path = tmp_path / "palette.txt"
  path.write_text("0 0 0\n120,120,120\n\n180 120 120\n")
  assert read_palette(str(path)).tolist() == [[0, 0, 0], [120, 120, 120], [180, 120, 120]]
  assert len(read_palette("")) == 256
  for text in ("a b c", "1 2\n", "0 0 256", "1 2 3\n4 5"):
    path.write_text(text)
    with pytest.raises(UserError, match="is not a palette"):
      read_palette(str(path))


def test_resizing_labels_adds_no_colors():
  labels = label_colors(np.random.default_rng(0).integers(0, 9, (1, 4, 6)).repeat(6, 1).repeat(6, 2))
  mixed, kept = (
    resize_and_crop(labels, (32, 48), resample=resampling(kind)) for kind in (TargetKind.IMAGE, TargetKind.SEGMENTATION)
  )
  colors = {tuple(color) for color in labels.reshape(-1, 3)}
  assert {tuple(color) for color in kept.reshape(-1, 3)} <= colors < {tuple(color) for color in mixed.reshape(-1, 3)}


@pytest.mark.parametrize("fit", [resize_and_crop, resize_and_pad])
@pytest.mark.parametrize("size", [(20, 24), (15, 24), (30, 70), (40, 48)])
def test_resizing_edges_keeps_thin_lines(fit, size):
  """A pixel is an edge where a pixel of an edge falls into it; without mixing, a pixel is the nearest one."""
  frame = np.random.default_rng(0).random((40, 48)) < 0.05
  edges = np.repeat(frame[None, ..., None] * np.uint8(255), 3, axis=-1)
  found = fit(edges, size, resample=resampling(TargetKind.EDGES))
  assert found.shape == (1, *size, 3) and set(np.unique(found)) == {0, 255}
  choose = max if fit is resize_and_crop else min
  scale = choose(length / own for length, own in zip(size, frame.shape))
  height, width = (min(length, round(own * scale)) for length, own in zip(size, frame.shape))
  expected = np.zeros((height, width), bool)
  ys, xs = np.indices((height, width)) + 0.5
  offsets = [(own - length / scale) / 2 for own, length in zip(frame.shape, (height, width))]
  if scale >= 1:
    expected = frame[(ys / scale + offsets[0]).astype(int), (xs / scale + offsets[1]).astype(int)]
  else:
    for y, x in np.argwhere(frame):
      cell = [math.floor((place + 0.5 - offset) * scale) for place, offset in zip((y, x), offsets)]
      if 0 <= cell[0] < height and 0 <= cell[1] < width:
        expected[cell[0], cell[1]] = True
  top, left = (size[0] - height) // 2, (size[1] - width) // 2
  np.testing.assert_array_equal(found[0, top : top + height, left : left + width, 0] > 0, expected)


def test_kinds_of_computed_configured_and_tfds_tasks():
  changes = {"data.kinds": {"rooms": "depth"}, "data.tfds.name": "scenes", "data.tfds.task": "labels"}
  kinds = own_kinds(override(tiny(), changes | {"data.tfds.kind": "segmentation"}).data)
  assert kinds == {"rooms": TargetKind.DEPTH, "labels": TargetKind.SEGMENTATION}
  assert COMPUTED_KINDS["scribble"] == TargetKind.EDGES and "invert" not in COMPUTED_KINDS
  assert COMPUTED_KINDS["outline"] == COMPUTED_KINDS["arc"] == TargetKind.GRID


def test_two_kinds_of_one_task_are_refused():
  changes = {"data.kinds": {"x": "depth"}, "data.tfds.name": "scenes", "data.tfds.task": "x"}
  assert own_kinds(override(tiny(), changes).data) == {"x": TargetKind.DEPTH}, "images that are drawn as depth is"
  with pytest.raises(
    UserError, match=r"config\.data\.kinds\.x is depth, but .*\.tfds\.kind of the same task is normals"
  ):
    override(tiny(), changes | {"data.tfds.kind": "normals"})
  changes = {"data.tfds.name": "scenes", "data.tfds.kind": "depth", "data.manifest": "m.jsonl"}
  with pytest.raises(UserError, match=r"that have no task: give config\.data\.tfds\.task"):
    override(tiny(), changes)
  override(tiny(), changes | {"data.tfds.task": "x"})
