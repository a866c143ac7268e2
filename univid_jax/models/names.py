"""Parameter names: ours, and those of Wan's official files, diffusers and others; a table per component."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence

Rules = Sequence[tuple[str, str]]

# Ours to official: (pattern, replacement), applied in order to our dotted name, which includes the layer of stacked
# blocks.
_LEAVES = ((r"\.kernel$", ".weight"), (r"\.scale$", ".weight"))

_TRANSFORMER = (
  (r"\b(text_embedding|time_embedding)\.up\.", r"\1.0."),
  (r"\b(text_embedding|time_embedding)\.down\.", r"\1.2."),
  (r"^time_projection\.", "time_projection.1."),
  (r"\.ffn\.up\.", ".ffn.0."),
  (r"\.ffn\.down\.", ".ffn.2."),
  (r"^img_emb\.norm_in\.", "img_emb.proj.0."),
  (r"^img_emb\.up\.", "img_emb.proj.1."),
  (r"^img_emb\.down\.", "img_emb.proj.3."),
  (r"^img_emb\.norm_out\.", "img_emb.proj.4."),
  *_LEAVES,
)

_LAYER = r"((?:downsamples|upsamples|middle)\.\d+)"
_VAE = (
  (r"\b(downsamples|upsamples)\.(\d+)\.layers\.", r"\1.\2.\1."),
  (rf"{_LAYER}\.norm1\.scale$", r"\1.residual.0.gamma"),
  (rf"{_LAYER}\.conv1\.", r"\1.residual.2."),
  (rf"{_LAYER}\.norm2\.scale$", r"\1.residual.3.gamma"),
  (rf"{_LAYER}\.conv2\.", r"\1.residual.6."),
  (rf"{_LAYER}\.conv\.", r"\1.resample.1."),
  (r"^(encoder|decoder)\.norm\.scale$", r"\1.head.0.gamma"),
  (r"^(encoder|decoder)\.head\.(kernel|bias)$", r"\1.head.2.\2"),
  (r"\.scale$", ".gamma"),
  *_LEAVES,
)

_TEXT_ENCODER = (
  (r"^token_embedding$", "token_embedding.weight"),
  (r"(blocks\.\d+)\.position$", r"\1.pos_embedding.embedding.weight"),
  (r"(blocks\.\d+)\.([qkvo])\.", r"\1.attn.\2."),
  (r"(blocks\.\d+)\.gate\.", r"\1.ffn.gate.0."),
  (r"(blocks\.\d+)\.(fc\d)\.", r"\1.ffn.\2."),
  *_LEAVES,
)

_IMAGE_ENCODER = (
  (r"^blocks\.", "transformer."),
  (r"(transformer\.\d+)\.(to_qkv|proj)\.", r"\1.attn.\2."),
  (r"(transformer\.\d+)\.up\.", r"\1.mlp.0."),
  (r"(transformer\.\d+)\.down\.", r"\1.mlp.2."),
  *_LEAVES,
)

TABLES: Mapping[str, Rules] = {
  "transformer": _TRANSFORMER,
  "transformer_2": _TRANSFORMER,
  "vae": _VAE,
  "text_encoder": _TEXT_ENCODER,
  "image_encoder": _IMAGE_ENCODER,
}


def original_name(component: str, path: Iterable[object], layer: int | None) -> str:
  """Returns the official name of a parameter; for stacked layers that of one layer."""
  name = ".".join(map(str, path))
  if layer is not None:
    name = re.sub(r"^blocks\.", f"blocks.{layer}.", name)
  for pattern, replacement in TABLES[component]:
    name = re.sub(pattern, replacement, name)
  return name


# Official to diffusers (for the encoders of text and images: to transformers) and to llama.cpp: pairs of parts,
# replaced in order; in the other direction in reverse order. ^ and $ anchor a part, # matches a number.
_ATTENTION = {
  "q": "to_q",
  "k": "to_k",
  "v": "to_v",
  "o": "to_out.0",
  "k_img": "add_k_proj",
  "v_img": "add_v_proj",
  "norm_k_img": "norm_added_k",
}
_IMAGE_EMBEDDER = {0: "norm1", 1: "ff.net.0.proj", 3: "ff.net.2", 4: "norm2"}

_TRANSFORMER_TO_DIFFUSERS = (
  *((f"_attn.{ours}.", f"_attn.{theirs}.") for ours, theirs in _ATTENTION.items()),
  (".self_attn.", ".attn1."),
  (".cross_attn.", ".attn2."),
  ("blocks.#.ffn.0.", "blocks.#.ffn.net.0.proj."),
  ("blocks.#.ffn.2.", "blocks.#.ffn.net.2."),
  ("blocks.#.norm3.", "blocks.#.norm2."),
  ("blocks.#.modulation$", "blocks.#.scale_shift_table$"),
  *(
    (f"^{kind}_embedding.{2 * i - 2}.", f"^condition_embedder.{kind}_embedder.linear_{i}.")
    for kind in ("text", "time")
    for i in (1, 2)
  ),
  *((f"^img_emb.proj.{i}.", f"^condition_embedder.image_embedder.{theirs}.") for i, theirs in _IMAGE_EMBEDDER.items()),
  ("^time_projection.1.", "^condition_embedder.time_proj."),
  ("^head.head.", "^proj_out."),
  ("^head.modulation$", "^scale_shift_table$"),
)

# How layers of autoencoders are numbered. In Wan2.1, official files number them consecutively, diffusers the decoder's
# per level; in Wan2.2, whose levels have shortcuts, both number them per level.
_ENCODER_BLOCKS, _DECODER_BLOCKS, _LEVELS = 2, 3, 4

_LEVELS_TO_DIFFUSERS = (
  ("^encoder.downsamples.", "^encoder.down_blocks."),
  *(
    (f"^decoder.upsamples.{level * (_DECODER_BLOCKS + 1) + layer}.", f"^decoder.up_blocks.{level}.{theirs}.")
    for level in range(_LEVELS)
    for layer, theirs in enumerate([*(f"resnets.{block}" for block in range(_DECODER_BLOCKS)), "upsamplers.0"])
  ),
)

_LEVELS_WITH_SHORTCUTS_TO_DIFFUSERS = tuple(
  (f"^{official}.{layer}.", f"^{diffusers}.{theirs}.")
  for official, diffusers, blocks, resampling in (
    ("encoder.downsamples.#.downsamples", "encoder.down_blocks.#", _ENCODER_BLOCKS, "downsampler"),
    ("decoder.upsamples.#.upsamples", "decoder.up_blocks.#", _DECODER_BLOCKS, "upsampler"),
  )
  for layer, theirs in enumerate([*(f"resnets.{block}" for block in range(blocks)), resampling])
)

_VAE_TO_DIFFUSERS = (
  ("^conv1.", "^quant_conv."),
  ("^conv2.", "^post_quant_conv."),
  ("coder.conv1.", "coder.conv_in."),
  ("coder.head.0.", "coder.norm_out."),
  ("coder.head.2.", "coder.conv_out."),
  (".residual.0.gamma$", ".norm1.gamma$"),
  (".residual.2.", ".conv1."),
  (".residual.3.gamma$", ".norm2.gamma$"),
  (".residual.6.", ".conv2."),
  (".shortcut.", ".conv_shortcut."),
  (".middle.1.", ".mid_block.attentions.0."),
  (".middle.0.", ".mid_block.resnets.0."),
  (".middle.2.", ".mid_block.resnets.1."),
)

_TEXT_ENCODER_TO_TRANSFORMERS = (
  ("^token_embedding.", "^shared."),
  ("^norm.", "^encoder.final_layer_norm."),
  ("blocks.#.attn.", "blocks.#.layer.0.SelfAttention."),
  ("blocks.#.pos_embedding.embedding.", "blocks.#.layer.0.SelfAttention.relative_attention_bias."),
  ("blocks.#.norm1.", "blocks.#.layer.0.layer_norm."),
  ("blocks.#.norm2.", "blocks.#.layer.1.layer_norm."),
  ("blocks.#.ffn.gate.0.", "blocks.#.layer.1.DenseReluDense.wi_0."),
  ("blocks.#.ffn.fc1.", "blocks.#.layer.1.DenseReluDense.wi_1."),
  ("blocks.#.ffn.fc2.", "blocks.#.layer.1.DenseReluDense.wo."),
  ("^blocks.", "^encoder.block."),
)

# Queries, keys and values are one official tensor, `to_qkv`; these are the names of its parts.
_IMAGE_ENCODER_TO_TRANSFORMERS = (
  ("^cls_embedding$", "^vision_model.embeddings.class_embedding$"),
  ("^patch_embedding.", "^vision_model.embeddings.patch_embedding."),
  ("^pos_embedding$", "^vision_model.embeddings.position_embedding.weight$"),
  ("^pre_norm.", "^vision_model.pre_layrnorm."),
  ("^post_norm.", "^vision_model.post_layernorm."),
  ("^head$", "^visual_projection.weight$"),
  ("transformer.#.norm1.", "transformer.#.layer_norm1."),
  ("transformer.#.norm2.", "transformer.#.layer_norm2."),
  *((f"transformer.#.attn.{part}.", f"transformer.#.self_attn.{part}_proj.") for part in "qkv"),
  ("transformer.#.attn.proj.", "transformer.#.self_attn.out_proj."),
  ("transformer.#.mlp.0.", "transformer.#.mlp.fc1."),
  ("transformer.#.mlp.2.", "transformer.#.mlp.fc2."),
  ("^transformer.", "^vision_model.encoder.layers."),
)

DIFFUSERS_TABLES: Mapping[str, Rules] = {
  "transformer": _TRANSFORMER_TO_DIFFUSERS,
  "transformer_2": _TRANSFORMER_TO_DIFFUSERS,
  "vae": (*_LEVELS_WITH_SHORTCUTS_TO_DIFFUSERS, *_LEVELS_TO_DIFFUSERS, *_VAE_TO_DIFFUSERS),
  "vae_with_shortcuts": (*_LEVELS_WITH_SHORTCUTS_TO_DIFFUSERS, *_VAE_TO_DIFFUSERS),
  "text_encoder": _TEXT_ENCODER_TO_TRANSFORMERS,
  "image_encoder": _IMAGE_ENCODER_TO_TRANSFORMERS,
}

_TEXT_ENCODER_TO_LLAMA_CPP = (
  ("^token_embedding.", "^token_embd."),
  ("^norm.", "^enc.output_norm."),
  *((f"blocks.#.attn.{part}.", f"blocks.#.attn_{part}.") for part in "qkvo"),
  ("blocks.#.pos_embedding.embedding.", "blocks.#.attn_rel_b."),
  ("blocks.#.norm1.", "blocks.#.attn_norm."),
  ("blocks.#.norm2.", "blocks.#.ffn_norm."),
  ("blocks.#.ffn.gate.0.", "blocks.#.ffn_gate."),
  ("blocks.#.ffn.fc1.", "blocks.#.ffn_up."),
  ("blocks.#.ffn.fc2.", "blocks.#.ffn_down."),
  ("^blocks.", "^enc.blk."),
)


def diffusers_table(component: str, names: Container[str]) -> str:
  """Returns the key of `DIFFUSERS_TABLES` by which `name_from_diffusers` converts a component's tensors.

  The names together tell which autoencoder it is: `decoder.up_blocks.0.resnets.0` alone belongs to both.
  """
  if component == "vae" and "decoder.up_blocks.0.upsampler.resample.1.weight" in names:
    return "vae_with_shortcuts"
  return component


def name_from_diffusers(table: str, name: str) -> str:
  """Returns the official name of a tensor of diffusers (of the text and image encoders: of transformers)."""
  for official, theirs in reversed(DIFFUSERS_TABLES[table]):
    name = _replace(name, theirs, official)
  return name


def name_from_llama_cpp(name: str) -> str:
  """Returns the official name of a tensor of the text encoder in llama.cpp's layout."""
  for official, theirs in reversed(_TEXT_ENCODER_TO_LLAMA_CPP):
    name = _replace(name, theirs, official)
  return name


def name_to_diffusers(component: str, name: str) -> str:
  """Returns the name in diffusers (for the text encoder: in transformers) of an official tensor."""
  for official, theirs in DIFFUSERS_TABLES[component]:
    name = _replace(name, official, theirs)
  return name


def _replace(name: str, part: str, other: str) -> str:
  """Replaces a part of a name by another, both in the notation of `DIFFUSERS_TABLES`."""
  pattern = re.escape(part.strip("^$")).replace(r"\#", r"(\d+)")
  pattern = ("^" if part.startswith("^") else "") + pattern + ("$" if part.endswith("$") else "")
  return re.sub(pattern, other.strip("^$").replace("#", r"\1"), name)
