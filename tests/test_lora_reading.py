"""Reading and writing LoRA files of every kind: names, alphas, PEFT's adapters, what is refused, exports, fuzzing."""

import dataclasses
import functools
import json
import re
import warnings
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests.helpers import GOLDENS
from tests.stand_ins import open_bucket
from univid_jax.checkpoints.built_in import locate
from univid_jax.checkpoints.experts import check_commas, split_loras, split_weight
from univid_jax.checkpoints.lora.folder import write_lora_folder
from univid_jax.checkpoints.lora.formats import FORMATS, lora_tensors, write_lora
from univid_jax.checkpoints.lora.kinds import DoRALayer
from univid_jax.checkpoints.lora.names import parse_name
from univid_jax.checkpoints.lora.reading import parse_lora, read_lora
from univid_jax.checkpoints.origin import Origin
from univid_jax.checkpoints.tensor_files import TensorFile, TensorInfo
from univid_jax.convert.__main__ import main as convert
from univid_jax.convert.commands import inspect
from univid_jax.core import bucket_files
from univid_jax.core.errors import UserError
from univid_jax.inference.load import load_pipeline
from univid_jax.models.changes import kernel_change

CASES = Path(__file__).parent / "cases" / "lora"
Q, FFN = "diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.ffn.0"


def lora_from(tensors, metadata=None, path="test.safetensors"):
  tensors = {name: np.asarray(value) for name, value in tensors.items()}
  infos = {name: TensorInfo(value.shape, str(value.dtype)) for name, value in tensors.items()}
  return parse_lora(TensorFile(Path(path), infos, tensors.__getitem__, metadata or {}))


def ones(*shape, dtype=np.float32):
  return np.ones(shape, dtype)


def pair(name=Q, rank=2, **parts):
  tensors = {f"{name}.lora_A.weight": ones(rank, 6), f"{name}.lora_B.weight": ones(8, rank)}
  return tensors | {f"{name}.{part}": value for part, value in parts.items()}


def weight_change(change, weight=None, strength=1.0):
  """Returns the change of a weight (out, in)."""
  group, parts = change.kernel_parts(strength)
  parts = {name: jnp.asarray(part) for name, part in parts.items()}
  weight = np.zeros(change.shape, np.float32) if weight is None else weight
  kernel = jnp.asarray(weight.reshape(len(weight), -1).T)
  return np.asarray(kernel_change(group, parts, kernel)).T


def same(a, b):
  """Asserts that two LoRAs change the same tensors by the same amounts."""
  assert a.changes.keys() == b.changes.keys()
  for name, change in a.changes.items():
    shape = change.shape
    weight = np.random.default_rng(0).normal(size=(shape[0], int(np.prod(shape[1:])))).astype(np.float32)
    changes = [
      weight_change(each, weight if isinstance(change, DoRALayer) else None) for each in (change, b.changes[name])
    ]
    np.testing.assert_allclose(changes[0], changes[1], rtol=2e-6, atol=1e-6)


class TestNames:
  @pytest.mark.parametrize(
    "name, expected",
    [
      ("lora_unet__blocks_3_cross_attn_k_img.lora_down.weight", ("blocks.3.cross_attn.k_img.weight", "down", "musubi")),
      ("lora_unet_blocks_3.ffn.2.alpha", ("blocks.3.ffn.2.weight", "alpha", "musubi")),
      ("pipe.dit.blocks.3.ffn.2.lora_B.default.weight", ("blocks.3.ffn.2.weight", "up", "univid")),
      (
        "base_model.model.diffusion_model.blocks.3.ffn.2.lora_A.x_1.weight",
        ("blocks.3.ffn.2.weight", "down", "univid"),
      ),
      ("lycoris_blocks_3_attn1_to_out_0.lokr_w1", ("blocks.3.self_attn.o.weight", "lokr_w1", "diffusers")),
      ("transformer.condition_embedder.time_proj.hada_w1_a", ("time_projection.1.weight", "hada_w1_a", "diffusers")),
      ("diffusion_model.blocks.3.diff_m", ("blocks.3.modulation", "diff_m", "comfyui")),
      ("diffusion_model.blocks.3.modulation.diff", ("blocks.3.modulation", "diff", "comfyui")),
      ("diffusion_model.head.diff_m", ("head.modulation", "diff_m", "comfyui")),
      ("diffusion_model.img_emb.proj.4.diff_b", ("img_emb.proj.4.bias", "diff_b", "comfyui")),
      ("blocks.3.norm3.w_norm", ("blocks.3.norm3.weight", "diff", "univid")),
      (
        "blocks.3.attn1.to_q.lora_magnitude_vector.default.weight",
        ("blocks.3.self_attn.q.weight", "magnitude", "diffusers"),
      ),
      ("blocks.3.self_attn.norm_q.diff_b", None),  # it has no bias
      ("blocks.1000.ffn.0.diff", None),
      ("transformer_2.blocks.3.attn1.to_q.lora_A.weight", None),
      ("vace_blocks.3.self_attn.q.lora_A.weight", None),
      ("transformer.transformer_blocks.3.attn1.to_q.lora_A.weight", None),  # other models, with the same parts
      ("_orig_mod.module.blocks.3.ffn.2.diff", ("blocks.3.ffn.2.weight", "diff", "univid")),
      ("lora_te_x.alpha", None),
    ],
  )
  def test_names(self, name, expected):
    found = parse_name(name)
    assert expected == (found and (found.tensor, found.part, found.format))


