"""The transformer with random weights, as benchmarks time it: a forward pass or a LoRA step.

Importing this module does not import JAX, so that JAX takes no memory in a peer's process.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from univid_jax.cli.flags import CommandFlags
from univid_jax.codecs.vae_config import find_autoencoder
from univid_jax.core.errors import UserError
from univid_jax.models.variants import VARIANTS, DiTConfig

if TYPE_CHECKING:
  from jax.sharding import Mesh
  from optax import GradientTransformation

  from univid_jax.config.schema import RunConfig
  from univid_jax.core.packed_row import ContextMode, PackedRow
  from univid_jax.training.state import StateSpec

LORA_RANK = 16


class ModelFlags:
  """Flags for the transformer that is measured, and the size of clips.

  Args:
    command: the command that gets the flags.
    height, width: default values.
  """

  def __init__(self, command: CommandFlags, *, height: int, width: int):
    help_text = "A published model, by its name in models.variants."
    self._variant = command.string("variant", "wan2.1-t2v-1.3b", help_text)
    help_text = "Another width, a multiple of 128; 0 for that of --variant."
    self._dim = command.integer("dim", 0, help_text, lower_bound=0)
    self._layers = command.integer("layers", 4, "Blocks; 0 for all.")
    self.frames = command.integer("frames", 1, "Latent frames of a clip.", lower_bound=1)
    self.height = command.integer("height", height, "In pixels.")
    self.width = command.integer("width", width, "In pixels.")

  @property
  def shape(self) -> DiTConfig:
    """The shape that the flags select; raises UserError if there is no such model."""
    shape = find_variant(self._variant.value)
    return shrink(dataclasses.replace(shape, num_layers=self._layers.value or shape.num_layers), self._dim.value)


# Keys of config.model that DiTConfig has too; its other values are the same in all of Wan2.1's T2V models.
SHAPE_KEYS = ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "rope_theta", "rope_scale")


def find_variant(name: str) -> DiTConfig:
  """Returns the shape of a published model without conditions, which the peers' rows lack.

  Raises:
    UserError: there is no such model.
  """
  names = [name for name, shape in VARIANTS.items() if not shape.takes_condition]
  if name not in names:
    raise UserError(f"--variant must be one of {', '.join(names)}, got {name!r}")
  return VARIANTS[name]


def shrink(shape: DiTConfig, dim: int) -> DiTConfig:
  """Returns the shape at another width, a multiple of 128, to try a benchmark on a small machine; 0 keeps the width."""
  return dataclasses.replace(shape, dim=dim, ffn_dim=4 * dim, num_heads=dim // 128) if dim else shape


def diffusers_options(shape: DiTConfig) -> dict[str, Any]:
  """Returns the arguments of diffusers.WanTransformer3DModel for the same shape."""
  return dict(
    num_attention_heads=shape.num_heads,
    attention_head_dim=shape.head_dim,
    in_channels=shape.in_dim,
    out_channels=shape.out_dim,
    text_dim=shape.text_dim,
    freq_dim=shape.freq_dim,
    ffn_dim=shape.ffn_dim,
    num_layers=shape.num_layers,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
    eps=shape.eps,
  )


def make_row_program(
  shape: DiTConfig, *, dtype: str, mode: str, backend: str, remat: str = "full", quantize: str = "none"
) -> Callable[["PackedRow"], dict[str, float]]:
  """Returns a program that runs rows through the model and waits for the result; it compiles once per shape of rows.

  Rows that are not yet on the devices are copied there each time. A training step returns forecast_gib, the memory that
  the forecast says it needs; a forward pass returns nothing.

  Args:
    shape: shape of the transformer.
    dtype: dtype of weights and activations; adapters are float32.
    mode: "train" is a step of AdamW on adapters, "forward" a forward pass.
    backend: the backend of attention.
    remat: what the step recomputes.
    quantize: how the base is quantised.
  """
  import jax
  import jax.numpy as jnp

  from univid_jax.checkpoints.run_parts import create_model
  from univid_jax.config.boundary import override
  from univid_jax.config.presets import wan_1_3b
  from univid_jax.parallel.mesh import make_mesh
  from univid_jax.training.optimizer import make_optimizer
  from univid_jax.training.state import StateSpec

  options = {"variant": "", "dtype": dtype, "param_dtype": dtype, "attention_backend": backend, "remat": remat}
  options |= {name: getattr(shape, name) for name in SHAPE_KEYS}
  changes = {"lora.rank": LORA_RANK, "base.quantize": quantize, "codec.latent_channels": shape.out_dim}
  config = override(wan_1_3b(), changes | {f"model.{key}": value for key, value in options.items()})
  mesh = make_mesh({}, devices=jax.devices()[:1])  # the peer uses one device, too
  optimizer = make_optimizer(config.optimizer, 1000)
  spec = StateSpec.for_model(lambda: create_model(config), optimizer, mesh, ema=False, lora=True)

  # One parameter at a time, so that drawing them does not determine peak memory.
  @jax.jit
  def draw(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.integer):
      return jax.random.randint(jax.random.key(x.size), x.shape, 0, 100, x.dtype)
    return 0.02 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)

  frozen = jax.tree.map(lambda x: jax.device_put(draw(jnp.zeros(x.shape, x.dtype)), x.sharding), spec.abstract_frozen)
  if mode == "forward":
    return _make_forward(spec, frozen, mesh)
  return _make_step(config, spec, frozen, mesh, optimizer)


def _make_forward(spec: "StateSpec", frozen: Any, mesh: "Mesh") -> Callable[["PackedRow"], dict[str, float]]:
  """Returns the forward pass of `make_row_program`."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from univid_jax.models.lora import join
  from univid_jax.parallel.sharding import shard_batch

  params = spec.create().params

  @jax.jit
  def predict(params, frozen, row):
    return nnx.merge(spec.graph, join(frozen, params))(row.tokens, jnp.full((len(row.tokens), 1), 500.0), row)

  def run_forward(row: "PackedRow") -> dict[str, float]:
    with jax.set_mesh(mesh):
      row = row if isinstance(row.tokens, jax.Array) else shard_batch(row, mesh)
      jax.block_until_ready(predict(params, frozen, row))
    return {}

  return run_forward


