"""LoRA files as people have them: `tests/cases/lora`, made elsewhere with an independent merge in NumPy."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from safetensors.numpy import load_file, save_file

import univid_jax
from tests.helpers import parameters, relative_error
from univid_jax.convert.commands import inspect
from univid_jax.convert.layout import make_fills
from univid_jax.core.errors import UserError
from univid_jax.core.sentence import Sentence, reference_roles
from univid_jax.data.rows.packing import RowShape, pack
from univid_jax.data.rows.tokens import sentence_features
from univid_jax.inference import added_loras
from univid_jax.parallel.mesh import make_mesh

CASES = Path(__file__).parent / "cases" / "lora"
INFO = json.loads((CASES / "cases.json").read_text())
RIGHT = [name for name, case in INFO.items() if case["merged"]]

# By case: the velocity of the merged checkpoint, and each merged tensor times a random vector, see `project`.
EXPECTED = load_file(CASES / "expected.safetensors")


@pytest.fixture(scope="module")
def load(checkpoint):
  """Loads the miniature with LoRAs by name of their case, in float32 on one device."""

  def load(*cases, **options):
    lora = [(str(CASES / INFO[case]["file"]), weight) for case, weight in cases]
    mesh = make_mesh({}, devices=jax.devices()[:1])
    return univid_jax.load_pipeline(checkpoint, lora, **{"dtype": "float32", "mesh": mesh, **options})

  return load


@pytest.fixture(scope="module")
def base(load):
  return load()


# Every kind, and files that change the same weights.
SEVERAL = (
  ("distill_diff", 0.7),
  ("dora", -0.5),
  ("loha", 2.0),
  ("lokr", 1.5),
  ("conv_patch_embedding", 0.3),
  ("dora", 2),
)


@pytest.fixture(scope="module")
def several(load):
  """Pipelines with all of them, by whether they are merged."""
  return {merge: load(*SEVERAL, merge_lora=merge) for merge in (True, False)}


def row():
  """Returns a row of one clip for the miniature."""
  rng = np.random.default_rng(0)
  features = sentence_features(
    Sentence(clips=(rng.normal(size=(2, 6, 4, 16)),), roles=reference_roles(1)),
    patch_size=(1, 2, 2),
    prompt_embedding=rng.normal(size=(7, 48)),
    text_len=512,
  )
  return pack([features], RowShape(num_tokens=12, num_text_tokens=8, num_slots=1))


# Compiled once for all LoRAs of the same form.
_predict = jax.jit(
  lambda graph, params, row: nnx.merge(graph, params)(row.tokens, jnp.full((1, 2), 600.0), row), static_argnums=0
)


def velocity(pipe):
  (transformer,) = pipe.experts.transformers
  with jax.set_mesh(pipe.mesh):
    return np.asarray(_predict(transformer.graph, transformer.params, row()))


def tensors(pipe):
  """Returns the transformer's weights by official name, in the official layout."""
  params = traverse_util.flatten_dict(parameters(pipe))
  out = {}
  for fill in make_fills("transformer", pipe.config):
    value = np.asarray(params[fill.path], np.float32)
    out |= {name: fill.to_original(x) for name, x in zip(fill.names, value if fill.stacked else (value,), strict=True)}
  return out


def project(tensor):
  """Multiplies a tensor by a random vector: linear, tells it from any other, and small enough to be stored."""
  matrix = tensor.reshape(len(tensor), -1).astype(np.float64)
  return matrix @ np.random.default_rng(1).normal(size=matrix.shape[1])


def expected_tensors(case):
  found = {name.removeprefix(f"{case}/"): x for name, x in EXPECTED.items() if name.startswith(f"{case}/")}
  del found["velocity"]
  return found


def assert_close(value, expected):
  assert relative_error(value, expected) <= 1e-6


