"""LoRA: training as in the reference, merged and unmerged adapters, files of every format."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from tests.helpers import channels_last, dit_config, golden, load_dit, relative_error
from univid_jax.checkpoints.lora.folder import LORA_FILE, write_lora_folder
from univid_jax.checkpoints.lora.formats import FORMATS, lora_tensors, write_lora
from univid_jax.checkpoints.lora.kinds import LoRALayer
from univid_jax.checkpoints.lora.reading import parse_lora, read_lora
from univid_jax.checkpoints.lora.stacking import stack_loras, unstack_lora
from univid_jax.checkpoints.lora.weights import LoRAWeights
from univid_jax.checkpoints.tensor_files import TensorFile, TensorInfo
from univid_jax.checkpoints.usage import SOFTWARE, SOFTWARE_NAME, Usage
from univid_jax.config.schema import LoRAConfig
from univid_jax.convert.commands import convert_any
from univid_jax.convert.layout import make_fills
from univid_jax.convert.release_configs import diffusers_config
from univid_jax.core.errors import UserError
from univid_jax.core.options import Expert, TrainedExpert
from univid_jax.core.sentence import Sentence, reference_roles
from univid_jax.data.rows.packing import RowShape, pack
from univid_jax.data.rows.tokens import patchify, sentence_features, unpatchify
from univid_jax.diffusion.loss import NoiseLevels
from univid_jax.inference.added_loras import add_loras
from univid_jax.inference.lora_specs import RequestedLoRA, select_loras, warn_of_repetitions
from univid_jax.models.dit import DiT
from univid_jax.models.lora import LoRA, LoRAParam, attach, join, with_dropout_keys
from univid_jax.models.names import name_to_diffusers
from univid_jax.models.variants import DiTConfig
from univid_jax.parallel.mesh import make_mesh
from univid_jax.training.step import StateSpec, make_update

PATCH = (1, 2, 2)
CONFIG = DiTConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=3, freq_dim=8, text_dim=12)


def lora_from(tensors):
  infos = {name: TensorInfo(value.shape, str(value.dtype)) for name, value in tensors.items()}
  return parse_lora(TensorFile(Path("test.safetensors"), infos, tensors.__getitem__))


def adapters_of(lora, config, shapes):
  """Returns a plain LoRA as the adapters that training starts from."""
  kernels, _ = stack_loras([(lora, 1.0)], config, shapes)
  return traverse_util.unflatten_dict({(*path, "lora"): groups["lora"] for path, groups in kernels.items()})


def shapes_of(model):
  return {
    path: value.shape
    for path, value in traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param))).items()
  }


class TestGoldenTraining:
  """Four steps of the reference's LoRA training, in float32 like the reference."""

  info, io, weights = golden("training")

  def part(self, name):
    return {key.removeprefix(name): value for key, value in self.weights.items() if key.startswith(name)}

  def batch(self, step):
    io = self.io
    latents, noise = (channels_last(io[f"step{step}.{name}"]) for name in ("latents", "noise"))
    ends = np.cumsum(self.info["clip_latent_frames"])[:-1]
    clips = tuple(np.split(latents, ends))
    features = sentence_features(
      Sentence(clips=clips, roles=reference_roles(4)),
      patch_size=PATCH,
      prompt_embedding=io[f"step{step}.context"],
      text_len=512,
    )
    row = pack([features], RowShape(num_tokens=len(features.tokens), num_text_tokens=len(features.text), num_slots=1))
    all_noise = np.zeros_like(row.tokens)
    all_noise[0, row.target_mask[0]] = patchify(noise, PATCH)
    sigma = io[f"step{step}.timestep"][None] / np.float32(1000)
    return row, all_noise, NoiseLevels(jnp.asarray(sigma), jnp.ones((1, 1)))

  def run(self, dtype):
    base = load_dit(dit_config(self.info["dit"]), self.part("base."), dtype=dtype, param_dtype=dtype)
    config = LoRAConfig(
      rank=self.info["lora_rank"],
      alpha=self.info["lora_alpha"],
      targets=tuple(self.info["lora_target_modules"].split(",")),
    )
    frozen, shapes = nnx.to_pure_dict(nnx.state(base, nnx.Param)), shapes_of(base)
    start = adapters_of(lora_from(self.part("lora_init.")), base.config, shapes)

    def init():
      model = DiT(base.config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
      assert len(attach(model, config, rngs=nnx.Rngs(0))) == 10
      return model

    optimizer = optax.adamw(self.info["learning_rate"], weight_decay=0.01)
    spec = StateSpec.for_model(init, optimizer, make_mesh({}, devices=jax.devices()[:1]), ema=False, lora=True)
    state = spec.create(jax.tree.map(lambda x: jnp.asarray(x, dtype), start))
    update = jax.jit(make_update(spec, optimizer))
    losses, moments = [], None
    for step in range(self.info["steps"]):
      state, metrics = update(state, frozen, *self.batch(step), jax.random.key(0))
      losses.append(float(metrics["loss"]))
      moments = state.opt_state[0].mu if moments is None else moments
    grads = jax.tree.map(
      lambda m: np.asarray(m) / 0.1, moments
    )  # after one step the first moment is 0.1 of the gradient
    return np.array(losses), unstack_lora(grads, alpha=4.0), unstack_lora(state.params, alpha=4.0)

  def errors(self, result, dtype_name):
    losses, grads, final = result
    worst = {"loss": np.max(np.abs(losses / self.io["losses"] - 1))}
    for name, lora, prefix in (("gradient", grads, "lora_grad0."), ("weights", final, "lora_final.")):
      expected = lora_from(self.part(prefix))
      assert lora.changes.keys() == expected.changes.keys() and len(lora.changes) == 20
      ours, theirs = (
        np.concatenate([part.ravel() for key in expected.changes for part in (x.changes[key].down, x.changes[key].up)])
        for x in (lora, expected)
      )
      worst[name] = relative_error(ours, theirs)
    print(dtype_name, worst)
    return worst

  def test_equals_the_reference(self):
    worst = self.errors(self.run(jnp.float32), "float32")
    assert worst["loss"] <= 1e-5 and worst["gradient"] <= 1e-4 and worst["weights"] <= 1e-3


@pytest.fixture(scope="module")
def base():
  """A small base with random weights everywhere; tests that change it clone it."""
  model, rng = nnx.jit(lambda: DiT(CONFIG, rngs=nnx.Rngs(0)))(), np.random.default_rng(1)
  add_noise = lambda x: jnp.asarray(np.asarray(x) + 0.1 * rng.standard_normal(x.shape, np.float32))  # noqa: E731
  nnx.update(model, jax.tree.map(add_noise, nnx.state(model, nnx.Param)))
  return model


def random_lora(rank=3, alpha=5.0, seed=0, blocks=(0, 2)):
  """Adapts some Linears of some blocks, and one outside of blocks."""
  rng = np.random.default_rng(seed)
  dims = {"self_attn.q": (24, 24), "cross_attn.v": (24, 24), "ffn.0": (24, 40), "ffn.2": (40, 24)}
  names = {f"blocks.{block}.{name}.weight": size for block in blocks for name, size in dims.items()} | {
    "time_projection.1.weight": (24, 144)
  }

  def layer(in_dim, out_dim):
    down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((rank, in_dim), (out_dim, rank)))
    return LoRALayer(down, up, alpha)

  return LoRAWeights({name: layer(*size) for name, size in names.items()}, "jax")


