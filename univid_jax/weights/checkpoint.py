"""A checkpoint folder: pre-trained weights in this project's layout, beside a readable account of them.

  DIR/checkpoint.json   what it is, where it is from; written last, so a folder that has it is whole
  DIR/transformer/      parameters, layers stacked (orbax); vae/, text_encoder/, image_encoder/ likewise, where they are there
  DIR/tokenizer/        the tokenizer's own files
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from univid_jax.files import absolute
from univid_jax.models.clip import CLIPConfig, CLIPVision
from univid_jax.models.dit import DiT, DiTConfig
from univid_jax.models.umt5 import UMT5Config, UMT5Encoder
from univid_jax.models.vae import VAE, VAEConfig
from univid_jax.parallel.sharding import parameter_shardings

CHECKPOINT_FILE = "checkpoint.json"
FORMAT = 1

# Each component's config and module.
COMPONENTS: Mapping[str, tuple[type, type]] = {
    "transformer": (DiTConfig, DiT),
    "vae": (VAEConfig, VAE),
    "text_encoder": (UMT5Config, UMT5Encoder),
    "image_encoder": (CLIPConfig, CLIPVision),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComponentInfo:
  """What checkpoint.json says of a component.

  Attributes:
    config: the values of the component's config.
    source: the file that it was converted from.
    layout: of that file, original or diffusers.
    dtypes: how many tensors have which dtype.
    num_tensors: of the official layout.
    num_parameters: numbers in them.
    num_files: in the component's folder.
    checksum: SHA-256 over the tensors of the official layout, each by name, dtype, shape and bytes.
  """

  config: Mapping[str, Any]
  source: str
  layout: str
  dtypes: Mapping[str, int]
  num_tensors: int
  num_parameters: int
  num_files: int
  checksum: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
  """What checkpoint.json says.

  Attributes:
    variant: the published model's name where the shape is one's, else "custom".
    version: of this project, when it was written.
    components: by name.
    tokenizer: the tokenizer's file in the folder, or None.
  """

  variant: str
  version: str
  components: Mapping[str, ComponentInfo]
  tokenizer: str | None

  def write(self, folder: epath.PathLike) -> None:
    values = {"format": FORMAT, **dataclasses.asdict(self)}
    (epath.Path(folder) / CHECKPOINT_FILE).write_text(json.dumps(values, indent=2) + "\n")


def is_checkpoint(folder: epath.PathLike) -> bool:
  """Whether a folder is a whole checkpoint folder."""
  return (epath.Path(folder) / CHECKPOINT_FILE).exists()


def read_info(folder: epath.PathLike) -> CheckpointInfo:
  """Reads checkpoint.json.

  Raises:
    FileNotFoundError: the folder is no checkpoint.
    ValueError: the file cannot be read, or is of a newer format.
  """
  path = epath.Path(folder) / CHECKPOINT_FILE
  if not path.exists():
    raise FileNotFoundError(f"no {CHECKPOINT_FILE} in {folder}: it is not a converted checkpoint "
                            "(python -m tools.convert_weights SRC DST makes one)")
  try:
    values = json.loads(path.read_text())
    if values.pop("format") != FORMAT:
      raise ValueError("of another version of this project")
    components = {name: ComponentInfo(**component) for name, component in values.pop("components").items()}
    return CheckpointInfo(components=components, **values)
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} cannot be read: {error}") from error


def component_config(name: str, values: Mapping[str, Any]) -> Any:
  """A component's typed config from JSON's values, in which tuples are lists."""
  config_class, _ = COMPONENTS[name]
  return config_class(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def abstract_component(name: str, config: Any, **options) -> nnx.Module:
  """A component without memory: shapes, dtypes and names of dims.

  Args:
    name: of `COMPONENTS`.
    config: the component's.
    **options: of the module (dtype, param_dtype, ...).
  """
  _, module_class = COMPONENTS[name]
  return nnx.eval_shape(lambda: module_class(config, rngs=nnx.Rngs(0), **options))


def parameter_shapes(module: nnx.Module) -> dict[tuple[str, ...], tuple[int, ...]]:
  """The shape of each parameter by its path."""
  return {tuple(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def restore(folder: epath.PathLike, name: str, *, mesh: Mesh, dtype=jnp.bfloat16, param_dtype=None,
            **options) -> tuple[nnx.GraphDef, dict[str, Any]]:
  """A component with its parameters, read straight into their shards.

  Args:
    folder: a checkpoint.
    name: of the component.
    mesh: where the parameters go.
    dtype: of activations and products.
    param_dtype: of the parameters; `dtype` by default.
    **options: of the module.

  Returns:
    The component without its parameters, and these in nested dicts.

  Raises:
    FileNotFoundError: the checkpoint has no such component.
    ValueError: it cannot be read.
  """
  info = read_info(folder)
  if name not in info.components:
    raise FileNotFoundError(f"{folder} has no {name}, only {', '.join(info.components)}")
  check_files(folder, name, info)
  config = component_config(name, info.components[name].config)
  module = abstract_component(name, config, dtype=dtype, param_dtype=dtype if param_dtype is None else param_dtype, **options)
  return nnx.graphdef(module), restore_arrays(epath.Path(folder) / name, abstract_parameters(module, mesh))


def count_files(folder: epath.Path) -> int:
  """Files below a folder."""
  return sum(count_files(path) if path.is_dir() else 1 for path in folder.iterdir())


def check_files(folder: epath.PathLike, name: str, info: CheckpointInfo) -> None:
  """Whether a component has all its files.

  Raises:
    ValueError: it has not.
  """
  found, expected = count_files(epath.Path(folder) / name), info.components[name].num_files
  if found != expected:
    raise ValueError(f"{epath.Path(folder) / name} has {found} of its {expected} files: convert it again")


def abstract_parameters(module: nnx.Module, mesh: Mesh, kind: type[nnx.Variable] = nnx.Param) -> dict[str, Any]:
  """Shapes, dtypes and shardings of a module's parameters (or variables of another kind), in nested dicts."""
  shapes = nnx.to_pure_dict(nnx.state(module, kind))
  return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes,
                      parameter_shardings(module, mesh, kind))


def restore_as_stored(folder: epath.PathLike, module: nnx.Module, mesh: Mesh) -> dict[str, Any]:
  """A module's parameters in the dtypes in which they are stored."""
  with ocp.StandardCheckpointer() as checkpointer:
    stored = jax.tree_util.tree_leaves_with_path(checkpointer.metadata(absolute(folder)).item_metadata.tree)
  dtypes = {_names(path): leaf.dtype for path, leaf in stored}
  abstract = jax.tree_util.tree_map_with_path(
      lambda path, x: jax.ShapeDtypeStruct(x.shape, dtypes.get(_names(path), x.dtype), sharding=x.sharding),
      abstract_parameters(module, mesh))
  return restore_arrays(folder, abstract)


def _names(path) -> tuple[str, ...]:
  """A path's keys; numbers come back from orbax as text."""
  return tuple(str(key.key) for key in path)


def restore_arrays(folder: epath.PathLike, abstract: Any) -> Any:
  """Arrays as orbax stored them, as the shapes, dtypes and shardings of `abstract` say.

  Raises:
    ValueError: they cannot be read.
  """
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(absolute(folder), abstract)
  except Exception as error:  # orbax and tensorstore raise many kinds
    raise ValueError(f"the weights in {folder} cannot be read: {str(error).splitlines()[0]}") from error
