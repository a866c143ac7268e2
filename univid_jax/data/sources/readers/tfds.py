"""Reads TFDS data sets as pairs."""

import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from univid_jax.config.schema import TFDSConfig
from univid_jax.core.errors import UserError, first_line
from univid_jax.core.options import TargetKind
from univid_jax.core.text import count_noun
from univid_jax.data.clips import ClipFormat, Footage, resampling_to
from univid_jax.data.media.color import blend_over_white
from univid_jax.data.media.reader import Frames, probe, read_clip
from univid_jax.data.media.schedule import Schedule
from univid_jax.data.sources.base import DrawOptions, Dropped, drop
from univid_jax.data.sources.pairs import Pair, PairSentences, check_aligned, join_pairs
from univid_jax.data.target_kinds import depth_to_image, label_colors, normals_to_image, resampling


def open_tfds(
  config: TFDSConfig,
  split: str,
  form: ClipFormat,
  options: DrawOptions,
  *,
  depth_range: tuple[float, float],
  kinds: Mapping[str, TargetKind] | None = None,
) -> tuple[PairSentences, list[Dropped]]:
  """Opens a split of a TFDS data set through `tfds.data_source`, which needs no TensorFlow, and checks every example.

  Clips are identified by their content. So every example is decoded once here, and its frames are hashed, which takes a
  second per gigabyte; they are hashed again whenever they are read.

  Args:
    config: names the data set and its features.
    split: its `split` or `test_split`.
    form: of the clips.
    options: how pairs are joined.
    depth_range: metres that white and black represent in images of depth.
    kinds: of targets, by task, which say how they are resized; by default `config.kind`, which says what values are.

  Returns:
    The sentences, and the examples and tasks that cannot be used. Pairs are named by TFDS's ids of their examples.

  Raises:
    UserError: there is no such data set or feature.
  """
  import tensorflow_datasets as tfds

  try:
    # Any: its type omits dataset_info.
    source: Any = tfds.data_source(config.name, split=split, data_dir=config.data_dir or None)
    ids = _example_ids(source.dataset_info, split)
  except Exception as error:  # TFDS raises many types
    raise UserError(f"TFDS has no {config.name} with split {split} here: {_describe(error)}") from error
  features = source.dataset_info.features
  missing = [name for name in (config.source, config.target) if name not in features]
  if missing:
    raise UserError(f"{config.name} has no feature {missing[0]!r}; there are {', '.join(features)}")
  resample = resampling((kinds or {}).get(config.task, config.kind))
  pairs, dropped = [], []
  for index, name in enumerate(ids):
    example = _Example(source, index, f"{source.dataset_info.full_name}, split {split}")
    try:
      values = example.read()
      first = _Feature(example, config.source, TargetKind.IMAGE, depth_range).open(values, form)
      target_form = dataclasses.replace(first.form, resample=resample)  # of the same size
      second = _Feature(example, config.target, config.kind, depth_range).open(values, target_form)
      check_aligned(first, second, form.num_frames if options.has_videos else 1)
      pairs.append(Pair(config.task, name, first, second, first.form.size))
    except ValueError as error:
      dropped.append(drop(f"{config.name} {index}", error))
  return join_pairs(pairs, dropped, form, options)


def _example_ids(info: Any, split: str) -> list[str]:
  """Returns the ids that TFDS gives to the examples of a split: the same ones in every split that has them."""
  return [
    f"{Path(part.filename).name.removeprefix(f'{info.name}-')}__{part.skip + index}"
    for part in info.splits[split].file_instructions
    for index in range(part.take)
  ]


@dataclasses.dataclass(frozen=True)
class _Example:
  """One example of a data set.

  Attributes:
    source: random access to the examples.
    index: of the example.
    origin: the data set and its split, for messages.
  """

  source: Any
  index: int
  origin: str

  def __str__(self) -> str:
    return f"example {self.index} of {self.origin}"

  def read(self) -> Mapping[str, Any]:
    """Returns the values of all features, decoded."""
    try:
      return self.source[self.index]
    except Exception as error:  # RuntimeError for damaged records, and whatever decoders raise
      raise UserError(f"{self} cannot be read: {_describe(error)}") from error