def _make_step(
  config: "RunConfig", spec: "StateSpec", frozen: Any, mesh: "Mesh", optimizer: "GradientTransformation"
) -> Callable[["PackedRow"], dict[str, float]]:
  """Returns the training step of `make_row_program`."""
  import jax
  import jax.numpy as jnp

  from univid_jax.parallel.sharding import shard_batch
  from univid_jax.training.memory import compile_step
  from univid_jax.training.step import make_train_step

  state = spec.create()
  step = make_train_step(config, spec, [optimizer], mesh)
  compiled = {}
  forecasts = {}

  def run_step(row: "PackedRow") -> dict[str, float]:
    nonlocal state
    if not isinstance(row.tokens, jax.Array):
      row = shard_batch(row, mesh)
    shapes = str(jax.tree.map(jnp.shape, row))
    if shapes not in compiled:
      compiled[shapes], forecasts[shapes] = compile_step(step, spec, row, mesh)
    with jax.set_mesh(mesh):
      state, metrics = compiled[shapes](state, frozen, row)
      jax.block_until_ready((state, metrics))
    return {"forecast_gib": round(forecasts[shapes].total / 2**30, 3)}

  return run_step


def make_sentence_row(
  shape: DiTConfig,
  *,
  frames: int | Sequence[int],
  height: int,
  width: int,
  prompt_tokens: int,
  with_targets: bool,
  context_mode: "ContextMode | None" = None,
  sentences: int = 1,
) -> "PackedRow":
  """Packs sentences of four clips into a row without padding.

  Args:
    shape: shape of the transformer.
    frames: latent frames of a clip, or of each.
    height: height of a clip in pixels.
    width: width of a clip in pixels.
    prompt_tokens: length of the prompt; 512 has no padding.
    with_targets: whether the row lists its targets, so that the last block computes only them.
    context_mode: see `PackedRow`; UniVid's by default.
    sentences: number of sentences in the row, which are equal.
  """
  import numpy as np

  from univid_jax.core.packed_row import UNIVID_CONTEXT
  from univid_jax.core.sentence import Sentence, reference_roles
  from univid_jax.data.rows.packing import RowShape, pack
  from univid_jax.data.rows.tokens import sentence_features

  stride = find_autoencoder(shape.out_dim).spatial_stride
  lengths = [frames] * 4 if isinstance(frames, int) else frames
  size = height // stride, width // stride, shape.out_dim
  clips = tuple(np.ones((length, *size), np.float32) for length in lengths)
  features = sentence_features(
    Sentence(clips=clips, roles=reference_roles(4)),
    patch_size=shape.patch_size,
    text_len=shape.text_len,
    prompt_embedding=np.ones((prompt_tokens, shape.text_dim), np.float32),
  )
  row_shape = RowShape(
    num_tokens=sentences * len(features.tokens),
    num_text_tokens=sentences * len(features.text),
    num_slots=sentences,
    num_targets=sentences * len(features.targets) if with_targets else None,
    context_mode=context_mode or UNIVID_CONTEXT,
  )
  return pack([features] * sentences, row_shape)
