"""Checkpoint files of other programs: each is read exactly, and what is in them besides weights is used or reported."""

import json
import shutil
import struct
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import univid_jax
from tests.checkpoint_files import (
  assert_converted,
  dequantize_gguf,
  gguf_package,
  is_matrix,
  quantize_gguf,
  random_float8,
  write_gguf,
  write_safetensors,
)
from tests.helpers import GOLDENS, golden
from univid_jax.checkpoints.info import read_info
from univid_jax.checkpoints.tensor_files import open_tensors
from univid_jax.codecs.sentencepiece import UnigramModel
from univid_jax.codecs.tokenizer import Tokenizer
from univid_jax.convert.commands import convert_any, inspect
from univid_jax.convert.layout import make_fills
from univid_jax.convert.quantized import dequantize
from univid_jax.convert.sources import find_release
from univid_jax.core.errors import UserError
from univid_jax.models.clip import CLIPConfig
from univid_jax.models.names import name_to_diffusers
from univid_jax.models.variants import DiTConfig

RELEASE = GOLDENS / "tiny_wan"
TOKENIZER = RELEASE / "google" / "umt5-xxl"
WEIGHTS = load_file(RELEASE / "diffusion_pytorch_model.safetensors")
BF16 = ml_dtypes.bfloat16


@pytest.fixture
def folder(tmp_path):
  """A folder with the config.json of the miniature transformer."""
  shutil.copy(RELEASE / "config.json", tmp_path)
  return tmp_path


def rng():
  return np.random.default_rng(0)


def read_all(path):
  """Returns the tensors of the only component at a path by official name."""
  (source,) = find_release(path).sources
  return {name: source.tensors.read(name) for name in source.tensors.infos}


def assert_equal(found, expected):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), name


def write_shards(folder, tensors, texts):
  """Writes tensors in turn into as many shards as there are texts for `_quantization_metadata`; returns the index."""
  weight_map = {}
  for number, text in enumerate(texts):
    names = list(tensors)[number :: len(texts)]
    shard = f"x-{number + 1:05d}-of-{len(texts):05d}.safetensors"
    text = text if isinstance(text, str) else json.dumps(text)
    metadata = {} if text == "null" else {"_quantization_metadata": text}
    write_safetensors(folder / shard, {name: tensors[name] for name in names}, {"hash": str(number), **metadata})
    weight_map |= dict.fromkeys(names, shard)
  index = folder / "x.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  return index


def velocity(checkpoint):
  pipe = univid_jax.load_pipeline(str(checkpoint), dtype="float32")
  latents, text = (rng().standard_normal(shape, np.float32) for shape in ((2, 4, 4, 16), (5, pipe.config.text_dim)))
  return pipe.predict_velocity(latents, 500.0, text)