class TestAlpha:
  @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
  @pytest.mark.parametrize("dtype", ["int64", "uint8", "float16", "bfloat16", "float64"])
  def test_any_dtype_and_shape(self, shape, dtype):
    lora = lora_from(pair(alpha=np.full(shape, 3).astype(jnp.dtype(dtype))))
    assert lora.alphas == (3.0,)

  @pytest.mark.parametrize("alpha", [0, -1, np.nan, np.inf, 1e9])
  def test_meaningless(self, alpha):
    with pytest.raises(UserError, match=rf"test\.safetensors: {re.escape(Q)}\.alpha is \S+ for rank 2; the scale"):
      lora_from(pair(alpha=np.array(alpha, np.float32)))

  def test_ignored_by_whole_factors(self):
    """LyCORIS stores 1e10 then."""
    tensors = {f"{Q}.lokr_w1": ones(2, 2), f"{Q}.lokr_w2": ones(4, 3), f"{Q}.alpha": np.array(np.inf, np.float32)}
    assert np.array_equal(weight_change(lora_from(tensors).changes["blocks.0.self_attn.q.weight"]), ones(8, 6))

  def test_musubi_scales_whole_factors(self):
    tensors = {f"{Q}.lokr_w1": ones(2, 2), f"{Q}.lokr_w2": ones(4, 3), f"{Q}.alpha": np.array(2.0)}
    lora = lora_from(tensors | {"lokr_factor": np.array(-1)})
    assert np.array_equal(weight_change(lora.changes["blocks.0.self_attn.q.weight"]), 0.5 * ones(8, 6))

  @pytest.mark.parametrize("whole_w2", [False, True])
  def test_musubi_gets_whole_first_factors(self, whole_w2):
    """Its `merge_weights_to_tensor` skips modules without `lokr_w1`, and takes the scale 1 if `lokr_w2` is whole."""
    rng = np.random.default_rng(0)
    w1 = {"lokr_w1_a": rng.normal(size=(2, 1)), "lokr_w1_b": rng.normal(size=(1, 2))}
    w2 = {"lokr_w2_a": rng.normal(size=(4, 2)), "lokr_w2_b": rng.normal(size=(2, 3))}
    w2 = {"lokr_w2": w2["lokr_w2_a"] @ w2["lokr_w2_b"]} if whole_w2 else w2
    tensors = {f"{Q}.{name}": value.astype(np.float32) for name, value in (w1 | w2).items()}
    lora = lora_from(tensors | {f"{Q}.alpha": np.array(3.0)})
    written = lora_tensors(lora, "musubi")
    module = "lora_unet_blocks_0_self_attn_q."
    w2_names = {"lokr_w2"} if whole_w2 else {"lokr_w2_a", "lokr_w2_b", "alpha"}
    assert written.keys() == {module + name for name in {"lokr_w1"} | w2_names}
    change = np.kron(written[module + "lokr_w1"], functools.reduce(np.matmul, w2.values()))
    scale = 1 if whole_w2 else 3.0 / 2
    expected = weight_change(lora.changes["blocks.0.self_attn.q.weight"])
    np.testing.assert_allclose(scale * change, expected, rtol=1e-5, atol=1e-6)

  def test_musubi_gets_one_kind_per_file(self):
    """Its `detect_network_type` takes all changes for those of the first kind that it finds."""
    tensors = {f"{Q}.lokr_w1": ones(2, 2), f"{Q}.lokr_w2": ones(4, 3), **pair("blocks.1.self_attn.q")}
    with pytest.raises(UserError, match="musubi, which applies one kind of change per file: 1 LoKr, 1 low-rank"):
      lora_tensors(lora_from(tensors), "musubi")
    assert FORMATS["musubi"].metadata(lora_from(pair())) == {
      "ss_network_module": "networks.lora_wan",
      "ss_network_dim": "2",
      "ss_network_alpha": "2",
    }
    lokr = lora_from({f"{Q}.lokr_w1": ones(2, 2), f"{Q}.lokr_w2": ones(4, 3)})
    assert FORMATS["musubi"].metadata(lokr)["ss_network_module"] == "networks.lokr"

  def test_dora_for_comfyui_has_a_note(self, tmp_path):
    for shape, expected in (((8, 1), "1 DoRA changes have a magnitude per output channel"), ((1, 6), "")):
      note = write_lora(tmp_path / "lora.safetensors", lora_from(pair(dora_scale=ones(*shape))), "comfyui")
      assert note.startswith(expected) and bool(note) == bool(expected)

  def test_written_as_a_scalar(self):
    """Of shape (), which every reader accepts."""
    assert all(
      value.shape == ()
      for to in ("comfyui", "musubi")
      for name, value in lora_tensors(lora_from(pair(alpha=np.array(1))), to).items()
      if name.endswith(".alpha")
    )


