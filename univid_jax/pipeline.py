"""What a person uses from Python: load a model, encode, sample, decode.

  pipe = univid_jax.load_pipeline("runs/tiny")
  out = pipe.sample([a, a_prime, b], seed=0)   # uint8 clips (T, H, W, 3); out.frames is B'
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from univid_jax import build
from univid_jax.data.packing import RowShape, pack, pack_rows, patchify, sentence_features, target_tokens, unpatchify
from univid_jax.diffusion.solvers import euler, velocity_fn
from univid_jax.parallel.mesh import make_mesh
from univid_jax.parallel.sharding import parameter_shardings, shard_batch
from univid_jax.training.checkpoint import CONFIG_FILE, Checkpointer
from univid_jax.types import PackedRow, Sentence, latent_shape, reference_roles


@dataclasses.dataclass(frozen=True)
class Sample:
  """A painted clip: latents float32 (t, y, x, c) and frames uint8 (T, H, W, 3)."""

  latents: np.ndarray
  frames: np.ndarray


class Pipeline:
  """A model with all that stands around it.

  Args:
    config: of the run that trained the model.
    graph: the transformer without its parameters.
    params: its parameters, sharded over `mesh`.
    mesh: the devices.
  """

  def __init__(self, config: Mapping[str, Any], graph: nnx.GraphDef, params: Mapping[str, Any], mesh: Mesh):
    self.config, self.mesh = config, mesh
    self._graph, self._params = graph, params
    self._codec, self._dit = build.codec(config), build.dit_config(config)
    self._features = build.feature_maker(config)
    self._flow = build.flow(config)

  @property
  def size(self) -> tuple[int, int]:
    """Height and width in pixels that the model was trained on."""
    return self.config["data"]["height"], self.config["data"]["width"]

  @property
  def num_frames(self) -> int:
    """Frames of the videos that the model was trained on."""
    return self.config["data"]["num_frames"]

  def encode(self, frames: np.ndarray) -> Float[np.ndarray, "t y x c"]:
    """Clip to latents, float32.

    Args:
      frames: (T, H, W, 3), uint8, or float in [-1, 1]; T must be 4n + 1.

    Raises:
      ValueError: the shape fits no latents; the message names the nearest that do.
    """
    frames = np.asarray(frames)
    if frames.dtype == np.uint8:
      frames = frames.astype(np.float32) / 127.5 - 1
    return np.asarray(self._codec.encode(frames.astype(np.float32)))

  def decode(self, latents: Float[Array, "t y x c"]) -> Float[np.ndarray, "T H W 3"]:
    """Latents to clip, float32 in [-1, 1]."""
    return np.clip(np.asarray(self._codec.decode(np.asarray(latents, np.float32))), -1, 1)

  def predict_velocity(self, latents: Float[Array, "t y x c"], timestep: float, prompt_embeds: Float[Array, "n d"]) -> np.ndarray:
    """One call of the transformer: the velocity, float32 (t, y, x, c).

    Args:
      latents: of a whole sentence, clips one after another in time.
      timestep: 0 to 1000.
      prompt_embeds: the prompt's embedding, without its padding.
    """
    sentence = Sentence(clips=(np.asarray(latents, np.float32),), roles=reference_roles(1))
    row = _single_row(self._sentence_features(sentence, np.asarray(prompt_embeds)))
    tokens = self._apply(self._params, row, jnp.full((1, 1), timestep, jnp.float32))
    return np.asarray(unpatchify(np.asarray(tokens)[0], latents.shape[:3], self._dit.patch_size))

  def sample(self, clips: Sequence[np.ndarray], prompt: str = "", num_frames: int | None = None,
             num_inference_steps: int = 50, guidance_scale: float = 1.0, negative_prompt: str = "", shift: float = 5.0,
             seed: int = 0, latents: Float[Array, "t y x c"] | None = None, prompt_embeds: Float[Array, "n d"] | None = None,
             negative_prompt_embeds: Float[Array, "n d"] | None = None) -> Sample:
    """Paints the clip that completes a sentence.

    Args:
      clips: the context in order (A, A', B and so on, an odd number), uint8 (T, H, W, 3), all of one size.
      prompt: the text; "" is the null prompt.
      num_frames: of the painted clip, 4n + 1; None infers it as contexts I to IV do.
      num_inference_steps: Euler steps.
      guidance_scale: 1 is none.
      negative_prompt: what guidance leads away from.
      shift: of the noise levels toward noise.
      seed: of the initial noise.
      latents: the initial noise itself.
      prompt_embeds: skips the text encoder.
      negative_prompt_embeds: likewise.

    Raises:
      ValueError: an even number of clips, clips of different sizes, or shapes that fit no latents.
    """
    if len(clips) % 2 == 0:
      raise ValueError(f"the context is an odd number of clips (A, A', B), got {len(clips)}")
    if len({clip.shape[1:3] for clip in clips}) > 1:
      raise ValueError(f"all clips must have one size, got {[clip.shape[1:3] for clip in clips]}")
    num_frames = inferred_length([len(clip) for clip in clips]) if num_frames is None else num_frames
    shape = latent_shape((num_frames, *clips[0].shape[1:3]), temporal_stride=self._codec.temporal_stride,
                         spatial_stride=self._codec.spatial_stride)
    if latents is None:
      latents = jax.random.normal(jax.random.key(seed), (*shape, self._codec.latent_channels))
    elif latents.shape[:3] != shape:
      raise ValueError(f"latents of shape {latents.shape[:3]} given where the target's are {shape}")

    encoded = (*(self.encode(clip) for clip in clips), np.zeros((*shape, self._codec.latent_channels), np.float32))
    sentence = Sentence(clips=encoded, roles=reference_roles(len(encoded)))

    def row_for(text, embeds):
      embeds = self._features.embed_prompt(text) if embeds is None else np.asarray(embeds)
      return _single_row(self._sentence_features(sentence, embeds))

    row = row_for(prompt, prompt_embeds)
    negative = None if guidance_scale == 1.0 else row_for(negative_prompt, negative_prompt_embeds)
    noise = np.zeros_like(row.tokens)
    noise[0, row.target_mask[0]] = patchify(np.asarray(latents, np.float32), self._dit.patch_size)
    sigmas = dataclasses.replace(self._flow, shift=shift).inference_sigmas(num_inference_steps)
    tokens = np.asarray(self._solve(self._params, row, negative, noise, sigmas, jnp.float32(guidance_scale)))
    result = unpatchify(tokens[0][row.target_mask[0]], shape, self._dit.patch_size)
    return Sample(result, to_uint8(self.decode(result)))

  def sample_sentences(self, sentences: Sequence[Sentence], *, num_inference_steps: int, seed: int) -> list[np.ndarray]:
    """Paints the target of many sentences at once, packed into rows; uint8 clips in the sentences' order.

    The clips of a sentence are pixels, its target too (only its shape is used).
    """
    features = [self._features(sentence) for sentence in sentences]
    row, places = pack_rows(features, build.row_shape(self.config))
    keys = jax.random.split(jax.random.key(seed), len(sentences))
    noise = np.zeros_like(row.tokens)
    for key, feature, (index, segment) in zip(keys, features, places):
      mask = (row.segment_ids[index] == segment) & row.target_mask[index]
      noise[index, mask] = jax.random.normal(key, (int(feature["target_mask"].sum()), noise.shape[-1]))

    sigmas = self._flow.inference_sigmas(num_inference_steps)
    batch = self.config["rows"]["per_batch"]
    tokens = []
    for start in range(0, len(noise), batch):
      part = functools.partial(_part, start=start, length=batch)
      piece, piece_noise = jax.tree.map(part, (row, noise))
      with self.mesh:
        out = self._solve(self._params, *shard_batch((piece, None, piece_noise), self.mesh), sigmas, jnp.float32(1.0))
      tokens.append(np.asarray(out))
    tokens = np.concatenate(tokens)

    painted = []
    for sentence, place in zip(sentences, places):
      shape = latent_shape(sentence.clips[-1].shape, temporal_stride=self._codec.temporal_stride,
                           spatial_stride=self._codec.spatial_stride)
      latents = unpatchify(target_tokens(tokens, row, place), shape, self._dit.patch_size)
      painted.append(to_uint8(self.decode(latents)))
    return painted

  def _sentence_features(self, sentence: Sentence, prompt_embedding: np.ndarray):
    return sentence_features(sentence, patch_size=self._dit.patch_size, prompt_embedding=prompt_embedding,
                             text_len=self._dit.text_len)

  @functools.cached_property
  def _apply(self):
    return jax.jit(lambda params, row, timesteps: nnx.merge(self._graph, params)(row.tokens, timesteps, row).astype(jnp.float32))

  @functools.cached_property
  def _solve(self):
    def solve(params, row: PackedRow, negative: PackedRow | None, noise, sigmas, guidance_scale):
      predict = velocity_fn(nnx.merge(self._graph, params), row, negative=negative, guidance_scale=guidance_scale)
      return euler(predict, row, noise, sigmas)
    return jax.jit(solve)


def load_pipeline(checkpoint: str) -> Pipeline:
  """Opens the workdir of a training run.

  Raises:
    FileNotFoundError: there is no run or no checkpoint in it.
  """
  folder = epath.Path(checkpoint)
  if not (folder / CONFIG_FILE).exists():
    raise FileNotFoundError(f"no {CONFIG_FILE} in {checkpoint}: it is not the workdir of a training run")
  config = json.loads((folder / CONFIG_FILE).read_text())
  checkpointer = Checkpointer(checkpoint, read_only=True)
  if checkpointer.latest_step is None:
    raise FileNotFoundError(f"no finished checkpoint in {checkpoint}")
  mesh = make_mesh({"data": 1, "fsdp": -1})
  abstract = nnx.eval_shape(lambda: build.model(config))
  shapes = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
  target = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes,
                        parameter_shardings(abstract, mesh))
  params = checkpointer.restore_model(target)
  checkpointer.close()
  return Pipeline(config, nnx.graphdef(abstract), params, mesh)


def inferred_length(lengths: Sequence[int]) -> int:
  """Frames of the target: where the last example pair is equally long the query's, else the pair's second clip's.

  Args:
    lengths: frames of A, A', B and so on; a query alone gives its own length.
  """
  if len(lengths) < 3 or lengths[-3] == lengths[-2]:
    return lengths[-1]
  return lengths[-2]


def to_uint8(frames: np.ndarray) -> np.ndarray:
  """[-1, 1] to 0 .. 255."""
  return np.clip((frames + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def _single_row(features) -> PackedRow:
  """One sentence as a row without padding, which needs no intervals and one timestep."""
  row = pack([features], RowShape(num_tokens=len(features["tokens"]), num_text_tokens=len(features["text"]), num_slots=1))
  return dataclasses.replace(row, key_intervals=None, text_intervals=None, modulation_ids=None)


def _part(x: np.ndarray, *, start: int, length: int) -> np.ndarray:
  """Rows from start on, filled up to length with zeros."""
  x = x[start:start + length]
  return np.pad(x, [(0, length - len(x))] + [(0, 0)] * (x.ndim - 1))
