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

# From the names of diffusers and transformers to the official ones, one table a component.
_MLP_EMBEDDERS = tuple((rf"^condition_embedder\.{kind}_embedder\.linear_{number}\.", f"{kind}_embedding.{2 * number - 2}.")
                       for kind in ("text", "time") for number in (1, 2))
_IMAGE_EMBEDDER = tuple((rf"^condition_embedder\.image_embedder\.{theirs}\.", f"img_emb.proj.{index}.")
                        for theirs, index in ((r"norm1", 0), (r"ff\.net\.0\.proj", 1), (r"ff\.net\.2", 3), (r"norm2", 4)))

FROM_DIFFUSERS_DIT = (
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"_attn\.to_([qkv])\.", r"_attn.\1."),
    (r"_attn\.to_out\.0\.", "_attn.o."),
    (r"_attn\.add_([kv])_proj\.", r"_attn.\1_img."),
    (r"_attn\.norm_added_k\.", "_attn.norm_k_img."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    *_MLP_EMBEDDERS,
    *_IMAGE_EMBEDDER,
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^proj_out\.", "head.head."),
    (r"^scale_shift_table$", "head.modulation"),
)

_RESIDUAL = ((r"\.norm1\.gamma$", ".residual.0.gamma"), (r"\.conv1\.", ".residual.2."), (r"\.norm2\.gamma$", ".residual.3.gamma"),
             (r"\.conv2\.", ".residual.6."), (r"\.conv_shortcut\.", ".shortcut."))

FROM_DIFFUSERS_VAE = (
    *_RESIDUAL,
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"coder\.conv_in\.", "coder.conv1."),
    (r"coder\.norm_out\.", "coder.head.0."),
    (r"coder\.conv_out\.", "coder.head.2."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
)

FROM_TRANSFORMERS_UMT5 = (
    (r"^(shared|encoder\.embed_tokens)\.", "token_embedding."),
    (r"^encoder\.block\.", "blocks."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
    (r"\.layer\.0\.SelfAttention\.", ".attn."),
    (r"\.layer\.0\.layer_norm\.", ".norm1."),
    (r"\.layer\.1\.layer_norm\.", ".norm2."),
    (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
    (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
    (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
)

FROM_DIFFUSERS = {"dit": FROM_DIFFUSERS_DIT, "vae": FROM_DIFFUSERS_VAE, "umt5": FROM_TRANSFORMERS_UMT5}


def name_from_diffusers(component: str, name: str, *, blocks_per_level: int = 3) -> str:
  """The official name of a tensor of diffusers (transformers, for the text encoder).

  Args:
    component: "dit", "vae" or "umt5".
    name: theirs.
    blocks_per_level: residual blocks on each level of the autoencoder's way up, which the official file counts through.
  """
  up = re.match(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.*)$", name) if component == "vae" else None
  if up:
    level, kind, index, rest = up.groups()
    place = int(level) * (blocks_per_level + 1) + (int(index) if kind == "resnets" else blocks_per_level)
    name = f"decoder.upsamples.{place}.{rest}"
  for pattern, replacement in FROM_DIFFUSERS[component]:
    name = re.sub(pattern, replacement, name)
  return name
