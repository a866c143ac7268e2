"""Reads TFDS data sets as pairs."""

import dataclasses
import re
import tempfile
from typing import Any

import numpy as np

from univid_jax.config.schema import TFDSConfig
from univid_jax.core.errors import UserError, first_line
from univid_jax.core.options import TargetKind
from univid_jax.data.clips import ClipFormat, Footage
from univid_jax.data.media.reader import Frames, read_clip
from univid_jax.data.sources.base import DrawOptions, Dropped, drop
from univid_jax.data.sources.pairs import Pair, PairSentences, check_aligned, join_pairs
from univid_jax.data.target_kinds import depth_to_image, label_colors, normals_to_image, resampling


def open_tfds(
  config: TFDSConfig, split: str, form: ClipFormat, options: DrawOptions, *, depth_range: tuple[float, float]
) -> tuple[PairSentences, list[Dropped]]:
  """Opens a split of a TFDS data set through `tfds.data_source`, which needs no TensorFlow, and checks every example.

  Args:
    config: names the data set and its features.
    split: its `split` or `test_split`.
    form: of the clips.
    options: how pairs are joined.
    depth_range: metres that white and black represent in images of depth.

  Returns:
    The sentences, and the examples and tasks that cannot be used.

  Raises:
    UserError: there is no such data set or feature.
  """
  import tensorflow_datasets as tfds

  try:
    # Any: its type omits dataset_info.
    source: Any = tfds.data_source(config.name, split=split, data_dir=config.data_dir or None)
    count = len(source)
  except Exception as error:  # TFDS raises many types
    raise UserError(f"TFDS has no {config.name} with split {split} here: {_describe(error)}") from error
  features = source.dataset_info.features
  missing = [name for name in (config.source, config.target) if name not in features]
  if missing:
    raise UserError(f"{config.name} has no feature {missing[0]!r}; there are {', '.join(features)}")
  identity = f"{source.dataset_info.full_name}|{split}"
  pairs, dropped = [], []
  for index in range(count):
    parts = [
      _Feature(source, index, name, kind, identity=identity, depth_range=depth_range)
      for name, kind in ((config.source, TargetKind.IMAGE), (config.target, config.kind))
    ]
    try:
      first = parts[0].open(form)
      second = parts[1].open(first.form)  # of the same size
      check_aligned(first, second, form.num_frames if options.has_videos else 1)
      pairs.append(Pair(config.task, str(index), first, second, first.form.size))
    except ValueError as error:
      dropped.append(drop(f"{config.name} {index}", error))
  return join_pairs(pairs, dropped, form, options)


@dataclasses.dataclass(frozen=True)
class _Feature:
  """A feature of one example of a data set.

  Attributes:
    source: random access to the examples.
    index, name: of the example and the feature.
    kind: what its values represent.
    identity: identifies the data set and split.
    depth_range: see `open_tfds`.
  """

  source: Any
  index: int
  name: str
  kind: TargetKind
  identity: str
  depth_range: tuple[float, float]

  def read(self) -> Frames:
    try:
      value = self.source[self.index][self.name]
    except Exception as error:  # RuntimeError for damaged records, and whatever decoders raise
      raise UserError(
        f"example {self.index} of {self.identity.replace('|', ', split ')} cannot be read: {_describe(error)}"
      ) from error
    return to_frames(value, self.kind, self.depth_range)

  def open(self, form: ClipFormat) -> Footage:
    num_frames, height, width, _ = self.read().shape
    form = dataclasses.replace(form.for_shape((height, width)), resample=resampling(self.kind))
    key = f"{self.identity}|{self.index}|{self.name}|{self.kind}"
    key += f"|{self.depth_range}" if self.kind == TargetKind.DEPTH else ""
    return Footage(
      name=f"{self.name} of example {self.index}",
      size=(height, width),
      fps=None,
      num_frames=num_frames,
      form=form,
      identify=lambda: key,
      read=lambda count: self.read()[:count],
    )


def to_frames(value: Any, kind: TargetKind, depth_range: tuple[float, float]) -> Frames:
  """Converts a feature of a data set to frames.

  Args:
    value: an array (H, W[, C]) or (T, H, W, C), or the bytes of an mp4.
    kind: labels for SEGMENTATION, metres for DEPTH, unit vectors for NORMALS; images for IMAGE, EDGES and SALIENCY.
    depth_range: metres that white and black represent in images of depth.

  Raises:
    UserError: the values do not have this form.
  """
  if isinstance(value, bytes):
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
      file.write(value)
      file.flush()
      return read_clip(file.name).frames
  array = np.asarray(value)
  if array.ndim == 2:
    array = array[..., None]
  array = array[None] if array.ndim == 3 else array
  if array.ndim != 4:
    raise UserError(f"a feature of shape {np.shape(value)} is neither an image nor a video")
  if kind == TargetKind.SEGMENTATION:
    return label_colors(array[..., 0])
  if kind == TargetKind.DEPTH:
    return depth_to_image(array[..., :1].astype(np.float64), depth_range)
  if kind == TargetKind.NORMALS:
    return normals_to_image(array)
  if kind == TargetKind.CAMERA:
    raise UserError("a feature cannot be a camera movement: use image, segmentation, depth, normals, edges or saliency")
  if array.dtype == bool:
    array = array.astype(np.uint8) * 255
  if array.dtype != np.uint8:
    raise UserError(f"images must be uint8, got {array.dtype}")
  return array if array.shape[-1] == 3 else np.repeat(array[..., :1], 3, axis=-1)


def _describe(error: Exception) -> str:
  """Returns the first line of the message, without addresses of objects, so that equal errors are reported once."""
  return re.sub(r"<(\S+) object at 0x[0-9a-f]+>", r"\1", first_line(error))
