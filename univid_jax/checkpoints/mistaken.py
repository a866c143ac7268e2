"""What is at a path where a converted checkpoint should be, so that messages say how to get one."""

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

from etils import epath

from univid_jax.checkpoints.lora.folder import is_lora_folder
from univid_jax.checkpoints.lora.names import is_lora
from univid_jax.checkpoints.lora.reading import is_peft_folder
from univid_jax.checkpoints.tensor_files import find_tensor_files, is_tensor_file, open_tensors
from univid_jax.core.errors import UserError
from univid_jax.core.paths import is_remote

# A name on Hugging Face, such as Wan-AI/Wan2.1-T2V-1.3B.
_RELEASE_NAME = re.compile(r"[\w.-]+/[\w.-]*wan[\w.-]*", re.IGNORECASE)


def describe_mistaken(path: epath.PathLike, *, use_of_lora: str) -> str:
  """Returns the end of a message about a path that is no converted checkpoint: what it is instead and what to do.

  Args:
    path: local; nothing is known of what is in a bucket.
    use_of_lora: what to do with a LoRA.

  Returns:
    Text that begins with a semicolon; "" if there is nothing to say.
  """
  if is_remote(path):
    return ""
  local = Path(path)
  convert = f"convert it with python -m univid_jax.convert {path} DST, and use DST"
  if not local.exists():
    if local.is_absolute() or local.parent.exists() or not _RELEASE_NAME.fullmatch(str(path)):
      return ""
    return (
      f"; if it is the name of a release, download it (hf download {path} --local-dir DIR) and convert it (python -m "
      "univid_jax.convert DIR DST)"
    )
  if is_lora_folder(path) or is_peft_folder(path):
    return f"; it is a LoRA: {use_of_lora}"
  with contextlib.suppress(OSError, UserError):
    if files := _find_weights(local):
      return f"; it contains a LoRA: {use_of_lora}" if _are_loras(files) else f"; it contains weights: {convert}"
  return ""


def _find_weights(path: Path) -> list[Path]:
  """Returns files of tensors: the path, or those of a folder and its direct subfolders, as releases have them."""
  if path.is_file():
    return [path] if is_tensor_file(path) else []
  folders = [path, *sorted(each for each in path.iterdir() if each.is_dir())]
  return [file for folder in folders for file in find_tensor_files(folder)]


def _are_loras(files: Iterable[Path]) -> bool:
  """Returns whether all files are LoRAs; others than safetensors, which need PyTorch, are taken for weights."""
  return all(file.suffix.lower() == ".safetensors" and is_lora(open_tensors(file).infos) for file in files)
