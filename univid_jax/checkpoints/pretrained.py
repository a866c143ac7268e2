"""Checkpoint folders: pre-trained weights in this project's layout.

DIR/checkpoint.json   describes the contents and their origin; written after them, so a folder that has it is complete
DIR/transformer/      parameters with stacked layers (Orbax); likewise vae/, text_encoder/ and image_encoder/, if any;
                      of a model that was trained from scratch in one file, transformer.safetensors
DIR/transformer_2/    the low-noise expert of Wan2.2 A14B; transformer/ is then the high-noise one
DIR/tokenizer/        the tokenizer's own files
DIR/checksums.xxh128  of all other files; written last
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from univid_jax.checkpoints import weights_file
from univid_jax.checkpoints.built_in import locate
from univid_jax.checkpoints.checksums import has_checksums
from univid_jax.checkpoints.info import CheckpointInfo, ComponentInfo, is_checkpoint, read_info
from univid_jax.checkpoints.layerwise import read_layerwise
from univid_jax.checkpoints.orbax_files import open_arrays, restore_arrays
from univid_jax.checkpoints.usage import Usage
from univid_jax.codecs.wan_vae import VAE, VAEConfig
from univid_jax.core.errors import UserError
from univid_jax.core.options import Expert, Quantize
from univid_jax.core.paths import exists, read_bytes, walk_files
from univid_jax.models.clip import CLIPConfig, CLIPVision
from univid_jax.models.dit import DiT
from univid_jax.models.layers import quantize_linears
from univid_jax.models.quantized import quantization_of
from univid_jax.models.umt5 import UMT5Config, UMT5Encoder
from univid_jax.models.variants import DiTConfig
from univid_jax.parallel.sharding import parameter_shardings

log = logging.getLogger(__name__)

# Names, among those of components, under which checksums of other contents are listed.
CONFIGS, TOKENIZER = "configs", "tokenizer"

# The config and the module of each component.
COMPONENTS: Mapping[str, tuple[type, type]] = {
  "transformer": (DiTConfig, DiT),
  "transformer_2": (DiTConfig, DiT),
  "vae": (VAEConfig, VAE),
  "text_encoder": (UMT5Config, UMT5Encoder),
  "image_encoder": (CLIPConfig, CLIPVision),
}


def is_converted(checkpoint: str) -> bool:
  """Returns whether a path or name is a converted checkpoint's, even if its description is missing."""
  return is_checkpoint(checkpoint) or has_checksums(checkpoint)


def require_no_step(checkpoint: str, step: int | str | None) -> None:
  """Raises UserError if a step is given for a converted checkpoint."""
  if step is not None:
    raise UserError(
      f"{checkpoint} is a converted checkpoint, which has no step {step}: runs have steps; those of sampling are "
      "--steps, in Python num_inference_steps"
    )