class TestCases:
  @pytest.mark.parametrize("case", RIGHT)
  def test_equals_the_merged_checkpoint(self, case, load, base):
    options = {"lora_skip_unmatched": case == "i2v_on_t2v"}
    merged, unmerged = (load((case, 1.0), merge_lora=merge, **options) for merge in (True, False))
    expected, before = expected_tensors(case), tensors(base)
    assert expected
    for name, value in tensors(merged).items():
      if name in expected:
        assert_close(project(value), expected[name])
      else:
        assert np.array_equal(value, before[name]), name
    for pipe in (merged, unmerged):
      assert relative_error(velocity(pipe), EXPECTED[f"{case}/velocity"]) <= 2e-5
    assert relative_error(velocity(base), EXPECTED[f"{case}/velocity"]) > 5e-3

  def test_nan_is_refused(self, load):
    with pytest.raises(
      UserError, match=r"nan\.safetensors: diffusion_model\.blocks\.0\.self_attn\.q\.lora_A\.weight contains NaN"
    ):
      load(("nan", 1.0))

  def test_tensors_without_a_counterpart_are_refused(self, load):
    with pytest.raises(UserError, match=r"has 15 tensors .*k_img\.lora_A.*norm_k_img\.diff.*--lora_skip_unmatched"):
      load(("i2v_on_t2v", 1.0))

  def test_left_out_tensors_are_reported(self, load, caplog):
    load(("i2v_on_t2v", 1.0), lora_skip_unmatched=True)
    assert any("left out 15 tensors" in text and "cross_attn.v_img.lora_B.weight" in text for text in caplog.messages)

  def test_several_with_weights(self, several, base):
    """Each file adds w (W' - W), with the base's W even for DoRA, which is not linear."""
    expected = {name: project(value) for name, value in tensors(base).items()}
    before = dict(expected)
    for case, weight in SEVERAL:
      for name, value in expected_tensors(case).items():
        expected[name] = expected[name] + weight * (value - before[name])
    for name, value in tensors(several[True]).items():
      assert_close(project(value), expected[name])
    assert relative_error(velocity(several[False]), velocity(several[True])) <= 2e-5

  @pytest.mark.parametrize("merge", [pytest.param(True, marks=pytest.mark.long), False])
  def test_on_a_mesh(self, merge, load, several):
    spread = load(*SEVERAL, merge_lora=merge, mesh=make_mesh({"fsdp": 4, "tensor": 2}))
    assert any(not value.sharding.is_fully_replicated for value in jax.tree.leaves(parameters(spread)))
    assert relative_error(velocity(spread), velocity(several[merge])) <= 2e-5

  def test_tensors_of_one_shape_share_a_program(self, load):
    """The file has 16 biases, norms and modulations per block and others, of some six shapes."""
    added_loras._add.clear_cache()
    load(("distill_diff", 1.0))
    assert 0 < added_loras._add._cache_size() < 10

  def test_bfloat16(self, load, base):
    """Merged parameters keep their dtype. Unmerged, kernels do; biases, norms and modulation are exact in float32."""
    merged, unmerged = (load(("distill_diff", 1.0), dtype="bfloat16", merge_lora=merge) for merge in (True, False))
    assert {str(value.dtype) for value in jax.tree.leaves(parameters(merged))} == {"bfloat16"}
    assert str(merged.dtype) == str(unmerged.dtype) == "bfloat16"
    assert str(parameters(unmerged)["blocks"]["self_attn"]["q"]["kernel"].dtype) == "bfloat16"
    name = "blocks.1.norm3.bias"
    rounded = tensors(base)[name].astype(jnp.bfloat16).astype(np.float32)
    change = expected_tensors("distill_diff")[name] - project(tensors(base)[name])
    assert_close(project(tensors(unmerged)[name]), project(rounded) + change)


class TestAssumptions:
  """What had to be assumed is logged and shown by --inspect."""

  def test_no_alpha(self, load, caplog):
    text = "no alpha is stored: taken to be the rank"
    assert text in inspect(str(CASES / "peft_named.safetensors"))
    load(("peft_named", 1.0))
    assert any(text in message for message in caplog.messages)

  @pytest.mark.parametrize("case", ["peft_folder", "musubi_int64_alpha", "dora"])
  def test_alpha_is_stored(self, case):
    assert "taken to be" not in inspect(str(CASES / INFO[case]["file"]))

  def test_bare_adapter_reads_its_config(self):
    assert "rank 4, alpha 12" in inspect(str(CASES / "peft_folder" / "adapter_model.safetensors"))

  def test_renamed_adapter_reads_its_config(self, tmp_path):
    """If it is the only file that the config can belong to."""
    shutil.copytree(CASES / "peft_folder", tmp_path, dirs_exist_ok=True)
    renamed = (tmp_path / "adapter_model.safetensors").rename(tmp_path / "mine.safetensors")
    assert "rank 4, alpha 12" in inspect(str(renamed)) and "rank 4, alpha 12" in inspect(str(tmp_path))
    shutil.copy(renamed, tmp_path / "other.safetensors")
    assert "no alpha is stored" in inspect(str(renamed))
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
      inspect(str(tmp_path))

  @pytest.mark.parametrize("key, text", [("lora_alpha", "PEFT's default, 8"), ("r", "states no rank")])
  def test_incomplete_config(self, key, text, tmp_path):
    config = json.loads((CASES / "peft_folder" / "adapter_config.json").read_text())
    del config[key]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((CASES / "peft_folder/adapter_model.safetensors").read_bytes())
    assert text in inspect(str(tmp_path))

  def test_unknown_tensors(self, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(
      {**load_file(CASES / "dora.safetensors"), "lora_te_x.lora_down.weight": np.ones((2, 2), np.float32)}, path
    )
    assert "1 tensors without a counterpart in Wan: lora_te_x.lora_down.weight" in inspect(str(path))
