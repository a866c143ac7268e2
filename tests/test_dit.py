"""The transformer equals the original; packed sentences are independent."""

import dataclasses
import functools
import importlib
import re
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import CAUSAL, channels_last, golden, load_dit, relative_error
from tests.test_diffusion import solve
from univid_jax.checkpoints.pretrained import abstract_parameters
from univid_jax.core.options import AttentionBackend, RematPolicy
from univid_jax.core.packed_row import ContextMode
from univid_jax.core.sentence import Role, Sentence
from univid_jax.data.rows.packing import RowShape, join_rows, pack, segment_intervals, target_indices
from univid_jax.data.rows.tokens import patchify, sentence_features, unpatchify
from univid_jax.diffusion.flow import FlowMatching
from univid_jax.diffusion.guidance import Branch, guide
from univid_jax.diffusion.loss import sentence_losses, timestep_table
from univid_jax.diffusion.solvers import Euler
from univid_jax.models import rope
from univid_jax.models.attention import splash, xla
from univid_jax.models.attention.api import attention
from univid_jax.models.dit import REMAT_POLICIES, DiT, timestep_embedding
from univid_jax.models.in_context import look_back
from univid_jax.models.layers import normalize, param
from univid_jax.models.rope import rotary_tables
from univid_jax.models.variants import VARIANTS, DiTConfig
from univid_jax.parallel.mesh import make_mesh
from univid_jax.platform import tpu

PATCH = (1, 2, 2)


def row_of(latents, context, *, fold=True):
  """Packs a golden's input, x (c, t, y, x), into a row; with fold, one token represents the padding of the prompt."""
  sentence = Sentence(clips=(channels_last(latents),), roles=(Role.TARGET,))
  features = sentence_features(sentence, patch_size=PATCH, prompt_embedding=context, text_len=512)
  if not fold:
    padded = np.pad(context, [(0, 512 - len(context)), (0, 0)])
    features = dataclasses.replace(features, text=padded, text_counts=np.ones(512, np.float32))
  return single_row(features)


def single_row(features):
  """Makes a row of one sentence without padding, intervals and modulation slots, as JAX arrays."""
  shape = RowShape(num_tokens=len(features.tokens), num_text_tokens=len(features.text), num_slots=1)
  row = dataclasses.replace(pack([features], shape), key_intervals=None, text_intervals=None, modulation_ids=None)
  return jax.tree.map(jnp.asarray, row)


@pytest.mark.parametrize("name", ["dit_t2v", "dit_i2v"])
@pytest.mark.parametrize("fold", [True, False])
def test_output_equals_the_original(name, fold):
  info, io, weights = golden(name)
  model = load_dit(DiTConfig.from_json(info["config"]), weights)
  row = row_of(io["x"], io["context"], fold=fold)
  conditions = {}
  if name == "dit_i2v":
    condition = patchify(channels_last(io["y"]), PATCH)[None]
    conditions = {"condition": jnp.asarray(condition), "image_features": jnp.asarray(io["clip_fea"])}
  out = jax.jit(model)(row.tokens, jnp.asarray(io["t"])[None], dataclasses.replace(row, **conditions))[0]
  expected = channels_last(io["out"])
  assert relative_error(unpatchify(np.asarray(out), expected.shape[:3], PATCH), expected) <= 2e-5


