"""The codec and the text and image encoders of a model, as other packages see them (`core.protocols.Encoders`).

A model trained from scratch has encoders without weights (`PlainEncoders`); a pre-trained base has its own, loaded on
first use.
"""

import operator
import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from univid_jax.codecs.tiling import Tiling
from univid_jax.codecs.tokenizer import Tokenizer
from univid_jax.codecs.vae_config import VAEConfig, find_autoencoder
from univid_jax.codecs.wan_vae import WanVAECodec, jit_method
from univid_jax.core.errors import UserError
from univid_jax.core.protocols import Codec
from univid_jax.models.clip import CLIPConfig, preprocess
from univid_jax.models.umt5 import UMT5Config
from univid_jax.models.variants import DiTConfig
from univid_jax.parallel.mesh import local_mesh, make_mesh


class PlainEncoders:
  """A codec without weights; supports neither text nor images.

  The null prompt is the only one, and its embedding has no tokens.
  """

  has_weights = has_text_encoder = False

  def __init__(self, codec: Codec, text_dim: int):
    self.codec, self.codec_shape, self.text_dim = codec, codec, text_dim
    self.codec_fingerprint, self.prompt_fingerprint, self.image_fingerprint = repr(codec), "null prompt", "no images"

  def tokenize(self, text: str) -> Int[np.ndarray, "n"]:
    raise UserError("this model has no tokenizer")

  def embed_prompt(self, text: str) -> Float[np.ndarray, "n d"]:
    if text:
      raise UserError(f"a prompt needs a text encoder, which this model lacks: leave it empty, got {text!r}")
    return np.zeros((0, self.text_dim), np.float32)

  def embed_image(self, frame: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "i e"]:
    raise UserError("this model has no image encoder")

  def release(self) -> None:
    """Does nothing: there are no weights."""


@runtime_checkable
class ComponentSource(Protocol):
  """A converted checkpoint: its components are "transformer", "vae", "text_encoder" and "image_encoder"."""

  def has(self, component: str) -> bool: ...

  def config(self, component: str) -> Any:
    """Returns a component's typed config; raises UserError that names the component if it is missing."""
    ...

  def checksum(self, component: str) -> str:
    """Returns the checksum of a component's weights; raises UserError if it is missing."""
    ...

  def load(
    self, component: str, *, mesh: Mesh, dtype: DTypeLike, param_dtype: DTypeLike | None = None
  ) -> tuple[nnx.GraphDef, Any]:
    """Loads a component into its shards; returns the module without its parameters, and the parameters."""
    ...

  def tokenizer_path(self) -> epath.PathLike:
    """Returns the tokenizer's file; raises UserError if there is none."""
    ...


T = TypeVar("T")


class Lazy(Generic[T]):
  """A value that is loaded on first use and can be released; safe to use from several threads."""

  def __init__(self, load: Callable[[], T]):
    self._load, self._lock = load, threading.Lock()
    self._loaded: list[T] = []

  def get(self) -> T:
    with self._lock:
      if not self._loaded:
        self._loaded.append(self._load())
      return self._loaded[0]

  def release(self) -> None:
    with self._lock:
      self._loaded.clear()


