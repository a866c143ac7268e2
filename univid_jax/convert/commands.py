"""The operations of the command line: inspect what a path contains, convert it, verify a conversion."""

import logging
import os
import re
from collections.abc import Mapping, Sequence

from etils import epath

from univid_jax.checkpoints.built_in import BUILT_IN
from univid_jax.checkpoints.experts import may_be_expert
from univid_jax.checkpoints.info import CheckpointInfo, is_checkpoint, read_info
from univid_jax.checkpoints.lora.folder import is_lora_folder, write_lora_folder
from univid_jax.checkpoints.lora.formats import FORMATS, check_suffix, write_lora
from univid_jax.checkpoints.lora.names import is_lora, list_names
from univid_jax.checkpoints.lora.reading import is_peft_folder, read_lora
from univid_jax.checkpoints.lora.sidecar import sidecar_path
from univid_jax.checkpoints.lora.weights import LoRAWeights
from univid_jax.checkpoints.pretrained import describe_errors
from univid_jax.checkpoints.run import RunRecord, read_run
from univid_jax.checkpoints.run_parts import transformer_config
from univid_jax.checkpoints.tensor_files import open_tensors
from univid_jax.checkpoints.trained import find_step, read_run_loras
from univid_jax.config.model import DTYPES
from univid_jax.convert.checkpoint_writer import describe_nonfinite, plan_components, write_checkpoint
from univid_jax.convert.destination import atomic_folder, check_destination
from univid_jax.convert.export import LAYOUTS, check_layout, export_checkpoint
from univid_jax.convert.identify import Source
from univid_jax.convert.layout import Layout
from univid_jax.convert.replacement import check_apart
from univid_jax.convert.sources import Release, find_release
from univid_jax.convert.trained_base import require_from_scratch, write_trained_base
from univid_jax.convert.verify import verify_release
from univid_jax.core.bucket_files import copy_file
from univid_jax.core.errors import UserError
from univid_jax.core.options import Expert, Quantize, parse_option
from univid_jax.core.paths import exists, is_file, make_absolute, require_local, to_path
from univid_jax.core.text import format_bytes

# LoRAs are several if a run has trained both experts. A record is that of a run that trained the whole model.
Found = CheckpointInfo | list[LoRAWeights] | RunRecord | Release

# The target that is this project's own layout; others are names in LAYOUTS (base weights) and FORMATS (LoRAs).
JAX = "jax"
OWN_FORMAT = "this project's format"

log = logging.getLogger(__name__)


def find_weights(source: str, *, step: int | str | None) -> Found:
  """Identifies what a path contains: a checkpoint of this project, a LoRA, or a release of PyTorch files.

  Args:
    source: the path, or the name of a built-in base.
    step: checkpoint of a workdir: a number, "best" or None for the latest.

  Raises:
    OSError: there are no weights, or no checkpoint of this step.
    UserError: they are damaged or of an unsupported model, or a step is given, but no workdir.
  """
  path, is_base = to_path(source), is_checkpoint(source)
  record = None if is_base else read_run(path)
  if step is not None and record is None and (is_base or exists(path)):
    raise UserError(f"--step={step} is for the workdirs of runs, and {source} is none: leave it out")
  if is_base:
    return read_info(source)
  if record is not None and record.config.lora.enabled:
    return read_run_loras(path, step=step)
  if record is not None:
    if step is not None:
      find_step(path, step)
    return record
  is_lora_file = is_file(path) and is_lora(open_tensors(copy_file(path)).infos)
  if is_lora_file or is_lora_folder(path) or is_peft_folder(path):
    return [read_lora(source)]
  return find_release(require_local(source))


def inspect(source: str, *, step: int | str | None = None) -> str:
  """Describes what a path contains, in several lines; arguments and errors are those of `find_weights`."""
  return _describe(source, find_weights(source, step=step))