def row():
  rng = np.random.default_rng(5)
  features = sentence_features(
    Sentence(clips=(rng.normal(size=(3, 4, 4, 16)),), roles=reference_roles(1)),
    patch_size=PATCH,
    prompt_embedding=rng.normal(size=(4, 12)),
    text_len=16,
  )
  return pack([features], RowShape(num_tokens=12, num_text_tokens=5, num_slots=1))


def predict(graph, params):
  velocity = jax.jit(lambda params, r: nnx.merge(graph, params)(r.tokens, jnp.full((1, 2), 300.0), r))
  return np.asarray(velocity(params, row()))


def with_lora(base, loras, merged):
  graph, params = nnx.graphdef(base), nnx.to_pure_dict(nnx.state(base, nnx.Param))
  mesh = make_mesh({}, devices=jax.devices()[:1])
  return predict(*add_loras(CONFIG, graph, jax.tree.map(jnp.copy, params), loras, mesh=mesh, merged=merged))


class TestOnAModel:
  def test_unmerged_merged_and_by_hand(self, base):
    lora = random_lora()
    unmerged, merged = (with_lora(base, [(lora, 0.5)], m) for m in (False, True))
    params = nnx.to_pure_dict(nnx.state(base, nnx.Param))
    for block in (0, 2):
      layer = lora.changes[f"blocks.{block}.ffn.0.weight"]
      up = params["blocks"]["ffn"]["up"]
      up["kernel"] = up["kernel"].at[block].add((0.5 * 5 / 3 * layer.up @ layer.down).T)
    only_ffn = lora.select(name for name in lora.changes if name.endswith("ffn.0.weight"))
    expected = predict(nnx.graphdef(base), params)
    assert relative_error(with_lora(base, [(only_ffn, 0.5)], False), expected) <= 1e-5
    assert relative_error(unmerged, merged) <= 1e-5
    assert relative_error(unmerged, expected) > 1e-2

  def test_several_with_weights(self, base):
    """The updates of several LoRAs add up, and ranks may differ between layers."""
    a, b = random_lora(seed=1), random_lora(rank=2, alpha=2.0, seed=2, blocks=(1, 2))
    together = with_lora(base, [(a, 0.3), (b, -0.7)], False)
    assert relative_error(together, with_lora(base, [(a, 0.3), (b, -0.7)], True)) <= 1e-5
    mixed = LoRAWeights({**b.changes, **a.changes}, "jax")
    assert relative_error(with_lora(base, [(mixed, 1.0)], False), with_lora(base, [(mixed, 1.0)], True)) <= 1e-5

  def test_stack_and_unstack(self, base):
    """The updates stay the same."""
    lora = random_lora()
    back = unstack_lora(adapters_of(lora, CONFIG, shapes_of(base)), alpha=3.0)
    for name, layer in back.changes.items():
      update, expected = layer.up @ layer.down, np.zeros(layer.shape)
      if name in lora.changes:
        expected = lora.changes[name].up @ lora.changes[name].down * 5 / 3
      np.testing.assert_allclose(update, expected, atol=1e-5)

  @pytest.mark.parametrize("rslora, scale", [(False, 8 / 4), (True, 8 / 2)])
  def test_adapters_keep_the_scale_of_their_training(self, rslora, scale):
    """Alpha over the rank, or over its root: of 8 and rank 4, 2 or 4."""
    rng = np.random.default_rng(0)
    down, up = (rng.normal(size=size).astype(np.float32) for size in ((6, 4), (4, 5)))
    lora = unstack_lora({"head": {"head": {"lora": {"down": down, "up": up}}}}, alpha=8.0, rslora=rslora)
    change = lora.changes["head.head.weight"]
    np.testing.assert_allclose(change.alpha / change.rank * change.up @ change.down, scale * (down @ up).T, rtol=1e-4)

  def test_new_adapters_change_nothing(self, base):
    model = nnx.clone(base)
    names = attach(model, LoRAConfig(rank=4, targets=("q", "ffn.0", "head.head")), rngs=nnx.Rngs(0))
    assert names == ["blocks.0.cross_attn.q", "blocks.0.ffn.0", "blocks.0.self_attn.q", "head.head"]
    r = jax.tree.map(jnp.asarray, row())
    time = jnp.full((1, 2), 300.0)
    assert np.array_equal(model(r.tokens, time, r), base(r.tokens, time, r))

  def test_unmatched_target(self, base):
    with pytest.raises(ValueError, match=r"no Linear of the model matches the LoRA target ffn\.1"):
      attach(nnx.clone(base), LoRAConfig(targets=("q", "ffn.1")), rngs=nnx.Rngs(0))

  def test_dropout(self, base):
    """Inputs are dropped at the given rate, differently in every layer and step, and their mean is preserved."""
    model = nnx.clone(base)
    attach(model, LoRAConfig(rank=4, targets=("self_attn.q",), dropout=0.3), rngs=nnx.Rngs(0))
    adapters = nnx.to_pure_dict(nnx.state(model, LoRAParam))
    first, second = (with_dropout_keys(adapters, jax.random.key(seed)) for seed in (1, 2))
    keys = [np.asarray(jax.random.key_data(k["blocks"]["self_attn"]["q"]["lora"]["key"])) for k in (first, second)]
    assert len({tuple(key) for key in np.concatenate(keys)}) == 6
    kernel = nnx.Param(jnp.zeros((1000, 1)), dims=("embed", "heads"))
    layer = LoRA(kernel, LoRAConfig(rank=1, alpha=1, dropout=0.3), dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.down[...], layer.up[...] = jnp.ones((1000, 1)), jnp.ones((1, 1))
    y = np.asarray(layer(jnp.ones((50, 1000))))
    assert abs(y.mean() / 1000 - 1) < 0.01 and y.std() > 10

  def test_every_adapter_of_every_layer_has_its_own_dropout(self):
    def adapter(*layers):
      return {"lora": {"down": jnp.zeros((*layers, 4, 2)), "up": jnp.zeros((*layers, 2, 4))}}

    adapters = {
      "blocks": {"self_attn": {"q": adapter(3), "v": adapter(3)}, "ffn": {"up": adapter(3)}},
      "time_projection": adapter(),
    }
    leaves = jax.tree_util.tree_leaves_with_path(with_dropout_keys(adapters, jax.random.key(0)))
    keys = [jax.random.key_data(value).reshape(-1, 2) for path, value in leaves if path[-1].key == "key"]
    assert len({tuple(key) for key in np.concatenate(keys).tolist()}) == 3 * 3 + 1

  def test_dropout_is_for_training_alone(self, base):
    """The model of a run is validated and sampled without it, and without its keys."""

    def create():
      model = nnx.clone(base)
      attach(model, LoRAConfig(rank=4, targets=("self_attn.q",), dropout=0.9), rngs=nnx.Rngs(0))
      return model

    spec = StateSpec.for_model(create, optax.sgd(1.0), make_mesh({}, jax.devices()[:1]), ema=False, lora=True)
    adapters = jax.tree.map(jnp.ones_like, spec.create().params)
    frozen = nnx.to_pure_dict(nnx.state(base, nnx.Param))
    plain = nnx.clone(base)
    attach(plain, LoRAConfig(rank=4, targets=("self_attn.q",)), rngs=nnx.Rngs(0))
    r, time = jax.tree.map(jnp.asarray, row()), jnp.full((1, 2), 300.0)
    expected, found = (
      nnx.merge(graph, join(frozen, adapters))(r.tokens, time, r) for graph in (nnx.graphdef(plain), spec.graph)
    )
    assert np.array_equal(found, expected)
    dropped = nnx.merge(spec.training_graph, join(frozen, with_dropout_keys(adapters, jax.random.key(0))))
    assert not np.array_equal(dropped(r.tokens, time, r), expected)

  def test_scale(self):
    assert LoRAConfig(rank=16, alpha=8).scale == 0.5
    assert LoRAConfig(rank=16, alpha=8, rslora=True).scale == 2
    assert LoRAConfig(rank=1).enabled and not LoRAConfig(rank=0).enabled
    with pytest.raises(UserError, match=r"config\.lora\.rank must be at least 0, got -1"):
      LoRAConfig(rank=-1)


# The tensor names that each trainer documents, and the number of tensors per layer.
KEYS = {
  "univid": (r"(blocks\.\d+\.\w+\.\w+|time_projection\.1)\.lora_[AB]\.default\.weight", 2),
  "diffusers": (
    r"transformer\.(blocks\.\d+\.(attn[12]\.to_[qv]|ffn\.net\.(0\.proj|2))|condition_embedder\.time_proj)"
    r"\.lora_[AB]\.weight",
    2,
  ),
  "comfyui": (r"diffusion_model\.(blocks\.\d+\.\w+\.\w+|time_projection\.1)\.(lora_[AB]\.weight|alpha)", 3),
  "musubi": (r"lora_unet_(blocks_\d+_\w+|time_projection_1)\.(lora_(down|up)\.weight|alpha)", 3),
}


class TestFiles:
  @pytest.mark.parametrize("name", FORMATS)
  def test_write_and_read(self, name, tmp_path):
    if name == "univid":
      pytest.importorskip("torch", reason="a .ckpt is a PyTorch file; needs the extra `convert`")
    metadata = {SOFTWARE: SOFTWARE_NAME, "base_model": "tiny", "step": "7"}
    # alpha / rank is a power of 2, so that folding it is exact.
    lora = dataclasses.replace(random_lora(rank=4, alpha=8.0), metadata=metadata)
    path = tmp_path / ("lora.ckpt" if name == "univid" else "lora.safetensors")
    write_lora(path, lora, name)
    back = read_lora(path)
    assert back.format == name and back.changes.keys() == lora.changes.keys()
    for key, layer in back.changes.items():
      folded = name in ("univid", "diffusers")
      assert layer.alpha == (4 if folded else 8)
      assert np.array_equal(layer.down, lora.changes[key].down)
      assert np.array_equal(layer.up, lora.changes[key].up * (2 if folded else 1))
    pattern, count = KEYS[name]
    keys = lora_tensors(lora, name)
    assert len(keys) == count * len(lora.changes) and all(re.fullmatch(pattern, key) for key in keys)
    if name != "univid":
      assert back.metadata | {"rank": "4", "alpha": "8", "base_model": "tiny", "step": "7"} == back.metadata
      assert "ffn.0" in back.metadata["targets"] and "univid_jax" in back.metadata["software"]

  def test_folder(self, tmp_path):
    lora = random_lora(alpha=0.7)
    mixed = LoRAWeights(
      {**random_lora(rank=5, seed=3).changes, **random_lora(rank=2, alpha=0.7, blocks=(1,)).changes}, "musubi"
    )
    for number, each in enumerate((lora, mixed)):
      folder = tmp_path / str(number)
      folder.mkdir()
      write_lora_folder(folder, dataclasses.replace(each, metadata={SOFTWARE: SOFTWARE_NAME, "step": "7"}))
      back = read_lora(folder)
      assert back.format == "jax" and back.metadata["step"] == "7" and back.metadata["source_format"] == each.format
      assert back.changes.keys() == each.changes.keys()
      for key, layer in back.changes.items():
        assert np.array_equal(layer.down, each.changes[key].down) and np.array_equal(layer.up, each.changes[key].up)
        assert layer.alpha == pytest.approx(each.changes[key].alpha)

  def test_damaged_folder(self, tmp_path):
    write_lora_folder(tmp_path, random_lora())
    (tmp_path / LORA_FILE).write_text("{")
    with pytest.raises(UserError, match=r"lora\.json \(checksum differs\)"):
      read_lora(tmp_path)
    with pytest.raises(UserError, match=r"lora\.json is not valid JSON"):
      read_lora(tmp_path, verify=False)

  @pytest.mark.parametrize(
    "to, name", [("comfyui", "lora.ckpt"), ("univid", "lora.bin"), ("kohya", "lora.safetensors")]
  )
  def test_wrong_suffix_or_format(self, to, name, tmp_path):
    with pytest.raises(UserError, match=r"must be named \*\.safetensors|unknown LoRA format 'kohya'; valid are univid"):
      write_lora(tmp_path / name, random_lora(), to)
    assert not list(tmp_path.iterdir())

  @pytest.mark.parametrize("to", ["univid", "diffusers"])
  @pytest.mark.parametrize("alpha, dtype", [(5.0, None), (16.0, None), (5.0, "bfloat16")])
  def test_folding_alpha_loses_nothing(self, to, alpha, dtype, tmp_path):
    """Unless a dtype is asked for that cannot hold the result: then the error is returned."""
    lora = random_lora(rank=8, alpha=alpha).astype("bfloat16")
    note = write_lora(path := tmp_path / "lora.safetensors", lora, to, dtype=dtype)
    widened = alpha == 5 and not dtype
    assert {str(layer.up.dtype) for layer in read_lora(path).changes.values()} == {"float32" if widened else "bfloat16"}
    lost = 0.0
    for key, layer in read_lora(path).changes.items():
      assert str(layer.down.dtype) == "bfloat16"
      folded = lora.changes[key].up.astype(np.float32) * np.float32(alpha / 8)
      lost = max(lost, relative_error(layer.up.astype(np.float32), folded))
    if dtype:
      assert 1e-3 < lost < 3e-3 and re.fullmatch(
        r"alpha is multiplied into lora_B, which bfloat16 rounds by 0\.\d+ %", note
      )
    else:
      expected = (
        f"alpha is multiplied into lora_B, which bfloat16 would round: {len(lora.changes)} of these tensors are"
      )
      assert lost == 0 and note == (f"{expected} float32" if widened else "")

  def test_a_dtype_rounds_what_is_folded_once(self):
    lora = random_lora(rank=8, alpha=5.0)
    tensors = lora_tensors(lora, "diffusers", dtype="bfloat16")
    for name, each in lora.changes.items():
      up = tensors[FORMATS["diffusers"].module_name(name) + ".lora_B.weight"]
      assert np.array_equal(up, (each.up * np.float32(5 / 8)).astype(up.dtype))
    assert lora_tensors(lora, "comfyui", dtype="bfloat16")["diffusion_model.blocks.0.ffn.0.alpha"].dtype == np.float32

  def test_the_command_says_what_folding_changed(self, tmp_path):
    write_lora(source := tmp_path / "source.safetensors", random_lora(rank=8, alpha=5.0).astype("bfloat16"), "comfyui")
    for dtype, text in ((None, "are float32"), ("bfloat16", r"bfloat16 rounds by 0\.\d+ %")):
      line = convert_any(str(source), str(tmp_path / f"{dtype}.safetensors"), to="univid", dtype=dtype)
      assert re.fullmatch(rf"wrote .* \(univid\); alpha is multiplied into lora_B, which .*{text}", line)

  def test_comfyui_omits_alpha_equal_to_rank(self):
    assert not any(key.endswith("alpha") for key in lora_tensors(random_lora(rank=4, alpha=4.0), "comfyui"))

  def test_diffsynth(self):
    """UniVid's tensor names and an alpha, which scales by alpha / rank."""
    lora = random_lora(rank=4, alpha=4.0)
    tensors = lora_tensors(lora, "univid") | {"blocks.0.ffn.0.alpha": np.float32(2)[None]}
    changes = lora_from(tensors).changes
    assert changes["blocks.0.ffn.0.weight"].alpha == 2 and changes["blocks.2.ffn.0.weight"].alpha == 4

  def test_alpha_in_the_header(self):
    """diffusers stores alpha in the file's header."""
    tensors = lora_tensors(random_lora(rank=4, alpha=4.0), "diffusers")
    infos = {name: TensorInfo(value.shape, str(value.dtype)) for name, value in tensors.items()}
    header = {
      "lora_adapter_metadata": json.dumps(
        {"transformer.r": 4, "transformer.lora_alpha": 12, "transformer.alpha_pattern": {"blocks.0.attn1.to_q": 3}}
      )
    }
    changes = parse_lora(TensorFile(Path("x"), infos, tensors.__getitem__, header)).changes
    assert changes["blocks.2.ffn.0.weight"].alpha == 12 and changes["blocks.0.self_attn.q.weight"].alpha == 3

  def test_wrong_base(self, base):
    def refused(changes, message):
      with pytest.raises(UserError, match=message):
        stack_loras([(LoRAWeights(changes, "x"), 1.0)], CONFIG, shapes_of(base))

    def layer(in_dim, out_dim):
      return LoRALayer(np.zeros((2, in_dim), np.float32), np.zeros((out_dim, 2), np.float32), 2.0)

    for dim, name, count in ((1536, "1.3B", 30), (3072, "5B", 30), (5120, "14B", 40)):
      refused(
        {f"blocks.{i}.self_attn.q.weight": layer(dim, dim) for i in range(count)},
        rf"needs a base with dim {dim} \({name}\) and at least {count} layers, the base has dim 24 and 3 layers",
      )
    refused(random_lora(blocks=(7,)).changes, "at least 8 layers")
    refused(
      {"blocks.0.ffn.2.weight": layer(41, 24)},
      r"its blocks\.0\.ffn\.2\.weight has the shape \(24, 41\), the base's \(24, 40",
    )
    refused(
      {"blocks.0.norm3.weight": layer(1, 24)}, r"low-rank change of blocks\.0\.norm3\.weight, which is not a matrix"
    )


@pytest.mark.long
def test_diffusers_gives_the_same_output(base, tmp_path, caplog):
  """diffusers loads the file without unmatched keys, although alpha differs from the rank, and predicts the same."""
  torch = pytest.importorskip("torch", reason="needs the extra `parity`")
  diffusers = pytest.importorskip("diffusers", reason="needs the extra `parity`")
  pytest.importorskip("peft", reason="needs the extra `parity`")
  lora = random_lora(alpha=5.0)
  write_lora(tmp_path / "lora.safetensors", lora, "diffusers")
  options = {key: value for key, value in diffusers_config(CONFIG).items() if key != "_class_name"}
  theirs = diffusers.WanTransformer3DModel(**options).eval()
  params = nnx.to_pure_dict(nnx.state(base, nnx.Param))
  state = {}
  for fill in make_fills("transformer", CONFIG):
    value = np.asarray(functools.reduce(lambda tree, key: tree[key], fill.path, params))
    for name, layer in zip(fill.names, value if fill.stacked else (value,)):
      state[name_to_diffusers("transformer", name)] = torch.from_numpy(np.array(fill.to_original(layer)))
  theirs.load_state_dict(state, strict=True)
  pipe = diffusers.WanPipeline(
    tokenizer=None,
    text_encoder=None,
    vae=None,
    transformer=theirs,
    scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
  )
  diffusers.utils.logging.enable_propagation()
  with caplog.at_level("WARNING"):  # unmatched keys are only logged there
    pipe.load_lora_weights(str(tmp_path / "lora.safetensors"))
  assert not [record for record in caplog.records if "key" in record.getMessage().lower()]
  adapted = [name for name, _ in theirs.named_parameters() if "lora_" in name]
  assert len(adapted) == 2 * len(lora.changes)
  r = row()
  latents = unpatchify(r.tokens[0], (3, 4, 4), PATCH)
  text = np.concatenate([r.text[0, :4], np.zeros((12, 12), np.float32)])
  with torch.no_grad():
    out = theirs(
      torch.from_numpy(np.moveaxis(latents, -1, 0)[None].copy()),
      torch.tensor([300.0]),
      torch.from_numpy(text[None]),
      return_dict=False,
    )[0]
  ours = unpatchify(with_lora(base, [(read_lora(tmp_path / "lora.safetensors"), 1.0)], False)[0], (3, 4, 4), PATCH)
  assert relative_error(ours, np.moveaxis(out[0].numpy(), 0, -1)) <= 1e-4
  assert relative_error(ours, unpatchify(predict(nnx.graphdef(base), params)[0], (3, 4, 4), PATCH)) > 1e-2


class TestSelection:
  """Which transformers get which LoRAs, and what is said of it."""

  @staticmethod
  def request(trained_for, *, asked_for=None, lora=None):
    metadata = {SOFTWARE: SOFTWARE_NAME, **Usage(expert=Expert(trained_for)).to_metadata()}
    lora = dataclasses.replace(lora or random_lora(), metadata=metadata, source=f"{trained_for}.safetensors")
    return RequestedLoRA(lora, 1.0, asked_for)

  def test_experts_that_contradict_the_file_are_reported(self, caplog):
    experts = [Expert.HIGH, Expert.LOW]
    crossed = [self.request("high", asked_for=TrainedExpert.LOW), self.request("low", asked_for=TrainedExpert.HIGH)]
    selected = select_loras(crossed, experts)
    assert [[lora.weights.source for lora in each] for each in selected] == [["low.safetensors"], ["high.safetensors"]]
    assert "high.safetensors was trained for the high-noise expert, not for the low-noise one" in caplog.text
    assert "low.safetensors was trained for the low-noise expert, not for the high-noise one" in caplog.text
    caplog.clear()
    for asked_for in (None, TrainedExpert.HIGH, TrainedExpert.BOTH):
      select_loras([self.request("high", asked_for=asked_for)], experts)
    named = dataclasses.replace(random_lora(), source="style_high.safetensors")
    select_loras([RequestedLoRA(named, 1.0, TrainedExpert.BOTH)], experts)
    assert "expert, not for" not in caplog.text
    # A name says it less surely than the user, who may have taken one for the other.
    assert select_loras([RequestedLoRA(named, 1.0, TrainedExpert.LOW)], experts)[1]
    assert "style_high.safetensors has the name of one for the high-noise expert, not for the low-noise" in caplog.text
    caplog.clear()
    for name in ("ultra_high_definition", "high_motion", "high/style", "high_to_low"):
      request = RequestedLoRA(dataclasses.replace(named, source=f"{name}.safetensors"), 1.0, TrainedExpert.LOW)
      assert select_loras([request], experts)[1] and not caplog.text

  def test_an_expert_s_lora_on_a_model_without_experts_is_reported(self, caplog):
    assert len(select_loras([self.request("high")], [None])[0]) == 1
    assert "high.safetensors was trained for the high-noise expert, but the model has no experts" in caplog.text

  def test_repetitions_are_reported(self, caplog):
    """Not what agrees in one tensor alone, such as a bias that is 0."""
    one, same, other = random_lora(), random_lora(), random_lora()
    (*_, last), (first, *_) = sorted(other.changes), sorted(one.changes)
    doubled = dataclasses.replace(other.changes[last], down=2 * other.changes[last].down)
    other = dataclasses.replace(other, changes={**other.changes, last: doubled})
    assert np.array_equal(one.changes[first].down, other.changes[first].down)
    warn_of_repetitions([self.request("high", lora=one), self.request("low", lora=other)])
    assert not caplog.text
    warn_of_repetitions([self.request("high", lora=one), self.request("low", lora=same)])
    assert "high.safetensors and low.safetensors are the same LoRA: it is applied twice" in caplog.text
