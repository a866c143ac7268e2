"""The Python interface of a model: encode, sample, decode.

pipe = univid_jax.load_pipeline("runs/tiny")
out = pipe.sample([a, a_prime, b], seed=0)   # uint8 clips (T, H, W, 3); out.frames is B'
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from univid_jax.checkpoints.usage import Usage
from univid_jax.core.dims import latent_shape
from univid_jax.core.errors import UserError
from univid_jax.core.options import Attention
from univid_jax.core.pixels import to_float, to_uint8
from univid_jax.core.protocols import Encoders, Solver
from univid_jax.core.sentence import Sentence, reference_roles
from univid_jax.data.clips import ClipFormat
from univid_jax.data.features import FeatureMaker
from univid_jax.data.tokens import Features, patchify, unpatchify
from univid_jax.diffusion.flow import FlowMatching
from univid_jax.diffusion.solvers import find_solver
from univid_jax.inference.jobs import Job, infer_length, pack_request, pack_single
from univid_jax.inference.sampler import Progress, Request, Sampler
from univid_jax.models.variants import DiTConfig


@dataclasses.dataclass(frozen=True)
class Sample:
  """A sampled clip: latents, float32 (t, y, x, c), and frames, uint8 (T, H, W, 3)."""

  latents: Float[np.ndarray, "t y x c"]
  frames: np.ndarray


class Pipeline:
  """A transformer with its codec and encoders.

  Args:
    config: the transformer's shape.
    graph: the transformer without its parameters.
    params: its parameters, sharded over `mesh`.
    encoders: the codec, and the encoders of prompts and images.
    mesh: the devices.
    usage: how the model was trained, if that is known.
    attention: "full" or "context_causal"; by default what the model was trained with. With context_causal the context
      is computed once per sentence.
  """

  def __init__(
    self,
    config: DiTConfig,
    graph: nnx.GraphDef,
    params: Mapping[str, Any],
    *,
    encoders: Encoders,
    mesh: Mesh,
    usage: Usage | None = None,
    attention: Attention | str | None = None,
  ):
    self.config, self.encoders, self.mesh, self.usage = config, encoders, mesh, usage or Usage()
    self.graph, self.params = graph, params
    self.attention = _parse_attention(attention or self.usage.attention)
    self._features = FeatureMaker(encoders, shape=config, task_names=())
    self._sampler = Sampler(graph, mesh)
    self._predict = jax.jit(
      lambda params, row, timesteps: nnx.merge(graph, params)(row.tokens, timesteps, row).astype(jnp.float32)
    )

  @property
  def clip_format(self) -> ClipFormat:
    """The form of the clips that the model was trained on; the paper's if that is not known."""
    usage, (size, *buckets) = self.usage, self.usage.sizes
    return ClipFormat(size=size, num_frames=usage.num_frames, fit=usage.fit, fps=usage.fps, buckets=tuple(buckets))

  @property
  def size(self) -> tuple[int, int]:
    """Height and width in pixels that the model was trained on."""
    return self.clip_format.size

  @property
  def num_frames(self) -> int:
    """Frames of the videos that the model was trained on."""
    return self.clip_format.num_frames

  @property
  def dtype(self) -> np.dtype:
    """Of the transformer's kernels; LoRAs make other parameters float32."""
    return self.params["patch_embedding"]["kernel"].dtype

  @property
  def _context_causal(self) -> bool:
    return self.attention == Attention.CONTEXT_CAUSAL

  def tokenize(self, text: str) -> Int[np.ndarray, "n"]:
    """Returns token ids, int32, with the end-of-text token, without padding.

    Raises:
      UserError: the model has no tokenizer.
    """
    return self.encoders.tokenize(text)

  def encode_prompt(self, text: str) -> Float[np.ndarray, "n d"]:
    """Returns the prompt's embedding, float32 (512, text_dim), zeros past the prompt.

    Raises:
      UserError: the model has no text encoder.
    """
    embedding = self.encoders.embed_prompt(text)
    return np.pad(embedding, ((0, self.config.text_len - len(embedding)), (0, 0)))

  def encode(self, frames: np.ndarray) -> Float[np.ndarray, "t y x c"]:
    """Encodes a clip to latents, float32.

    Args:
      frames: (T, H, W, 3), uint8, or float in [-1, 1]; T must be 4n + 1.

    Raises:
      ValueError: the shape has no latents; the message names the nearest that do.
    """
    return np.asarray(self.encoders.codec.encode(to_float(frames)))

  def decode(self, latents: Float[Array | np.ndarray, "t y x c"]) -> Float[np.ndarray, "T H W 3"]:
    """Decodes latents to a clip, float32 in [-1, 1]."""
    return np.clip(np.asarray(self.encoders.codec.decode(np.asarray(latents, np.float32))), -1, 1)

  def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns (t, y, x) of the latents of a clip of shape (T, H, W, ...).

    Raises:
      UserError: there are none, or they do not divide into patches; the message names the nearest shapes that do.
    """
    codec = self.encoders.codec
    patch_side = codec.spatial_stride * self.config.patch_size[1]
    latent_shape(shape, temporal_stride=codec.temporal_stride, spatial_stride=patch_side)
    return latent_shape(shape, temporal_stride=codec.temporal_stride, spatial_stride=codec.spatial_stride)

  def predict_velocity(
    self,
    latents: Float[Array | np.ndarray, "t y x c"],
    timestep: float,
    prompt_embeds: Float[Array | np.ndarray, "n d"],
    condition: Float[Array | np.ndarray, "t y x v"] | None = None,
    clip_features: Float[Array | np.ndarray, "i e"] | None = None,
  ) -> Float[np.ndarray, "t y x c"]:
    """Calls the transformer once and returns the velocity, float32.

    Args:
      latents: of a whole sentence, its clips concatenated in time.
      timestep: 0 to 1000.
      prompt_embeds: the prompt's embedding, with or without its padding.
      condition: I2V's mask (4 channels) and first-frame latents (16), see `core.conditions.i2v_condition`.
      clip_features: I2V's CLIP features of the first frame, (257, 1280).

    Raises:
      ValueError: an I2V model without condition and features, or a T2V model with them.
    """
    job = Job(
      Sentence(clips=(np.asarray(latents, np.float32),), roles=reference_roles(1)),
      np.zeros((0, 0), np.float32),
      None if condition is None else np.asarray(condition),
      None if clip_features is None else np.asarray(clip_features),
    )
    row = pack_single(self._make_features(job, np.asarray(prompt_embeds)), context_causal=self._context_causal)
    slots = 1 if row.modulation_ids is None else 2
    with jax.set_mesh(self.mesh):
      tokens = self._predict(self.params, row, jnp.full((1, slots), timestep, jnp.float32))
    t, y, x = latents.shape[:3]
    return unpatchify(np.asarray(tokens)[0], (t, y, x), self.config.patch_size)

  def sample(
    self,
    clips: Sequence[np.ndarray],
    prompt: str = "",
    num_frames: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    negative_prompt: str = "",
    shift: float | None = None,
    seed: int = 0,
    latents: Float[Array | np.ndarray, "t y x c"] | None = None,
    prompt_embeds: Float[Array | np.ndarray, "n d"] | None = None,
    negative_prompt_embeds: Float[Array | np.ndarray, "n d"] | None = None,
    solver: str | Solver[Any] = "euler",
    progress: Progress | None = None,
  ) -> Sample:
    """Generates the clip that completes a sentence.

    Args:
      clips: the context in order (A, A', B and so on, an odd number), uint8 (T, H, W, 3), all of one size.
      prompt: its text; "" is the null prompt.
      num_frames: of the generated clip, 4n + 1; None infers it as contexts I to IV do.
      num_inference_steps: steps of the solver.
      guidance_scale: 1 is no guidance.
      negative_prompt: what guidance moves away from.
      shift: of the noise levels toward noise; None takes that of training, which is 5 in the paper.
      seed: of the initial noise.
      latents: the initial noise itself.
      prompt_embeds, negative_prompt_embeds: replace the text encoder.
      solver: "euler", the reference's, or "unipc", for fewer steps.
      progress: called with the number of steps taken, after each.

    Raises:
      ValueError: an even number of clips, clips of different sizes, or shapes that have no latents.
    """
    job = self._make_job(clips, num_frames, seed, latents)
    embeds = [self._embed(prompt, prompt_embeds)]
    if guidance_scale != 1.0:
      embeds.append(self._embed(negative_prompt, negative_prompt_embeds))
    rows = [pack_single(self._make_features(job, each), context_causal=self._context_causal) for each in embeds]
    request = Request(rows[0], rows[1] if len(rows) > 1 else None, [(0, 1)], [job.noise])
    return self._run(
      request, [job], num_inference_steps, guidance_scale=guidance_scale, shift=shift, solver=solver, progress=progress
    )[0]

  def sample_batch(
    self,
    batch: Sequence[Sequence[np.ndarray]],
    prompts: Sequence[str] | None = None,
    num_frames: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    negative_prompt: str = "",
    shift: float | None = None,
    seeds: Sequence[int] | None = None,
    solver: str | Solver[Any] = "euler",
    progress: Progress | None = None,
  ) -> list[Sample]:
    """Generates the clips that complete many sentences of any lengths, packed into rows that spread over the mesh.

    Each result equals that of `sample`, to rounding.

    Args:
      batch: the context of each sentence.
      prompts: one per sentence; null prompts by default.
      num_frames: see `sample`.
      num_inference_steps: see `sample`.
      guidance_scale: see `sample`.
      negative_prompt: of all sentences.
      shift: see `sample`.
      seeds: one per sentence; 0, 1, 2 and so on by default.
      solver: see `sample`.
      progress: called with the number of steps taken, from 1 again for every batch of rows.

    Raises:
      ValueError: see `sample`; or the numbers of sentences, prompts and seeds differ.
    """
    prompts = [""] * len(batch) if prompts is None else prompts
    seeds = range(len(batch)) if seeds is None else seeds
    if not len(batch) == len(prompts) == len(seeds):
      raise ValueError(f"there are {len(batch)} sentences, {len(prompts)} prompts and {len(seeds)} seeds")
    jobs = [self._make_job(clips, num_frames, seed, None) for clips, seed in zip(batch, seeds, strict=True)]
    embeddings = {prompt: self._embed(prompt, None) for prompt in dict.fromkeys(prompts)}
    positive = [self._make_features(job, embeddings[prompt]) for job, prompt in zip(jobs, prompts, strict=True)]
    negative = None
    if guidance_scale != 1.0:
      embedding = self._embed(negative_prompt, None)
      negative = [self._make_features(job, embedding) for job in jobs]
    request = pack_request(positive, negative, [job.noise for job in jobs], context_causal=self._context_causal)
    return self._run(
      request, jobs, num_inference_steps, guidance_scale=guidance_scale, shift=shift, solver=solver, progress=progress
    )

  def _make_job(
    self,
    clips: Sequence[np.ndarray],
    num_frames: int | None,
    seed: int,
    latents: Float[Array | np.ndarray, "t y x c"] | None,
  ) -> Job:
    """Encodes the clips of a sentence and draws the noise of its target."""
    if len(clips) % 2 == 0:
      raise UserError(f"the context must be an odd number of clips (A, A', B), got {len(clips)}")
    if len({clip.shape[1:3] for clip in clips}) > 1:
      raise UserError(f"all clips must have the same size, got {[clip.shape[1:3] for clip in clips]}")
    num_frames = infer_length([len(clip) for clip in clips]) if num_frames is None else num_frames
    shape = self.latent_shape((num_frames, *clips[0].shape[1:3]))
    channels = self.encoders.codec.latent_channels
    if latents is None:
      latents = jax.random.normal(jax.random.key(seed), (*shape, channels))
    elif latents.shape[:3] != shape:
      raise UserError(f"latents must have the target's shape {shape}, got {latents.shape[:3]}")
    encoded = (*(self.encode(clip) for clip in clips), np.zeros((*shape, channels), np.float32))
    condition = features = None
    if self.config.takes_image:
      condition, features = self._features.condition(clips[0], sum(len(clip) for clip in encoded))
    sentence = Sentence(clips=encoded, roles=reference_roles(len(encoded)))
    return Job(sentence, patchify(np.asarray(latents, np.float32), self.config.patch_size), condition, features)

  def _embed(self, prompt: str, embeds: Float[Array | np.ndarray, "n d"] | None) -> np.ndarray:
    return self._features.embed_prompt(prompt) if embeds is None else np.asarray(embeds)

  def _make_features(self, job: Job, prompt_embedding: np.ndarray) -> Features:
    return self._features.assemble(
      job.sentence, prompt_embedding=prompt_embedding, condition=job.condition, image_features=job.image_features
    )

  def _run(
    self,
    request: Request,
    jobs: Sequence[Job],
    num_inference_steps: int,
    *,
    guidance_scale: float,
    shift: float | None,
    solver: str | Solver[Any],
    progress: Progress | None,
  ) -> list[Sample]:
    solver = find_solver(solver)
    shift = self.usage.shift if shift is None else shift
    if not shift > 0:
      raise UserError(f"the shift of the noise levels must be positive, got {shift}")
    sampled = self._sampler.sample(
      self.params,
      request,
      solver=solver,
      sigmas=solver.sigmas(FlowMatching(shift=shift), num_inference_steps),
      guidance_scale=guidance_scale,
      progress=progress,
    )
    shapes, patch_size = [job.target_shape for job in jobs], self.config.patch_size
    return [self._finish(unpatchify(tokens, shape, patch_size)) for tokens, shape in zip(sampled, shapes, strict=True)]

  def _finish(self, latents: Float[np.ndarray, "t y x c"]) -> Sample:
    """Decodes sampled latents.

    Raises:
      UserError: latents or frames are not finite.
    """
    frames = self.decode(latents) if np.isfinite(latents).all() else latents
    if not np.isfinite(frames).all():
      raise UserError(
        "the sample is not finite: the weights or a LoRA contain NaN, or dtype, shift and guidance scale overflow; "
        "try dtype float32"
      )
    return Sample(latents, to_uint8(frames))


def _parse_attention(attention: Attention | str) -> Attention:
  try:
    return Attention(attention)
  except ValueError as error:
    raise UserError(f"attention must be one of {', '.join(Attention)}, got {attention!r}") from error
