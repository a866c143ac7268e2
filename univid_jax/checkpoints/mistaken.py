"""Identifies what is at a path instead of a converted checkpoint, so that messages say how to get one."""

import contextlib
import re
import shlex
from pathlib import Path

from etils import epath

from univid_jax.checkpoints.info import is_checkpoint
from univid_jax.checkpoints.lora.folder import is_lora_folder
from univid_jax.checkpoints.lora.names import is_lora, is_transformer
from univid_jax.checkpoints.lora.reading import is_peft_folder
from univid_jax.checkpoints.tensor_files import find_tensor_files, is_tensor_file, open_tensors
from univid_jax.core.errors import UserError
from univid_jax.core.paths import is_remote

# A name on Hugging Face, such as Wan-AI/Wan2.1-T2V-1.3B.
_RELEASE_NAME = re.compile(r"[\w.-]+/[\w.-]*wan[._-]?2[\w.-]*", re.IGNORECASE)


def describe_mistaken(path: epath.PathLike, *, use_of_lora: str) -> str:
  """Returns the end of a message about a path that is not a converted checkpoint: what it is, and what to do.

  Args:
    path: a local path; nothing is known about one in a bucket.
    use_of_lora: what to do with a LoRA.

  Returns:
    Text that begins with a semicolon; "" if there is nothing to say.
  """
  if is_remote(path):
    return ""
  local = Path(path)
  if not local.exists():
    if local.is_absolute() or local.parent.exists() or not _RELEASE_NAME.fullmatch(str(local)):
      return ""
    return (
      f"; if it is the name of a release, download it (hf download {local} --local-dir DIR) and convert it (python -m "
      "univid_jax.convert DIR DST)"
    )
  if is_lora_folder(path) or is_peft_folder(path):
    return f"; it is a LoRA: {use_of_lora}"
  with contextlib.suppress(OSError, UserError):
    folders = sorted(each for each in local.iterdir() if each.is_dir()) if local.is_dir() else []
    if inside := next((folder for folder in folders if is_checkpoint(folder) or _may_be_run(folder)), None):
      return f"; name the folder in it, {inside}"
    files = _find_weights(local)
    if lora := next(filter(_is_lora, files), None):
      return f"; {'it' if lora == local else lora} is a LoRA: {use_of_lora}"
    files += [file for folder in folders for file in find_tensor_files(folder)]
    if any(map(_may_be_transformer, files)):
      source = shlex.quote(str(path))
      return f"; it contains weights: convert it with python -m univid_jax.convert {source} DST, and use DST"
  return ""


def _find_weights(path: Path) -> list[Path]:
  """Returns the file of tensors at a path, or those directly in a folder."""
  return find_tensor_files(path) if path.is_dir() else [path] if is_tensor_file(path) else []


def _may_be_run(folder: Path) -> bool:
  return (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()


def _is_lora(file: Path) -> bool:
  """Returns whether a file is a LoRA; only safetensors are read, as others need PyTorch."""
  return file.suffix.lower() == ".safetensors" and is_lora(open_tensors(file).infos)


def _may_be_transformer(file: Path) -> bool:
  """Returns whether a file is a transformer to convert; others than safetensors count as one."""
  return file.suffix.lower() != ".safetensors" or is_transformer(open_tensors(file).infos)
