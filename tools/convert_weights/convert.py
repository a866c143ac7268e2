"""From PyTorch's files to a checkpoint folder: tensor by tensor, in bounded memory, whole or not at all."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from tqdm import tqdm

import univid_jax
from tools.convert_weights.layout import Fill, check_fills, fills
from tools.convert_weights.sources import Release, Source
from univid_jax.files import absolute, is_remote
from univid_jax.parallel.sharding import unflatten
from univid_jax.weights.checkpoint import CheckpointInfo, ComponentInfo, abstract_component, count_files, parameter_shapes
from univid_jax.weights.files import numpy_dtype

# Layers larger than this are stored in several chunks.
CHUNK_BYTES = 64 << 20
NUM_THREADS = 4


def component_fills(component: str, config: Any) -> list[Fill]:
  """Which official tensors each parameter of a component needs."""
  return fills(component, config, parameter_shapes(abstract_component(component, config)))


def convert(release: Release, destination: epath.PathLike, *, dtype: str | None = None, allow_missing: Sequence[str] = (),
            force: bool = False) -> CheckpointInfo:
  """Writes a checkpoint folder.

  Args:
    release: what to convert.
    destination: the folder; `gs://` paths too.
    dtype: of the stored parameters; that of the source by default.
    allow_missing: patterns of official names that may be missing; they become 1 in scales, else 0.
    force: whether to replace what is there.

  Raises:
    ValueError: tensors are missing, left over or of the wrong shape.
    OSError: the destination exists, or the disk is too small.
  """
  # All that can be wrong with names and shapes is found before the first byte is written.
  planned = []
  for source in release.sources:
    try:
      shapes = {name: info.shape for name, info in source.tensors.infos.items()}
      planned.append((source, check_fills(component_fills(source.component, source.config), shapes, allow_missing=allow_missing)))
    except ValueError as error:
      raise ValueError(f"{source.path}: {error}") from error
  total = sum(stored_bytes(source, wanted, dtype) for source, wanted in planned)
  with writing(destination, needed=total, force=force) as folder, \
      tqdm(total=sum(source.nbytes for source, _ in planned), unit="B", unit_scale=True, desc="convert") as bar:
    components = {source.component: write_component(folder, source, wanted, dtype, bar) for source, wanted in planned}
    tokenizer = None
    if release.tokenizer:
      (folder / "tokenizer").mkdir()
      for file in sorted(path for path in release.tokenizer.iterdir() if path.is_file()):
        (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
      tokenizer = "tokenizer/tokenizer.json"
    info = CheckpointInfo(variant=release.variant, version=univid_jax.__version__, components=components, tokenizer=tokenizer)
    info.write(folder)
  return info


def stored_bytes(source: Source, wanted: Sequence[Fill], dtype: str | None) -> int:
  return sum(int(np.prod(fill.shape)) * numpy_dtype(dtype or fill_dtype(source, fill)).itemsize for fill in wanted)


def fill_dtype(source: Source, fill: Fill) -> str:
  """The dtype of a parameter's tensors; the widest where layers differ."""
  dtypes = {source.tensors.infos[name].dtype for name in fill.names if name is not None} or {"float32"}
  return "float32" if len(dtypes) > 1 else dtypes.pop()


def write_component(folder: epath.Path, source: Source, wanted: Sequence[Fill], dtype: str | None, bar: tqdm) -> ComponentInfo:
  """Writes a component's parameters, a few layers at a time."""
  dtypes = {fill.path: dtype or fill_dtype(source, fill) for fill in wanted}
  arrays = create_arrays(folder / source.component, {fill.path: (fill.shape, dtypes[fill.path]) for fill in wanted})
  digests: dict[str, str] = {}

  def write_layer(item: tuple[Fill, int]) -> None:
    fill, layer = item
    name = fill.names[layer]
    target = arrays[fill.path][layer] if fill.stacked else arrays[fill.path]
    kind = numpy_dtype(dtypes[fill.path])
    if name is None:
      target.write(fill.default().astype(kind)).result()
      return
    tensor = source.tensors.read(name).astype(kind, copy=False)
    digests[name] = digest(name, tensor)
    target.write(contiguous(fill.from_original(tensor))).result()
    bar.update(source.tensors.infos[name].nbytes)

  # Reading, hashing, transposing and writing leave Python's lock alone.
  with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
    for _ in pool.map(write_layer, [(fill, layer) for fill in wanted for layer in range(len(fill.names))]):
      pass
  counts = collections.Counter(dtypes[fill.path] for fill in wanted for name in fill.names if name is not None)
  return ComponentInfo(config=dataclasses.asdict(source.config), source=str(source.path), layout=source.layout,
                       dtypes=dict(counts), num_tensors=len(digests), checksum=combined(digests),
                       num_files=count_files(folder / source.component),
                       num_parameters=sum(int(np.prod(fill.shape)) for fill in wanted))