def scaled(dtype, shape_of_scale, *, scale="scale_weight", activation="scale_input"):
  """Returns the miniature transformer's tensors with scales, and what they are read as."""
  random, stored, expected = rng(), {}, {}
  for name, value in WEIGHTS.items():
    if not is_matrix(name, value):
      stored[name] = expected[name] = value.astype(BF16)
      continue
    layer = name.removesuffix(".weight")
    numbers = (
      random.integers(-128, 128, value.shape, np.int8) if dtype == "int8" else random_float8(value.shape, dtype, random)
    )
    scales = random.uniform(1e-4, 1e-3, shape_of_scale(value.shape)).astype(np.float32)
    stored |= {name: numbers, f"{layer}.{scale}": scales, f"{layer}.{activation}": np.ones((), np.float32)}
    if scales.ndim == 3:
      rows, columns = value.shape
      blocks = numbers.astype(np.float32).reshape(rows, -1, columns // scales.shape[1])
      expected[name] = (blocks * scales).reshape(value.shape)
    else:
      expected[name] = numbers.astype(np.float32) * (scales[:, None] if scales.shape == value.shape[:1] else scales)
  return stored, expected


SCALES = {
  "one": lambda shape: (),
  "list of one": lambda shape: (1,),
  "rows": lambda shape: (shape[0], 1),
  "list of rows": lambda shape: shape[:1],
  "blocks": lambda shape: (shape[0], 2, 1),
}


class TestFloat8:
  @pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
  def test_plain(self, folder, dtype):
    """Becomes bfloat16, special values and zeros of both signs included."""
    random = rng()
    tensors = {name: random_float8(value.shape, dtype, random) for name, value in WEIGHTS.items()}
    tensors["head.head.weight"] = np.resize(
      np.arange(256, dtype=np.uint8).view(dtype), WEIGHTS["head.head.weight"].shape
    )
    file = write_safetensors(folder / "wan.safetensors", tensors)
    assert_equal(read_all(file), {name: value.astype(BF16) for name, value in tensors.items()})

  def test_plain_converted(self, folder):
    random = rng()
    tensors = {name: random_float8(x.shape, "float8_e4m3fn", random) for name, x in WEIGHTS.items()}
    file = write_safetensors(folder / "wan.safetensors", tensors)
    convert_any(str(file), str(folder / "target"))
    assert_converted(folder / "target", "transformer", {name: value.astype(BF16) for name, value in tensors.items()})
    assert "96 float8_e4m3fn, 829.76 kB as 96 bfloat16" in inspect(str(file))

  @pytest.mark.parametrize("shape", SCALES)
  @pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
  def test_scales(self, folder, dtype, shape):
    stored, expected = scaled(dtype, SCALES[shape])
    assert_equal(read_all(write_safetensors(folder / "wan.safetensors", stored)), expected)

  def test_scaled_file_of_comfyui(self, folder):
    """The older form, under a prefix: converted, and with the velocity of the dequantised weights."""
    stored, expected = scaled("float8_e4m3fn", SCALES["one"])
    stored["scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    file = write_safetensors(
      folder / "wan_fp8_scaled.safetensors", {f"model.diffusion_model.{name}": x for name, x in stored.items()}
    )
    convert_any(str(file), str(folder / "target"))
    assert_converted(folder / "target", "transformer", expected)
    assert "scales of activations (36 tensors)" in inspect(str(file))
    assert "36 float8_e4m3fn with scales" in inspect(str(file))
    plain = write_safetensors(folder / "plain.safetensors", expected)
    convert_any(str(plain), str(folder / "plain"))
    assert np.array_equal(velocity(folder / "target"), velocity(folder / "plain"))

  @pytest.mark.parametrize("as_bytes", [False, True])
  @pytest.mark.parametrize("dtype, kind", [("float8_e4m3fn", None), ("float8_e5m2", None), ("int8", "int8_tensorwise")])
  def test_format_in_tensors(self, folder, dtype, kind, as_bytes):
    """The newer form: a JSON text for each layer; numbers may be stored as bytes."""
    stored, expected = scaled(dtype, SCALES["rows"], scale="weight_scale", activation="input_scale")
    text = np.frombuffer(json.dumps({"format": kind or dtype, "full_precision_matrix_mult": True}).encode(), np.uint8)
    for name in [name for name, value in stored.items() if is_matrix(name, value)]:
      stored[name.removesuffix("weight") + "comfy_quant"] = text
      stored[name] = stored[name].view(np.uint8) if as_bytes else stored[name]
    assert_equal(read_all(write_safetensors(folder / "wan.safetensors", stored)), expected)

  def test_format_in_header(self, folder):
    """Layers may have a prefix there that tensors lack."""
    stored, expected = scaled("float8_e4m3fn", SCALES["one"], scale="weight_scale", activation="input_scale")
    layers = [name.removesuffix(".weight") for name, value in stored.items() if is_matrix(name, value)]
    stored |= {f"{layer}.weight": stored[f"{layer}.weight"].view(np.uint8) for layer in layers}
    text = json.dumps({"layers": {f"model.diffusion_model.{layer}": {"format": "float8_e4m3fn"} for layer in layers}})
    file = write_safetensors(folder / "wan.safetensors", stored, {"_quantization_metadata": text})
    assert_equal(read_all(file), expected)

  def test_format_in_the_headers_of_shards(self, folder):
    """Each describes its own layers, or all."""
    stored, expected = scaled("float8_e4m3fn", SCALES["one"], scale="weight_scale", activation="input_scale")
    layers = [name.removesuffix(".weight") for name, value in stored.items() if is_matrix(name, value)]
    stored |= {f"{layer}.weight": stored[f"{layer}.weight"].view(np.uint8) for layer in layers}
    formats = {layer: {"format": "float8_e4m3fn"} for layer in layers}
    half = dict(list(formats.items())[: len(formats) // 2])
    rest = {layer: value for layer, value in formats.items() if layer not in half}
    for parts in ([half, rest, None], [half, formats, {}], [formats, formats, formats], [None, formats, None]):
      texts = [part if part is None else {"format_version": "1.0", "layers": part} for part in parts]
      assert_equal(read_all(write_shards(folder, stored, texts)), expected)
    texts = [{"layers": formats}, {"layers": {layers[0]: {"format": "nvfp4"}}}, None]
    with pytest.raises(
      UserError, match=rf"index\.json: its shards contradict each other: x-00002-.* {layers[0]} in _q"
    ):
      read_all(write_shards(folder, stored, texts))
    with pytest.raises(UserError, match=r"x-00002-of-00003\.safetensors: the entry _quantization_metadata .* damaged"):
      read_all(write_shards(folder, stored, [{"layers": formats}, "{", None]))

  def test_options_in_the_headers_of_shards_are_refused(self, folder):
    stored = {"blocks.0.ffn.0.weight": np.ones((4, 4), np.int8), "blocks.0.ffn.0.weight_scale": np.ones((), np.float32)}
    text = {"layers": {"blocks.0.ffn.0": {"format": "int8_tensorwise", "convrot": True}}}
    with pytest.raises(UserError, match="quantised as int8_tensorwise with convrot, which is not supported"):
      dequantize(open_tensors(write_shards(folder, stored, [text])))

  @pytest.mark.parametrize(
    "text, message",
    [
      ({"format": "nvfp4"}, "blocks.0.ffn.0 is quantised as nvfp4, which is not supported"),
      ({"format": "int8_tensorwise", "params": {"convrot": True}}, "quantised as int8_tensorwise with convrot"),
      ({"format": "float8_e5m2"}, "blocks.0.ffn.0.weight is float8_e4m3fn, but the file says that it is float8_e5m2"),
      ({}, "quantised as None"),
      ("{", "blocks.0.ffn.0.comfy_quant is not valid JSON"),
      ("[" * 60000, "blocks.0.ffn.0.comfy_quant is not valid JSON: it is nested too deeply"),
    ],
  )
  def test_unsupported_format(self, folder, text, message):
    stored, _ = scaled("float8_e4m3fn", SCALES["one"])
    text = text if isinstance(text, str) else json.dumps(text)
    stored["blocks.0.ffn.0.comfy_quant"] = np.frombuffer(text.encode(), np.uint8)
    with pytest.raises(UserError, match=message):
      read_all(write_safetensors(folder / "wan.safetensors", stored))

  @pytest.mark.parametrize(
    "name, value, message",
    [
      ("blocks.0.ffn.0.scale_weight", np.ones(7, np.float32), r"scale_weight \(7,\) does not fit .*\(160, 96\)"),
      ("blocks.0.ffn.0.scale_weight", np.ones((160, 7, 1), np.float32), r"\(160, 7, 1\) does not fit"),
      ("blocks.0.ffn.0.scale_weight", np.ones((160, 0, 1), np.float32), r"\(160, 0, 1\) does not fit"),
      ("blocks.0.ffn.0.scale_weight", np.ones(1, np.uint8), "scale_weight is uint8, expected one of"),
      ("blocks.0.ffn.9.scale_weight", np.ones(1, np.float32), "blocks.0.ffn.9.scale_weight must be the only scale"),
      ("blocks.0.ffn.0.weight_scale", np.ones(1, np.float32), "must be the only scale of blocks.0.ffn.0.weight"),
      ("blocks.0.ffn.0.weight", np.ones((160, 96), np.uint8), "is uint8 with scales, and the file does not name"),
    ],
  )
  def test_wrong_scale(self, folder, name, value, message):
    stored, _ = scaled("float8_e4m3fn", SCALES["one"])
    with pytest.raises(UserError, match=message):
      read_all(write_safetensors(folder / "wan.safetensors", {**stored, name: value}))

  def test_pytorch_file(self, folder):
    torch = pytest.importorskip("torch", reason="needs the extra `convert`")
    tensors = {name: torch.from_numpy(value).to(torch.float8_e4m3fn) for name, value in WEIGHTS.items()}
    torch.save(tensors, folder / "wan.pth")
    expected = {name: value.astype(ml_dtypes.float8_e4m3fn).astype(BF16) for name, value in WEIGHTS.items()}
    assert_equal(read_all(folder / "wan.pth"), expected)


def test_lora_in_8_bits(tmp_path):
  """Becomes float32, as nothing computes in 8 bits."""
  layer, random = "diffusion_model.blocks.0.self_attn.q", rng()
  pair = {
    "lora_A": random_float8((2, 96), "float8_e4m3fn", random),
    "lora_B": random_float8((96, 2), "float8_e5m2", random),
  }
  file = write_safetensors(tmp_path / "lora.safetensors", {f"{layer}.{name}.weight": x for name, x in pair.items()})
  convert_any(str(file), str(tmp_path / "out.safetensors"), to="comfyui")
  assert_equal(
    load_file(tmp_path / "out.safetensors"),
    {f"{layer}.{name}.weight": value.astype(np.float32) for name, value in pair.items()},
  )


class TestPrefixes:
  @pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model.", "diffusion_model."])
  def test_half_precision(self, folder, prefix):
    tensors = {name: value.astype(np.float16) for name, value in WEIGHTS.items()}
    file = write_safetensors(folder / "wan.safetensors", {prefix + name: value for name, value in tensors.items()})
    assert_equal(read_all(file), tensors)

  def test_other_tensors(self, folder):
    """Tensors without the prefix of the others are reported."""
    tensors = {f"model.diffusion_model.{name}": value for name, value in WEIGHTS.items()}
    with pytest.raises(UserError, match=r"not a known component of Wan \(its first tensors are extra\)"):
      read_all(write_safetensors(folder / "wan.safetensors", {**tensors, "extra": np.ones(3, np.float32)}))

  def test_whole_model_in_one_file(self, folder):
    """As ComfyUI saves checkpoints."""
    pytest.importorskip("torch", reason="the release contains PyTorch files; needs the extra `convert`")
    text, vae = text_encoder(), read_all(RELEASE / "Wan2.1_VAE.pth")
    model = np.frombuffer((TOKENIZER / "spiece.model").read_bytes(), np.uint8)
    tensors = {f"model.diffusion_model.{name}": value for name, value in WEIGHTS.items()}
    tensors |= {f"vae.{name}": value for name, value in vae.items()}
    tensors |= {f"text_encoders.umt5xxl.transformer.{in_transformers(name)}": value for name, value in text.items()}
    tensors |= {"text_encoders.umt5xxl.logit_scale": np.ones((), np.float32), "text_encoders.spiece_model": model}
    release = find_release(write_safetensors(folder / "wan.safetensors", tensors))
    assert [source.component for source in release.sources] == ["transformer", "vae", "text_encoder"]
    for source, expected in zip(release.sources, (WEIGHTS, vae, text)):
      assert_equal({name: source.tensors.read(name) for name in source.tensors.infos}, expected)
    assert "SentencePiece model with 133 tokens" in str(release.tokenizer)


def text_encoder():
  return read_all(RELEASE / "models_t5_umt5-xxl-enc-bf16.pth")


def in_transformers(name):
  return name_to_diffusers("text_encoder", name)


class TestTextEncoder:
  @pytest.fixture(autouse=True)
  def torch(self):
    pytest.importorskip("torch", reason="the release contains PyTorch files; needs the extra `convert`")

  def test_comfyui(self, tmp_path):
    """transformers' names, scaled, with a SentencePiece model that becomes the tokenizer."""
    random, stored, expected = rng(), {}, {}
    for name, value in text_encoder().items():
      if is_matrix(name, value) and ".pos_embedding." not in name:
        stored[in_transformers(name)] = random_float8(value.shape, "float8_e4m3fn", random)
        scale = np.float32(random.uniform(1e-3, 1e-2))
        stored[in_transformers(name).removesuffix("weight") + "scale_weight"] = np.array(scale)
        expected[name] = stored[in_transformers(name)].astype(np.float32) * scale
      else:
        stored[in_transformers(name)] = expected[name] = value
    stored["spiece_model"] = np.frombuffer((TOKENIZER / "spiece.model").read_bytes(), np.uint8)
    stored["scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    file = write_safetensors(tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", stored)
    convert_any(str(file), str(tmp_path / "target"))
    assert_converted(tmp_path / "target", "text_encoder", expected)
    pipe = univid_jax.load_pipeline(str(tmp_path / "target"))
    reference = Tokenizer(TOKENIZER / "tokenizer.json")
    text = " [clip1] is  \u2014 a d\u00e9j\u00e0 vu \u4e2d\u6587 \U0001f600 &amp; "
    assert np.array_equal(pipe.tokenize(text), reference(text))
    embedding = pipe.encode_prompt(text)
    assert len(embedding) == 512 and np.isfinite(embedding).all() and embedding[: len(reference(text))].any()
    with pytest.raises(UserError, match="has no transformer, only text_encoder: convert a release that includes it"):
      pipe.predict_velocity(np.zeros((1, 4, 4, 16), np.float32), 500.0, embedding)
    lora = write_safetensors(tmp_path / "lora.safetensors", {
      "blocks.0.ffn.0.lora_A.weight": np.zeros((2, 8), np.float32),
      "blocks.0.ffn.0.lora_B.weight": np.zeros((8, 2), np.float32),
    })  # fmt: skip
    with pytest.raises(UserError, match="has no transformer, only text_encoder"):
      univid_jax.load_pipeline(str(tmp_path / "target"), lora=str(lora))

  def test_tokenizer_json_is_preferred(self, tmp_path):
    stored = {in_transformers(name): value for name, value in text_encoder().items()}
    stored["spiece_model"] = np.zeros(4, np.uint8)
    write_safetensors(tmp_path / "text_encoder" / "model.safetensors", stored)
    with pytest.raises(UserError, match="the tokenizer in it cannot be used: not a SentencePiece model"):
      find_release(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(TOKENIZER / "spiece.model", tmp_path / "tokenizer")
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path / "tokenizer")
    assert find_release(tmp_path).tokenizer == tmp_path / "tokenizer"
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    (tmp_path / "tokenizer").symlink_to(tmp_path / "elsewhere")
    assert find_release(tmp_path).tokenizer == tmp_path / "tokenizer"

  def test_folder_with_sentencepiece_model(self, tmp_path):
    shutil.copytree(RELEASE, tmp_path / "release")
    for name in ("univid_lora.ckpt", "google/umt5-xxl/tokenizer.json", "Wan2.1_VAE.pth", "config.json"):
      (tmp_path / "release" / name).unlink()
    (tmp_path / "release" / "diffusion_pytorch_model.safetensors").unlink()
    convert_any(str(tmp_path / "release"), str(tmp_path / "target"))
    file = tmp_path / "target" / read_info(tmp_path / "target").tokenizer
    assert np.array_equal(Tokenizer(file)("a clip"), Tokenizer(TOKENIZER / "tokenizer.json")("a clip"))

  def test_wrong_vocabulary(self, tmp_path):
    stored = {in_transformers(name): value for name, value in text_encoder().items()}
    stored["shared.weight"] = stored["shared.weight"][:100]
    stored["spiece_model"] = np.frombuffer((TOKENIZER / "spiece.model").read_bytes(), np.uint8)
    with pytest.raises(UserError, match=r"has 133 tokens, but .* embeds 100: they do not belong together"):
      find_release(write_safetensors(tmp_path / "text.safetensors", stored))

  def test_decoder_is_left_out(self, tmp_path):
    """A whole UMT5, whose embedding may be stored as that of the encoder alone."""
    expected = text_encoder()
    stored = {in_transformers(name): value for name, value in expected.items()}
    stored["encoder.embed_tokens.weight"] = stored.pop("shared.weight")
    stored |= {"decoder.block.0.layer.0.SelfAttention.q.weight": np.ones((3, 3), np.float32)}
    assert_equal(read_all(write_safetensors(tmp_path / "text.safetensors", stored)), expected)

  def test_gguf(self, tmp_path):
    """llama.cpp's names, and a tokenizer in the header."""
    expected = text_encoder()
    kinds = {name: "Q8_0" for name, x in expected.items() if is_matrix(name, x) and x.shape[1] % 32 == 0}
    tensors = quantize_gguf(expected, kinds, rng())
    model = UnigramModel.parse((TOKENIZER / "spiece.model").read_bytes())
    texts, scores, types = zip(*model.pieces)
    values = {
      "tokenizer.ggml.model": "t5",
      "tokenizer.ggml.tokens": list(texts),
      "tokenizer.ggml.scores": list(scores),
      "tokenizer.ggml.token_type": list(types),
      "tokenizer.ggml.unknown_token_id": model.unknown,
      "tokenizer.ggml.precompiled_charsmap": model.charsmap,
    }
    names = {"token_embedding.weight": "token_embd.weight", "norm.weight": "enc.output_norm.weight"}
    parts = {"attn.": "attn_", "pos_embedding.embedding": "attn_rel_b", "norm1": "attn_norm", "norm2": "ffn_norm"}
    parts |= {"ffn.gate.0": "ffn_gate", "ffn.fc1": "ffn_up", "ffn.fc2": "ffn_down", "blocks.": "enc.blk."}
    for name in expected.keys() - names.keys():
      names[name] = name
      for part, other in parts.items():
        names[name] = names[name].replace(part, other)
    file = write_gguf(tmp_path / "umt5.gguf", {names[name]: value for name, value in tensors.items()}, values)
    assert_equal(read_all(file), dequantize_gguf(tensors))
    convert_any(str(file), str(tmp_path / "target"))
    pipe = univid_jax.load_pipeline(str(tmp_path / "target"))
    assert np.array_equal(pipe.tokenize("a clip \u4e2d"), Tokenizer(TOKENIZER / "tokenizer.json")("a clip \u4e2d"))
    assert "SentencePiece model" in str(find_release(file.rename(tmp_path / "UMT5.GGUF")).tokenizer)


class TestGGUF:
  def test_blocks_of_32(self, folder):
    """Types of each module drawn at random; converted, with the velocity of the dequantised weights."""
    random = rng()
    matrices = [name for name, x in WEIGHTS.items() if is_matrix(name, x) and x.shape[1] % 32 == 0]
    modules = sorted({name.split(".", 2)[-1] for name in matrices})
    drawn = dict(zip(modules, random.permuted(["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"] * len(modules))))
    kinds = {name: str(drawn[name.split(".", 2)[-1]]) for name in matrices}
    kinds |= {"patch_embedding.weight": "F16", "head.head.bias": "F16"}
    tensors = quantize_gguf(WEIGHTS, kinds, random)
    file = write_gguf(folder / "wan.gguf", {f"model.diffusion_model.{name}": x for name, x in tensors.items()})
    convert_any(str(file), str(folder / "target"))
    expected = dequantize_gguf(tensors)
    assert_converted(folder / "target", "transformer", expected)
    convert_any(str(write_safetensors(folder / "plain.safetensors", expected)), str(folder / "plain"))
    assert np.array_equal(velocity(folder / "target"), velocity(folder / "plain"))

  @pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "BF16"])
  def test_types(self, tmp_path, kind):
    """Random blocks, of a transformer whose rows divide into blocks of 256. NaN and infinite weights are counted."""
    config = DiTConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=1, freq_dim=256, text_dim=256)
    shapes = {name: fill.original_shape for fill in make_fills("transformer", config) for name in fill.names}
    weights = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    kinds = {name: kind for name, value in weights.items() if is_matrix(name, value)}
    tensors = quantize_gguf(weights, kinds, rng())
    expected = dequantize_gguf(tensors)
    if kind == "BF16":
      expected |= {name: expected[name].astype(BF16) for name in kinds}
    found = read_all(write_gguf(tmp_path / "wan.gguf", tensors))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
      assert found[name].dtype == value.dtype and np.array_equal(found[name], value, equal_nan=True), name

  def test_original_shape(self, folder):
    """Tensors that were reshaped for quantisation have their shape in the header."""
    tensors = quantize_gguf(WEIGHTS, {}, rng())
    name = "patch_embedding.weight"
    tensors |= quantize_gguf({name: WEIGHTS[name].reshape(-1, 32)}, {name: "Q8_0"}, rng())
    values = {f"comfy.gguf.orig_shape.{name}": list(WEIGHTS[name].shape)}
    found = read_all(write_gguf(folder / "wan.gguf", tensors, values))[name]
    assert np.array_equal(found, dequantize_gguf(tensors)[name].reshape(WEIGHTS[name].shape))
    write_gguf(folder / "wan.gguf", tensors, {f"comfy.gguf.orig_shape.{name}": [3, 5]})
    with pytest.raises(UserError, match=r"orig_shape.patch_embedding.weight is \(3, 5\), but the tensor is"):
      read_all(folder / "wan.gguf")

  @pytest.mark.parametrize("padding, start", [(15, 96), (16, 96), (17, 128)])
  def test_the_data_begins_at_the_next_multiple_of_32(self, tmp_path, padding, start):
    """Of 80 bytes of a header and as many as its only value has: a string."""
    gguf_package()
    header = struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + struct.pack("<Q3sIQ", 3, b"pad", 8, padding) + b"x" * padding
    header += struct.pack("<Q1sIQIQ", 1, b"w", 1, 4, 0, 0)
    assert len(header) == 80 + padding
    numbers = np.arange(4, dtype=np.float32)
    (tmp_path / "wan.gguf").write_bytes(header.ljust(start, b"\0") + numbers.tobytes())
    assert open_tensors(tmp_path / "wan.gguf").read("w").tolist() == [0, 1, 2, 3]

  def test_without_the_package(self, folder, monkeypatch):
    file = write_gguf(folder / "wan.gguf", quantize_gguf(WEIGHTS, {}, rng()))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"need the package gguf: pip install -e .*\[gguf\]'"):
      find_release(file)