def convert_any(
  source: epath.PathLike,
  destination: epath.PathLike,
  *,
  to: str = JAX,
  dtype: str | None = None,
  quantize: str | None = None,
  force: bool = False,
  allow_missing: Sequence[str] = (),
  lora_skip_unmatched: bool = False,
  step: int | str | None = None,
) -> str:
  """Converts what a path contains.

  Args:
    source, step: see `find_weights`.
    destination: the new folder or LoRA file; of the LoRAs of two experts each gets _high or _low added to its name.
    to: "jax", a layout in `export.LAYOUTS` for base weights, or a format in `lora.formats.FORMATS` for LoRAs.
    dtype: of the written weights; that of the source by default.
    quantize: "int8", "fp8" or "nf4": storage of the linear weights of a transformer's blocks in a checkpoint.
    force: whether to replace an existing destination.
    allow_missing: patterns of official names that a release may lack.
    lora_skip_unmatched: leaves out tensors of a LoRA that Wan's transformers have no counterpart of.

  Returns:
    One line that says what was written.

  Raises:
    UserError: the source is incomplete or cannot be converted to this target, or the destination may not be replaced.
    OSError: the destination exists, or the disk is too small.
  """
  source, destination = os.fspath(source), os.fspath(destination)
  if dtype and dtype not in DTYPES:
    raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
  if destination in BUILT_IN:
    raise UserError(f"{destination} is the name of a base in the package: write to ./{destination} or another path")
  found = find_weights(source, step=step)
  log.info(_describe(source, found))
  method = parse_option(Quantize, "quantize", quantize) if quantize else Quantize.NONE
  if method != Quantize.NONE and (to != JAX or not isinstance(found, Release)):
    raise UserError(f"--quantize={method} is for the conversion of PyTorch weights to a checkpoint of this project")
  if allow_missing and not isinstance(found, Release):
    raise UserError(
      f"--allow_missing is for the conversion of PyTorch's base weights, and {source} has none: leave it out"
    )
  if lora_skip_unmatched and not isinstance(found, list):
    raise UserError(f"--lora_skip_unmatched is for LoRAs, and {source} contains base weights: leave it out")
  if isinstance(found, list):
    loras = [lora.select(lora.changes) if lora_skip_unmatched else lora for lora in found]
    return _convert_loras(loras, source, destination, to=to, dtype=dtype, force=force)
  check_apart(source, destination)
  if to != JAX and to not in LAYOUTS:
    raise UserError(f"{source} contains base weights, and {to} is a format of LoRAs; use {JAX}, {', '.join(LAYOUTS)}")
  if isinstance(found, CheckpointInfo):
    if to == JAX:
      raise UserError(f"{source} is a checkpoint of this project already; convert it to {' or '.join(LAYOUTS)}")
    export_checkpoint(source, destination, Layout(to), dtype=dtype, force=force)
    return f"wrote {destination} in the layout of {'the official release' if to == Layout.ORIGINAL else to}"
  if isinstance(found, RunRecord):
    require_from_scratch(source, found)
    if to != JAX:
      check_layout(source, transformer_config(found.config), Layout(to))
      raise UserError(
        f"{source} is a run that trained a model from scratch; convert it to {JAX} first, and the result to {to}"
      )
    info = write_trained_base(source, found, destination, step=step, dtype=dtype, force=force)
    return f"wrote {destination}: {_describe_model(info)} ({_describe_sizes(info)})"
  if to != JAX:
    raise UserError(f"{source} contains PyTorch weights; convert them to {JAX} first, and the result to {to}")
  info = write_checkpoint(found, destination, dtype=dtype, quantize=method, allow_missing=allow_missing, force=force)
  warnings = [
    f"{name}: {describe_nonfinite(part.nonfinite)}" for name, part in info.components.items() if part.nonfinite
  ]
  return "; ".join([f"wrote {destination}: {_describe_model(info)} ({_describe_sizes(info)})", *warnings])


def _convert_loras(
  loras: Sequence[LoRAWeights], source: str, destination: str, *, to: str, dtype: str | None, force: bool
) -> str:
  """Converts the LoRA of a transformer, or those of two experts; for the arguments and the result see `convert_any`."""
  targets = [destination] if len(loras) == 1 else [_name_expert(destination, lora) for lora in loras]
  for target in targets:
    check_apart(source, target)
  notes = [
    _convert_lora(lora, source, target, to=to, dtype=dtype, force=force)
    for lora, target in zip(loras, targets, strict=True)
  ]
  written = f"wrote {' and '.join(targets)} ({OWN_FORMAT if to == JAX else to})"
  return "; ".join([written, *dict.fromkeys(filter(None, notes))])


def _describe_sizes(info: CheckpointInfo) -> str:
  parts = ", ".join(f"{name} {part.num_parameters:,}" for name, part in info.components.items())
  return f"{parts} parameters"


def _name_expert(destination: str, lora: LoRAWeights) -> str:
  """Returns the destination of the LoRA of one of two experts."""
  assert lora.usage, "it is a run's"
  path = epath.Path(destination)
  return str(path.with_name(f"{path.stem}_{lora.usage.expert}{path.suffix}"))


def _convert_lora(lora: LoRAWeights, source: str, destination: str, *, to: str, dtype: str | None, force: bool) -> str:
  """Writes a LoRA; returns what else there is to say: see `write_lora`, and whether only this project has its base."""
  if to != JAX and to not in FORMATS:
    raise UserError(f"{source} contains a LoRA, which cannot be converted to {to}; use {JAX}, {', '.join(FORMATS)}")
  converted = lora.astype(dtype) if dtype else lora
  needed = 2 * converted.nbytes
  if to == JAX:
    make_absolute(destination)  # or Orbax cannot write there
    with atomic_folder(destination, needed=needed, force=force) as folder:
      write_lora_folder(folder, converted)
    return ""
  check_suffix(destination, to)
  path = epath.Path(destination)
  for file in (path, sidecar_path(path)) if path.suffix.lower() == ".ckpt" else (path,):
    check_destination(file, needed=needed, force=force, is_file=True)
  notes = [write_lora(path, lora, to, dtype=dtype)]
  if lora.usage and lora.usage.has_own_base:
    notes.append(f"only univid_jax can use it: no other program can load its base, {lora.usage.base_model}")
  return "; ".join(filter(None, notes))