def test_intermediate_results_equal_the_original():
  info, io, weights = golden("dit_t2v")
  config = DiTConfig.from_json(info["config"])
  model = load_dit(config, weights)
  row = row_of(io["x"], io["context"], fold=False)

  @jax.jit
  def intermediate_results():
    time = model.time_embedding(timestep_embedding(jnp.asarray(io["t"])[None], config.freq_dim))
    modulation = model.time_projection(jax.nn.silu(time)).reshape(1, 1, 6, config.dim)
    text = model.text_embedding(row.text)

    graph, layers = nnx.split(model.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda x: x[0], layers))
    tables = rotary_tables(row.positions, config.head_dim)
    x = model.patch_embedding(row.tokens)
    shift, scale = (block.modulation[i] + modulation[:, :, i] for i in (0, 1))
    y, _ = block.self_attn(normalize(x, config.eps) * (1 + scale) + shift, row, tables)
    return modulation, text, y, block(x, row, tables, modulation, text, None)[0]

  modulation, text, y, z = intermediate_results()
  assert relative_error(modulation.reshape(1, -1), io["time_projection"]) <= 2e-5
  assert relative_error(text, io["text_embedding"]) <= 2e-5
  assert relative_error(y, io["block0.self_attn"]) <= 2e-5
  assert relative_error(z, io["block0"]) <= 2e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tpu_form_of_swap_pairs_is_bit_identical(dtype):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 8)), dtype)
  assert np.array_equal(tpu.swap_pairs(x), rope.swap_pairs(x))
  assert np.array_equal(rope.swap_pairs(x)[0, 0, 0], x[0, 0, 0, jnp.array([1, 0, 3, 2, 5, 4, 7, 6])])


def test_bfloat16_is_close_to_float32():
  info, io, weights = golden("dit_t2v")
  config = DiTConfig.from_json(info["config"])
  row, t = row_of(io["x"], io["context"]), jnp.asarray(io["t"])[None]
  expected, low = (
    jax.jit(load_dit(config, weights, dtype=dtype))(row.tokens, t, row) for dtype in (jnp.float32, jnp.bfloat16)
  )
  assert low.dtype == jnp.bfloat16
  assert 1e-6 < relative_error(low, expected) <= 2e-2


def gradient_program(remat):
  """Returns the gradient as a compilable function, and its parameters."""
  info, io, weights = golden("dit_t2v")
  row, t = row_of(io["x"], io["context"]), jnp.asarray(io["t"])[None]
  graph, params = nnx.split(load_dit(DiTConfig.from_json(info["config"]), weights, remat=remat), nnx.Param)
  return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(nnx.merge(graph, p)(row.tokens, t, row))))), params


@functools.cache
def gradient(remat):
  function, params = gradient_program(remat)
  return jax.tree.leaves(jax.device_get(function(params)))


def test_parts_are_named_in_programs():
  """In forward passes, what is recomputed and gradients; profiles and `benchmarks.ranking` show these names."""
  function, params = gradient_program(RematPolicy.FULL)
  # JAX 0.10 writes paths within the loop's body, JAX 0.12 whole ones.
  sources = re.findall(r'loc\("([^"]*)/\w+"', function.lower(params).as_text(debug_info=True))
  attention = ("self_attention/rotary", "self_attention/norm", "cross_attention/norm")
  for part in (*attention, "feed_forward", "modulation/norm"):
    paths = {f"/{source}".removesuffix(part) for source in sources if f"/{source}".endswith(f"/{part}")}
    assert any(path.endswith("/checkpoint/rematted_computation/") for path in paths), part
    assert any(path.endswith("/checkpoint/") for path in paths), part
    assert any("checkpoint" not in path for path in paths), part


@pytest.mark.parametrize(
  "remat",
  [RematPolicy.ATTENTION, *(pytest.param(x, marks=pytest.mark.long) for x in (RematPolicy.DOTS, RematPolicy.FULL))],
)
def test_remat_does_not_change_gradients(remat):
  for a, b in zip(gradient(remat), gradient(RematPolicy.NONE), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(np.max(np.abs(b))) + 1e-12)


