"""Names of parameters in Wan2.1's official files, one table a component."""

import re
from collections.abc import Iterable

Path = Iterable[str]

# Each table: (pattern, replacement), applied in order to our dotted name; the layer of stacked blocks stands in it already.
LEAVES = ((r"\.kernel$", ".weight"), (r"\.scale$", ".weight"))

DIT = (
    (r"\b(text_embedding|time_embedding)\.up\.", r"\1.0."),
    (r"\b(text_embedding|time_embedding)\.down\.", r"\1.2."),
    (r"^time_projection\.", "time_projection.1."),
    (r"\.ffn\.up\.", ".ffn.0."),
    (r"\.ffn\.down\.", ".ffn.2."),
    (r"^img_emb\.norm_in\.", "img_emb.proj.0."),
    (r"^img_emb\.up\.", "img_emb.proj.1."),
    (r"^img_emb\.down\.", "img_emb.proj.3."),
    (r"^img_emb\.norm_out\.", "img_emb.proj.4."),
    *LEAVES,
)

_LAYER = r"((?:downsamples|upsamples|middle)\.\d+)"
VAE = (
    (rf"{_LAYER}\.norm1\.scale$", r"\1.residual.0.gamma"),
    (rf"{_LAYER}\.conv1\.", r"\1.residual.2."),
    (rf"{_LAYER}\.norm2\.scale$", r"\1.residual.3.gamma"),
    (rf"{_LAYER}\.conv2\.", r"\1.residual.6."),
    (rf"{_LAYER}\.conv\.", r"\1.resample.1."),
    (r"^(encoder|decoder)\.norm\.scale$", r"\1.head.0.gamma"),
    (r"^(encoder|decoder)\.head\.(kernel|bias)$", r"\1.head.2.\2"),
    (r"\.scale$", ".gamma"),
    *LEAVES,
)

UMT5 = (
    (r"^token_embedding$", "token_embedding.weight"),
    (r"(blocks\.\d+)\.position$", r"\1.pos_embedding.embedding.weight"),
    (r"(blocks\.\d+)\.([qkvo])\.", r"\1.attn.\2."),
    (r"(blocks\.\d+)\.gate\.", r"\1.ffn.gate.0."),
    (r"(blocks\.\d+)\.(fc\d)\.", r"\1.ffn.\2."),
    *LEAVES,
)

CLIP = (
    (r"^blocks\.", "transformer."),
    (r"(transformer\.\d+)\.(to_qkv|proj)\.", r"\1.attn.\2."),
    (r"(transformer\.\d+)\.up\.", r"\1.mlp.0."),
    (r"(transformer\.\d+)\.down\.", r"\1.mlp.2."),
    *LEAVES,
)

TABLES = {"dit": DIT, "vae": VAE, "umt5": UMT5, "clip": CLIP}


def original_name(component: str, path: Path, layer: int | None = None) -> str:
  """The official name of a parameter; of one layer where layers are stacked."""
  name = ".".join(map(str, path))
  if layer is not None:
    name = re.sub(r"^blocks\.", f"blocks.{layer}.", name)
  for pattern, replacement in TABLES[component]:
    name = re.sub(pattern, replacement, name)
  return name