def write_adapter(folder, config, tensors=None):
  folder.mkdir(exist_ok=True)
  save_file(
    pair("base_model.model.blocks.0.ffn.0") if tensors is None else tensors, folder / "adapter_model.safetensors"
  )
  (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
  return folder


class TestPEFT:
  @pytest.mark.parametrize(
    "config, message",
    [
      ("{", "is not valid JSON"),
      ("[]", "must contain a JSON object, got list"),
      ({"r": 4, "lora_alpha": 8}, r"states rank 4 for blocks\.0\.ffn\.0, whose tensors have rank 2"),
      ({"r": 4, "rank_pattern": {"ffn.0": 3}}, "states rank 3"),
      ({"r": "2"}, "r must be a positive number, got '2'"),
      ({"r": 2, "lora_alpha": -8}, "lora_alpha must be a positive number, got -8"),
      ({"r": 2, "lora_alpha": 10**400}, "lora_alpha must be a positive number"),
      ({"r": 2, "lora_alpha": 1e8}, r"is 1e\+08 for rank 2; the scale"),
      ({"r": 2, "alpha_pattern": {"ffn.(": 3}}, "is not a regular expression"),
      ({"r": 2, "alpha_pattern": {"[[]": 3}}, "is not a regular expression: Possible nested set"),
      ({"r": 2, "alpha_pattern": {"(a+)+b": 3}}, "is too complex"),
      ({"r": 2, "alpha_pattern": [3]}, "alpha_pattern must be an object"),
      ({"peft_type": "OFT"}, "peft_type OFT are not supported, only LORA, LOHA, LOKR"),
      ({"r": 2, "init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4 is not supported"),
      ({"r": 2, "layer_replication": [[0, 1]]}, "layer_replication is not supported"),
    ],
  )
  def test_bad_configs(self, config, message, tmp_path):
    with pytest.raises(UserError, match=rf"adapter_config\.json.*{message}"):
      read_lora(write_adapter(tmp_path, config))

  @pytest.mark.parametrize(
    "pattern, matches", [("ffn.0", True), ("0", True), ("blocks.0.ffn.0", True), ("fn.0", False), ("blocks.0", False)]
  )
  def test_patterns_are_of_whole_words_at_the_end(self, tmp_path, pattern, matches):
    """As PEFT reads them: v is not the end of to_v."""
    config = {"r": 2, "lora_alpha": 16, "alpha_pattern": {pattern: 4}}
    (change,) = read_lora(write_adapter(tmp_path, config)).changes.values()
    assert weight_change(change).max() == (4 if matches else 16)

  @pytest.mark.parametrize("other", ["adapter_model.bin", "._adapter_model.safetensors", "optimizer.pt"])
  def test_other_files_in_the_folder(self, tmp_path, other):
    """The config belongs to the adapter, whatever lies beside it."""
    expected = read_lora(write_adapter(tmp_path / "alone", {"r": 2, "lora_alpha": 16}))
    folder = write_adapter(tmp_path / "adapter", {"r": 2, "lora_alpha": 16})
    (folder / other).write_bytes(b"x")
    assert weight_change(next(iter(expected.changes.values()))).max() == 16
    for path in (folder, folder / "adapter_model.safetensors"):
      same(read_lora(path), expected)

  def test_missing_weights(self, tmp_path):
    write_adapter(tmp_path, {"r": 2})
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has adapter_config\.json, but no adapter_model\.safetensors"):
      read_lora(tmp_path)

  def test_bad_header(self):
    with pytest.raises(UserError, match=r"lora_adapter_metadata in the header of test\.safetensors is not valid JSON"):
      lora_from(pair(), {"lora_adapter_metadata": "{"})

  # Classes of adapters of PEFT, with their options.
  KINDS: ClassVar = {
    "patterns": ("Lora", {"r": 2, "lora_alpha": 7, "rank_pattern": {r"blocks\.1\..*": 3}, "alpha_pattern": {"^blocks.0.ffn.0": 9}}),  # noqa: E501
    "rslora": ("Lora", {"r": 4, "lora_alpha": 3, "use_rslora": True}),
    "DoRA": ("Lora", {"r": 2, "lora_alpha": 3, "use_dora": True}),
    "bias": ("Lora", {"r": 2, "lora_alpha": 3, "lora_bias": True}),
    "LoHa": ("LoHa", {"r": 2, "alpha": 3}),
    "LoKr": ("LoKr", {"r": 1, "alpha": 3, "decompose_factor": 2}),
    "LoKr both": ("LoKr", {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 2}),
    "LoKr whole": ("LoKr", {"r": 8, "alpha": 3, "decompose_factor": 2}),
  }  # fmt: skip

  @pytest.mark.parametrize("kind", KINDS)
  def test_as_merged_by_peft(self, kind, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    peft = pytest.importorskip("peft", reason="needs the extra `parity`")

    def module(**children):
      out = torch.nn.Module()
      for name, child in children.items():
        out.add_module(name, child)
      return out

    def block():
      return module(self_attn=module(q=torch.nn.Linear(8, 8)), ffn=torch.nn.Sequential(torch.nn.Linear(8, 12)))

    torch.manual_seed(0)
    targets = ["q", "ffn.0"]
    model = module(blocks=torch.nn.ModuleList([block(), block()]), patch_embedding=torch.nn.Conv3d(4, 8, (1, 2, 2)))
    config_class, options = self.KINDS[kind]
    if config_class == "Lora" and kind != "bias":
      targets.append("patch_embedding")
    before = {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
    adapted = peft.get_peft_model(model, getattr(peft, f"{config_class}Config")(target_modules=targets, **options))
    for name, value in adapted.named_parameters():
      if value.requires_grad and "magnitude" not in name:
        torch.nn.init.normal_(value)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # PEFT takes biases for incomplete matrices
      adapted.save_pretrained(tmp_path)
    lora = read_lora(tmp_path)
    after = {name: value.detach().numpy() for name, value in adapted.merge_and_unload().state_dict().items()}
    assert not lora.notes and not lora.unmatched
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert lora.changes.keys() == changed and len(changed) >= 4
    for name, change in lora.changes.items():
      old, new = (value[name].reshape(len(value[name]), -1) for value in (before, after))
      np.testing.assert_allclose(old + weight_change(change, old).reshape(old.shape), new, atol=2e-5)


class TestRefused:
  @pytest.mark.parametrize(
    "tensors, message",
    [
      ({f"{Q}.lora_A.weight": ones(2, 6)}, r"self_attn\.q\.weight is incomplete: a low-rank pair needs up too"),
      ({f"{Q}.alpha": np.array(1.0)}, "has no matrices"),
      (pair() | {f"{Q}.lora_B.weight": ones(8, 3)}, r"needs matrices \(rank, in\) and \(out, rank\).*\(8, 3\)"),
      (pair() | {f"{Q}.lora_A.weight": ones(6)}, r"needs matrices"),
      (pair() | {f"{Q}.lora_A.weight": ones(0, 6)}, r"lora_A\.weight is empty, its shape is \(0, 6\)"),
      (pair() | {f"{Q}.lora_A.weight": ones(2, 6, dtype=np.int8)}, "has the dtype int8; expected floats"),
      (pair() | {f"{Q}.lora_A.weight": np.full((2, 6), 1e300)}, "infinite or too large for float32"),
      (pair() | {f"{Q}.lora_down.weight": ones(2, 6)}, r"two tensors for down .*lora_A\.w.* and .*lora_down"),
      (pair() | pair("lora_unet_blocks_0_self_attn_q"), r"two tensors for down of blocks\.0\.self_attn\.q\.weight"),
      (pair() | {f"{Q}.lora_A.b.weight": ones(2, 6)}, "two tensors for down"),
      (pair(alpha=ones(2)), r"alpha must be one number, its shape is \(2,\)"),
      (pair(diff=ones(8, 6)), "mixes a low-rank pair with diff"),
      (pair(dora_scale=ones(7, 1)), r"needs one magnitude of DoRA per channel, 8 \(out, 1\) or 6 \(1, in\)"),
      (pair(dora_scale=ones(8, 1), lora_magnitude_vector=ones(8)), "has the magnitudes of DoRA twice"),
      ({f"{Q}.dora_scale": ones(8, 1)}, "has no matrices"),
      ({f"{Q}.hada_w1_a": ones(8, 2), f"{Q}.hada_w1_b": ones(2, 6)}, "LoHa needs hada_w2_a and hada_w2_b too"),
      ({f"{Q}.lokr_w1_a": ones(8, 2), f"{Q}.lokr_w2": ones(2, 6)}, "LoKr needs lokr_w1_b too"),
      ({f"{Q}.lokr_w1": ones(2, 2)}, "LoKr needs lokr_w2 too"),
      (pair() | {f"{Q}.lora_mid.weight": ones(3, 3, 1)}, "needs a core"),
      (pair(oft_R=ones(2)), "OFT factors, which are not supported"),
      (pair() | {f"{FFN}.weight": ones(2)}, r"whole weights \(PEFT's modules_to_save\), not changes of them"),
      (pair(strange=ones(2)), "tensors of an unknown kind"),
      (pair() | {"x" * 400 + ".alpha": ones(1)}, "names of more than 300 characters"),
      ({"x.lora_A.weight": ones(2, 2)}, "contains no LoRA for Wan: Wan.s transformers have no counterpart of x.lora_A"),
      ({}, "contains no LoRA"),
      (pair() | {f"{Q}.diff_b": ones(8), f"{Q}.lora_B.bias": ones(8)}, r"changes blocks\.0\.self_attn\.q\.bias twice"),
    ],
  )  # fmt: skip
  def test_in_one_line(self, tensors, message):
    with pytest.raises(UserError, match=message) as info:
      lora_from(tensors)
    assert str(info.value).startswith("test.safetensors") and "\n" not in str(info.value)

  def test_huge_factors(self):
    """They cost no memory."""
    tensors = {f"{Q}.lokr_w1": ones(5000, 1), f"{Q}.lokr_w2_a": ones(9000, 1), f"{Q}.lokr_w2_b": ones(1, 9000)}
    assert lora_from(tensors).changes["blocks.0.self_attn.q.weight"].shape == (45_000_000, 9000)
    tensors = {f"{Q}.hada_{name}": ones(1, 9000) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    with pytest.raises(UserError, match="convolution of 81000000 weights"):
      lora_from(tensors | {f"{Q}.hada_{name}": ones(1, 1, 1) for name in ("t1", "t2")})

  @pytest.mark.parametrize("data", [b"", b"{}", b"\xff" * 100, b'\x08\0\0\0\0\0\0\0{"a": 1}'])
  def test_damaged_files(self, data, tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match="is not a complete safetensors file"):
      read_lora(path)

  def test_models_are_no_loras(self, tmp_path):
    path = GOLDENS / "tiny_wan" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=r"is a whole model, not a LoRA: convert it with .* give DST as the checkpoint"):
      read_lora(path)
    with pytest.raises(UserError, match="small is a converted checkpoint, not a LoRA: give it as the checkpoint"):
      read_lora(locate("small"))

  def test_folder_of_something_else(self, tmp_path):
    with pytest.raises(UserError, match=r"is a folder without lora\.json or adapter_config\.json"):
      read_lora(tmp_path)

  @pytest.mark.parametrize(
    "lora, message",
    [
      (("x.safetensors", float("nan")), r"the weight of the LoRA x\.safetensors must be a finite number, got nan"),
      ([split_weight("x.safetensors:inf")], r"must be a finite number, got inf"),
      ("x:0,5", r"^x:0,5: a weight has a decimal point, as in x:0\.5; commas separate LoRAs"),
    ],
  )
  def test_bad_arguments(self, lora, message, tmp_path):
    with pytest.raises(UserError, match=message):
      load_pipeline(str(tmp_path), lora)

  def test_a_list_that_was_split_at_a_decimal_comma(self, tmp_path):
    for items in (["a:1.5", "high=x:0", "5"], ["x:0", "5:lightx2v"]):
      with pytest.raises(UserError, match=r"a weight has a decimal point, as in (high=)?x:0.5"):
        check_commas(items)
    for name in ("x:0", "5"):  # names that exist are no weights
      (tmp_path / name).touch()
    path = str(tmp_path / "x:0")
    assert split_loras([path, "5"]) == [(path, 1), ("5", 1)] and split_loras(["a:0", "b"]) == [("a", 0), ("b", 1)]


@pytest.mark.parametrize("alpha, scale", [({f"{Q}.alpha": np.array(6.0)}, 6 / 2), ({}, 1)])
def test_two_products_of_lokr_are_scaled_by_the_rank_of_the_second(alpha, scale):
  """As in ComfyUI, where that of w2 comes last; without an alpha it is 1."""
  rng = np.random.default_rng(0)
  shapes = {"w1_a": (2, 1), "w1_b": (1, 3), "w2_a": (4, 2), "w2_b": (2, 2)}
  parts = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  lora = lora_from({f"{Q}.lokr_{name}": value for name, value in parts.items()} | alpha)
  expected = scale * np.kron(parts["w1_a"] @ parts["w1_b"], parts["w2_a"] @ parts["w2_b"])
  np.testing.assert_allclose(weight_change(lora.changes["blocks.0.self_attn.q.weight"]), expected, rtol=1e-5)


def test_the_weight_of_dora_scales_its_whole_change():
  """Not what is added before columns are brought to their magnitudes."""
  change = lora_from(pair(dora_scale=ones(8, 1))).changes["blocks.0.self_attn.q.weight"]
  weight = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
  np.testing.assert_allclose(weight_change(change, weight, 0.5), 0.5 * weight_change(change, weight), rtol=1e-5)


class TestTucker:
  def test_equals_the_product(self):
    """Factors of the patch embedding with a core, as LyCORIS trains convolutions."""
    rng = np.random.default_rng(0)

    def random(*shape):
      return rng.normal(size=shape).astype(np.float32)

    name = "diffusion_model.patch_embedding"
    up, core, down = random(8, 3, 1, 1, 1), random(3, 3, 1, 2, 2), random(3, 4, 1, 1, 1)
    lora = lora_from({f"{name}.lora_up.weight": up, f"{name}.lora_mid.weight": core, f"{name}.lora_down.weight": down})
    expected = np.einsum("oi,ijtyx,jc->octyx", up[..., 0, 0, 0], core, down[..., 0, 0, 0]).reshape(8, -1)
    np.testing.assert_allclose(weight_change(lora.changes["patch_embedding.weight"]), expected, rtol=1e-5, atol=1e-5)
    tucker = [("t1", core), ("w1_a", random(3, 8)), ("w1_b", random(3, 4))]
    lora = lora_from(
      {f"{name}.hada_{part}": x for part, x in tucker + [(p.replace("1", "2", 1), x) for p, x in tucker]}
    )
    factor = np.einsum("ijtyx,io,jc->octyx", *(x for _, x in tucker)).reshape(8, -1)
    np.testing.assert_allclose(weight_change(lora.changes["patch_embedding.weight"]), factor**2, rtol=1e-4, atol=1e-5)
    tensors = {f"{name}.lokr_w1": random(2, 2), f"{name}.lokr_t2": core, f"{name}.lokr_w2_a": random(3, 4)}
    tensors |= {f"{name}.lokr_w2_b": random(3, 2), f"{name}.alpha": np.array(6.0)}
    w1, _, w2_a, w2_b, _ = tensors.values()
    w2 = np.einsum("ijtyx,io,jc->octyx", core, w2_a, w2_b).reshape(4, -1)
    change = lora_from(tensors).changes["patch_embedding.weight"]
    np.testing.assert_allclose(weight_change(change), 2 * np.kron(w1, w2), rtol=1e-4, atol=1e-5)


class TestExports:
  # What a format has no form for.
  REFUSED: ClassVar = {
    "univid": {"distill_diff", "lokr", "loha", "dora", "i2v_on_t2v"},
    "diffusers": {"distill_diff", "lokr", "loha", "dora", "i2v_on_t2v"},
    "musubi": {"distill_diff", "dora", "i2v_on_t2v"},
    "comfyui": set(),
  }

  @pytest.mark.parametrize("to", FORMATS)
  @pytest.mark.parametrize("case", ["distill_diff", "lokr", "loha", "dora", "i2v_on_t2v", "conv_patch_embedding"])
  def test_keep_everything_or_refuse_it_by_name(self, case, to, tmp_path):
    lora, path = read_lora(CASES / f"{case}.safetensors"), tmp_path / "lora.safetensors"
    if case in self.REFUSED[to]:
      with pytest.raises(
        UserError, match=rf"cannot be written as {to}, .*: \d+ (difference|LoHa|LoKr|DoRA).* \(blocks\."
      ):
        write_lora(path, lora, to)
      assert not path.exists()
      return
    write_lora(path, lora, to)
    back = read_lora(path)
    assert back.format == to and not back.notes
    same(lora, back)

  @pytest.mark.parametrize("case", ["distill_diff", "lokr", "loha", "dora", "conv_patch_embedding"])
  def test_own_folder(self, case, tmp_path):
    lora = read_lora(CASES / f"{case}.safetensors")
    write_lora_folder(tmp_path, lora)
    same(lora, read_lora(tmp_path))

  def test_magnitudes_of_either_axis(self, tmp_path):
    for scale in (ones(8, 1), ones(1, 6), ones(1, 8)):
      lora = lora_from(
        pair(dora_scale=scale) if scale.shape[1] != 8 else pair(dora_scale=scale) | {f"{Q}.lora_A.weight": ones(2, 8)}
      )
      write_lora(tmp_path / "lora.safetensors", lora, "comfyui")
      same(lora, read_lora(tmp_path / "lora.safetensors"))
      weight = (
        np.random.default_rng(0).normal(size=lora.changes["blocks.0.self_attn.q.weight"].shape).astype(np.float32)
      )
      changed = weight + weight_change(lora.changes["blocks.0.self_attn.q.weight"], weight)
      np.testing.assert_allclose(np.linalg.norm(changed, axis=0 if scale.shape[0] == 1 else 1), 1, rtol=1e-5)

  def test_overflow(self):
    lora = lora_from({name: 1000 * value for name, value in pair(alpha=np.array(0.4)).items()})
    with pytest.raises(UserError, match=r"NaN, or values too large for their dtype, in .*lora_B"):
      lora_tensors(lora, "univid", dtype="float16")
    wide = lora_tensors(lora.astype("float16"), "univid")
    assert {str(value.dtype) for name, value in wide.items() if "lora_B" in name} == {"float32"}

  def test_unmatched_tensors(self, tmp_path, capsys):
    """The converter refuses them, or leaves them out."""
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(pair() | {"lora_te_x.lora_down.weight": ones(2, 2)}, source)
    assert convert(["convert", str(source), str(target), "--to=musubi"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "has 1 tensors that Wan's transformers have no counterpart of: lora_te_x.lora_down.weight" in error
    assert convert(["convert", str(source), str(target), "--to=musubi", "--lora_skip_unmatched"]) == 0
    assert len(load_file(target)) == 3


WORDS = st.sampled_from([
  "diffusion_model", "lora_unet_blocks_0_ffn_0", "blocks", "0", "7", "self_attn", "q", "ffn", "patch_embedding",
  "lora_A", "lora_B", "lora_down", "default", "weight", "bias", "alpha", "diff", "diff_b", "diff_m", "lora_mid",
  "dora_scale", "lokr_w1", "lokr_w2_a", "lokr_w2_b", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "",
])  # fmt: skip
TENSORS = st.tuples(
  st.sampled_from(["float32", "float16", "int64", "float64"]),
  st.lists(st.integers(0, 3), max_size=5),
  st.floats(width=16),
).map(lambda x: np.full(tuple(x[1]), x[2] if x[0] != "int64" else 1).astype(x[0]))
NAMES = st.one_of(
  st.lists(WORDS, min_size=1, max_size=6).map(".".join),
  st.tuples(st.sampled_from([Q, FFN, "patch_embedding", "blocks.0.norm3"]), WORDS).map(".".join),
  st.sampled_from([f"{Q}.{end}" for end in ("lora_A.weight", "lora_B.weight", "alpha", "dora_scale", "diff_b")]),
)
JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(["r", "lora_alpha", "rank_pattern", "alpha_pattern", "peft_type", "ffn.0", "(", "use_rslora"]),
      inner,
    )
  ),
  max_leaves=6,
)


def test_line_breaks_in_files_are_none_in_messages():
  tensors = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": np.zeros((), np.float32)}
  with pytest.raises(UserError) as caught:
    lora_from(tensors, {"lora_adapter_metadata": json.dumps({"r": "\n"})})
  assert str(caught.value).endswith(r"r must be a positive number, got '\n'")
  assert str(UserError("a\nb\u2028c")) == "a b c"


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, TENSORS, max_size=6), st.none() | JSON)
def test_any_file_is_read_or_refused(tensors, config):
  """Whatever the names, shapes, dtypes and values: a LoRA, or one line."""
  try:
    lora = lora_from(tensors, {"lora_adapter_metadata": json.dumps(config)} if config is not None else None)
    lora_tensors(lora, "comfyui")
  except UserError as error:
    assert "\n" not in str(error)


class TestBuckets:
  @pytest.fixture
  def bucket(self, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket_files, "CACHE_FOLDER", str(tmp_path / "cache"))
    return open_bucket("loras")

  @pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
  def test_files(self, bucket, name):
    """With their sidecars, and without that of a file of the same name that was there before."""
    lora = lora_from(pair(alpha=np.array(1.0)), {"software": "univid_jax 1", "step": "7"})
    write_lora(bucket / name, lora, "univid" if name.endswith(".ckpt") else "comfyui")
    found = read_lora(bucket / name)
    same(found, lora)
    assert found.source == f"s3://bucket/loras/{name}" and "LoRA" in inspect(found.source)
    assert found.metadata["step"] == "7"
    for path in bucket.glob("*.json"):
      path.unlink()
      assert "step" not in read_lora(bucket / name).metadata

  def test_a_folder_of_peft_is_read_with_its_config(self, bucket, tmp_path):
    folder = write_adapter(tmp_path / "adapter", {"r": 2, "lora_alpha": 16})
    for path in folder.iterdir():
      (bucket / path.name).write_bytes(path.read_bytes())
    for path in (bucket, bucket / "adapter_model.safetensors"):
      same(read_lora(path), read_lora(folder))
    origin = dataclasses.replace(Origin.resolve("small"), loras=[(str(bucket / "adapter_model.safetensors"), 1.0)])
    before = origin.checksums["lora 0"]
    (bucket / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    assert dataclasses.replace(origin).checksums["lora 0"] != before, "it decides about the scale"

  def test_errors_keep_the_name(self, bucket):
    (bucket / "folder" / "x.txt").write_text("")
    with pytest.raises(UserError, match=r"s3://bucket/loras/folder is a folder without lora\.json"):
      read_lora(bucket / "folder")
    with pytest.raises(FileNotFoundError, match="s3://bucket/loras/none"):
      read_lora(bucket / "none.safetensors")