@pytest.mark.parametrize("remat, passes", [(RematPolicy.FULL, 3), (RematPolicy.ATTENTION, 2)])
def test_remat_policy_attention_saves_the_second_forward_pass(monkeypatch, remat, passes):
  """Counts attention's loops over keys in the program of a gradient: forward, with `full` once more, backward."""
  monkeypatch.setattr(xla, "choose_blocks", lambda *_: xla.Blocks(1, 8, 8, 0))
  info, io, weights = golden("dit_t2v")
  row, t = row_of(io["x"], io["context"], fold=False), jnp.asarray(io["t"])[None]
  row = dataclasses.replace(row, text=row.text[:, :8], text_counts=row.text_counts[:, :8])  # one block, so no loop
  graph, params = nnx.split(load_dit(DiTConfig.from_json(info["config"]), weights, remat=remat), nnx.Param)
  gradient = jax.grad(lambda p: jnp.sum(jnp.square(nnx.merge(graph, p)(row.tokens, t, row))))
  assert str(jax.make_jaxpr(gradient)(params)).count("while[") == passes


@pytest.mark.parametrize("remat, kernels", [(RematPolicy.FULL, 3), (RematPolicy.ATTENTION, 2)])
def test_remat_policy_attention_saves_the_second_forward_pass_of_splash(remat, kernels):
  x = jnp.ones((1, 128, 1, 128))
  block = jax.checkpoint(lambda x: jnp.sum(splash.splash_attention(x, x, x)), policy=REMAT_POLICIES[remat])
  assert str(jax.make_jaxpr(jax.grad(block))(x)).count("pallas_call[") == kernels


