"""Weights of other projects at a path: the components of Wan in a folder or file, and their tokenizer."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from univid_jax.checkpoints.experts import SAME_TENSORS
from univid_jax.checkpoints.gguf_files import read_gguf_values
from univid_jax.checkpoints.lora.names import is_lora
from univid_jax.checkpoints.pretrained import COMPONENTS
from univid_jax.checkpoints.tensor_files import SUFFIXES, TensorFile, find_tensor_files, open_tensors
from univid_jax.codecs.sentencepiece import UnigramModel
from univid_jax.convert.identify import Source, identify
from univid_jax.convert.prefixes import find_tokenizer, split_parts
from univid_jax.core.errors import UserError
from univid_jax.core.options import Expert
from univid_jax.core.paths import walk_files
from univid_jax.models.variants import VARIANTS, DiTConfig

# UMT5's has 4.5 MB.
MAX_TOKENIZER_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Release:
  """Everything usable in a folder or file.

  Attributes:
    sources: its components.
    tokenizer: the folder of the tokenizer's files, or a SentencePiece model if there is no tokenizer.json, or None.
    notes: one line for each file that is not converted.
  """

  sources: tuple[Source, ...]
  tokenizer: "Path | SentencePiece | None"
  notes: tuple[str, ...]

  @property
  def transformer(self) -> Source | None:
    return next((source for source in self.sources if source.component == "transformer"), None)

  @property
  def has_both_experts(self) -> bool:
    return any(source.component == "transformer_2" for source in self.sources)

  @property
  def expert(self) -> Expert | None:
    """Which expert the only transformer is, if it is one."""
    return self.transformer.expert if self.transformer and not self.has_both_experts else None

  @property
  def variant(self) -> str:
    """The name of the published model with the transformer's shape, else "custom"."""
    name = variant_name(self.transformer.config if self.transformer else None)
    return SAME_TENSORS.get(name, name) if self.expert or self.has_both_experts else name


@dataclasses.dataclass(frozen=True)
class SentencePiece:
  """A SentencePiece model: where it was found, what it says, and its own file (GGUF files have another form of it)."""

  path: Path
  model: UnigramModel
  file: bytes | None

  def __str__(self) -> str:
    return f"SentencePiece model with {len(self.model.pieces):,} tokens in {self.path}"


def variant_name(config: DiTConfig | None) -> str:
  """Returns the name of the published model with this shape, or "custom" if there is none."""
  return next((name for name, preset in VARIANTS.items() if preset == config), "custom")


def find_release(path: Path) -> Release:
  """Identifies the components in a folder (an official release or one of diffusers) or in a single file.

  Raises:
    FileNotFoundError: the path, its weights or one of their shards do not exist.
    UserError: a file is damaged, belongs to an unsupported model, or contains a component that another file has too.
  """
  if not path.exists():
    raise FileNotFoundError(f"no such file or folder: {path}")
  found: list[Source] = []
  files, notes = [], []
  for file in _list_files(path):
    tensors = open_tensors(file)
    if is_lora(tensors.infos):
      notes.append(f"{file} is a LoRA: convert it separately")
      continue
    found += [identify(file, part) for part in split_parts(tensors)]
    files.append(tensors)
  if not found:
    raise UserError(f"{path} contains no component of Wan: {'; '.join(notes) or 'it has no tensors'}")
  sources = _by_component(path, found)
  _check_latent_channels(path, sources)
  ordered = tuple(sources[component] for component in COMPONENTS if component in sources)
  return Release(ordered, _find_tokenizer(path, files, sources.get("text_encoder")), tuple(notes))


def _by_component(path: Path, found: Sequence[Source]) -> dict[str, Source]:
  """Returns sources by component; a low-noise expert beside a high-noise one is the second transformer.

  Raises:
    UserError: there are two of one component, or the experts are of different models.
  """
  high = next((source for source in found if source.expert == Expert.HIGH), None)
  sources: dict[str, Source] = {}
  for source in found:
    if source.expert == Expert.LOW and high is not None:
      if source.config != high.config:
        raise UserError(
          f"{path} has experts of different models, {high.path} ({high.config.model_type}) and {source.path} "
          f"({source.config.model_type}): convert two of one model"
        )
      source = dataclasses.replace(source, component="transformer_2")
    if source.component in sources:
      raise UserError(_explain_duplicate(path, sources[source.component], source))
    sources[source.component] = source
  return sources