class TestAutoencoder:
  @pytest.mark.parametrize("prefix", ["", "model.", "vae.", "first_stage_model."])
  def test_names(self, tmp_path, prefix):
    """Alone, in bfloat16: it decodes, and what needs another component says so."""
    _, _, weights = golden("vae")
    expected = {name: value.astype(BF16) for name, value in weights.items()}
    file = write_safetensors(tmp_path / "vae.safetensors", {prefix + name: x for name, x in expected.items()})
    if prefix != "model.":
      assert_equal(read_all(file), expected)
      return
    convert_any(str(file), str(tmp_path / "target"))
    assert_converted(tmp_path / "target", "vae", expected)
    pipe = univid_jax.load_pipeline(str(tmp_path / "target"))
    assert np.isfinite(pipe.decode(rng().standard_normal((1, 2, 2, 16), np.float32))).all()
    frames = np.zeros((1, 16, 16, 3), np.uint8)
    for use, component in (
      (lambda: pipe.sample([frames] * 3, prompt_embeds=np.zeros((1, 8), np.float32)), "transformer"),
      (lambda: pipe.predict_velocity(np.zeros((1, 2, 2, 16), np.float32), 1.0, np.zeros((1, 8))), "transformer"),
      (lambda: pipe.config, "transformer"),
      (lambda: pipe.encode_prompt("a"), "tokenizer"),
    ):
      with pytest.raises(UserError, match=f"has no {component}"):
        use()


