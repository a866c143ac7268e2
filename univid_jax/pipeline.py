"""What a person uses from Python: load a model, encode, sample, decode.

  pipe = univid_jax.load_pipeline("runs/tiny")
  out = pipe.sample([a, a_prime, b], seed=0)   # uint8 clips (T, H, W, 3); out.frames is B'
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from univid_jax import build
from univid_jax.data.packing import (
    Features,
    RowShape,
    assign_rows,
    join_rows,
    pack,
    pack_rows,
    patchify,
    places_of,
    sentence_features,
    target_places,
    target_tokens,
    unpatchify,
)
from univid_jax.diffusion.flow import FlowMatching
from univid_jax.diffusion.solvers import SOLVERS, velocity_fn
from univid_jax.encoders import CheckpointEncoders, Encoders, i2v_condition
from univid_jax.models.dit import DiTConfig
from univid_jax.models.lora import LoRAConfig, LoRAParam, attach, join, linear_name, merge
from univid_jax.parallel.mesh import make_mesh
from univid_jax.parallel.sharding import gathered, own_rows, parameter_shardings, shard_batch
from univid_jax.training.checkpoint import CONFIG_FILE, read_config
from univid_jax.training.restore import restore_run
from univid_jax.types import PackedRow, Sentence, latent_shape, reference_roles
from univid_jax.weights.checkpoint import CHECKPOINT_FILE, component_config, is_checkpoint, read_info, restore
from univid_jax.weights.lora import LoRAWeights, read_lora, stack_loras


@dataclasses.dataclass(frozen=True)
class Sample:
  """A painted clip: latents float32 (t, y, x, c) and frames uint8 (T, H, W, 3)."""

  latents: np.ndarray
  frames: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Job:
  """A sentence to be completed: clean latents, the shape and the initial noise of its target, and I2V's conditions."""

  sentence: Sentence
  shape: tuple[int, int, int]
  noise: np.ndarray
  condition: np.ndarray | None
  image_features: np.ndarray | None