class PretrainedEncoders:
  """Wan's encoders, each loaded from a checkpoint when it is first needed.

  Missing components raise UserError when they are needed.

  Args:
    checkpoint: holds the components.
    mesh: the devices; text and image encoder are sharded over those of this process, which needs no other process to
      use them; the autoencoder runs on one of them, and encodes several clips on all.
    dtype: of the text and image encoders; the autoencoder computes in float32.
    tiling: how the autoencoder cuts large frames, or None.
  """

  has_weights = True

  def __init__(
    self, checkpoint: ComponentSource, mesh: Mesh, *, dtype: DTypeLike = jnp.bfloat16, tiling: Tiling | None = None
  ):
    self._checkpoint, self._mesh, self._tiling = checkpoint, local_mesh(mesh), tiling
    self._dtype = jnp.dtype(dtype)
    self._codec = Lazy(self._load_codec)
    self._tokenizer = Lazy(self._load_tokenizer)
    self._text_encoder = Lazy(lambda: self._load_encoder("text_encoder"))
    self._image_encoder = Lazy(lambda: self._load_encoder("image_encoder"))

  @property
  def has_text_encoder(self) -> bool:
    return self._checkpoint.has("text_encoder")

  @property
  def text_dim(self) -> int:
    return self._checkpoint.config("transformer").text_dim

  @property
  def text_len(self) -> int:
    """The maximum number of tokens in a prompt: the transformer's, or Wan2.1's if the checkpoint has no transformer."""
    has_transformer = self._checkpoint.has("transformer")
    return self._checkpoint.config("transformer").text_len if has_transformer else DiTConfig.text_len

  @property
  def codec(self) -> WanVAECodec:
    return self._codec.get()

  @property
  def codec_shape(self) -> VAEConfig:
    return self._checkpoint.config("vae")

  @property
  def codec_fingerprint(self) -> str:
    """Identifies everything besides the pixels that determines latents."""
    config = self.codec_shape
    published = find_autoencoder(config.latent_channels)
    statistics = config.latent_mean, config.latent_std
    own = "" if statistics == (published.latent_mean, published.latent_std) else f" {statistics}"
    return f"vae {self._checkpoint.checksum('vae')} {self._tiling}{own}"

  @property
  def prompt_fingerprint(self) -> str:
    """Identifies everything besides the text that determines the embedding of a prompt."""
    checksum, tokenizer = self._checkpoint.checksum("text_encoder"), self._tokenizer.get()
    own = self._describe_config("text_encoder", UMT5Config())
    return f"umt5 {checksum} {self._dtype} {tokenizer.max_length} {tokenizer.sha256}{own}"

  @property
  def image_fingerprint(self) -> str:
    """Identifies everything that determines the features of an image; "" if the model takes none."""
    if not self._checkpoint.config("transformer").takes_image_features:
      return ""
    own = self._describe_config("image_encoder", CLIPConfig())
    return f"clip {self._checkpoint.checksum('image_encoder')} {self._dtype}{own}"

  def _describe_config(self, component: str, published: Any) -> str:
    """Returns a component's config, which the checksum of its weights does not cover; "" if it is the published one."""
    config = self._checkpoint.config(component)
    return "" if config == published else f" {config}"

  def tokenize(self, text: str) -> Int[np.ndarray, "n"]:
    """Returns token ids, int32, with the end-of-text token, without padding."""
    return self._tokenizer.get()(text)

  def embed_prompt(self, text: str) -> Float[np.ndarray, "n d"]:
    """Returns the embedding of a prompt, float32, without padding."""
    tokenizer, encode = self._tokenizer.get(), self._text_encoder.get()
    ids = tokenizer(text)
    length = tokenizer.max_length  # one shape for all prompts, so that one program serves them
    padded, mask = np.zeros((1, length), np.int32), np.zeros((1, length), bool)
    padded[0, : len(ids)], mask[0, : len(ids)] = ids, True
    return np.asarray(encode(padded, mask)[0], np.float32)[: len(ids)]

  def embed_image(self, frame: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "i e"]:
    """Returns the CLIP features of a frame in [-1, 1] for I2V models, float32 (257, 1280)."""
    size = self._checkpoint.config("image_encoder").image_size
    return np.asarray(self._image_encoder.get()(preprocess(frame, size)[None])[0], np.float32)

  def release(self) -> None:
    """Frees the memory of loaded weights; they are loaded again when needed."""
    for component in (self._codec, self._text_encoder, self._image_encoder):
      component.release()

  def _load_codec(self) -> WanVAECodec:
    config = self._checkpoint.config("vae")
    local = make_mesh({"data": -1}, jax.local_devices()[:1])
    graph, params = self._checkpoint.load("vae", mesh=local, dtype=jnp.float32)
    return WanVAECodec(config, graph, params, mesh=local, devices=list(self._mesh.devices.flat), tiling=self._tiling)

  def _load_tokenizer(self) -> Tokenizer:
    return Tokenizer(self._checkpoint.tokenizer_path(), max_length=self.text_len)

  def _load_encoder(self, component: str) -> Callable[..., np.ndarray]:
    """Loads an encoder as a function from and to NumPy arrays, since the caller may compute on other devices."""
    graph, params = self._checkpoint.load(component, mesh=self._mesh, dtype=self._dtype)
    run = jit_method(operator.call, graph)

    def encode(*inputs: np.ndarray) -> np.ndarray:
      with jax.set_mesh(self._mesh):
        return np.asarray(run(params, *inputs))

    return encode