class TestImageEncoder:
  def test_transformers_layout(self, tmp_path):
    """Queries, keys and values apart; the last block and the projection are left out."""
    _, _, weights = golden("clip_vision")
    stored, expected = {}, {}
    for name, value in weights.items():
      theirs = name_to_diffusers("image_encoder", name)
      value = value.reshape(value.shape[-2:]) if name == "pos_embedding" else value
      if name.endswith(("to_qkv.weight", "to_qkv.bias")):
        for part, rows in zip("qkv", np.split(value, 3)):
          stored[name_to_diffusers("image_encoder", name.replace("to_qkv", part))] = rows
      else:
        stored[theirs] = value.reshape(-1) if name == "cls_embedding" else value
      if not name.startswith(("transformer.2.", "post_norm.", "head")):
        expected[name] = value.reshape(-1) if name == "cls_embedding" else value
    stored["vision_model.embeddings.position_ids"] = np.zeros((1, 5), np.int32)
    file = write_safetensors(tmp_path / "clip_vision_h.safetensors", stored)
    config = {"model_type": "clip_vision_model", "num_attention_heads": 4, "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_equal(read_all(file), expected)
    convert_any(str(file), str(tmp_path / "target"))
    assert_converted(tmp_path / "target", "image_encoder", expected)
    assert CLIPConfig(**read_info(tmp_path / "target").components["image_encoder"].config) == CLIPConfig(
      image_size=28, patch_size=14, dim=48, num_heads=4, num_layers=3
    )
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "quick_gelu"}))
    with pytest.raises(UserError, match="hidden_act = gelu"):
      find_release(file)
    del stored["vision_model.encoder.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(UserError, match=r"transformer.0.attn.q.weight, .* must all exist"):
      find_release(write_safetensors(file, stored))
