"""The Python interface of a model: encode, sample, decode."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from univid_jax.checkpoints.usage import Usage
from univid_jax.core.checks import require_callables, require_integer
from univid_jax.core.dims import latent_shape
from univid_jax.core.errors import UserError
from univid_jax.core.options import Attention, ContextTimestep, ModelType, parse_option
from univid_jax.core.packed_row import ContextMode, PackedRow
from univid_jax.core.protocols import Encoders, Solver
from univid_jax.core.seeds import random_key
from univid_jax.data.clips import ClipFormat, read_context
from univid_jax.data.features import FeatureMaker
from univid_jax.data.rows.tokens import Features
from univid_jax.diffusion.distillations import Distillation
from univid_jax.diffusion.step_cache import RatioMeasurement, StepCache
from univid_jax.inference.arguments import check_embedding, choose_prompt, list_clips, to_numpy
from univid_jax.inference.batches import sample_batch
from univid_jax.inference.encoding import EncodingPipeline, Sample
from univid_jax.inference.experts import Experts, Transformer
from univid_jax.inference.jobs import Job, infer_length, join_context, make_job, pack_in_bucket
from univid_jax.inference.joint import JointSampler
from univid_jax.inference.long_video import VideoReader, VideoSample
from univid_jax.inference.plan import SamplingOptions, SamplingPlan
from univid_jax.inference.preview import DrawnPreview, Preview
from univid_jax.inference.prompts import embed_negative, warn_of_null_prompt
from univid_jax.inference.queries import sample_queries
from univid_jax.inference.sampler import PackedJobs, Progress, Sampler
from univid_jax.inference.velocity import predict_velocity
from univid_jax.models.variants import DiTConfig


class Pipeline(EncodingPipeline):
  """A transformer, or two experts, with the codec and the encoders; made by `univid_jax.load_pipeline`.

  Args:
    config: the transformer's shape.
    transformers: the only one, or the high-noise and the low-noise expert; their parameters are sharded over `mesh`.
    encoders: the codec, and the encoders of prompts and images.
    mesh: the devices.
    usage: how the model was trained, if that is known.
    attention: "full" or "context_causal"; by default what the model was trained with. With context_causal the context
      is computed once per sentence.
    context_timestep: "target" or "zero"; by default what the model was trained with.
    distillation: decides how the model is sampled if a distillation LoRA is part of it.
  """

  def __init__(
    self,
    config: DiTConfig,
    transformers: Sequence[Transformer],
    *,
    encoders: Encoders,
    mesh: Mesh,
    usage: Usage | None = None,
    attention: Attention | str | None = None,
    context_timestep: ContextTimestep | str | None = None,
    distillation: Distillation | None = None,
  ):
    super().__init__(encoders, text_len=config.text_len)
    self.config, self.mesh, self.usage = config, mesh, usage or Usage(is_known=False)
    self.experts, self.distillation = Experts(transformers, config.expert_boundary), distillation
    self.attention = parse_option(Attention, "attention", attention or self.usage.attention)
    trained = self.usage.context_timestep if self.attention == self.usage.attention else ContextTimestep.AUTO
    timestep = parse_option(ContextTimestep, "context_timestep", context_timestep or trained)
    self.context_mode = ContextMode.from_options(self.attention, timestep, default=config.context_timestep)
    self.features = FeatureMaker(encoders, shape=config, task_names=(), clip_gap=self.usage.clip_gap)
    self.sampler, self.joint_sampler = Sampler(mesh), JointSampler(mesh)

  def __repr__(self) -> str:
    shape, (height, width) = f"{self.config.num_layers} layers of {self.config.dim}", self.size
    return f"<Pipeline: {shape}, {width} x {height} pixels (width x height), {self.dtype}, {self.attention} attention>"

  @property
  def clip_format(self) -> ClipFormat:
    """The form of the clips that the model was trained on; the paper's if that is not known."""
    usage, (size, *buckets) = self.usage, self.usage.sizes
    return ClipFormat(size=size, num_frames=usage.num_frames, fit=usage.fit, fps=usage.fps, buckets=tuple(buckets))

  def read_clips(self, paths: Iterable[str | os.PathLike[str]]) -> list[np.ndarray]:
    """Reads files as the context of a sentence, as training reads images; see `data.clips.read_context`.

    Raises:
      OSError, UserError: there is no file, one is not a clip, or `paths` is a single path.
    """
    return [clip.frames for clip in read_context(paths, self.clip_format)]

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
    """The dtype of the transformer's kernels; LoRAs make other parameters float32."""
    return self.experts.dtype

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
    timestep: float | Float[Array | np.ndarray, "_t"],
    prompt_embeds: Float[Array | np.ndarray, "n d"],
    condition: Float[Array | np.ndarray, "t y x v"] | None = None,
    clip_features: Float[Array | np.ndarray, "i e"] | None = None,
  ) -> Float[np.ndarray, "t y x c"]:
    """Calls the transformer once and returns the velocity, float32.

    It runs on the host and cannot be traced by jit, grad or vmap. What can be is the transformer itself, of an expert
    in `experts.transformers`: `nnx.merge(expert.graph, expert.load())(row.tokens, timesteps, row)`, with a `PackedRow`.

    Args:
      latents: of a whole sentence, its clips concatenated in time.
      timestep: 0 to 1000, of all latents or of each latent frame; of two experts the largest chooses one.
      prompt_embeds: the prompt's embedding, with or without its padding.
      condition: I2V's mask (4 channels) and first-frame latents (16), see `core.conditions.i2v_condition`.
      clip_features: I2V's CLIP features of the first frame, (257, 1280).

    Raises:
      ValueError: an array has another shape than the model takes, inputs of I2V are missing or not taken, timesteps do
        not fit, or the model has gaps between clips.
    """
    return predict_velocity(self, latents, timestep, prompt_embeds, condition, clip_features)

  def sample(
    self,
    clips: Sequence[np.ndarray],
    prompt: str = "",
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    negative_prompt: str = "",
    shift: float | None = None,
    seed: int = 0,
    latents: Float[Array | np.ndarray, "t y x c"] | None = None,
    first_frame: np.ndarray | None = None,
    prompt_embeds: Float[Array | np.ndarray, "n d"] | None = None,
    negative_prompt_embeds: Float[Array | np.ndarray, "_n d"] | None = None,
    solver: str | Solver[Any] | None = None,
    sigmas: Sequence[float] | None = None,
    guidance_range: Sequence[float] | None = None,
    step_cache: StepCache | RatioMeasurement | None = None,
    progress: Progress | None = None,
    preview: Preview | None = None,
  ) -> Sample:
    """Generates the clip that completes a sentence. It runs on the host and cannot be traced, see `predict_velocity`.

    Args:
      clips: the context in order (A, A', B and so on, an odd number), uint8 (T, H, W, 3), all of one size; a list or
        any other iterable.
      prompt: its text; "" is the null prompt.
      num_frames: of the generated clip, 4n + 1; None infers it as contexts I to IV do.
      num_inference_steps: None takes the number of the model's evaluation, 50 for Wan's bases, or that of the solver.
      guidance_scale: None and 1 are no guidance; two numbers are those of the experts, low and high noise.
      negative_prompt: what guidance moves away from.
      shift: of the noise levels toward noise; None takes that of training, which is 5 in the paper.
      seed: of the initial noise.
      latents: the initial noise itself.
      first_frame: of the generated clip, uint8 (H, W, 3); its latents stay clean, and the context may be empty (TI2V).
      prompt_embeds, negative_prompt_embeds: replace the text encoder.
      solver: "euler" (None), the reference's; "unipc", for fewer steps; or "distilled", for step-distilled models.
      sigmas: the noise level before each Euler step, descending within (0, 1], instead of steps and shift.
      guidance_range: noise levels with guidance, (from, to); None is all. Steps outside take half the time.
      step_cache: steps that reuse a part of earlier ones; or the measurement of the ratios that decide which.
      progress: called with the number of steps taken, after each.
      preview: called likewise with a function that draws the current estimate, see `inference.preview`.

    Raises:
      ValueError: an even number of clips, different sizes, no latents of these, arguments of another type or range, or
        options that contradict each other.
    """
    clips = list_clips("clips", clips)
    plan = self.plan(
      num_inference_steps,
      guidance_scale=guidance_scale,
      shift=shift,
      solver=solver,
      sigmas=sigmas,
      guidance_range=guidance_range,
      step_cache=step_cache,
    )
    require_callables(progress=progress, preview=preview)
    given = choose_prompt("prompt_embeds", prompt, prompt_embeds, self.config)
    away = choose_prompt("negative_prompt_embeds", negative_prompt, negative_prompt_embeds, self.config)
    embeds = self.embed_branches(plan, given, away)
    job = self.make_job(clips, num_frames, seed, latents, first_frame)
    drawn = preview and DrawnPreview(preview, self.encoders.codec, join_context(clips, first_frame), job)
    return self.finish(self.sample_job(job, embeds, plan, progress=progress, preview=drawn))

  def sample_video(
    self, examples: Iterable[np.ndarray], query: np.ndarray | VideoReader | str, prompt: str = "", **options: Any
  ) -> VideoSample:
    """Prepares to sample a whole video of any length, frames or a file; see `VideoSample.prepare`."""
    return VideoSample.prepare(self, examples, query, prompt, **options)

  def sample_queries(
    self, examples: Iterable[np.ndarray], queries: Iterable[np.ndarray], prompt: str = "", **options: Any
  ) -> Iterator[Sample]:
    """Samples many queries, of one shape, after the same example pairs; see `inference.queries.sample_queries`."""
    return sample_queries(self, examples, queries, prompt, **options)

  def sample_batch(
    self,
    batch: Iterable[Iterable[np.ndarray]],
    prompts: Iterable[str] | None = None,
    num_frames: int | None = None,
    *,
    negative_prompt: str = "",
    seeds: Iterable[int] | None = None,
    progress: Progress | None = None,
    **options: Any,
  ) -> list[Sample]:
    """Generates the clips that complete many sentences of any lengths, packed into rows that spread over the mesh.

    Each result equals that of `sample` with the sentence's own seed, to rounding.

    Args:
      batch: the context of each sentence; of none, the result is empty.
      prompts: one per sentence; null prompts by default.
      num_frames: see `sample`.
      negative_prompt: of all sentences.
      seeds: one per sentence; 0, 1, 2 and so on by default.
      progress: called with the number of steps taken, from 1 again for every batch of rows.
      **options: of `plan`.

    Raises:
      ValueError: see `sample`; or the numbers of sentences, prompts and seeds differ.
    """
    return sample_batch(self, batch, prompts, num_frames, negative_prompt, seeds, progress, self.plan(**options))

  def plan(self, num_inference_steps: int | None = None, **options: Any) -> SamplingPlan:
    """Returns the plan for options of `sample`, those of `SamplingOptions`.

    Raises UserError if there is no such option, or a value is invalid.
    """
    return self.make_plan(SamplingOptions.from_keywords(num_inference_steps=num_inference_steps, **options))

  def make_plan(self, options: SamplingOptions) -> SamplingPlan:
    """Returns the plan for options, given how the model was trained."""
    shift, steps = self.usage.shift, self.usage.num_inference_steps
    return SamplingPlan.from_options(options, self.distillation, default_shift=shift, default_steps=steps)

  def make_job(
    self,
    clips: Sequence[np.ndarray],
    num_frames: int | None,
    seed: int,
    latents: Float[Array | np.ndarray, "t y x c"] | None = None,
    first_frame: np.ndarray | None = None,
  ) -> Job:
    """Encodes the clips of a sentence and draws the noise of its target."""
    given = join_context(clips, first_frame)
    if first_frame is not None:
      self.warn_of_first_frame()
    if num_frames is None:
      num_frames = infer_length([len(clip) for clip in given[: len(clips) or 1]])
    shape = self.latent_shape((require_integer("num_frames", num_frames, 1), *given[0].shape[1:3]))
    known = 0 if first_frame is None else 1
    if known == shape[0]:
      raise UserError(f"with a first frame, num_frames must be more than {num_frames}: nothing is left to generate")
    channels = self.encoders.codec.latent_channels
    if latents is None:
      drawn = np.asarray(jax.random.normal(random_key(seed), (*shape, channels), jnp.float32))
    else:
      drawn = np.asarray(to_numpy("latents", latents), np.float32)
    if drawn.shape != (*shape, channels):
      raise UserError(f"latents must have the target's shape {(*shape, channels)}, got {drawn.shape}")
    # The latents of a first frame precede those of the target like another clip: time runs on from one to the other.
    target = np.zeros((shape[0] - known, *shape[1:], channels), np.float32)
    encoded = (*(self.encode(clip) for clip in given), target)
    return make_job(encoded, drawn[known:], features=self.features, first_clip=given[0], has_first_frame=known > 0)

  def pack_job(self, job: Job, embeds: Sequence[np.ndarray]) -> list[PackedRow]:
    """Returns a row of the job's sentence for each prompt: the prompt and, with guidance, the negative prompt."""
    return [pack_in_bucket(self.make_features(job, each), context_mode=self.context_mode) for each in embeds]

  def sample_job(
    self,
    job: Job,
    embeds: Sequence[np.ndarray],
    plan: SamplingPlan,
    *,
    progress: Progress | None,
    preview: DrawnPreview | None = None,
  ) -> Float[np.ndarray, "t y x c"]:
    """Samples the latents of a job's target."""
    rows = self.pack_job(job, embeds)
    packed = PackedJobs(rows[0], rows[1] if len(rows) > 1 else None, [(0, 1)], [job.noise])
    estimates = None if preview is None else preview.of_row(rows[0], self.config.patch_size)
    (tokens,) = self.sampler.sample(self.experts, packed, plan, progress=progress, estimates=estimates)
    return job.finish(tokens, self.config.patch_size)

  def embed(self, prompt: str | Float[Array | np.ndarray, "n d"], name: str = "prompt") -> np.ndarray:
    """Returns the embedding of a prompt, an argument of this name; an embedding stays as it is."""
    if isinstance(prompt, str):
      if not prompt and name == "prompt":
        warn_of_null_prompt(self)
      return self.features.embed_prompt(prompt)
    return check_embedding(name, prompt, self.config, or_text=True)

  def embed_branches(self, plan: SamplingPlan, prompt: str | Any, negative_prompt: str | Any) -> list[np.ndarray]:
    """Returns the embeddings of the prompt and, if guidance has an effect, of the negative prompt, see `embed`."""
    embedding = self.embed(prompt)
    away = embed_negative(self, plan, [embedding], negative_prompt)
    return [embedding] if away is None else [embedding, away]

  def warn_of_first_frame(self) -> None:
    """Warns, once, that a clip of which the first frame is given is new to the model, unless it is of TI2V."""
    if self.config.model_type != ModelType.TI2V:
      self.warn_once("expect worse results with a given first frame, which only TI2V models know from their training")

  def make_features(self, job: Job, prompt_embedding: np.ndarray) -> Features:
    return job.assemble(self.features, prompt_embedding)

  def sample_rows(
    self,
    packed: PackedJobs,
    jobs: Sequence[Job],
    plan: SamplingPlan,
    *,
    rows_per_batch: int | None = None,
    progress: Progress | None = None,
  ) -> list[Sample]:
    """Samples the targets of jobs that are packed already; see `Sampler.sample`."""
    sampled = self.sampler.sample(self.experts, packed, plan, rows_per_batch=rows_per_batch, progress=progress)
    return [self.finish(job.finish(tokens, self.config.patch_size)) for tokens, job in zip(sampled, jobs, strict=True)]