@pytest.mark.parametrize("remat, passes", [(RematPolicy.FULL, 2), (RematPolicy.ATTENTION, 1)])
def test_remat_policy_attention_knows_the_primitive_of_cudnn(monkeypatch, remat, passes):
  """Traces the gradient of attention as on a GPU, which need not be here, and counts forward passes of the kernel."""
  module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(module, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(module, "check_compute_capability", lambda capability: True)
  x = jnp.ones((1, 8, 1, 8), jnp.bfloat16)
  attend = functools.partial(attention, backend=AttentionBackend.CUDNN)
  block = jax.checkpoint(lambda x: jnp.sum(attend(x, x, x)), policy=REMAT_POLICIES[remat])
  program = str(jax.make_jaxpr(jax.grad(block))(x))
  assert program.count("dot_product_attention_fwd_wrapper[") == passes
  assert program.count("dot_product_attention_bwd_wrapper[") == 1


@pytest.mark.parametrize(
  "name, count",
  [
    ("wan2.1-t2v-1.3b", 1_418_996_800),
    ("wan2.1-t2v-14b", 14_288_491_584),
    ("wan2.1-i2v-14b-480p", 16_394_878_784),
    ("wan2.1-i2v-14b-720p", 16_394_878_784),
  ],
)
def test_number_of_parameters(name, count):
  model = nnx.eval_shape(lambda: DiT(VARIANTS[name], rngs=nnx.Rngs(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


@pytest.mark.parametrize(
  "values, word",
  [
    ({"model_type": "flf2v"}, "flf2v"),
    ({"_class_name": "VaceWanModel"}, "Vace"),
    ({"model_type": "i2v", "in_dim": 48}, "in_dim"),
    ({"in_dim": 48, "out_dim": 16}, "in_dim"),
  ],
)
def test_unsupported_variants_are_rejected_by_name(values, word):
  with pytest.raises(ValueError, match=word):
    DiTConfig.from_json({"dim": 48, "ffn_dim": 96, "num_heads": 2, "num_layers": 1, **values})


def test_conditions_must_match_the_model():
  info, io, weights = golden("dit_i2v")
  row = row_of(io["x"], io["context"])
  with pytest.raises(ValueError, match="condition must be given to this i2v model"):
    load_dit(DiTConfig.from_json(info["config"]), weights)(row.tokens, jnp.zeros((1, 1)), row)


def test_timestep_embedding():
  t, frequency = 917.1992, 10000 ** (-3 / 8)
  embedding = timestep_embedding(jnp.array([t]), 16)[0]
  np.testing.assert_allclose(embedding[np.array([3, 11])], [np.cos(t * frequency), np.sin(t * frequency)], atol=1e-4)


class TestPacking:
  """Sentences that share a row are independent."""

  config = DiTConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, in_dim=4, out_dim=4)

  @classmethod
  def setup_class(cls):
    rng = np.random.default_rng(0)
    cls.model = nnx.jit(lambda: DiT(cls.config, rngs=nnx.Rngs(1)))()
    cls.velocity = staticmethod(jax.jit(cls.model))

    def sentence(lengths, prompt_length):
      clips = tuple(rng.normal(size=(n, 4, 6, 4)).astype(np.float32) for n in lengths)
      roles = (Role.CONTEXT,) * (len(clips) - 1) + (Role.TARGET,)
      return sentence_features(
        Sentence(clips=clips, roles=roles),
        patch_size=PATCH,
        text_len=512,
        prompt_embedding=rng.normal(size=(prompt_length, 8)).astype(np.float32),
      )

    cls.sentences = [sentence((2, 2, 2, 2), 5), sentence((1, 1, 1, 1), 0), sentence((1, 1, 2, 2), 3)]
    row = pack(cls.sentences, RowShape(num_tokens=120, num_text_tokens=16, num_slots=4))
    cls.row = jax.tree.map(jnp.asarray, row)
    cls.timesteps = jnp.asarray([[900.0, 900.0, 500.0, 500.0, 20.0, 20.0, 0.0, 0.0]])

  def test_packed_sentences_equal_single_ones(self):
    """The first without padding too; the others in a row as long, for which nothing is compiled again."""
    packed = self.velocity(self.row.tokens, self.timesteps, self.row)[0]
    shape = RowShape(num_tokens=120, num_text_tokens=16, num_slots=4)
    singles = [jax.tree.map(jnp.asarray, pack([features], shape)) for features in self.sentences]
    for index, row in enumerate([*singles, single_row(self.sentences[0])]):
      index %= len(singles)
      timestep = self.timesteps[:, 2 * index : 2 * index + 1]
      timesteps = timestep if row.modulation_ids is None else jnp.tile(timestep, self.timesteps.shape[1])
      alone = self.velocity(row.tokens, timesteps, row)[0][row.segment_ids[0] == 1]
      assert relative_error(packed[self.row.segment_ids[0] == index + 1], alone) <= 1e-5

  def test_cached_context_gives_the_same_samples(self):
    """Samples contexts I to III in two rows, one of them not full, in four steps with and without the cache."""
    shape = RowShape(num_tokens=100, num_text_tokens=16, num_slots=3, context_mode=CAUSAL)
    row = join_rows([pack([self.sentences[i] for i in part], shape) for part in ((2, 0), (1,))])
    noise = np.random.default_rng(3).normal(size=row.tokens.shape).astype(np.float32)
    places = target_indices(row.target_mask)
    assert places.shape == (2, 24) and (places[1, 6:] == 100).all()

    def sample(row):
      solver, predict = Euler(), guide(self.model, Branch.create(self.model, jax.tree.map(jnp.asarray, row)))
      return solve(solver, predict, noise, solver.sigmas(FlowMatching(), 4))[row.target_mask]

    cached, whole = sample(dataclasses.replace(row, targets=places)), sample(row)
    assert relative_error(cached, whole) <= 1e-5
    full = dataclasses.replace(
      row,
      context_mode=ContextMode(zero_timestep=True),
      key_intervals=segment_intervals(row.segment_ids, row.segment_ids),
    )
    assert relative_error(sample(full), whole) > 1e-3
    with pytest.raises(ValueError, match="only the context of a row that is context-causal"):
      self.model.encode_context(dataclasses.replace(full, targets=places))

  @classmethod
  def loss_and_gradients(cls, remat):
    graph = nnx.graphdef(nnx.eval_shape(lambda: DiT(cls.config, remat=remat, rngs=nnx.Rngs(0))))
    params = nnx.state(cls.model)
    noise = np.random.default_rng(3).normal(size=cls.row.tokens.shape).astype(np.float32)

    @jax.jit
    def loss_and_gradients(row):
      def loss(params):
        losses, _ = sentence_losses(
          nnx.merge(graph, params), row, jnp.asarray(noise), jnp.array([[0.9, 0.5, 0.1, 0.0]])
        )
        return jnp.sum(losses * jnp.arange(1, 5))

      return jax.value_and_grad(loss)(params)

    return loss_and_gradients

  @classmethod
  @functools.cache
  def of_every_token(cls):
    return jax.tree.leaves(cls.loss_and_gradients(RematPolicy.NONE)(cls.row))

  @pytest.mark.parametrize(
    "remat",
    [RematPolicy.FULL, *(pytest.param(x, marks=pytest.mark.long) for x in (RematPolicy.ATTENTION, RematPolicy.NONE))],
  )
  @pytest.mark.parametrize("spare", [pytest.param(0, marks=pytest.mark.long), 10])
  def test_skipping_unused_context_outputs_changes_nothing(self, remat, spare):
    """Losses and gradients equal those of a model that computes every token's velocity."""
    row = pack(self.sentences, RowShape(num_tokens=120, num_targets=30 + spare, num_text_tokens=16, num_slots=4))
    assert row.targets.shape == (1, 30 + spare)
    for a, b in zip(jax.tree.leaves(self.loss_and_gradients(remat)(row)), self.of_every_token(), strict=True):
      assert relative_error(a, b) <= 1e-5
    velocity = np.asarray(self.velocity(row.tokens, self.timesteps, row))
    assert not np.any(velocity[~row.target_mask]) and np.all(np.any(velocity[row.target_mask], axis=-1))

  def test_causal_context_does_not_depend_on_targets_and_noise(self):
    shape = RowShape(num_tokens=120, num_text_tokens=16, num_slots=4, context_mode=CAUSAL)
    row = pack(self.sentences, shape)
    other = np.where(row.target_mask[..., None], 7.0, row.tokens)
    outs = [
      self.velocity(tokens, timestep_table(jnp.full((1, 4), sigma), row), row)
      for tokens, sigma in ((row.tokens, 0.9), (other, 0.1))
    ]
    context = (row.segment_ids[0] > 0) & ~row.target_mask[0]
    assert np.array_equal(outs[0][0][context], outs[1][0][context])
    assert relative_error(outs[0][0][row.target_mask[0]], outs[1][0][row.target_mask[0]]) > 1e-3

  def test_no_gradient_between_sentences(self):
    def output_of(tokens, segment):
      out = self.velocity(tokens, self.timesteps, self.row)[0]
      return jnp.sum(jnp.where((self.row.segment_ids[0] == segment)[:, None], out, 0) ** 2)

    for segment in (1, 2, 3):
      gradient = jax.grad(output_of)(jnp.asarray(self.row.tokens), segment)[0]
      inside = self.row.segment_ids[0] == segment
      assert np.all(np.asarray(gradient)[~inside] == 0)
      assert np.all(np.any(np.asarray(gradient)[inside] != 0, axis=-1))

  def test_context_and_target_can_have_different_timesteps(self):
    same = self.velocity(self.row.tokens, self.timesteps, self.row)
    other = self.velocity(self.row.tokens, self.timesteps.at[0, 0].set(0.0), self.row)
    first = self.row.segment_ids[0] == 1
    assert relative_error(other[0][first], same[0][first]) > 1e-3
    others = self.row.segment_ids[0] > 1
    assert np.array_equal(other[0][others], same[0][others])


@pytest.mark.slow
def test_full_size_weights_are_created_sharded():
  """Creates the 1.3B's random bfloat16 weights over eight devices, none of which holds more than its share."""
  mesh = make_mesh({"fsdp": 4, "tensor": 2})
  init = lambda: DiT(VARIANTS["wan2.1-t2v-1.3b"], param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))  # noqa: E731
  abstract = abstract_parameters(nnx.eval_shape(init), mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(init(), nnx.Param)), out_shardings=shardings)()
  sizes = dict.fromkeys(mesh.devices.flat, 0)
  for leaf in jax.tree.leaves(params):
    for shard in leaf.addressable_shards:
      sizes[shard.device] += shard.data.nbytes
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert total == 2 * 1_418_996_800 and len(set(sizes.values())) == 1
  assert max(sizes.values()) < 1.05 * total / 8  # norms and small biases are not sharded
  assert float(jnp.std(params["blocks"]["ffn"]["up"]["kernel"][7].astype(jnp.float32))) > 0


@pytest.mark.slow
def test_compile_time_does_not_grow_with_depth():
  def seconds(num_layers):
    config = DiTConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=num_layers, text_dim=8)
    model = nnx.eval_shape(lambda: DiT(config, remat=RematPolicy.FULL, rngs=nnx.Rngs(0)))
    graph, params = nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    row = row_of(np.zeros((16, 4, 16, 16), np.float32), np.zeros((3, 8), np.float32))
    gradient = jax.jit(jax.grad(lambda params: nnx.merge(graph, params)(row.tokens, jnp.full((1, 1), 5.0), row).sum()))
    start = time.perf_counter()
    gradient.lower(params).compile()
    return time.perf_counter() - start

  seconds(3)
  assert np.median([seconds(30) / seconds(2) for _ in range(3)]) <= 1.5