def verify(source: str, destination: str, *, allow_missing: Sequence[str] = ()) -> tuple[str, bool]:
  """Compares a checkpoint folder with the release that it was converted from; converts first if there is no folder.

  Returns:
    A report with a verdict in its last line, and whether everything is equal.

  Raises: see `convert_any`.
  """
  release = find_release(require_local(source))
  if is_checkpoint(destination):
    plan_components(release, allow_missing=allow_missing)
  else:
    log.info(convert_any(source, destination, allow_missing=allow_missing))
  return verify_release(release, destination)


def _describe(source: str, found: Found) -> str:
  match found:
    case list():
      return "\n".join(
        f"{source}: {lora.describe()}" + "".join(f"\n  {line}" for line in _lora_lines(lora)) for lora in found
      )
    case CheckpointInfo():
      header, lines = f"checkpoint of univid_jax {found.version}, {_describe_model(found)}", _checkpoint_lines(found)
    case RunRecord():
      header, lines = f"run of univid_jax {found.version}, trained from scratch, {found.config.name}", []
    case Release():
      header, lines = _describe_model(found), _release_lines(found)
  return "\n".join([f"{source}: {header}", *(f"  {line}" for line in lines)])


def _shorten(text: str, limit: int = 200) -> str:
  return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def _lora_lines(lora: LoRAWeights) -> list[str]:
  unmatched = [f"{len(lora.unmatched)} tensors without a counterpart in Wan: {list_names(lora.unmatched)}"]
  metadata = [f"{key}: {_shorten(value)}" for key, value in sorted(lora.metadata.items())]
  return [*lora.notes, *(unmatched if lora.unmatched else []), *metadata]


def _describe_model(found: CheckpointInfo | Release) -> str:
  if isinstance(found, CheckpointInfo) and found.codec is not None:
    return f"trained from scratch, {found.variant}"
  if found.expert:
    which = (
      f"the {found.expert}-noise expert" if found.expert != Expert.UNKNOWN else "one expert, high or low is not said"
    )
    return f"Wan2.2 A14B, {which}, {found.variant}"
  if found.has_both_experts:
    return f"Wan2.2 A14B, both experts, {found.variant}"
  has_transformer = "transformer" in found.components if isinstance(found, CheckpointInfo) else found.transformer
  if not has_transformer:
    return "Wan, without a transformer"
  version = re.match(r"wan(\d\.\d)", found.variant)
  return f"Wan{version[1] if version else ''}, {found.variant}"


def _checkpoint_lines(info: CheckpointInfo) -> list[str]:
  lines = []
  for name, part in info.components.items():
    dtypes = _describe_dtypes(part.dtypes)
    lines.append(f"{name}: {part.num_parameters:,} parameters, {dtypes}, from {part.source} ({part.layout})")
    if part.quantize != Quantize.NONE:
      lines.append(f"  {describe_errors(part.quantize, part.quantize_errors)}")
    if part.nonfinite:
      lines.append(f"  {describe_nonfinite(part.nonfinite)}")
  return [*lines, f"tokenizer: {info.tokenizer or 'none'}"]


def _release_lines(release: Release) -> list[str]:
  components = [line for part in release.sources for line in _source_lines(part)]
  notes = [f"not converted: {note}" for note in release.notes]
  if release.transformer and may_be_expert(
    release.transformer.path, release.transformer.tensors.metadata, release.variant
  ):
    notes.append("it could be an expert of Wan2.2 T2V-A14B, which has the same tensors: no name says Wan2.1 or Wan2.2")
  return [*components, f"tokenizer: {release.tokenizer or 'none'}", *notes]


def _source_lines(source: Source) -> list[str]:
  left_out = [
    f"  left out, not used by Wan: {reason} ({len(names)} tensors)"
    for reason, names in source.left_out.items()
    if names
  ]
  stored, dtypes = (_describe_dtypes(counts) for counts in (source.stored_dtypes, source.dtypes))
  size = format_bytes(source.nbytes) + (f" as {dtypes}" if stored != dtypes else "")
  return [
    f"{source.component}: {len(source.tensors.infos)} tensors ({stored}, {size}) in the {source.layout} layout, "
    f"{source.path}",
    *left_out,
  ]


def _describe_dtypes(counts: Mapping[str, int]) -> str:
  return ", ".join(f"{count} {dtype}" for dtype, count in sorted(counts.items()))