def _check_latent_channels(path: Path, sources: Mapping[str, Source]) -> None:
  """Raises UserError if transformer and autoencoder have different latents."""
  if {"transformer", "vae"} <= sources.keys():
    transformer, vae = sources["transformer"], sources["vae"]
    if transformer.config.out_dim != vae.config.latent_channels:
      raise UserError(
        f"{path} has a transformer of latents with {transformer.config.out_dim} channels, but {vae.path} is Wan"
        f"{vae.config.version}'s autoencoder, with {vae.config.latent_channels}: they do not belong together"
      )


def _explain_duplicate(path: Path, first: Source, second: Source) -> str:
  if first.expert and second.expert:
    return (
      f"{path} has two experts of Wan2.2 A14B, {first.path} ({first.expert}) and {second.path} ({second.expert}), not "
      "one for high and one for low noise: name their folders high_noise_model and low_noise_model"
    )
  return f"{path} has two files for {first.component}: {first.path} and {second.path}; remove one of them"


def _list_files(path: Path) -> list[Path]:
  """Lists the files of tensors in a folder and its direct subfolders."""
  if not path.is_dir():
    return [path]
  folders = [path, *sorted(folder for folder in path.iterdir() if folder.is_dir() and folder.name[0] != ".")]
  files = [file for folder in folders for file in find_tensor_files(folder)]
  if not files:
    raise FileNotFoundError(f"no weights ({', '.join(SUFFIXES)}) in {path}")
  return files


def _find_tokenizer(
  path: Path, files: Sequence[TensorFile], text_encoder: Source | None
) -> Path | SentencePiece | None:
  """Returns the tokenizer to use: tokenizer.json, else a model among the weights, else a spiece.model."""
  if found := _find_file(path, "tokenizer.json"):
    return found.parent
  tokenizer = next((found for file in files if (found := _read_embedded(file))), None)
  if tokenizer is None and (found := _find_file(path, "spiece.model")):
    tokenizer = _parse(found, found.read_bytes())
  if tokenizer and text_encoder and len(tokenizer.model.pieces) > text_encoder.config.vocab_size:
    raise UserError(
      f"{tokenizer.path} has {len(tokenizer.model.pieces):,} tokens, but {text_encoder.path} embeds "
      f"{text_encoder.config.vocab_size:,}: they do not belong together"
    )
  return tokenizer


def _find_file(path: Path, name: str) -> Path | None:
  """Finds a tokenizer's file in the folder of a release."""
  files = walk_files(path, is_left_out=_is_closed) if path.is_dir() else ()
  found = (file for file in files if file.name == name)
  return next((file for file in found if "umt5" in file.parent.name or file.parent.name == "tokenizer"), None)


def _is_closed(path: Path) -> bool:
  """Returns whether a folder cannot be searched, as lost+found at the root of a disk."""
  return path.is_dir() and not os.access(path, os.R_OK | os.X_OK)


def _read_embedded(tensors: TensorFile) -> SentencePiece | None:
  """Reads the tokenizer in a file of weights: ComfyUI's tensor of bytes, or the header of a GGUF file."""
  path = tensors.path
  if name := find_tokenizer(tensors):
    if tensors.infos[name].nbytes > MAX_TOKENIZER_BYTES:
      raise UserError(f"{path}: {name} has {tensors.infos[name].nbytes:,} bytes, too many for a tokenizer")
    return _parse(path, tensors.read(name).tobytes())
  if path.suffix.lower() != ".gguf":
    return None
  try:
    model = UnigramModel.from_gguf(read_gguf_values(path))
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  return SentencePiece(path, model, None) if model else None


def _parse(path: Path, file: bytes) -> SentencePiece:
  try:
    return SentencePiece(path, UnigramModel.parse(file), file)
  except UserError as error:
    raise UserError(f"{path}: the tokenizer in it cannot be used: {error}") from error
