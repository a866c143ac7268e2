"""What checkpoint.json says: the contents of a checkpoint folder and their origin."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from univid_jax.checkpoints.built_in import locate
from univid_jax.core.errors import UserError
from univid_jax.core.json_files import parse_json, write_json
from univid_jax.core.options import Expert, Quantize
from univid_jax.core.paths import exists, read_bytes

CHECKPOINT_FILE = "checkpoint.json"
# Next to checkpoint.json, if ratios were measured; see `inference.ratio_tables`.
STEP_CACHE_FILE = "step_cache.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComponentInfo:
  """A component in checkpoint.json.

  Attributes:
    config: the values of the component's config.
    source: the file it was converted from.
    layout: layout of that file, see `convert.layout.Layout`.
    dtypes: number of tensors by dtype.
    num_tensors: number of tensors in the official layout.
    num_parameters: numbers in them.
    num_files: number of files in the component's folder; 0 if it is one file, see `weights_file`.
    checksum: checksum of the tensors of the official layout, see `checksums`.
    nonfinite: number of NaNs and infinities, by official name of the tensor.
    quantize: how the linear weights of a transformer's blocks are stored, see `Quantize`.
    quantize_errors: relative L2 error of each block's weights, if they are quantised.
  """

  config: Mapping[str, Any]
  source: str
  layout: str
  dtypes: Mapping[str, int]
  num_tensors: int
  num_parameters: int
  num_files: int
  checksum: str
  nonfinite: Mapping[str, int] = dataclasses.field(default_factory=dict)
  quantize: Quantize = Quantize.NONE
  quantize_errors: Sequence[float] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
  """The contents of checkpoint.json.

  Attributes:
    variant: name of the published model with this shape, else "custom".
    version: version of univid_jax that wrote it.
    components: by name.
    tokenizer: the tokenizer's file, relative to the folder, or None.
    expert: which expert of Wan2.2 A14B the only transformer is, if it is one.
    codec: the values of `CodecConfig` for a transformer that was trained with the codec without weights, else None.
    usage: how a transformer that this project trained must be run, from `Usage.to_metadata`, else None.
  """

  variant: str
  version: str
  components: Mapping[str, ComponentInfo]
  tokenizer: str | None
  expert: Expert | None = None
  codec: Mapping[str, Any] | None = None
  usage: Mapping[str, str] | None = None

  @property
  def has_both_experts(self) -> bool:
    """Whether there are two transformers, the experts of Wan2.2 A14B."""
    return "transformer_2" in self.components

  def write(self, folder: epath.PathLike) -> None:
    write_json(epath.Path(folder) / CHECKPOINT_FILE, {"format": FORMAT, **dataclasses.asdict(self)})


def is_checkpoint(folder: epath.PathLike) -> bool:
  """Returns whether a path, or the name of a built-in checkpoint, is a complete checkpoint folder."""
  return exists(locate(folder) / CHECKPOINT_FILE)


def read_info(folder: epath.PathLike) -> CheckpointInfo:
  """Reads checkpoint.json.

  Raises:
    FileNotFoundError: the folder is not a checkpoint.
    UserError: the file is damaged or has a newer format.
  """
  path = locate(folder) / CHECKPOINT_FILE
  if not exists(path):
    raise FileNotFoundError(f"{folder} is not a converted checkpoint (no {CHECKPOINT_FILE})")
  contents = read_bytes(path)
  try:
    values = parse_json(contents)
    if values.pop("format") != FORMAT:
      raise ValueError("it was written by another version of univid_jax")
    components = {
      name: ComponentInfo(**part | {"quantize": Quantize(part.get("quantize", Quantize.NONE))})
      for name, part in values.pop("components").items()
    }
    expert = values.pop("expert", None)
    return CheckpointInfo(components=components, expert=Expert(expert) if expert else None, **values)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"cannot read {path}: {error}") from error
