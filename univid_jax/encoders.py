"""What stands around the transformer: clips to latents and back, prompts and images to embeddings.

The default run needs no weights for that (`PlainEncoders`); pre-trained ones come from a checkpoint folder on first use.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from univid_jax.data.tokenizer import Tokenizer
from univid_jax.models.clip import preprocess
from univid_jax.models.codec import DCTCodec
from univid_jax.models.vae import Tiling, VAEConfig, decode_tiled, encode_tiled
from univid_jax.parallel.mesh import make_mesh
from univid_jax.weights.checkpoint import component_config, read_info, restore


class Codec(Protocol):
  """Clips, pixels (T, H, W, 3) in [-1, 1], to latents (t, y, x, latent_channels) and back."""

  latent_channels: int
  temporal_stride: int
  spatial_stride: int

  def encode(self, frames: Float[np.ndarray, "T H W 3"]) -> Float[np.ndarray, "t y x c"]: ...
  def decode(self, latents: Float[np.ndarray, "t y x c"]) -> Float[np.ndarray, "T H W 3"]: ...


class Encoders(Protocol):
  """A codec, and embeddings of prompts and images."""

  text_dim: int
  codec: Codec
  codec_fingerprint: str
  prompt_fingerprint: str
  image_fingerprint: str

  def tokenize(self, text: str) -> Int[np.ndarray, "n"]: ...
  def embed_prompt(self, text: str) -> Float[np.ndarray, "n d"]: ...
  def embed_image(self, frame: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "i e"]: ...
  def release(self) -> None: ...


class PlainEncoders:
  """No weights at all: a fixed codec, and the null prompt, which has no tokens of its own."""

  def __init__(self, codec: DCTCodec, text_dim: int):
    self.codec, self.text_dim = codec, text_dim
    self.codec_fingerprint, self.prompt_fingerprint, self.image_fingerprint = repr(codec), "null prompt", "no images"

  def tokenize(self, text: str) -> Int[np.ndarray, "n"]:
    raise ValueError("this model has no tokenizer")

  def embed_prompt(self, text: str) -> Float[np.ndarray, "n d"]:
    if text:
      raise ValueError("a prompt needs a text encoder, and this model has none: use the null prompt")
    return np.zeros((0, self.text_dim), np.float32)

  def embed_image(self, frame: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "i e"]:
    raise ValueError("this model has no image encoder")

  def release(self) -> None:
    """Gives the memory of loaded weights back."""


class CheckpointEncoders:
  """Wan2.1's encoders, each read from a checkpoint folder when it is first needed.

  Args:
    folder: the checkpoint.
    mesh: the devices; the text encoder is sharded over them, the others are small and run on the first.
    dtype: of the text and image encoders; the autoencoder computes in float32.
    tiling: how the autoencoder cuts large frames, or None.
  """

  def __init__(self, folder: epath.PathLike, mesh: Mesh, *, dtype=jnp.bfloat16, tiling: Tiling | None = None):
    self.folder, self.mesh, self.dtype, self.tiling = epath.Path(folder), mesh, dtype, tiling
    self.info = read_info(folder)

  @property
  def text_dim(self) -> int:
    return self._config("transformer").text_dim

  @property
  def codec_fingerprint(self) -> str:
    """Names all that determines latents, beside the pixels."""
    self._require("vae")
    return f"vae {self.info.components['vae'].checksum} {self.tiling}"

  @property
  def prompt_fingerprint(self) -> str:
    """Names all that determines a prompt's embedding, beside the text."""
    self._require("text_encoder")
    return f"umt5 {self.info.components['text_encoder'].checksum} {jnp.dtype(self.dtype)} {self.tokenizer.max_length}"

  @property
  def image_fingerprint(self) -> str:
    """Names all that determines an image's features; empty where the model needs none."""
    if self._config("transformer").model_type != "i2v":
      return ""
    self._require("image_encoder")
    return f"clip {self.info.components['image_encoder'].checksum} {jnp.dtype(self.dtype)}"

  @functools.cached_property
  def codec(self) -> "VAECodec":
    self._require("vae")
    local = make_mesh({"data": -1}, jax.local_devices()[:1])
    graph, params = restore(self.folder, "vae", mesh=local, dtype=jnp.float32)
    return VAECodec(self._config("vae"), graph, params, mesh=local, tiling=self.tiling)

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    if self.info.tokenizer is None:
      raise ValueError(f"{self.folder} has no tokenizer: convert it again from a release that has one")
    return Tokenizer(self.folder / self.info.tokenizer, max_length=self._config("transformer").text_len)

  def tokenize(self, text: str) -> Int[np.ndarray, "n"]:
    """Token ids, int32, with the end-of-text token, without padding."""
    return self.tokenizer(text)

  def embed_prompt(self, text: str) -> Float[np.ndarray, "n d"]:
    """The prompt's embedding, float32, without padding."""
    ids = self.tokenize(text)
    length = self.tokenizer.max_length  # one shape for all prompts, so one program
    padded, mask = np.zeros((1, length), np.int32), np.zeros((1, length), bool)
    padded[0, :len(ids)], mask[0, :len(ids)] = ids, True
    with jax.set_mesh(self.mesh):
      return np.asarray(self._text_encoder(padded, mask)[0], np.float32)[:len(ids)]

  @functools.cached_property
  def _text_encoder(self) -> Callable[..., Array]:
    self._require("text_encoder")
    graph, params = restore(self.folder, "text_encoder", mesh=self.mesh, dtype=self.dtype)
    run = jax.jit(lambda params, ids, mask: nnx.merge(graph, params)(ids, mask))
    return functools.partial(run, params)

  def embed_image(self, frame: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "i e"]:
    """CLIP's features of a frame in [-1, 1], float32 (257, 1280), as I2V models read them."""
    size = self._config("image_encoder").image_size
    with jax.set_mesh(self.mesh):
      return np.asarray(self._image_encoder(preprocess(frame, size)[None])[0], np.float32)

  @functools.cached_property
  def _image_encoder(self) -> Callable[..., Array]:
    self._require("image_encoder")
    graph, params = restore(self.folder, "image_encoder", mesh=self.mesh, dtype=self.dtype)
    run = jax.jit(lambda params, images: nnx.merge(graph, params)(images))
    return functools.partial(run, params)

  def release(self) -> None:
    """Gives the memory of loaded weights back; they are read again when they are needed."""
    for name in ("codec", "_text_encoder", "_image_encoder"):
      self.__dict__.pop(name, None)

  def _require(self, component: str) -> None:
    if component not in self.info.components:
      raise ValueError(f"{self.folder} has no {component}, only {', '.join(self.info.components)}: convert a release that has it")

  def _config(self, component: str) -> Any:
    self._require(component)
    return component_config(component, self.info.components[component].config)