@dataclasses.dataclass(frozen=True)
class _Feature:
  """A feature of an example.

  Attributes:
    example, name: which one.
    kind: what its values represent.
    depth_range: see `open_tfds`.
  """

  example: _Example
  name: str
  kind: TargetKind
  depth_range: tuple[float, float]

  def open(self, values: Mapping[str, Any], form: ClipFormat) -> Footage:
    """Returns the footage of the feature whose example has these values."""
    frames, schedule = self._read_frames(values, form.fps)
    _, height, width, _ = frames.shape
    digest = _hash_frames(frames)
    return Footage(
      name=f"{self.name} of example {self.example.index}",
      size=(height, width),
      num_frames=len(frames),
      form=form.for_shape((height, width)),
      identify=lambda: digest,
      read=lambda count: self._read(digest, form.fps)[:count],
      **(resampling_to(schedule, form.fps) if schedule else {}),
    )

  def _read(self, digest: str, fps: float) -> Frames:
    frames, _ = self._read_frames(self.example.read(), fps)
    if _hash_frames(frames) != digest:
      raise UserError(f"{self.example} changed while it was in use: start again")
    return frames

  def _read_frames(self, values: Mapping[str, Any], fps: float) -> tuple[Frames, Schedule | None]:
    """Returns the frames, resampled to a rate unless it is 0, and the schedule before that; only mp4s have one."""
    value = values[self.name]
    try:
      if isinstance(value, bytes):
        if self.kind in _VALUES:
          raise UserError(f"an mp4 holds pictures, not {self.kind}: {_AS_PICTURES.format(kind=self.kind)}")
        return _read_video(value, fps)
      return feature_to_frames(value, self.kind, self.depth_range), None
    except UserError as error:
      raise UserError(f"the feature {self.name!r}: {error}") from error


def _read_video(content: bytes, fps: float) -> tuple[Frames, Schedule]:
  """Reads an mp4, see `_Feature._read_frames`."""
  with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
    file.write(content)
    file.flush()
    return read_clip(file.name, fps=fps or None).frames, probe(file.name).schedule


def _hash_frames(frames: Frames) -> str:
  """Returns the SHA-256 of frames and their shape."""
  digest = hashlib.sha256(repr(frames.shape).encode())
  digest.update(np.ascontiguousarray(frames).data)
  return digest.hexdigest()


def feature_to_frames(value: Any, kind: TargetKind, depth_range: tuple[float, float]) -> Frames:
  """Converts a feature of a data set to frames.

  Args:
    value: an array (H, W[, C]) or (T, H, W, C).
    kind: integer labels for SEGMENTATION, metres as floats for DEPTH, unit vectors for NORMALS; for all others images,
      uint8 or bool, in grey, RGB, or RGB with alpha, which are shown over white.
    depth_range: metres that white and black represent in images of depth.

  Raises:
    UserError: the values do not have this form.
  """
  array = np.asarray(value)
  if array.ndim == 2:
    array = array[..., None]
  array = array[None] if array.ndim == 3 else array
  if array.ndim != 4:
    raise UserError(f"a feature of shape {np.shape(value)} is neither an image nor a video")
  if kind == TargetKind.CAMERA:
    raise UserError("a feature cannot be a camera movement: use image, segmentation, depth, normals, edges or saliency")
  if kind in _VALUES:
    return _draw_values(array, kind, depth_range)
  if array.dtype == bool:
    array = array.astype(np.uint8) * 255
  if array.dtype != np.uint8:
    raise UserError(f"images must be uint8, got {array.dtype}")
  channels = array.shape[-1]
  if channels not in (1, 3, 4):
    raise UserError(f"images must have 1, 3 or 4 channels, and the feature of shape {np.shape(value)} has {channels}")
  if channels == 4:
    return np.stack([blend_over_white(frame) for frame in array])
  return array if channels == 3 else np.repeat(array, 3, axis=-1)


# What the values of a kind are, in words, the types that they may have, and their channels.
_VALUES: Mapping[TargetKind, tuple[str, tuple[type, ...], int]] = {
  TargetKind.SEGMENTATION: ("labels must be integers", (np.integer, np.bool_), 1),
  TargetKind.DEPTH: ("depth must be metres in floating point", (np.floating,), 1),
  TargetKind.NORMALS: ("normals must be vectors in floating point", (np.floating,), 3),
}


_AS_PICTURES = "set config.data.tfds.kind=image and the task in config.data.kinds to {kind}"


def _draw_values(
  array: Shaped[np.ndarray, "T H W channels"], kind: TargetKind, depth_range: tuple[float, float]
) -> Frames:
  """Draws labels, depth or normals; values that are not finite are unknown.

  Raises:
    UserError: they have another type or number of channels, as pictures of them have.
  """
  expected, types, channels = _VALUES[kind]
  if not issubclass(array.dtype.type, types) or array.shape[-1] != channels:
    raise UserError(
      f"{expected} with {count_noun(channels, 'channel')}, got {array.dtype} with {array.shape[-1]}: convert "
      f"them, or if they are pictures, {_AS_PICTURES.format(kind=kind)}"
    )
  if kind == TargetKind.SEGMENTATION:
    return label_colors(array[..., 0].astype(np.int64))
  if kind == TargetKind.DEPTH:
    return depth_to_image(array.astype(np.float64), depth_range)
  return normals_to_image(np.where(np.isfinite(array).all(-1, keepdims=True), array, 0))


def _describe(error: Exception) -> str:
  """Returns the first line of the message, without addresses of objects, so that equal errors are reported once."""
  return re.sub(r"<(\S+) object at 0x[0-9a-f]+>", r"\1", first_line(error))
