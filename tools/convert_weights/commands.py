"""What the command line does: say what a path holds, carry it over, verify."""

from collections.abc import Sequence
from pathlib import Path

from etils import epath

from tools.convert_weights import export
from tools.convert_weights.convert import component_fills, convert, gigabytes, writing
from tools.convert_weights.layout import check_fills
from tools.convert_weights.sources import Release, find_release
from tools.convert_weights.verify import verify_release
from univid_jax.training.restore import is_lora_run, read_run_lora
from univid_jax.weights.checkpoint import CheckpointInfo, is_checkpoint, read_info
from univid_jax.weights.files import open_tensors
from univid_jax.weights.lora import FORMATS, LORA_FILE, LoRAWeights, is_lora, read_lora, write_lora, write_lora_folder


def find(source: str) -> CheckpointInfo | LoRAWeights | Release:
  """What a path holds: a checkpoint of this project, a LoRA, or PyTorch's base weights."""
  path = epath.Path(source)
  if is_checkpoint(path):
    return read_info(path)
  if is_lora_run(path):
    return read_run_lora(path)
  if (path / LORA_FILE).exists() or (path.is_file() and is_lora(open_tensors(source).infos)):
    return read_lora(source)
  return find_release(Path(source))


def inspect(source: str) -> str:
  """Lines that say what a path holds.

  Raises:
    ValueError: nothing that is known, or not whole.
  """
  return _describe(source, find(source))


def _describe(source: str, found: CheckpointInfo | LoRAWeights | Release) -> str:
  if isinstance(found, LoRAWeights):
    kept = [f"  {key}: {value}" for key, value in sorted(found.metadata.items()) if len(value) < 200]
    return "\n".join([f"{source}: {found.describe()}", *kept])
  if isinstance(found, CheckpointInfo):
    lines = [f"{source}: checkpoint of univid_jax {found.version}, {found.variant}"]
    lines += [f"  {name}: {info.num_parameters:,} parameters, {_dtypes(info.dtypes)}, from {info.source} ({info.layout})"
              for name, info in found.components.items()]
    return "\n".join([*lines, f"  tokenizer: {found.tokenizer or 'none'}"])
  lines = [f"{source}: Wan2.1, {found.variant}"]
  for part in found.sources:
    dtypes: dict[str, int] = {}
    for info in part.tensors.infos.values():
      dtypes[info.dtype] = dtypes.get(info.dtype, 0) + 1
    lines.append(f"  {part.component}: {len(part.tensors.infos)} tensors ({_dtypes(dtypes)}, {gigabytes(part.nbytes)}) in the "
                 f"{part.layout} layout, {part.path}")
    lines += [f"    left out, not used by Wan2.1: {reason} ({len(names)} tensors)"
              for reason, names in part.left_out.items() if names]
  lines.append(f"  tokenizer: {found.tokenizer or 'none'}")
  return "\n".join([*lines, *(f"  not converted: {note}" for note in found.notes)])


def _dtypes(counts) -> str:
  return ", ".join(f"{count} {dtype}" for dtype, count in sorted(counts.items()))


def convert_any(source: str, destination: str, *, to: str = "jax", dtype: str | None = None, force: bool = False,
                allow_missing: Sequence[str] = ()) -> str:
  """Carries whatever a path holds over to a layout; the line that says what was done.

  Raises:
    ValueError: the source cannot go there, or is not whole.
    OSError: the destination exists or is too small.
  """
  found = find(source)
  print(_describe(source, found))
  if isinstance(found, LoRAWeights):
    return convert_lora(found, source, destination, to=to, dtype=dtype, force=force)
  if to in FORMATS and to not in export.LAYOUTS:
    raise ValueError(f"{source} holds base weights, and --to={to} is a LoRA's format; they go to jax, original or diffusers")
  if isinstance(found, CheckpointInfo):
    if to == "jax":
      raise ValueError(f"{source} is a checkpoint of this project already; --to=original or --to=diffusers goes back")
    export.export(source, destination, to, dtype=dtype, force=force)
    return f"wrote {destination} in the layout of {'the official release' if to == 'original' else 'diffusers'}"
  if to != "jax":
    raise ValueError(f"{source} holds PyTorch weights: convert them to jax first, then to {to}")
  info = convert(found, destination, dtype=dtype, allow_missing=allow_missing, force=force)
  parts = ", ".join(f"{name} {part.num_parameters:,}" for name, part in info.components.items())
  return f"wrote {destination}: {info.variant} ({parts} parameters)"


def convert_lora(lora: LoRAWeights, source: str, destination: str, *, to: str, dtype: str | None, force: bool) -> str:
  """Writes a LoRA in another format; see `convert_any`."""
  if to == "original":
    raise ValueError(f"{source} holds a LoRA; LoRAs go to jax, {', '.join(FORMATS)}")
  if dtype:
    lora = lora.astype(dtype)
  size = sum(layer.down.nbytes + layer.up.nbytes for layer in lora.layers.values())
  with writing(destination, needed=2 * size, is_file=to != "jax", force=force) as target:
    if to == "jax":
      write_lora_folder(target, lora)
    else:
      write_lora(target, lora, to)
  return f"wrote {destination} ({'this project' if to == 'jax' else to})"


def verify(source: str, destination: str, *, allow_missing: Sequence[str] = ()) -> tuple[str, bool]:
  """Converts where the destination is not there yet, compares, and gives a verdict with its reasons.

  Returns:
    The lines, and whether all is well.
  """
  release = find_release(Path(source))
  if not is_checkpoint(destination):
    print(convert_any(source, destination, allow_missing=allow_missing))
  for part in release.sources:
    check_fills(component_fills(part.component, part.config), {name: x.shape for name, x in part.tensors.infos.items()},
                allow_missing=allow_missing)
  return verify_release(release, destination)
