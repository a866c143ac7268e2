"""From the PyTorch files of a release to a checkpoint folder, tensor by tensor, so that memory is bounded."""

import collections
import concurrent.futures
import dataclasses
import fnmatch
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

import univid_jax
from univid_jax.checkpoints.casting import cast, count_nonfinite
from univid_jax.checkpoints.checksums import combine_digests, tensor_digest, write_checksums
from univid_jax.checkpoints.info import CheckpointInfo, ComponentInfo
from univid_jax.checkpoints.layerwise import describe_parts, quantize_on_host
from univid_jax.checkpoints.orbax_files import create_arrays, num_chunks
from univid_jax.checkpoints.pretrained import count_files, describe_errors
from univid_jax.checkpoints.tensor_files import numpy_dtype
from univid_jax.convert.destination import atomic_folder
from univid_jax.convert.identify import Source, read_config
from univid_jax.convert.layout import Fill, make_fills, match_fills
from univid_jax.convert.release_configs import read_own_entries
from univid_jax.convert.sources import Release, SentencePiece
from univid_jax.core.errors import UserError
from univid_jax.core.options import Quantize
from univid_jax.core.paths import make_absolute
from univid_jax.core.text import list_first
from univid_jax.models.quantized import QuantizationError

NUM_THREADS = 4

# Block size of a file system; a block belongs to one file.
BLOCK_BYTES = 4096

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ComponentPlan:
  """What is written of a component.

  Attributes:
    source: its files.
    fills: its parameters.
    dtypes: the dtype of each parameter by its path, before it is quantised.
    quantize: what the kernels of blocks are quantised to.
  """

  source: Source
  fills: Sequence[Fill]
  dtypes: dict[tuple[str, ...], str]
  quantize: Quantize

  def is_quantized(self, fill: Fill) -> bool:
    return self.quantize != Quantize.NONE and fill.path[0] == "blocks" and fill.path[-1] == "kernel"

  @property
  def arrays(self) -> dict[tuple[str, ...], tuple[tuple[int, ...], str]]:
    """Shape and dtype of each stored array by its path."""
    arrays: dict[tuple[str, ...], tuple[tuple[int, ...], str]] = {}
    for fill in self.fills:
      if self.is_quantized(fill):
        arrays |= describe_parts(fill.path, fill.shape, self.quantize)
      else:
        arrays[fill.path] = fill.shape, self.dtypes[fill.path]
    return arrays

  @property
  def nbytes(self) -> int:
    """An upper bound of the space on disk: all weights, a partly filled block per file, and descriptions."""
    total = 0
    for path, (shape, dtype) in self.arrays.items():
      files = num_chunks(path, shape, dtype) + 3
      total += int(np.prod(shape)) * numpy_dtype(dtype).itemsize + files * BLOCK_BYTES
    return total


def plan_component(
  source: Source, *, dtype: str | None, allow_missing: Sequence[str], quantize: Quantize = Quantize.NONE
) -> ComponentPlan:
  """Plans what to write; `quantize` concerns transformers only.

  Raises:
    UserError: tensors are missing, unused or have the wrong shape.
  """
  shapes = {name: info.shape for name, info in source.tensors.infos.items()}
  try:
    fills = match_fills(make_fills(source.component, source.config), shapes, allow_missing=allow_missing)
  except UserError as error:
    raise UserError(f"{source.path}: {error}") from error
  method = quantize if source.component.startswith("transformer") else Quantize.NONE
  return ComponentPlan(source, fills, {fill.path: dtype or _source_dtype(source, fill) for fill in fills}, method)


def plan_components(
  release: Release, *, dtype: str | None = None, allow_missing: Sequence[str], quantize: Quantize = Quantize.NONE
) -> list[ComponentPlan]:
  """Plans what to write of each component, see `plan_component`; warns of patterns that allow nothing."""
  plans = [
    plan_component(source, dtype=dtype, allow_missing=allow_missing, quantize=quantize) for source in release.sources
  ]
  absent = {name for plan in plans for fill in plan.fills for name in fill.absent}
  for pattern in allow_missing:
    if not fnmatch.filter(absent, pattern):
      log.warning("--allow_missing=%s has no effect: nothing of that name is missing", pattern)
  return plans


def _source_dtype(source: Source, fill: Fill) -> str:
  """Returns the dtype of a parameter's tensors; float32 if they differ."""
  dtypes = {source.tensors.infos[name].dtype for name in fill.names if name not in fill.absent} or {"float32"}
  return "float32" if len(dtypes) > 1 else dtypes.pop()


