"""From PyTorch's files to a checkpoint folder: tensor by tensor, in bounded memory, whole or not at all."""

import collections
import contextlib
import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from tqdm import tqdm

import univid_jax
from tools.convert_weights.layout import Fill, check_fills, fills
from tools.convert_weights.sources import Release, Source
from univid_jax.parallel.sharding import unflatten
from univid_jax.weights.checkpoint import CheckpointInfo, ComponentInfo, abstract_component, parameter_shapes
from univid_jax.weights.files import numpy_dtype

# Orbax writes a parameter in chunks of this size; with the limit on what is under way at once they bound its memory.
CHUNK_BYTES = 32 << 20
CONCURRENT_GB = 1


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
  largest = max(stored_bytes(source, wanted, dtype) for source, wanted in planned)
  with writing(destination, needed=total, scratch=largest, force=force) as folder, scratch_folder(folder) as scratch, \
      tqdm(total=sum(source.nbytes for source, _ in planned), unit="B", unit_scale=True, desc="convert") as bar:
    components = {source.component: write_component(folder, scratch, source, wanted, dtype, bar) for source, wanted in planned}
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


def write_component(folder: epath.Path, scratch: Path, source: Source, wanted: Sequence[Fill], dtype: str | None,
                    bar: tqdm) -> ComponentInfo:
  """Fills a component's parameters in memory-mapped files of the scratch folder, and has orbax store them."""
  arrays, digests = {}, {}
  dtypes: collections.Counter[str] = collections.Counter()
  scratch = scratch / source.component
  scratch.mkdir()
  for number, fill in enumerate(wanted):
    stored = dtype or fill_dtype(source, fill)
    buffer = np.memmap(scratch / str(number), numpy_dtype(stored), "w+", shape=fill.shape if fill.shape else (1,))
    layers = buffer if fill.stacked else buffer.reshape(1, *fill.shape)
    for layer, name in zip(layers, fill.names):
      if name is None:
        layer[...] = fill.default()
        continue
      tensor = source.tensors.read(name).astype(numpy_dtype(stored), copy=False)
      digests[name] = digest(name, tensor)
      layer[...] = fill.from_original(tensor)
      dtypes[stored] += 1
      bar.update(source.tensors.infos[name].nbytes)
    # JAX on a CPU takes aligned memory as it is, so this copies nothing, and orbax reads it chunk by chunk.
    arrays[fill.path] = jax.device_put(buffer, jax.devices("cpu")[0])
  save_arrays(folder / source.component, unflatten(arrays.items()))
  arrays.clear()
  shutil.rmtree(scratch)
  return ComponentInfo(config=dataclasses.asdict(source.config), source=str(source.path), layout=source.layout,
                       dtypes=dict(dtypes), num_tensors=len(digests), checksum=combined(digests),
                       num_parameters=sum(int(np.prod(fill.shape)) for fill in wanted))


def save_arrays(folder: epath.Path, tree: Any) -> None:
  """Stores nested dicts of arrays with orbax."""
  handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=CONCURRENT_GB)
  save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(tree, save_args=save_args))


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
def writing(destination: epath.PathLike, *, needed: int, scratch: int = 0, is_file: bool = False,
            force: bool) -> Iterator[epath.Path]:
  """A folder (or the path of a file) to write to that becomes the destination when all went well, and else leaves nothing.

  Where there is renaming it has another name until then; on object stores it is the destination itself, whose
  checkpoint.json comes last.

  Raises:
    FileExistsError: the destination exists, and `force` was not given.
    OSError: less than `needed` + `scratch` bytes are free.
  """
  destination = epath.Path(destination)
  if destination.exists() and not force:
    raise FileExistsError(f"{destination} exists already; --force replaces it")
  if "://" in str(destination):
    if destination.exists():
      _remove(destination)
    if not is_file:
      destination.mkdir(parents=True)
    yield destination
    return
  destination = destination.resolve()
  destination.parent.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(destination.parent).free
  if free < needed + scratch:
    raise OSError(f"{destination} needs {gigabytes(needed + scratch)} ({gigabytes(scratch)} of it for the time of writing), "
                  f"{destination.parent} has {gigabytes(free)} free")
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


@contextlib.contextmanager
def scratch_folder(folder: epath.Path) -> Iterator[Path]:
  """A local folder for memory-mapped files: in the one being written where that is local."""
  with tempfile.TemporaryDirectory(prefix=".scratch", dir=None if "://" in str(folder) else folder) as name:
    yield Path(name)


def gigabytes(count: int) -> str:
  return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
