"""What a conversion may replace: nothing of its source, and only what conversions write."""

import dataclasses
import fnmatch
import os

from etils import epath

from univid_jax.checkpoints.built_in import locate
from univid_jax.checkpoints.checksums import CHECKSUMS_FILE
from univid_jax.checkpoints.info import CHECKPOINT_FILE, STEP_CACHE_FILE
from univid_jax.checkpoints.lora.folder import LORA_FILE
from univid_jax.checkpoints.run import read_run
from univid_jax.checkpoints.saved import CHECKPOINTS_FOLDER
from univid_jax.checkpoints.weights_file import SUFFIX
from univid_jax.core.errors import UserError
from univid_jax.core.paths import exists, is_folder, is_remote, to_path
from univid_jax.core.text import list_first

_WEIGHTS = (
  "diffusion_pytorch_model*.safetensors",
  "high_noise_model",
  "low_noise_model",
  "*_VAE.pth",
  "models_t5_*.pth",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Written:
  """A kind of folder that conversions write.

  Attributes:
    markers: patterns of names, one of which every complete folder of this kind has.
    others: of what else may be in it.
  """

  markers: tuple[str, ...]
  others: tuple[str, ...]

  def includes(self, names: list[str], *, complete: bool) -> bool:
    """Returns whether a folder with these names is one; unless `complete`, one that a killed process has begun too."""
    known = all(_matches(name, self.markers + self.others) for name in names)
    return known and (not complete or any(_matches(name, self.markers) for name in names))


_CHECKPOINT = _Written(
  markers=(CHECKPOINT_FILE,),
  others=(
    *("transformer", "transformer_2", "vae", "text_encoder", "image_encoder", "tokenizer"),
    *(f"transformer{SUFFIX}", CHECKSUMS_FILE, STEP_CACHE_FILE),
  ),
)
_LORA = _Written(markers=(LORA_FILE,), others=("lora", CHECKSUMS_FILE))
_ORIGINAL = _Written(markers=_WEIGHTS, others=("diffusion_pytorch_model*.index.json", "config.json", "google"))
_DIFFUSERS = _Written(
  markers=("model_index.json",),
  others=("transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler"),
)
_KINDS = (_CHECKPOINT, _LORA, _ORIGINAL, _DIFFUSERS)
# Beginnings of the names that macOS adds to folders.
_FOREIGN = (".DS_Store", "._")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_apart(source: epath.PathLike, destination: epath.PathLike) -> None:
  """Checks that writing a destination changes nothing of the source.

  Raises:
    UserError: they are the same, or one contains the other. A workdir may contain what is made of its run, outside of
      its checkpoints.
  """
  here, there = locate(source), to_path(destination)
  if is_remote(here) != is_remote(there):
    return
  written = _resolve(there)
  if _resolve(here) == written or (not is_remote(here) and there.exists() and os.path.samefile(here, there)):
    raise UserError(f"{destination} is the source itself: choose another destination")
  place = here if is_remote(here) else epath.Path(os.path.realpath(here.parent)) / here.name  # maybe a link
  if any(_is_inside(path, written) for path in (_resolve(here), str(place))):
    raise UserError(f"{destination} contains the source {source}: choose another destination")
  if _is_inside(written, _resolve(here)) and (
    read_run(here) is None or _is_inside(written, _resolve(here / CHECKPOINTS_FOLDER))
  ):
    raise UserError(f"{destination} is inside of the source {source}: choose another destination")


def _resolve(path: epath.Path) -> str:
  return str(path).rstrip("/") if is_remote(path) else os.path.realpath(path)


def _is_inside(path: str, folder: str) -> bool:
  """Returns whether a path is a folder itself, or in it."""
  return path == folder or path.startswith(folder.rstrip("/") + "/")


def check_replaceable_file(destination: epath.Path) -> None:
  """Raises UserError if a folder is where a file is to be written."""
  if is_folder(destination):
    raise UserError(f"{destination} is a folder, and a file is to be written: name a file, or one in {destination}/")


def check_replaceable_folder(destination: epath.Path) -> None:
  """Checks that what exists may be replaced by a folder: it is empty, or what a conversion wrote.

  A bucket cannot rename, so there it may be incomplete.

  Raises:
    UserError: it is a file, or has contents of another kind, which are named.
  """
  if not exists(destination):
    return
  if not is_folder(destination):
    raise UserError(f"{destination} is a file, and a folder is to be written: choose another destination")
  names = sorted(path.name for path in destination.iterdir() if not path.name.startswith(_FOREIGN))
  if not names or any(kind.includes(names, complete=not is_remote(destination)) for kind in _KINDS):
    return
  strange = [name for name in names if not any(_matches(name, kind.markers + kind.others) for kind in _KINDS)] or names
  raise UserError(
    f"{destination} contains {list_first(strange, 4)}: --force replaces only empty folders and what univid-convert "
    "wrote; choose another destination, or remove it yourself"
  )