def write_checkpoint(
  release: Release,
  destination: epath.PathLike,
  *,
  dtype: str | None,
  quantize: Quantize,
  allow_missing: Sequence[str],
  force: bool,
) -> CheckpointInfo:
  """Converts a release to a checkpoint folder.

  Args:
    release: the release.
    destination: the new folder, local or in a bucket.
    dtype: of the stored parameters; None is that of the source.
    quantize: storage of the linear weights of a transformer's blocks; float8_e4m3fn of the source becomes fp8 as it is,
      if its scales are of rows or of the whole matrix.
    allow_missing: patterns of official names that the release may lack; scales become 1, everything else 0.
    force: whether to replace an existing destination.

  Raises:
    UserError: tensors are missing, unused or have the wrong shape, or overflow `dtype`; nothing is written.
    OSError: the destination exists, or the disk is too small.
  """
  make_absolute(destination)  # or Orbax cannot write there
  plans = plan_components(release, dtype=dtype, allow_missing=allow_missing, quantize=quantize)
  tokenizer, own = _tokenizer_files(release), _own_entries(release)
  needed = sum(plan.nbytes for plan in plans) + sum(len(file) + BLOCK_BYTES for file in tokenizer.values())
  total = sum(source.nbytes for source in release.sources)
  with (
    atomic_folder(destination, needed=needed, force=force) as folder,
    tqdm(total=total, unit="B", unit_scale=True, desc="convert") as bar,
  ):
    for name, file in tokenizer.items():
      (folder / "tokenizer").mkdir(exist_ok=True)
      (folder / "tokenizer" / name).write_bytes(file)
    info = CheckpointInfo(
      variant=release.variant,
      version=univid_jax.__version__,
      components={plan.source.component: _write_component(folder, plan, bar) for plan in plans},
      tokenizer="tokenizer/tokenizer.json" if tokenizer else None,
      expert=release.expert,
      **own,
    )
    info.write(folder)
    write_checksums(folder)
  return info


def describe_nonfinite(counts: Mapping[str, int]) -> str:
  """Describes the tensors with NaN or infinite numbers, which are given by name with their counts."""
  items = [f"{name} ({count:,})" for name, count in sorted(counts.items())]
  return f"{sum(counts.values()):,} numbers are NaN or infinite, in {list_first(items, 8)}"


def _own_entries(release: Release) -> dict[str, Any]:
  """Returns what the release says of a model that this project trained."""
  if release.transformer is None:
    return {}
  path = release.transformer.path
  return read_own_entries(read_config(path), str(path.parent / "config.json"))


def _tokenizer_files(release: Release) -> dict[str, bytes]:
  """Returns the tokenizer's files by name; a SentencePiece model is converted to a tokenizer.json."""
  match release.tokenizer:
    case None:
      return {}
    case SentencePiece(file=file, model=model):
      files = {"tokenizer.json": model.to_tokenizer().to_str().encode()}
      return files if file is None else {**files, "spiece.model": file}
    case folder:
      return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _write_component(folder: epath.Path, plan: ComponentPlan, bar: tqdm) -> ComponentInfo:
  """Writes the parameters of a component, a few layers at a time."""
  source, dtypes = plan.source, plan.dtypes
  arrays = create_arrays(folder / source.component, plan.arrays)
  digests: dict[str, str] = {}
  nonfinite: dict[str, int] = {}
  errors = QuantizationError()

  def write_layer(fill: Fill, layer: int) -> None:
    name, dtype = fill.names[layer], numpy_dtype(dtypes[fill.path])
    if name in fill.absent:
      values = fill.default().astype(dtype)
    else:
      tensor, count = read_as(source, name, dtype)
      digests[name] = tensor_digest(name, tensor)
      if count:
        nonfinite[name] = count
      values = _make_contiguous(fill.from_original(tensor))
    if plan.is_quantized(fill):
      float8 = source.tensors.read_float8(name) if name not in fill.absent else None
      parts, squares = quantize_on_host(values, plan.quantize, float8)
      errors.add(layer, squares)
    else:
      parts = {(): values}
    for part, value in parts.items():
      target = arrays[*fill.path, *part]
      (target[layer] if fill.stacked else target).write(value).result()
    if name not in fill.absent:
      bar.update(source.tensors.infos[name].nbytes)

  # Threads help: reading, hashing, transposing and writing release Python's lock.
  with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
    layers = [(fill, layer) for fill in plan.fills for layer in range(len(fill.names))]
    for _ in pool.map(write_layer, *zip(*layers)):  # raises the first error
      pass
  if plan.quantize != Quantize.NONE:
    log.info("%s: %s", source.component, describe_errors(plan.quantize, errors.by_layer))
  counts = collections.Counter(dtypes[fill.path] for fill in plan.fills for name in fill.names if name in digests)
  return ComponentInfo(
    config=dataclasses.asdict(source.config),
    source=str(source.path),
    layout=source.layout,
    dtypes=dict(counts),
    num_tensors=len(digests),
    checksum=combine_digests(digests),
    num_files=count_files(folder / source.component),
    num_parameters=sum(int(np.prod(fill.shape)) for fill in plan.fills),
    nonfinite=dict(sorted(nonfinite.items())),
    quantize=plan.quantize,
    quantize_errors=errors.by_layer,
  )


def read_as(source: Source, name: str, dtype: np.dtype) -> tuple[np.ndarray, int]:
  """Returns a tensor in a dtype, and how many of its numbers are NaN or infinite.

  Raises:
    UserError: finite numbers are too large for the dtype.
  """
  tensor = source.tensors.read(name)
  try:
    return cast(name, tensor, dtype), count_nonfinite(tensor)
  except UserError as error:
    raise UserError(f"{source.path}: {error}") from None


def _make_contiguous(array: np.ndarray) -> np.ndarray:
  """Returns the array in C order; copies a transposed matrix in strips, which is twice as fast as in one go."""
  if array.ndim != 2 or array.flags.c_contiguous:
    return np.ascontiguousarray(array)
  out = np.empty(array.shape, array.dtype)
  # Views as integers, because NumPy releases Python's lock only for copies of its own dtypes.
  target, source = (x.view(np.uint16) if x.itemsize == 2 else x for x in (out, array))
  for start in range(0, array.shape[1], 64):
    target[:, start : start + 64] = source[:, start : start + 64]
  return out
