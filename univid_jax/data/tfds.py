"""TFDS data sets as pairs, and what their features become: label maps, depth and normals as pictures."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from univid_jax.data.clips import ClipFormat, array_clip
from univid_jax.data.datasets import Drawing, Dropped, Pair, PairSentences, Shot, joined


def open_tfds(options: Mapping[str, Any], form: ClipFormat, drawing: Drawing) -> tuple[PairSentences, list[Dropped]]:
  """A TFDS data set as pairs, through `tfds.data_source` (which needs no TensorFlow).

  Args:
    options: name, split, data_dir (or ""), task, source and target (names of features), kind of the target: "image" (images and
      videos as they are), "labels" (numbers to the colours of `palette_color`), "depth" (near is bright) or "normals" ([-1, 1]).
    form: size and lengths.
    drawing: how sentences are drawn.

  Raises:
    ValueError: there is no such data set or feature.
  """
  import tensorflow_datasets as tfds
  try:
    source = tfds.data_source(options["name"], split=options["split"], data_dir=options["data_dir"] or None)
  except Exception as error:  # TFDS raises many kinds
    raise ValueError(f"TFDS has no {options['name']} with split {options['split']} here: {str(error).splitlines()[0]}") from error
  features = source.dataset_info.features
  absent = [name for name in (options["source"], options["target"]) if name not in features]
  if absent:
    raise ValueError(f"{options['name']} has no feature {absent[0]!r}; there are {', '.join(features)}")
  identity = f"{source.dataset_info.full_name}|{options['split']}"

  def shot(index, name, kind):
    def read(count):
      return to_frames(source[index][name], kind)[:count]
    frames, height, width, _ = to_frames(source[index][name], kind).shape
    own, key = form.for_shape((height, width)), f"{identity}|{index}|{name}|{kind}"
    return Shot(frames, lambda count: array_clip(f"{key}|{count}", lambda: read(count), own), (height, width))

  pairs, dropped = [], []
  for index in range(len(source)):
    try:
      first, second = shot(index, options["source"], "image"), shot(index, options["target"], options["kind"])
      pairs.append(Pair(options["task"], str(index), first, second, form.for_shape(first.size).size))
    except ValueError as error:
      dropped.append(Dropped(f"{options['name']} {index}", str(error)))
  return joined(pairs, dropped, form, drawing)


def to_frames(value: Any, kind: str) -> np.ndarray:
  """A feature of a data set as uint8 (T, H, W, 3).

  Args:
    value: an array (H, W[, C]) or (T, H, W, C), or the bytes of an mp4.
    kind: "image", "labels", "depth" or "normals".
  """
  if isinstance(value, bytes):
    import io

    import av
    with av.open(io.BytesIO(value)) as container:
      return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
  array = np.asarray(value)
  if array.ndim == 2:
    array = array[..., None]
  array = array[None] if array.ndim == 3 else array
  if array.ndim != 4:
    raise ValueError(f"a feature of shape {np.shape(value)} is no image and no video")
  if kind == "labels":
    return palette_color(array[..., 0])
  if kind == "depth":
    depth = array[..., :1].astype(np.float64)
    known = np.isfinite(depth) & (depth > 0)
    near, far = (depth[known].min(), depth[known].max()) if known.any() else (0.0, 1.0)
    gray = np.where(known, 255 * (far - depth) / max(far - near, 1e-9), 0)
    return np.repeat(gray.round().astype(np.uint8), 3, axis=-1)
  if kind == "normals":
    return ((np.clip(array, -1, 1) + 1) * 127.5).round().astype(np.uint8)
  if kind != "image":
    raise ValueError(f"a feature is read as image, labels, depth or normals, got {kind!r}")
  if array.dtype != np.uint8:
    raise ValueError(f"images are uint8, got {array.dtype}")
  return array if array.shape[-1] == 3 else np.repeat(array[..., :1], 3, axis=-1)


def palette_color(labels: np.ndarray) -> np.ndarray:
  """Pascal VOC's colours: the bits of a label spread over red, green and blue, the highest first; label 0 is black."""
  labels = labels.astype(np.int64)
  color = np.zeros((*labels.shape, 3), np.uint8)
  for bit in range(8):
    for channel in range(3):
      color[..., channel] |= (((labels >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
  return color