class VAECodec:
  """Wan2.1's autoencoder as a codec of NumPy arrays, on the mesh where its parameters lie; one compiled program a shape."""

  def __init__(self, config: VAEConfig, graph: nnx.GraphDef, params: Any, *, mesh: Mesh, tiling: Tiling | None = None):
    self.latent_channels = config.latent_channels
    self.temporal_stride, self.spatial_stride = config.temporal_stride, config.spatial_stride
    self.tiling = tiling

    def on_mesh(method):
      run = jax.jit(lambda params, x: method(nnx.merge(graph, params), x))

      def call(x):
        with jax.set_mesh(mesh):  # a caller's mesh may be another
          return run(params, x)
      return call

    self._encode, self._decode = on_mesh(lambda vae, x: vae.encode(x)), on_mesh(lambda vae, x: vae.decode(x))

  def encode(self, frames: Float[np.ndarray, "T H W 3"]) -> Float[np.ndarray, "t y x c"]:
    """Pixels in [-1, 1] to normalised latents, float32.

    Raises:
      ValueError: T is not 4n + 1 or a side is not a multiple of 8.
    """
    frames = np.asarray(frames, np.float32)
    if self.tiling is None:
      return np.asarray(self._encode(frames))
    return encode_tiled(self._encode, frames, self.tiling, spatial_stride=self.spatial_stride,
                        temporal_stride=self.temporal_stride)

  def decode(self, latents: Float[np.ndarray, "t y x c"]) -> Float[np.ndarray, "T H W 3"]:
    """Latents to pixels, about in [-1, 1]."""
    latents = np.asarray(latents, np.float32)
    if self.tiling is None:
      return np.asarray(self._decode(latents))
    return decode_tiled(self._decode, latents, self.tiling, spatial_stride=self.spatial_stride)


def i2v_condition(codec: Codec, image: Float[np.ndarray, "H W 3"], num_latent_frames: int) -> Float[np.ndarray, "t y x 20"]:
  """What an I2V model reads beside the latents: 4 channels of mask (1 in the first latent frame) and the latents of a clip
  that is the image, then grey.

  Args:
    codec: Wan2.1's autoencoder.
    image: in [-1, 1].
    num_latent_frames: of the whole sentence.
  """
  frames = np.zeros((1 + codec.temporal_stride * (num_latent_frames - 1), *image.shape), np.float32)
  frames[0] = image
  latents = codec.encode(frames)
  mask = np.zeros((*latents.shape[:3], codec.temporal_stride), np.float32)
  mask[0] = 1
  return np.concatenate([mask, latents], axis=-1)
