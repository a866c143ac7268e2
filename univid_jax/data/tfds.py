"""TFDS data sets as pairs."""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import av
import numpy as np

from univid_jax.data.clips import ClipFormat, array_clip
from univid_jax.data.datasets import Drawing, Dropped, Pair, PairSentences, Shot, joined
from univid_jax.data.kinds import depth_picture, label_colors, normals_picture, resampling


def open_tfds(options: Mapping[str, Any], form: ClipFormat, drawing: Drawing, *,
              depth_range: tuple[float, float]) -> tuple[PairSentences, list[Dropped]]:
  """A TFDS data set as pairs, through `tfds.data_source` (which needs no TensorFlow).

  Args:
    options: name, split, data_dir (or ""), task, source and target (names of features), kind of the target, see `to_frames`.
    form: size and lengths.
    drawing: how sentences are drawn.
    depth_range: metres that white and black stand for in pictures of depth.

  Raises:
    ValueError: there is no such data set or feature.
  """
  import tensorflow_datasets as tfds
  try:
    source = tfds.data_source(options["name"], split=options["split"], data_dir=options["data_dir"] or None)
  except Exception as error:  # TFDS raises many kinds
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise ValueError(f"TFDS has no {options['name']} with split {options['split']} here: {reason}") from error
  features = source.dataset_info.features
  absent = [name for name in (options["source"], options["target"]) if name not in features]
  if absent:
    raise ValueError(f"{options['name']} has no feature {absent[0]!r}; there are {', '.join(features)}")
  identity = f"{source.dataset_info.full_name}|{options['split']}"

  def shot(index, name, kind):
    def read(count):
      return to_frames(source[index][name], kind, depth_range)[:count]
    frames, height, width, _ = to_frames(source[index][name], kind, depth_range).shape
    own, key = form.for_shape((height, width)), f"{identity}|{index}|{name}|{kind}"
    key += f"|{depth_range}" if kind == "depth" else ""
    own = dataclasses.replace(own, resample=resampling(kind))
    return Shot(frames, lambda count: array_clip(f"{key}|{count}", lambda: read(count), own), (height, width))

  pairs, dropped = [], []
  for index in range(len(source)):
    try:
      first, second = shot(index, options["source"], "image"), shot(index, options["target"], options["kind"])
      pairs.append(Pair(options["task"], str(index), first, second, form.for_shape(first.size).size))
    except ValueError as error:
      dropped.append(Dropped(f"{options['name']} {index}", str(error)))
  return joined(pairs, dropped, form, drawing)


def to_frames(value: Any, kind: str, depth_range: tuple[float, float]) -> np.ndarray:
  """A feature of a data set as uint8 (T, H, W, 3).

  Args:
    value: an array (H, W[, C]) or (T, H, W, C), or the bytes of an mp4.
    kind: "segmentation" (labels), "depth" (metres), "normals" (unit vectors), or "image" (pictures as they are), which "edges"
      and "saliency" are too.
    depth_range: metres that white and black stand for in pictures of depth.
  """
  if isinstance(value, bytes):
    with av.open(io.BytesIO(value)) as container:
      return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
  array = np.asarray(value)
  if array.ndim == 2:
    array = array[..., None]
  array = array[None] if array.ndim == 3 else array
  if array.ndim != 4:
    raise ValueError(f"a feature of shape {np.shape(value)} is no image and no video")
  if kind == "segmentation":
    return label_colors(array[..., 0])
  if kind == "depth":
    return depth_picture(array[..., :1].astype(np.float64), depth_range)
  if kind == "normals":
    return normals_picture(array)
  if kind not in ("image", "edges", "saliency"):
    raise ValueError(f"a feature is read as image, segmentation, depth, normals, edges or saliency, got {kind!r}")
  if array.dtype == bool:
    array = array.astype(np.uint8) * 255
  if array.dtype != np.uint8:
    raise ValueError(f"images are uint8, got {array.dtype}")
  return array if array.shape[-1] == 3 else np.repeat(array[..., :1], 3, axis=-1)