class Pipeline:
  """A model with all that stands around it.

  Args:
    config: the transformer's shape.
    graph: the transformer without its parameters.
    params: its parameters, sharded over `mesh`.
    encoders: the codec, and what embeds prompts and images.
    mesh: the devices.
    run: the config of the run that trained the model, where there was one.
    attention: "full", or "context_causal" where the model was trained so: then context is computed once a sentence; the run's
      by default, else "full".
  """

  def __init__(self, config: DiTConfig, graph: nnx.GraphDef, params: Mapping[str, Any], *, encoders: Encoders, mesh: Mesh,
               run: Mapping[str, Any] | None = None, attention: str | None = None):
    attention = attention or (run["model"].get("attention", "full") if run else "full")
    if attention not in ("full", "context_causal"):
      raise ValueError(f"attention is full or context_causal, got {attention!r}")
    self.config, self.encoders, self.mesh, self.run, self.attention = config, encoders, mesh, run, attention
    self.graph, self.params = graph, params

  @property
  def size(self) -> tuple[int, int]:
    """Height and width in pixels that the model was trained on; the paper's where no run says."""
    return (self.run["data"]["height"], self.run["data"]["width"]) if self.run else (480, 832)

  @property
  def dtype(self) -> np.dtype:
    """Of the transformer's parameters."""
    return jax.tree.leaves(self.params)[0].dtype

  @property
  def num_frames(self) -> int:
    """Frames of the videos that the model was trained on; the paper's where no run says."""
    return self.run["data"]["num_frames"] if self.run else 17

  @property
  def _flow(self) -> FlowMatching:
    return build.flow(self.run) if self.run else FlowMatching()

  def tokenize(self, text: str) -> Int[np.ndarray, "n"]:
    """Token ids, int32, with the end-of-text token, without padding.

    Raises:
      ValueError: the model has no tokenizer.
    """
    return self.encoders.tokenize(text)

  def encode_prompt(self, text: str) -> Float[np.ndarray, "n d"]:
    """The prompt's embedding, float32 (512, text_dim), zeros past the prompt.

    Raises:
      ValueError: the model has no text encoder.
    """
    embedding = self.encoders.embed_prompt(text)
    return np.pad(embedding, ((0, self.config.text_len - len(embedding)), (0, 0)))

  def encode(self, frames: np.ndarray) -> Float[np.ndarray, "t y x c"]:
    """Clip to latents, float32.

    Args:
      frames: (T, H, W, 3), uint8, or float in [-1, 1]; T must be 4n + 1.

    Raises:
      ValueError: the shape fits no latents; the message names the nearest that do.
    """
    return np.asarray(self.encoders.codec.encode(to_float(frames)))

  def decode(self, latents: Float[Array, "t y x c"]) -> Float[np.ndarray, "T H W 3"]:
    """Latents to clip, float32 in [-1, 1]."""
    return np.clip(np.asarray(self.encoders.codec.decode(np.asarray(latents, np.float32))), -1, 1)

  def predict_velocity(self, latents: Float[Array, "t y x c"], timestep: float, prompt_embeds: Float[Array, "n d"],
                       condition: Float[Array, "t y x q"] | None = None,
                       clip_features: Float[Array, "i e"] | None = None) -> Float[np.ndarray, "t y x c"]:
    """One call of the transformer: the velocity, float32.

    Args:
      latents: of a whole sentence, clips one after another in time.
      timestep: 0 to 1000.
      prompt_embeds: the prompt's embedding, with or without its padding.
      condition: I2V's mask (4 channels) and first-frame latents (16), see `encoders.i2v_condition`.
      clip_features: I2V's CLIP features of the first frame, (257, 1280).

    Raises:
      ValueError: an I2V model without condition and features, or a T2V model with them.
    """
    sentence = Sentence(clips=(np.asarray(latents, np.float32),), roles=reference_roles(1))
    row = self._row(sentence_features(sentence, patch_size=self.config.patch_size, prompt_embedding=np.asarray(prompt_embeds),
                                      text_len=self.config.text_len, condition=condition, image_features=clip_features))
    slots = 1 if row.modulation_ids is None else 2
    with jax.set_mesh(self.mesh):
      tokens = self._apply(self.params, row, jnp.full((1, slots), timestep, jnp.float32))
    return np.asarray(unpatchify(np.asarray(tokens)[0], latents.shape[:3], self.config.patch_size))

  def sample(self, clips: Sequence[np.ndarray], prompt: str = "", num_frames: int | None = None,
             num_inference_steps: int = 50, guidance_scale: float = 1.0, negative_prompt: str = "", shift: float = 5.0,
             seed: int = 0, latents: Float[Array, "t y x c"] | None = None, prompt_embeds: Float[Array, "n d"] | None = None,
             negative_prompt_embeds: Float[Array, "n d"] | None = None,
             solver: str = "euler", progress: Callable[[int], None] | None = None) -> Sample:
    """Paints the clip that completes a sentence.

    Args:
      clips: the context in order (A, A', B and so on, an odd number), uint8 (T, H, W, 3), all of one size.
      prompt: the text; "" is the null prompt.
      num_frames: of the painted clip, 4n + 1; None infers it as contexts I to IV do.
      num_inference_steps: steps of the solver.
      guidance_scale: 1 is none.
      negative_prompt: what guidance leads away from.
      shift: of the noise levels toward noise.
      seed: of the initial noise.
      latents: the initial noise itself.
      prompt_embeds: skips the text encoder.
      negative_prompt_embeds: likewise.
      solver: "euler", the reference's, or "unipc", for fewer steps.
      progress: called with the number of steps taken, after each.

    Raises:
      ValueError: an even number of clips, clips of different sizes, or shapes that fit no latents.
    """
    job = self._job(clips, num_frames, seed, latents)
    rows = [self._row(self._features(job, prompt, prompt_embeds))]
    if guidance_scale != 1.0:
      rows.append(self._row(self._features(job, negative_prompt, negative_prompt_embeds)))
    painted = self._solved(rows, [(0, 1)], [job.noise], solver=solver, num_inference_steps=num_inference_steps, shift=shift,
                           guidance_scale=guidance_scale, progress=progress)
    return self._painted(painted[0], job.shape)

  def sample_batch(self, batch: Sequence[Sequence[np.ndarray]], prompts: Sequence[str] | None = None,
                   num_frames: int | None = None, num_inference_steps: int = 50, guidance_scale: float = 1.0,
                   negative_prompt: str = "", shift: float = 5.0, seeds: Sequence[int] | None = None, solver: str = "euler",
                   progress: Callable[[int], None] | None = None) -> list[Sample]:
    """Paints many sentences at once, of any lengths, packed into rows that spread over the mesh.

    Each comes out as from `sample` alone, to rounding.

    Args:
      batch: the context of each sentence.
      prompts: one a sentence; none by default.
      num_frames: see `sample`, as all that follow.
      num_inference_steps: of each.
      guidance_scale: 1 is none.
      negative_prompt: of all.
      shift: of the noise levels.
      seeds: one a sentence; 0, 1, 2 and so on by default.
      solver: "euler" or "unipc".
      progress: called with the number of steps taken, from 1 again for every batch of rows.

    Raises:
      ValueError: see `sample`; or prompts or seeds are not as many as sentences.
    """
    prompts = [""] * len(batch) if prompts is None else prompts
    seeds = range(len(batch)) if seeds is None else seeds
    if not len(batch) == len(prompts) == len(seeds):
      raise ValueError(f"{len(batch)} sentences, {len(prompts)} prompts and {len(seeds)} seeds do not go together")
    jobs = [self._job(clips, num_frames, seed, None) for clips, seed in zip(batch, seeds)]
    features = [[self._features(job, prompt, None) for job, prompt in zip(jobs, prompts)]]
    if guidance_scale != 1.0:
      features.append([self._features(job, negative_prompt, None) for job in jobs])
    longest = max(len(f["tokens"]) for f in features[0])
    slots = max(1, longest // min(len(f["tokens"]) for f in features[0]))
    text = slots * max(len(f["text"]) for kind in features for f in kind)
    shape = RowShape(num_tokens=longest, num_text_tokens=text, num_slots=slots, context_causal=self.attention == "context_causal")
    groups = assign_rows(features[0], shape)
    rows = [join_rows([pack([kind[i] for i in group], shape) for group in groups]) for kind in features]
    painted = self._solved(rows, places_of(groups), [job.noise for job in jobs], solver=solver, shift=shift,
                           num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, progress=progress)
    return [self._painted(tokens, job.shape) for tokens, job in zip(painted, jobs)]

  def sample_sentences(self, sentences: Sequence[Sentence], *, num_inference_steps: int, seed: int) -> list[np.ndarray]:
    """Paints the targets of sentences of the run that trained the model; uint8 clips in the sentences' order.

    The clips of a sentence are pixels, its target too (only its shape is used). Several processes share the rows, and each gets
    all that was painted.
    """
    make_features = build.feature_maker(self.run, self.encoders)
    row, places = pack_rows([make_features(sentence) for sentence in sentences], build.row_shape(self.run))
    keys = jax.random.split(jax.random.key(seed), len(sentences))
    noises = [np.asarray(jax.random.normal(key, target_tokens(row.tokens, row, place).shape)) for key, place in zip(keys, places)]
    painted = self._solved([row], places, noises, solver="euler", num_inference_steps=num_inference_steps,
                           rows_at_once=build.rows_per_batch(self.run, self.mesh))
    return [self._painted(tokens, self._latent_shape(sentence.clips[-1].shape)).frames
            for tokens, sentence in zip(painted, sentences)]

  def _job(self, clips: Sequence[np.ndarray], num_frames: int | None, seed: int, latents: np.ndarray | None) -> "_Job":
    """A sentence with its clips encoded and its noise drawn."""
    if len(clips) % 2 == 0:
      raise ValueError(f"the context is an odd number of clips (A, A', B), got {len(clips)}")
    if len({clip.shape[1:3] for clip in clips}) > 1:
      raise ValueError(f"all clips must have one size, got {[clip.shape[1:3] for clip in clips]}")
    num_frames = inferred_length([len(clip) for clip in clips]) if num_frames is None else num_frames
    shape = self._latent_shape((num_frames, *clips[0].shape[1:3]))
    channels = self.encoders.codec.latent_channels
    if latents is None:
      latents = jax.random.normal(jax.random.key(seed), (*shape, channels))
    elif latents.shape[:3] != shape:
      raise ValueError(f"latents of shape {latents.shape[:3]} given where the target's are {shape}")

    encoded = (*(self.encode(clip) for clip in clips), np.zeros((*shape, channels), np.float32))
    condition = features = None
    if self.config.model_type == "i2v":
      first = to_float(clips[0])[0]
      condition = i2v_condition(self.encoders.codec, first, sum(len(clip) for clip in encoded))
      features = self.encoders.embed_image(first)
    return _Job(Sentence(clips=encoded, roles=reference_roles(len(encoded))), shape,
                patchify(np.asarray(latents, np.float32), self.config.patch_size), condition, features)

  def _features(self, job: "_Job", prompt: str, embeds: np.ndarray | None) -> Features:
    embeds = self.encoders.embed_prompt(prompt) if embeds is None else np.asarray(embeds)
    return sentence_features(job.sentence, patch_size=self.config.patch_size, prompt_embedding=embeds,
                             text_len=self.config.text_len, condition=job.condition, image_features=job.image_features)

  def _solved(self, rows: Sequence[PackedRow], places: Sequence[tuple[int, int]], noises: Sequence[np.ndarray], *, solver: str,
              num_inference_steps: int, shift: float | None = None, guidance_scale: float = 1.0, rows_at_once: int | None = None,
              progress: Callable[[int], None] | None = None) -> list[np.ndarray]:
    """The targets' tokens of the sentences at `places`; `rows` are those of the prompts and, for guidance, the negative ones."""
    if solver not in SOLVERS:
      raise ValueError(f"unknown solver {solver!r}; there are {', '.join(SOLVERS)}")
    flow = self._flow if shift is None else dataclasses.replace(self._flow, shift=shift)
    sigmas = flow.unipc_sigmas(num_inference_steps) if solver == "unipc" else flow.inference_sigmas(num_inference_steps)
    # The places of the targets, exactly as many as there are.
    rows = [dataclasses.replace(row, targets=target_places(row.target_mask)) for row in rows]
    row = rows[0]
    noise = np.zeros_like(row.tokens)
    for tokens, (index, segment) in zip(noises, places):
      noise[index, (row.segment_ids[index] == segment) & row.target_mask[index]] = tokens

    count, shards = len(noise), self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    batch = rows_at_once or (shards if count > 1 else 1)
    self._progress = progress
    solved = []
    with jax.set_mesh(self.mesh):
      solve = self._solve(solver, tuple(map(float, sigmas)), progress is not None)
      for start in range(0, count, batch):
        part = functools.partial(_part, start=start, length=batch)
        inputs = jax.tree.map(part, (row, rows[1] if len(rows) > 1 else None, noise))
        if batch % shards == 0:
          inputs = shard_batch(jax.tree.map(lambda x: own_rows(x, self.mesh), inputs), self.mesh)
        solved.append(gathered(solve(self.params, *inputs, jnp.float32(guidance_scale))))
      jax.effects_barrier()  # the last call of progress
    solved = np.concatenate(solved)
    return [target_tokens(solved, row, place) for place in places]

  def _painted(self, tokens: np.ndarray, shape: tuple[int, int, int]) -> Sample:
    latents = unpatchify(tokens, shape, self.config.patch_size)
    return Sample(latents, to_uint8(self.decode(latents)))

  def _latent_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
    codec = self.encoders.codec
    patches = codec.spatial_stride * self.config.patch_size[1]
    latent_shape(shape, temporal_stride=codec.temporal_stride, spatial_stride=patches)  # sides divide into patches as well
    return latent_shape(shape, temporal_stride=codec.temporal_stride, spatial_stride=codec.spatial_stride)

  def _row(self, features: Features) -> PackedRow:
    """One sentence as a row without padding, which needs no intervals and one timestep, unless context sees only context."""
    causal = self.attention == "context_causal"
    row = pack([features], RowShape(num_tokens=len(features["tokens"]), num_text_tokens=len(features["text"]), num_slots=1,
                                    context_causal=causal))
    row = dataclasses.replace(row, text_intervals=None, image_intervals=None)
    return row if causal else dataclasses.replace(row, key_intervals=None, modulation_ids=None)

  @functools.cached_property
  def _apply(self):
    return jax.jit(lambda params, row, timesteps: nnx.merge(self.graph, params)(row.tokens, timesteps, row).astype(jnp.float32))

  @functools.lru_cache(maxsize=16)  # noqa: B019 (a pipeline lives as long as its programs)
  def _solve(self, solver: str, sigmas: tuple[float, ...], aloud: bool):
    """The whole of sampling as one program: (params, row, negative row, noise, guidance scale) to tokens."""
    on_step = (lambda taken: self._progress(taken)) if aloud else None

    def solve(params, row: PackedRow, negative: PackedRow | None, noise, guidance_scale):
      predict = velocity_fn(nnx.merge(self.graph, params), row, negative=negative, guidance_scale=guidance_scale)
      return SOLVERS[solver](predict, row, noise, np.array(sigmas, np.float32), on_step=on_step)
    return jax.jit(solve)


def load_pipeline(checkpoint: str, lora: str | Sequence[str | tuple[str, float]] | None = None, dtype: str | None = None, *,
                  merge_lora: bool = False, mesh: Mesh | None = None, attention: str | None = None,
                  step: int | str | None = None) -> Pipeline:
  """Opens a converted checkpoint or the workdir of a training run.

  Args:
    checkpoint: a folder that `tools.convert_weights` wrote, or a workdir; that of a LoRA training brings its base along.
    lora: a LoRA file of any trainer (or a folder of this project's), or several, each with a weight or not.
    dtype: of the transformer and the encoders of text and image; by default bfloat16, or that in which a run was trained.
    merge_lora: add LoRAs to the weights instead of running them beside.
    mesh: the devices; all of them, parameters spread over them, by default.
    attention: "full" or "context_causal"; by default what the run or the LoRAs were trained with.
    step: of a workdir's checkpoints: a number, "best" (the lowest validation loss) or None for the latest.

  Raises:
    FileNotFoundError: there is no checkpoint, run or LoRA.
    ValueError: it cannot be read, or a LoRA is for another base.
  """
  mesh = make_mesh({"data": 1, "fsdp": -1}) if mesh is None else mesh
  loras = [item if isinstance(item, tuple) else (item, 1.0) for item in ([lora] if isinstance(lora, str) else lora or [])]
  adapters = [(read_lora(path), float(weight)) for path, weight in loras]
  run = None
  if is_checkpoint(checkpoint):
    encoders = CheckpointEncoders(checkpoint, mesh, dtype=jnp.dtype(dtype or "bfloat16"))
    config = component_config("transformer", read_info(checkpoint).components["transformer"].config)
    graph, params = restore(checkpoint, "transformer", mesh=mesh, dtype=jnp.dtype(dtype or "bfloat16"))
  else:
    run = read_config(checkpoint)
    if run is None:
      raise FileNotFoundError(f"{checkpoint} is neither a converted checkpoint (no {CHECKPOINT_FILE}) nor the workdir of a "
                              f"training run (no {CONFIG_FILE})")
    if dtype:
      run = {**run, "model": {**run["model"], "dtype": dtype, "param_dtype": dtype}}
    config, encoders = build.transformer_config(run), build.encoders(run, mesh)
    graph, params, trained = restore_run(checkpoint, run, mesh, step=step)
    adapters = [(lora, 1.0) for lora in trained] + adapters
  if adapters:
    graph, params = with_loras(config, graph, params, adapters, mesh=mesh, merged=merge_lora)
  if attention is None and run is None:
    trained_with = {lora.metadata.get("attention", "full") for lora, _ in adapters}
    if len(trained_with) > 1:
      raise ValueError("the LoRAs were trained with different attention (full and context_causal): choose one with attention=")
    attention = next(iter(trained_with), None)
  return Pipeline(config, graph, params, encoders=encoders, mesh=mesh, run=run, attention=attention)


def with_loras(config: DiTConfig, graph: nnx.GraphDef, params: Mapping[str, Any], loras: Sequence[tuple[LoRAWeights, float]], *,
               mesh: Mesh, merged: bool) -> tuple[nnx.GraphDef, Mapping[str, Any]]:
  """A transformer with LoRAs (each with its weight), added to its weights or running beside them."""
  shapes = {path: value.shape for path, value in traverse_util.flatten_dict(params).items()}
  adapters, rank = stack_loras(loras, config, shapes)
  if merged:
    return graph, jax.jit(merge, donate_argnums=0)(params, adapters)
  targets = tuple(linear_name(path[:-2], 0 if path[0] == "blocks" else None)
                  for path in traverse_util.flatten_dict(adapters) if path[-1] == "down")

  def attached():
    module = nnx.merge(graph, params)
    attach(module, LoRAConfig(rank=rank, alpha=rank, targets=targets), rngs=nnx.Rngs(0))
    return module

  module = nnx.eval_shape(attached)
  shardings = parameter_shardings(module, mesh, kind=LoRAParam)
  return nnx.graphdef(module), join(params, jax.device_put(adapters, shardings))


def inferred_length(lengths: Sequence[int]) -> int:
  """Frames of the target: where the last example pair is equally long the query's, else the pair's second clip's.

  Args:
    lengths: frames of A, A', B and so on; a query alone gives its own length.
  """
  if len(lengths) < 3 or lengths[-3] == lengths[-2]:
    return lengths[-1]
  return lengths[-2]


def to_float(frames: np.ndarray) -> np.ndarray:
  """uint8 to [-1, 1]; what is float already stays."""
  frames = np.asarray(frames)
  return (frames.astype(np.float32) / 127.5 - 1) if frames.dtype == np.uint8 else frames.astype(np.float32)


def to_uint8(frames: np.ndarray) -> np.ndarray:
  """[-1, 1] to 0 .. 255."""
  return np.clip((frames + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def _part(x: np.ndarray, *, start: int, length: int) -> np.ndarray:
  """Rows from start on, filled up to length with zeros."""
  x = x[start:start + length]
  return np.pad(x, [(0, length - len(x))] + [(0, 0)] * (x.ndim - 1))