def component_config(component: str, values: Mapping[str, Any]) -> Any:
  """Converts the values of a component's config in checkpoint.json, where tuples are lists, to its dataclass."""
  config_class, _ = COMPONENTS[component]
  if config_class is DiTConfig:
    return DiTConfig.from_json(values)
  return config_class(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def abstract_component(component: str, config: Any, *, quantize: Quantize = Quantize.NONE, **options) -> nnx.Module:
  """Builds a component without allocating memory: shapes, dtypes and names of dims.

  Args:
    component: a name in `COMPONENTS`.
    config: config of the component.
    quantize: how the linear weights of a transformer's blocks are stored.
    **options: options of the module (dtype, param_dtype, ...).
  """
  _, module_class = COMPONENTS[component]

  def create() -> nnx.Module:
    module = module_class(config, rngs=nnx.Rngs(0), **options)
    if quantize != Quantize.NONE:
      quantize_linears(module.blocks, quantize)
    return module

  return nnx.eval_shape(create)


def abstract_parameters(module: nnx.Module, mesh: Mesh, kind: type[nnx.Variable] = nnx.Param) -> dict[str, Any]:
  """Returns shapes, dtypes and shardings of a module's parameters (or variables of another kind), in nested dicts."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    nnx.to_pure_dict(nnx.state(module, kind)),
    parameter_shardings(module, mesh, kind),
  )


@dataclasses.dataclass(frozen=True)
class PretrainedCheckpoint:
  """A checkpoint folder whose components are loaded one by one.

    checkpoint = PretrainedCheckpoint.open("converted/wan-1.3b")
    graph, params = checkpoint.load("vae", mesh=mesh, dtype=jnp.float32)
    vae = nnx.merge(graph, params)

  Every method that takes the name of a component raises UserError if the checkpoint lacks it.
  """

  folder: epath.Path
  info: CheckpointInfo

  @classmethod
  def open(cls, folder: epath.PathLike) -> "PretrainedCheckpoint":
    """Reads checkpoint.json only; raises like `read_info`."""
    return cls(locate(folder), read_info(folder))

  def has(self, component: str) -> bool:
    return component in self.info.components

  @property
  def transformers(self) -> tuple[str, ...]:
    """The names of the transformers: the only one, or the high-noise and the low-noise expert."""
    return tuple(name for name in ("transformer", "transformer_2") if self.has(name))

  @property
  def experts(self) -> tuple[Expert | None, ...]:
    """Which expert each transformer is; None for one that serves all noise levels."""
    if len(self.transformers) > 1:
      return Expert.HIGH, Expert.LOW
    return (self.info.expert,)

  @property
  def usage(self) -> Usage | None:
    """How the transformer must be run, if this project trained it."""
    return None if self.info.usage is None else Usage.from_metadata(self.info.usage, source=str(self.folder))

  def component(self, component: str) -> ComponentInfo:
    if not self.has(component):
      raise UserError(self.explain_missing(component))
    return self.info.components[component]

  def explain_missing(self, component: str) -> str:
    return (
      f"{self.folder} has no {component}, only {', '.join(self.info.components)}: convert a release that includes it"
    )

  def config(self, component: str) -> Any:
    """Returns the dataclass that describes the component's shape."""
    return component_config(component, self.component(component).config)

  def checksum(self, component: str) -> str:
    """Returns the checksum of a component's tensors, before they were quantised."""
    return self.component(component).checksum

  @functools.cached_property
  def checksums(self) -> dict[str, str]:
    """Checksums of everything that determines samples: each component, all configs and the tokenizer."""
    configs = {name: dataclasses.asdict(self.config(name)) for name in self.info.components}
    text = json.dumps({"components": configs, "codec": self.info.codec}, sort_keys=True)
    checksums = {name: self.checksum(name) for name in self.info.components}
    checksums[CONFIGS] = hashlib.sha256(text.encode()).hexdigest()
    if self.info.tokenizer is not None:
      checksums[TOKENIZER] = hashlib.sha256(read_bytes(self.tokenizer_path())).hexdigest()
    return checksums

  @property
  def contents(self) -> dict[str, str]:
    """Identifies copies of the folder in other places: `checksums`, and how components are quantised."""
    stored = {f"{name} is stored in": str(each.quantize) for name, each in self.info.components.items()}
    return {**self.checksums, **{name: method for name, method in stored.items() if method != Quantize.NONE}}

  def quantization(self, component: str, wanted: Quantize = Quantize.NONE) -> Quantize:
    """Returns how a transformer's blocks are quantised when they are loaded.

    Args:
      component: its name.
      wanted: how to quantise them; NONE keeps them as stored.

    Raises:
      UserError: they are stored in another quantisation.
    """
    stored = self.component(component).quantize
    if Quantize.NONE not in (stored, wanted) and stored != wanted:
      raise UserError(
        f"the {component} of {self.folder} is stored in {stored}, not {wanted}: convert the release with "
        f"--quantize={wanted}"
      )
    return wanted if stored == Quantize.NONE else stored

  def tokenizer_path(self) -> epath.Path:
    if self.info.tokenizer is None:
      raise UserError(f"{self.folder} has no tokenizer: convert a release that includes it")
    return self.folder / self.info.tokenizer

  def load(
    self,
    component: str,
    *,
    mesh: Mesh,
    dtype: DTypeLike = jnp.bfloat16,
    param_dtype: DTypeLike | None = None,
    quantize: Quantize = Quantize.NONE,
    **options,
  ) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Loads a component, each parameter directly into its shards.

    Args:
      component: its name.
      mesh: the devices to load onto.
      dtype: of activations and matrix products.
      param_dtype: of the parameters; `dtype` by default.
      quantize: how to quantise a transformer's blocks, see `quantization`.
      **options: options of the module.

    Returns:
      The module's graph, and its parameters in nested dicts.

    Raises:
      UserError: the weights are damaged, or stored in another quantisation.
    """
    options |= {"dtype": dtype, "param_dtype": dtype if param_dtype is None else param_dtype}
    module = abstract_component(
      component, self.config(component), quantize=self.quantization(component, quantize), **options
    )
    return nnx.graphdef(module), self.load_arrays(component, abstract_parameters(module, mesh))

  def load_arrays(self, component: str, abstract: Any) -> dict[str, Any]:
    """Loads the parameters of a component; kernels are quantised one layer after another.

    Args:
      component: its name.
      abstract: shapes, dtypes and shardings, see `abstract_parameters`; quantised kernels as `quantization` says.

    Raises:
      UserError: the weights are damaged.
    """
    self._check_files(component)
    self._warn(component)
    method = quantization_of(abstract)
    if method == Quantize.NONE:
      restore = weights_file.restore_arrays if self._is_file(component) else restore_arrays
      return restore(self._weights(component), abstract)
    info = self.component(component)
    open_stored = functools.partial(self.open_arrays, component)
    params, errors = read_layerwise(open_stored, abstract, stored=info.quantize)
    log.info("%s: %s", component, describe_errors(method, errors or info.quantize_errors))
    return params

  def open_arrays(self, component: str, paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], Any]:
    """Opens parameters of a component as TensorStore arrays, to read them layer by layer; raises like `load_arrays`."""
    self._check_files(component)
    return (weights_file.open_arrays if self._is_file(component) else open_arrays)(self._weights(component), paths)

  def _is_file(self, component: str) -> bool:
    return self.component(component).num_files == 0

  def _weights(self, component: str) -> epath.Path:
    return self.folder / (component + weights_file.SUFFIX if self._is_file(component) else component)

  def _check_files(self, component: str) -> None:
    if self._is_file(component):
      return
    folder = self.folder / component
    found, expected = count_files(folder), self.component(component).num_files
    if found != expected:
      raise UserError(f"{folder} has {found} files instead of {expected}: convert the release again")

  def _warn(self, component: str) -> None:
    """Logs what is unusual about weights that are about to be used."""
    if nonfinite := self.component(component).nonfinite:
      first = min(nonfinite)
      log.warning(
        "%s: %s numbers of the %s are NaN or infinite, the first in %s: its outputs will not be finite",
        self.folder,
        f"{sum(nonfinite.values()):,}",
        component,
        first,
      )
    if component == "transformer" and self.info.expert:
      log.warning(
        "%s is one expert of Wan2.2 A14B (%s): it was trained on a part of the noise levels",
        self.folder,
        self.info.expert,
      )


def describe_errors(method: Quantize, errors: Sequence[float]) -> str:
  """Describes the relative L2 error of each block's weights."""
  numbers = " ".join(f"{100 * error:.2f}" for error in errors)
  return f"{method} weights of {len(errors)} blocks, relative error of each in %: {numbers}"


def count_files(folder: epath.Path) -> int:
  """Counts the files in a folder and its subfolders; 0 if there is none."""
  return sum(1 for _ in walk_files(folder)) if exists(folder) else 0
