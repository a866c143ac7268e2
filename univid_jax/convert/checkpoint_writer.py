"""From the PyTorch files of a release to a checkpoint folder, tensor by tensor, so that memory is bounded."""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Sequence

import numpy as np
from etils import epath
from tqdm import tqdm

import univid_jax
from univid_jax.checkpoints.checksums import combine_digests, tensor_digest
from univid_jax.checkpoints.orbax_files import create_arrays
from univid_jax.checkpoints.pretrained import CheckpointInfo, ComponentInfo, count_files
from univid_jax.checkpoints.tensor_files import numpy_dtype
from univid_jax.convert.destination import atomic_folder
from univid_jax.convert.layout import Fill, make_fills, match_fills
from univid_jax.convert.sources import Release, Source
from univid_jax.core.errors import UserError

NUM_THREADS = 4


@dataclasses.dataclass(frozen=True)
class ComponentPlan:
  """What is written of a component.

  Attributes:
    source: its files.
    fills: its parameters.
    dtypes: the dtype of each parameter by its path.
  """

  source: Source
  fills: Sequence[Fill]
  dtypes: dict[tuple[str, ...], str]

  @property
  def nbytes(self) -> int:
    return sum(int(np.prod(fill.shape)) * numpy_dtype(self.dtypes[fill.path]).itemsize for fill in self.fills)


def plan_component(source: Source, *, dtype: str | None, allow_missing: Sequence[str]) -> ComponentPlan:
  """Plans what to write; raises UserError if tensors are missing, unused or have the wrong shape."""
  shapes = {name: info.shape for name, info in source.tensors.infos.items()}
  try:
    fills = match_fills(make_fills(source.component, source.config), shapes, allow_missing=allow_missing)
  except UserError as error:
    raise UserError(f"{source.path}: {error}") from error
  return ComponentPlan(source, fills, {fill.path: dtype or _source_dtype(source, fill) for fill in fills})


def _source_dtype(source: Source, fill: Fill) -> str:
  """Returns the dtype of a parameter's tensors; float32 if they differ."""
  dtypes = {source.tensors.infos[name].dtype for name in fill.names if name not in fill.absent} or {"float32"}
  return "float32" if len(dtypes) > 1 else dtypes.pop()


def write_checkpoint(
  release: Release,
  destination: epath.PathLike,
  *,
  dtype: str | None = None,
  allow_missing: Sequence[str] = (),
  force: bool = False,
) -> CheckpointInfo:
  """Converts a release to a checkpoint folder.

  Args:
    release: the release.
    destination: the new folder, local or in a bucket.
    dtype: of the stored parameters; that of the source by default.
    allow_missing: patterns of official names that the release may lack; scales become 1, everything else 0.
    force: whether to replace an existing destination.

  Raises:
    UserError: tensors are missing, unused or have the wrong shape; nothing is written.
    OSError: the destination exists, or the disk is too small.
  """
  plans = [plan_component(source, dtype=dtype, allow_missing=allow_missing) for source in release.sources]
  needed, total = sum(plan.nbytes for plan in plans), sum(source.nbytes for source in release.sources)
  with (
    atomic_folder(destination, needed=needed, force=force) as folder,
    tqdm(total=total, unit="B", unit_scale=True, desc="convert") as bar,
  ):
    info = CheckpointInfo(
      variant=release.variant,
      version=univid_jax.__version__,
      components={plan.source.component: _write_component(folder, plan, bar) for plan in plans},
      tokenizer=_copy_tokenizer(release, folder),
    )
    info.write(folder)
  return info


def _copy_tokenizer(release: Release, folder: epath.Path) -> str | None:
  if release.tokenizer is None:
    return None
  (folder / "tokenizer").mkdir()
  for file in sorted(path for path in release.tokenizer.iterdir() if path.is_file()):
    (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
  return "tokenizer/tokenizer.json"


def _write_component(folder: epath.Path, plan: ComponentPlan, bar: tqdm) -> ComponentInfo:
  """Writes the parameters of a component, a few layers at a time."""
  source, dtypes = plan.source, plan.dtypes
  arrays = create_arrays(folder / source.component, {fill.path: (fill.shape, dtypes[fill.path]) for fill in plan.fills})
  digests: dict[str, str] = {}

  def write_layer(fill: Fill, layer: int) -> None:
    name, dtype = fill.names[layer], numpy_dtype(dtypes[fill.path])
    target = arrays[fill.path][layer] if fill.stacked else arrays[fill.path]
    if name in fill.absent:
      target.write(fill.default().astype(dtype)).result()
      return
    tensor = source.tensors.read(name).astype(dtype, copy=False)
    digests[name] = tensor_digest(name, tensor)
    target.write(_make_contiguous(fill.from_original(tensor))).result()
    bar.update(source.tensors.infos[name].nbytes)

  # Threads help: reading, hashing, transposing and writing release Python's lock.
  with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
    layers = [(fill, layer) for fill in plan.fills for layer in range(len(fill.names))]
    for _ in pool.map(write_layer, *zip(*layers)):  # raises the first error
      pass
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
  )


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