def test_parameters_are_drawn_from_the_keys_of_nnx():
  """Also where the stream counts within a traced function."""

  def draw(create):
    rngs = nnx.Rngs(3)
    return [create(rngs) for _ in range(3)]

  def create_ours(rngs):
    return param(rngs, jax.random.normal, (2,), jnp.float32, (None,))[...]

  for run in (draw, jax.jit(draw, static_argnums=0)):
    drawn, expected = run(create_ours), run(lambda rngs: jax.random.normal(rngs.params(), (2,), jnp.float32))
    np.testing.assert_array_equal(drawn, expected)
    assert len(np.unique(np.stack(drawn))) == 6


def test_biases_look_back(monkeypatch):
  """At each time a query's bias has the largest product with that of the key so many frames earlier, once rotated."""
  monkeypatch.setattr(jax.nn.initializers, "orthogonal", lambda: lambda key, shape, dtype: np.ones(shape, dtype))
  config = DiTConfig(dim=48, ffn_dim=8, num_heads=4, num_layers=1, freq_dim=8, text_dim=8)

  def fake(**shapes):
    return mock.Mock(**{name: nnx.Param(np.ones(shape, np.float32)) for name, shape in shapes.items()})

  model, linear = mock.Mock(spec=DiT, config=config), functools.partial(fake, bias=(1, 48), kernel=(1, 1, 1))
  model.blocks = fake(modulation=(1, 6, 48))
  model.blocks.self_attn = mock.Mock(q=linear(), k=linear(), v=linear(), o=linear())
  model.blocks.self_attn.norm_q = model.blocks.self_attn.norm_k = fake(scale=(1, 48))
  model.blocks.ffn = mock.Mock(up=linear(), down=linear())
  model.time_projection, model.patch_embedding = fake(kernel=(1, 1)), fake(kernel=(4, 48))
  model.head = mock.Mock(head=fake(kernel=(1, 1)))
  look_back(model, (0, 1, 3), rng=jax.random.key(0))

  query, key = (
    np.asarray(each.bias[...]).reshape(4, 6, 2).astype(np.float64).view(np.complex128)[..., 0]
    for each in (model.blocks.self_attn.q, model.blocks.self_attn.k)
  )
  # Two of the six pairs of channels encode time, at frequencies of 10000**0 and 10000**-0.5; places are the same.
  rotations = np.exp(1j * np.arange(7)[:, None] * np.array([1, 0.01, 0, 0, 0, 0]))
  products = np.einsum("qhc, khc -> hqk", query * rotations[:, None], np.conj(key * rotations[:, None])).real
  for head, distance in enumerate((0, 1, 3)):
    assert (products[head, distance:].argmax(-1) == np.arange(7 - distance)).all()
  assert np.all(products[3] == 0)
