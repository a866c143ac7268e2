"""Attention to keys in pieces, of one device or of a ring, equals attention to all of them at once."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.helpers import relative_error
from univid_jax.core.options import AttentionBackend
from univid_jax.models.attention import api, splash, xla
from univid_jax.models.attention.api import attention, count_bias
from univid_jax.models.attention.pieces import Ring
from univid_jax.models.attention.sharded import Exchange
from univid_jax.parallel.mesh import make_mesh


def packed_row(num_queries, num_keys, num_heads, *, rows=2):
  """Returns queries, keys, values and intervals: a sentence, one that is context-causal, and padding."""
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.normal(size=(rows, n, num_heads, 8)), jnp.float32) for n in (num_queries, *(num_keys,) * 2)
  )
  intervals = np.zeros((rows, num_queries, 2), np.int32)
  first, last, end = num_queries // 3, num_queries - 31, num_keys - 31
  intervals[0, :first], intervals[0, first:last] = [0, num_keys // 3], [num_keys // 3, end]
  intervals[0, first : last // 2, 1] = num_keys // 2
  intervals[1:, :last] = [0, end]
  return q, k, v, intervals


def out_and_gradients(backend, q, k, v, intervals=None, bias=None):
  """Computes both for tokens; outputs of padding are finite but undefined."""
  intervals = None if intervals is None else jnp.asarray(intervals)
  real = 1.0 if intervals is None else (intervals[..., 1] > 0)[..., None, None]
  weight = np.random.default_rng(7).normal(size=q.shape).astype(np.float32)

  @jax.jit
  def run(q, k, v):
    out, gradients = jax.vjp(
      lambda *qkv: attention(*qkv, key_intervals=intervals, key_bias=bias, backend=backend), q, k, v
    )
    return out, gradients(weight * real)

  out, gradients = run(q, k, v)
  assert np.all(np.isfinite(out))
  return out * real, *gradients


def assert_equal(found, expected, tolerance=1e-5):
  for a, b in zip(found, expected, strict=True):
    assert relative_error(a, b) <= tolerance


@pytest.fixture
def small_blocks(monkeypatch):
  for name in ("BLOCK_Q", "BLOCK_KV", "BLOCK_KV_COMPUTE"):
    monkeypatch.setattr(splash, name, 128)
  monkeypatch.setattr(splash, "GRADIENT_BLOCK_KV", 256)
  monkeypatch.setattr(xla, "choose_blocks", lambda *_: xla.Blocks(heads=1, queries=64, keys=48, smallest=1 << 17))


@pytest.mark.parametrize(
  "size, calls", [(128, 2), pytest.param(128, 3, marks=pytest.mark.long), pytest.param(256, 2, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.long)])
def test_splash_in_pieces_equals_xla(monkeypatch, small_blocks, size, calls, masked):
  """Outputs and gradients: intervals across pieces, pieces without any visible key, padding, and biased keys."""
  q, k, v, intervals = packed_row(200, 370, 1, rows=1)
  args = (q, k, v)
  if masked:
    counts = np.ones((1, 370), np.float32)
    counts[:, 120:140], counts[:, 300:310] = 500, 0
    args = *args, intervals, count_bias(jnp.asarray(counts))
  for name, value in (("MAX_KEYS", size), ("GRADIENT_BLOCK_KV", size), ("MAX_GRADIENT_CALLS", calls)):
    monkeypatch.setattr(splash, name, value)
  assert len(list(splash.split_gradient_keys(384, 128))) == calls and len(splash.split_keys(384, 128)) == -(
    -384 // size
  )
  assert_equal(out_and_gradients(AttentionBackend.SPLASH, *args), out_and_gradients(AttentionBackend.XLA, *args))


def test_without_a_gradient_the_kernel_of_splash_returns_no_log_sum_exps():
  x = jnp.ones((1, 128, 1, 128))
  program = str(jax.make_jaxpr(lambda x: splash.splash_attention(x, x, x))(x))
  assert "splash_mha_fwd_no_residuals" in program
  program = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(splash.splash_attention(x, x, x))))(x))
  assert "splash_mha_fwd_no_residuals" not in program and "splash_mha_fwd_residuals" in program


def test_the_gradient_of_splash_reads_no_keys_that_its_queries_do_not_see(monkeypatch, small_blocks):
  """If they were masked only, 0 * NaN would spread; pieces without a visible key would take time, too."""
  monkeypatch.setattr(splash, "GRADIENT_BLOCK_KV", 128)
  q, k, v, _ = packed_row(256, 256, 1, rows=1)
  intervals = np.repeat([[[0, 128], [128, 256]]], 128, axis=1)
  attend = lambda *qkv: attention(*qkv, key_intervals=jnp.asarray(intervals), backend=AttentionBackend.SPLASH)  # noqa: E731
  gradients = jax.jit(lambda *qkv: jax.vjp(attend, *qkv)[1](jnp.ones_like(q)))(q, k, v.at[:, :128].set(jnp.nan))
  for gradient in gradients:
    assert np.all(np.isfinite(gradient[:, 128:])) and np.any(gradient[:, 128:])


def test_a_piece_has_at_most_as_many_keys_as_16_bits_count():
  """Four clips of 81 frames at 480p are two pieces, whose last keys are seen and whose empty intervals see nothing."""
  blocks = splash.TokenBlocks.of(131_040, 131_040)
  assert splash.split_keys(131_072, blocks.keys) == [(0, 65_536), (65_536, 65_536)]
  assert [size for _, size in splash.split_keys(150 * 1024, blocks.keys)] == [50 * 1024] * 3
  intervals = jnp.array([[0, 65_536], [40_000, 65_536], [65_535, 65_536], [0, 0], [65_536, 65_536], [7, 7]])
  kernel = splash._build_kernel(jnp.tile(intervals, (128, 1))[:512], blocks, 65_536, interpret=True)
  encoded, keys = kernel.fwd_mask_info.q_sequence[:6, None], np.array([0, 39_999, 40_000, 65_535])
  expected = (keys >= intervals[:, :1]) & (keys < intervals[:, 1:])
  np.testing.assert_array_equal(splash._is_visible(encoded, jnp.asarray(keys)), expected)


@pytest.mark.parametrize(
  "num_keys, block, pieces",
  [
    (5 * 1024, 1024, [(0, 2048, 2048), (2048, 2048, 2048), (4096, 1024, 1024)]),
    (83 * 1024, 1024, [*((4096 * i, 4096, 2048) for i in range(20)), (81_920, 2048, 2048), (83_968, 1024, 1024)]),
    (1024, 1024, [(0, 1024, 1024)]),
    (384, 384, [(0, 384, 384)]),
  ],
)
def test_pieces_of_the_gradient_are_its_blocks_and_at_most_forty(num_keys, block, pieces):
  assert list(splash.split_gradient_keys(num_keys, block)) == pieces


def test_the_function_behind_the_gradient_of_splash_is_unchanged():
  """The gradient needs the kernel's with log-sum-exps over all keys, which no public function takes.

  If this fails after an upgrade of JAX: compare `splash.SplashPieces.backward` with `_splash_attention_bwd` and the
  residuals that `_splash_attention_fwd` returns in JAX's splash_attention_kernel.py, and run this file's splash tests.
  """
  parameters = list(inspect.signature(splash.splash._splash_attention_bwd).parameters)
  kernel = splash._build_kernel(jnp.zeros((128, 2), jnp.int32), splash.TokenBlocks(128, 128), 128, interpret=True)
  assert sorted(parameters) == sorted([*kernel.kwargs, "res", "do"])
  fields = inspect.getsource(splash.splash._splash_attention_bwd).partition(") = res")[0].rpartition("(")[2].split(",")
  names = ["q", "k", "v", "segment_ids", "sinks", "o", "logsumexp", "dq_mask_info", "dkv_mask_info"]
  assert [field.strip() for field in fields if field.strip()] == names


@pytest.mark.parametrize("num_heads, group, ring", [(16, 8, 1), (12, 4, 2), (3, 1, 8), (40, 8, 1), (6, 2, 4)])
def test_heads_divide_over_groups_and_keys_travel_between_them(num_heads, group, ring):
  assert Exchange.of(8, num_heads) == Exchange(group, ring)


def test_intervals_are_those_of_the_keys_that_have_arrived():
  """Of two rings of four devices side by side, with three keys each: every query attends to one of all keys."""
  ring = Ring("context", 4, stride=2, num_keys=3)
  own = [3 * (device // 2) + key for device in range(8) for key in range(3)]
  intervals = jnp.stack([jnp.arange(12), jnp.arange(1, 13)], axis=-1)

  def travel(keys):
    held, lengths = [], []
    for step in range(4):
      held.append(keys)
      lengths.append(jnp.diff(ring.clip(intervals, step))[:, 0])
      keys = ring.pass_on(keys)
    return jnp.stack(held), jnp.stack(lengths)

  each = PartitionSpec("context")
  run = jax.shard_map(travel, mesh=make_mesh({"context": 8}), in_specs=each, out_specs=each)
  held, lengths = (np.asarray(x).reshape(8, 4, -1) for x in jax.jit(run)(jnp.array(own)))
  assert (np.sort(held.reshape(8, -1)) == np.arange(12)).all()
  assert [np.flatnonzero(x).tolist() for x in lengths.reshape(32, -1)] == held.reshape(32, -1).tolist()


@pytest.mark.parametrize(
  "num_heads, sizes",
  [
    (2, {"data": 2, "context": 4}),
    pytest.param(3, {"context": 8}, marks=pytest.mark.long),
    pytest.param(8, {"context": 8}, marks=pytest.mark.long),
    pytest.param(4, {"context": 8}, marks=pytest.mark.long),
    pytest.param(4, {"tensor": 2, "context": 4}, marks=pytest.mark.long),
  ],
  ids=str,
)
@pytest.mark.parametrize("num_queries", [301, pytest.param(104, marks=pytest.mark.long)], ids=["tokens", "targets"])
def test_the_sequence_axis_equals_one_device(small_blocks, num_heads, sizes, num_queries):
  """A ring, Ulysses, and both, for tokens that divide by neither devices nor blocks, and the targets of a row alone."""
  bias = jnp.asarray(np.random.default_rng(5).normal(size=(2, 301)), jnp.float32)
  args = *packed_row(num_queries, 301, num_heads), bias
  with jax.set_mesh(make_mesh(sizes)):
    sharded = out_and_gradients(AttentionBackend.XLA, *args)
  assert_equal(sharded, out_and_gradients(AttentionBackend.XLA, *args))


@pytest.mark.long
@pytest.mark.parametrize("backend", [AttentionBackend.XLA, AttentionBackend.SPLASH])
def test_the_sequence_axis_without_intervals(small_blocks, backend):
  args = packed_row(150, 150, 2)[:3]
  with jax.set_mesh(make_mesh({"data": 2, "context": 4})):
    sharded = out_and_gradients(backend, *args)
  assert_equal(sharded, out_and_gradients(backend, *args))


@pytest.mark.parametrize("max_keys", [1 << 16, pytest.param(128, marks=pytest.mark.long)])
def test_a_ring_of_splash_equals_one_device(monkeypatch, small_blocks, max_keys):
  """Also if the keys of each device are several pieces."""
  num_tokens = 251 if max_keys > 128 else 301
  args = packed_row(num_tokens, num_tokens, 1, rows=1)
  whole = out_and_gradients(AttentionBackend.XLA, *args)
  monkeypatch.setattr(splash, "MAX_KEYS", max_keys)
  monkeypatch.setattr(splash, "GRADIENT_BLOCK_KV", 128)
  with jax.set_mesh(make_mesh({"context": 2}, devices=jax.devices()[:2])):
    sharded = out_and_gradients(AttentionBackend.SPLASH, *args)
  assert_equal(sharded, whole)


@pytest.mark.long
def test_backends_without_a_ring_gather_keys(monkeypatch):
  """As cuDNN does, which cannot run here."""
  monkeypatch.setitem(api.BACKENDS, AttentionBackend.CUDNN, xla.xla_attention)
  args = packed_row(150, 150, 2)
  with jax.set_mesh(make_mesh({"data": 2, "context": 4})):
    sharded = out_and_gradients(AttentionBackend.CUDNN, *args)
  assert_equal(sharded, out_and_gradients(AttentionBackend.XLA, *args))