def create_arrays(folder: epath.Path, specs: Mapping[tuple[str, ...], tuple[tuple[int, ...], str]]) -> dict[tuple[str, ...], Any]:
  """An orbax checkpoint of arrays that are still to be written, and these as TensorStore arrays.

  Orbax saves zeros from empty files, which gives all its own records; then each array is laid out anew, in chunks of one
  layer, so that layers can be written one by one. (Orbax itself takes whole arrays only, 5.7 GB each in the 14B.)

  Args:
    folder: of the checkpoint.
    specs: shape and dtype of each array by its path; under `blocks` the first dim is that of layers.
  """
  with tempfile.TemporaryDirectory() as empty:
    files = {path: np.memmap(f"{empty}/{index}", numpy_dtype(dtype), "w+", shape=shape)
             for index, (path, (shape, dtype)) in enumerate(specs.items())}
    # JAX on a CPU takes mapped memory as it is, so this copies nothing.
    tree = unflatten((path, jax.device_put(zeros, jax.devices("cpu")[0])) for path, zeros in files.items())
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
      checkpointer.save(absolute(folder), args=ocp.args.PyTreeSave(tree))
  base = str(folder) if is_remote(folder) else f"file://{absolute(folder)}"
  return {path: ts.open({"driver": "zarr", "kvstore": f"{base}/{'.'.join(path)}/",
                         "metadata": {"shape": shape, "chunks": chunk_shape(path, shape, dtype), "dtype": zarr_dtype(dtype),
                                      "compressor": {"id": "zstd", "level": 1}},
                         "store_data_equal_to_fill_value": True},  # orbax takes a chunk that is not there for a loss
                        create=True, delete_existing=True).result()
          for path, (shape, dtype) in specs.items()}


def chunk_shape(path: tuple[str, ...], shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
  """One layer where layers are stacked; the first dim of what is larger than CHUNK_BYTES is divided."""
  if path[0] == "blocks":
    return (1, *chunk_shape(path[1:], shape[1:], dtype))
  row = int(np.prod(shape[1:])) * numpy_dtype(dtype).itemsize
  return (max(1, min(shape[0], CHUNK_BYTES // max(row, 1))), *shape[1:])


def zarr_dtype(dtype: str) -> str:
  return dtype if dtype == "bfloat16" else np.dtype(dtype).str


def contiguous(array: np.ndarray) -> np.ndarray:
  """The array in C order; a transposed matrix goes in strips, twice as fast as at once."""
  if array.ndim != 2 or array.flags.c_contiguous:
    return np.ascontiguousarray(array)
  out = np.empty(array.shape, array.dtype)
  # As integers: NumPy copies its own types without Python's lock.
  target, source = (x.view(np.uint16) if x.itemsize == 2 else x for x in (out, array))
  for start in range(0, array.shape[1], 64):
    target[:, start:start + 64] = source[:, start:start + 64]
  return out


def digest(name: str, tensor: np.ndarray) -> str:
  """SHA-256 of a tensor of the official layout: its name, dtype, shape and bytes."""
  sha = hashlib.sha256(f"{name} {tensor.dtype} {_significant(tensor.shape)}\n".encode())
  sha.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
  return sha.hexdigest()


def _significant(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Without the dims of size 1, in which layouts differ."""
  return tuple(n for n in shape if n != 1)


def combined(digests: Mapping[str, str]) -> str:
  """One checksum for all tensors."""
  return hashlib.sha256("".join(f"{name} {value}\n" for name, value in sorted(digests.items())).encode()).hexdigest()


@contextlib.contextmanager
def writing(destination: epath.PathLike, *, needed: int, is_file: bool = False, force: bool) -> Iterator[epath.Path]:
  """A folder (or the path of a file) to write to that becomes the destination when all went well, and else leaves nothing.

  Where there is renaming it has another name until then; on object stores it is the destination itself, whose
  checkpoint.json comes last.

  Raises:
    FileExistsError: the destination exists, and `force` was not given.
    OSError: less than `needed` bytes are free.
  """
  destination = epath.Path(destination)
  if destination.exists() and not force:
    raise FileExistsError(f"{destination} exists already; --force replaces it")
  if is_remote(destination):
    if destination.exists():
      _remove(destination)
    if not is_file:
      destination.mkdir(parents=True)
    yield destination
    return
  destination = destination.resolve()
  destination.parent.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(destination.parent).free
  if free < needed:
    raise OSError(f"{destination} needs {gigabytes(needed)}, {destination.parent} has {gigabytes(free)} free")
  partial, old = (destination.with_name(f".{kind}-{destination.name}") for kind in ("partial", "old"))
  if partial.exists():  # of a run that was killed
    _remove(partial)
  if not is_file:
    partial.mkdir()
  try:
    yield partial
    if destination.exists():
      destination.rename(old)
    partial.rename(destination)
  except BaseException:
    if partial.exists():
      _remove(partial)
    raise
  if old.exists():
    _remove(old)


def _remove(path: epath.Path) -> None:
  path.rmtree() if path.is_dir() else path.unlink()


def gigabytes(count: int) -> str:
  return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
