"""Files of other programs: prefixes of tensor names, and several components in one file."""

from collections import defaultdict

from univid_jax.checkpoints.tensor_files import TensorFile

# Prefixes of tensor names, and the part of the model whose tensors have them; the first that fits is removed. ComfyUI
# writes the first seven, and Kijai's autoencoder has the last.
PREFIXES = {
  "model.diffusion_model.": "transformer",
  "diffusion_model.": "transformer",
  "text_encoders.umt5xxl.transformer.": "text_encoder",
  "text_encoders.umt5xxl.": "text_encoder",
  "text_encoders.": "text_encoder",
  "first_stage_model.": "vae",
  "vae.": "vae",
  "model.": "model",
}

# Tensors that are no weights, by their names without prefix: a SentencePiece model, a sign that a file has scales, and
# a parameter of CLIP that ComfyUI gives to every text encoder.
TOKENIZER = "spiece_model"
MARKER = "scaled_fp8"
NO_WEIGHTS = (TOKENIZER, MARKER, "logit_scale")


def strip_prefix(name: str) -> tuple[str, str]:
  """Returns the part of the model that a tensor belongs to, "" if no prefix says it, and its name without prefix."""
  prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
  return PREFIXES.get(prefix, ""), name.removeprefix(prefix)


def split_parts(tensors: TensorFile) -> list[TensorFile]:
  """Returns the parts of the model in a file, without prefixes, and without tensors that are no weights."""
  parts: dict[str, dict[str, str]] = defaultdict(dict)
  for name in tensors.infos:
    part, rest = strip_prefix(name)
    if rest not in NO_WEIGHTS:
      parts[part][name] = rest
  return [tensors.rename(names) for names in parts.values()]


def find_tokenizer(tensors: TensorFile) -> str | None:
  """Returns the name of the tensor of bytes that is a SentencePiece model, None if there is none."""
  return next((name for name in tensors.infos if strip_prefix(name)[1] == TOKENIZER), None)
