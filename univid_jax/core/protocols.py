"""Interfaces between packages, so that for example `data` receives codecs and encoders without importing them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Array, Float, Int

# Before Python 3.12, isinstance with typing's protocols evaluates properties, such as Encoders.codec, which loads
# weights.
from typing_extensions import Protocol, runtime_checkable

from univid_jax.core.packed_row import PackedRow
from univid_jax.core.sentence import Sentence


@runtime_checkable
class CodecShape(Protocol):
  """How the latents of a clip relate to its pixels; see `core.dims.latent_shape`."""

  @property
  def has_weights(self) -> bool:
    """Whether it is an autoencoder; one without weights decodes in less time than a step takes."""
    ...

  @property
  def latent_channels(self) -> int: ...
  @property
  def temporal_stride(self) -> int: ...
  @property
  def spatial_stride(self) -> int: ...


@runtime_checkable
class Codec(CodecShape, Protocol):
  """Converts clips between pixels, (T, H, W, 3) in [-1, 1], and latents, (t, y, x, latent_channels)."""

  @property
  def num_parallel(self) -> int:
    """How many clips `encode_many` encodes at the same time."""
    ...

  def encode(self, frames: Float[np.ndarray, "T H W 3"]) -> Float[np.ndarray, "t y x c"]: ...
  def encode_many(self, clips: Sequence[Float[np.ndarray, "T H W 3"]]) -> list[Float[np.ndarray, "t y x c"]]:
    """Encodes up to `num_parallel` clips of one shape, each as `encode` does."""
    ...

  def decode(self, latents: Float[np.ndarray, "t y x c"]) -> Float[np.ndarray, "T H W 3"]: ...
  def decode_parts(self, latents: Float[np.ndarray, "t y x c"]) -> Iterator[Float[np.ndarray, "T H W 3"]]:
    """Decodes one latent frame after the other; together the parts are what `decode` returns."""
    ...


@runtime_checkable
class TransformerShape(Protocol):
  """What the data pipeline needs to know about a transformer."""

  @property
  def patch_size(self) -> tuple[int, int, int]: ...
  @property
  def patch_volume(self) -> int: ...
  @property
  def text_len(self) -> int: ...
  @property
  def takes_condition(self) -> bool: ...
  @property
  def takes_image_features(self) -> bool: ...


@runtime_checkable
class Resumable(Protocol):
  """A stream whose position is part of a checkpoint, together with those of the other processes."""

  def get_state(self) -> bytes: ...

  def set_state(self, states: Sequence[bytes], /) -> None:
    """Continues where all processes saved their states; they may have been more or fewer than now."""
    ...


@runtime_checkable
class Encoders(Protocol):
  """A codec, and the embeddings of prompts and images; fingerprints identify everything that determines its results."""

  @property
  def has_weights(self) -> bool:
    """Whether the results are worth caching; without weights, codec and null prompt cost almost nothing."""
    ...

  @property
  def has_text_encoder(self) -> bool:
    """Whether prompts are supported; else the only one is the null prompt, which has no tokens."""
    ...

  @property
  def text_dim(self) -> int: ...
  @property
  def codec(self) -> Codec: ...
  @property
  def codec_shape(self) -> CodecShape:
    """The codec's shape, without loading the codec."""
    ...

  @property
  def codec_fingerprint(self) -> str: ...
  @property
  def prompt_fingerprint(self) -> str: ...
  @property
  def image_fingerprint(self) -> str: ...

  def tokenize(self, text: str) -> Int[np.ndarray, "n"]: ...
  def embed_prompt(self, text: str) -> Float[np.ndarray, "n d"]: ...
  def embed_image(self, frame: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "i e"]: ...

  def release(self) -> None:
    """Frees the memory of loaded weights; they are loaded again when needed."""
    ...


@runtime_checkable
class SentenceSource(Protocol):
  """Random access to sentences: an index always gives the same sentence, whose clips are read on demand if possible."""

  @property
  def task_names(self) -> Sequence[str]: ...

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> Sentence: ...


# JAX arrays; NumPy arrays where a state is too large for the devices.
Tokens: TypeAlias = Float[Array | np.ndarray, "b l p"]
Number: TypeAlias = Float[Array | np.ndarray, ""]
Weights: TypeAlias = Float[Array | np.ndarray, "w"]

# Maps noised tokens and their noise level to velocities.
VelocityFn = Callable[..., Tokens]


@runtime_checkable
class NoiseSchedule(Protocol):
  """Maps uniform times in [0, 1] to noise levels; 1 is pure noise."""

  def sigma(self, u: np.ndarray) -> np.ndarray: ...


State = TypeVar("State")


@runtime_checkable
class Solver(Protocol[State]):
  """Integrates the flow from noise to data, one step at a time; the state is a pytree."""

  @property
  def fixed_steps(self) -> int | None:
    """The only number of steps that the solver supports; None if it supports any."""
    ...

  @property
  def takes_sigmas(self) -> bool:
    """Whether noise levels other than those of `sigmas` may be given."""
    ...

  def sigmas(self, schedule: NoiseSchedule, num_steps: int) -> Float[np.ndarray, "i"]:
    """Returns the noise level before each step, float32, descending; it is 0 after the last step."""
    ...

  def coefficients(self, sigmas: Float[np.ndarray, "i"]) -> Float[np.ndarray, "i w"]:
    """Returns the coefficients of each step as arrays, so that one compiled step serves every schedule."""
    ...

  def init(self, noise: Tokens) -> State: ...

  def step(self, predict: VelocityFn, state: State, sigma: Number, coefficients: Weights) -> State: ...

  def tokens(self, state: State) -> Tokens:
    """Returns the current tokens of a state."""
    ...


@runtime_checkable
class TrainStep(Protocol):
  """A compiled training step: (state, frozen parameters, batch) to (state, metrics). The state passed in is donated."""

  def __call__(self, state: Any, frozen: Any, row: PackedRow) -> tuple[Any, dict[str, Array]]: ...
