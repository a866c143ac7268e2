"""A task of a model as MaxDiffusion and univid_jax write it, lowered for TPUs that need not be present.

JAX is imported inside functions, after `use_tpu_compiler`.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from univid_jax.core.errors import UserError
from univid_jax.platform.topologies import count_chips, describe_devices

TASKS = ("forward", "gradient", "training")
MODELS = {"1.3b": "wan2.1-t2v-1.3b", "14b": "wan2.1-t2v-14b"}
SIZES = {"480p": (21, 60, 104), "720p": (21, 90, 160)}  # latents of 81 frames, (t, y, x)
CONTEXT, TEXT_TOKENS = 4, 512
# Operations per cycle of all matrix units of a chip: units x side^2 x 2.
PEAK = {"v5e": 4 * 128**2 * 2, "v5p": 8 * 128**2 * 2, "v6e": 4 * 256**2 * 2}
# Blocks of MaxDiffusion's flash attention, from its configs/base_wan_14b.yml: "Use on v6e" for the forward pass. Its
# "Use on v5p" is refused (keys are padded to whole blocks of 3072, which the forward pass's blocks of 2048 must
# divide), and both are refused in gradients (block_q = 3024 is not a multiple of 128), which therefore use the file's
# default.
BLOCK_NAMES = ("block_q", "block_kv_compute", "block_kv", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
BLOCK_NAMES = (*BLOCK_NAMES, "block_q_dq", "block_kv_dq")
FORWARD_BLOCKS = dict(zip(BLOCK_NAMES, (3024, 1024, 2048, 3024, 2048, 1024, 3024, 2048)))
GRADIENT_BLOCKS = dict.fromkeys(BLOCK_NAMES, 512)


@dataclasses.dataclass(frozen=True)
class Case:
  """A program: what it computes, of which model, at which size, on which devices."""

  task: str
  model: str
  size: str
  topology: str

  @classmethod
  def parse(cls, text: str) -> "Case":
    """Parses TASK/MODEL/SIZE/TOPOLOGY; raises UserError if the text is not one."""
    parts = text.split("/")
    known = len(parts) == 4 and parts[0] in TASKS and parts[1] in MODELS and parts[2] in SIZES
    if not known or parts[3].partition(":")[0] not in PEAK or count_chips(parts[3]) % CONTEXT:
      raise UserError(
        f"--cases: {text!r} is not TASK/MODEL/SIZE/TOPOLOGY with {', '.join(TASKS)}, {', '.join(MODELS)}, "
        f"{', '.join(SIZES)}, and a multiple of {CONTEXT} chips of {', '.join(PEAK)}"
      )
    return cls(*parts)

  @property
  def chip(self) -> str:
    return self.topology.partition(":")[0]

  @property
  def rows(self) -> int:
    """Rows of a batch: one per data shard; shards share the weights (fsdp)."""
    return count_chips(self.topology) // CONTEXT


def lower_program(case: Case, apply: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> Any:
  """Lowers a case's task.

  Args:
    case: the case, with its task.
    apply: maps parameters and inputs to a velocity of the shape of the first input.
    params: a tree of shapes with shardings.
    inputs: the same for the inputs.
  """
  import jax
  import jax.numpy as jnp
  import optax

  if case.task == "forward":
    return jax.jit(apply).lower(params, *inputs)

  def loss(params: Any, x: Any, *others: Any) -> Any:
    return jnp.mean(jnp.square(apply(params, x, *others).astype(jnp.float32) - x.astype(jnp.float32)))

  shardings = jax.tree.map(lambda x: x.sharding, params)
  if case.task == "gradient":
    return jax.jit(jax.grad(loss), out_shardings=shardings).lower(params, *inputs)
  optimizer = optax.adamw(1e-5, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
  whole = inputs[0].sharding.update(spec=jax.sharding.PartitionSpec())
  moments = jax.eval_shape(optimizer.init, params)
  structure = jax.tree.structure(params)
  # `optax.tree_utils.tree_map_params` would make arrays on the mesh's devices, which do not exist.
  placed = jax.tree.map(
    lambda x: shardings if jax.tree.structure(x) == structure else whole,
    moments,
    is_leaf=lambda x: jax.tree.structure(x) == structure,
  )
  moments = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), moments, placed)

  def train(params: Any, moments: Any, *inputs: Any) -> Any:
    value, grads = jax.value_and_grad(loss)(params, *inputs)
    updates, moments = optimizer.update(grads, moments, params)
    return optax.apply_updates(params, updates), moments, value, optax.tree_utils.tree_norm(grads)

  step = jax.jit(train, donate_argnums=(0, 1), out_shardings=(shardings, placed, whole, whole))
  return step.lower(params, moments, *inputs)


def lower_ours(case: Case) -> Any:
  """Lowers the program of univid_jax, for rows as long as sampling makes them; their padding is attended to."""
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from jax.sharding import NamedSharding

  from univid_jax.checkpoints.pretrained import abstract_parameters
  from univid_jax.core.options import RematPolicy
  from univid_jax.core.packed_row import PackedRow
  from univid_jax.data.rows.packing import bucket_size
  from univid_jax.models.dit import DiT
  from univid_jax.models.variants import VARIANTS
  from univid_jax.parallel.mesh import make_mesh
  from univid_jax.parallel.sharding import BATCH, TOKENS

  mesh = make_mesh({"fsdp": case.rows, "context": CONTEXT}, describe_devices(case.topology))
  t, y, x = SIZES[case.size]
  num_tokens = bucket_size(t * (y // 2) * (x // 2))
  config = VARIANTS[MODELS[case.model]]
  options: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "remat": RematPolicy.FULL}
  module = nnx.eval_shape(lambda: DiT(config, **options, rngs=nnx.Rngs(0)))
  graph = nnx.graphdef(module)

  def describe(*shape: int, dtype: Any = jnp.bfloat16, spec: Any = BATCH) -> Any:
    return jax.ShapeDtypeStruct((case.rows, *shape), dtype, sharding=NamedSharding(mesh, spec))

  tokens = describe(num_tokens, 4 * config.in_dim, spec=TOKENS)
  row: Any = PackedRow(
    tokens=tokens,
    positions=describe(num_tokens, 3, dtype=jnp.int32, spec=TOKENS),
    segment_ids=describe(num_tokens, dtype=jnp.int32, spec=TOKENS),
    target_mask=describe(num_tokens, dtype=jnp.bool_, spec=TOKENS),
    text=describe(TEXT_TOKENS, config.text_dim),
    text_counts=describe(TEXT_TOKENS, dtype=jnp.float32),
  )
  with jax.set_mesh(mesh):
    inputs = (tokens, describe(1, dtype=jnp.float32), row)
    return lower_program(
      case, lambda params, *x: nnx.merge(graph, params)(*x), abstract_parameters(module, mesh), inputs
    )


def lower_maxdiffusion(case: Case, folder: str) -> Any:
  """Lowers the program of MaxDiffusion, which is imported from a folder."""
  sys.path.insert(0, folder)
  import flax.linen as nn
  import jax
  import jax.numpy as jnp
  import yaml
  from flax import nnx
  from flax.linen.spmd import logical_to_mesh_sharding
  from jax.experimental import mesh_utils
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
  from jax.sharding import Mesh, NamedSharding, PartitionSpec
  from maxdiffusion.models.wan.transformers.transformer_wan import WanModel

  from univid_jax.models.variants import VARIANTS

  file = Path(folder) / "maxdiffusion" / "configs" / f"base_wan_{case.model.replace('.', '_')}.yml"
  settings = yaml.safe_load(file.read_text())
  rules = [(name, tuple(axes) if isinstance(axes, list) else axes) for name, axes in settings["logical_axis_rules"]]
  devices = mesh_utils.create_device_mesh(
    (1, case.rows, CONTEXT, 1), describe_devices(case.topology), allow_split_physical_axes=True
  )
  mesh = Mesh(devices, settings["mesh_axes"])
  config = VARIANTS[MODELS[case.model]]
  options: dict[str, Any] = dict(
    num_attention_heads=config.num_heads, ffn_dim=config.ffn_dim, num_layers=config.num_layers, mesh=mesh
  )
  options |= dict(dtype=jnp.bfloat16, weights_dtype=jnp.bfloat16, attention=settings["attention"], remat_policy="FULL")
  options |= {name: settings[name] for name in ("flash_min_seq_length", "mask_padding_tokens", "scan_layers")}
  blocks = FORWARD_BLOCKS if case.task == "forward" else GRADIENT_BLOCKS
  options["flash_block_sizes"] = splash_attention_kernel.BlockSizes(**blocks)

  def describe(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  batch, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ([("data", "fsdp")], []))
  with contextlib.ExitStack() as stack:
    stack.enter_context(mesh)
    stack.enter_context(nn.logical_axis_rules(rules))
    model = nnx.eval_shape(lambda: WanModel(**options, rngs=nnx.Rngs(0)))
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    placed = logical_to_mesh_sharding(nnx.get_partition_spec(state), mesh, rules)
    leaves, tree = jax.tree.flatten(state)
    placed = jax.tree.leaves(placed, is_leaf=lambda x: isinstance(x, NamedSharding))
    params = [describe(x, sharding) for x, sharding in zip(leaves, placed, strict=True)]
    rest = jax.tree.map(lambda x: describe(x, whole), rest)

    def apply(params: Any, latents: Any, timesteps: Any, text: Any, rest: Any) -> Any:
      model = nnx.merge(graph, jax.tree.unflatten(tree, params), rest)
      found = model(hidden_states=latents, timestep=timesteps, encoder_hidden_states=text, return_dict=False)
      return found[0] if isinstance(found, tuple) else found

    shapes = ((config.in_dim, *SIZES[case.size]), jnp.bfloat16), ((), jnp.float32)
    shapes = (*shapes, ((TEXT_TOKENS, config.text_dim), jnp.bfloat16))
    inputs = [jax.ShapeDtypeStruct((case.rows, *shape), dtype, sharding=batch) for shape, dtype in shapes]
    return lower_program(case, apply, params, (*inputs, rest))
