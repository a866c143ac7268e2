"""Stand-ins for a transformer and its encoders in tests of the data."""

import collections
import dataclasses

import fsspec
import numpy as np
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem


@dataclasses.dataclass(frozen=True)
class Shape:
  """A `TransformerShape`."""

  patch_size: tuple[int, int, int] = (1, 2, 2)
  text_len: int = 512
  takes_condition: bool = False
  takes_image_features: bool = False

  @property
  def patch_volume(self) -> int:
    return int(np.prod(self.patch_size))


class CountingEncoders:
  """Cheap `Encoders` that count what they encode, by kind; the codec encodes `num_parallel` clips together."""

  text_dim = 8
  has_weights = has_text_encoder = True
  codec_fingerprint = prompt_fingerprint = image_fingerprint = "counting"

  def __init__(self, num_parallel=1, temporal_stride=4):
    self.num_parallel, self.temporal_stride = num_parallel, temporal_stride
    self.calls = collections.Counter()
    self.loaded: set[str] = set()
    self.most_loaded = 0

  @property
  def codec(self):
    self._load("codec")
    return self.codec_shape

  @property
  def codec_shape(self):
    return _CountingCodec(self.calls, num_parallel=self.num_parallel, temporal_stride=self.temporal_stride)

  def tokenize(self, text):
    raise AssertionError("no test tokenizes")

  def embed_prompt(self, text):
    self._load("text encoder")
    self.calls["prompt"] += 1
    return np.full((1 + len(text) % 5, self.text_dim), len(text), np.float32)

  def embed_image(self, frame):
    self._load("image encoder")
    self.calls["image"] += 1
    return np.full((257, 4), frame.mean(), np.float32)

  def release(self):
    self.loaded.clear()

  def _load(self, component):
    self.loaded.add(component)
    self.most_loaded = max(self.most_loaded, len(self.loaded))


@dataclasses.dataclass
class _CountingCodec:
  calls: collections.Counter
  latent_channels: int = 3
  temporal_stride: int = 4
  spatial_stride: int = 4
  num_parallel: int = 1
  has_weights: bool = True

  def encode(self, frames):
    self.calls["clip"] += 1
    return np.asarray(frames, np.float32)[:: self.temporal_stride, ::4, ::4].copy()

  def encode_many(self, clips):
    assert 0 < len(clips) <= self.num_parallel and len({x.shape for x in clips}) == 1
    self.calls["together"] += 1
    return [self.encode(frames) for frames in clips]

  def decode(self, latents):
    raise AssertionError("no test decodes")

  decode_parts = decode


class Bucket(MemoryFileSystem):
  """A bucket in memory. One class, as etils and fsspec each keep an instance."""

  protocol, store, pseudo_dirs = "s3", {}, [""]

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.replace("s3://", "memory://"))


def open_bucket(name):
  """Returns an empty bucket that is in memory."""
  Bucket.store.clear()
  Bucket.pseudo_dirs[:] = [""]
  fsspec.register_implementation("s3", Bucket, clobber=True)
  return epath.Path(f"s3://bucket/{name}")
