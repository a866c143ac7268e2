"""Attention equals its definition in NumPy float64, on every backend and mesh."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import relative_error
from univid_jax.core.options import AttentionBackend
from univid_jax.models.attention import splash, xla
from univid_jax.models.attention.api import attention, best_backend, count_bias
from univid_jax.parallel.mesh import make_mesh
from univid_jax.platform.current import Platform


def reference(q, k, v, intervals=None, bias=None):
  logits = np.einsum("blhk,bnhk->bhln", q, k) / np.sqrt(q.shape[-1])
  if bias is not None:
    logits = logits + bias[:, None, None]
  if intervals is not None:
    keys = np.arange(k.shape[1])
    seen = (keys >= intervals[..., :1]) & (keys < intervals[..., 1:])
    logits = np.where(seen[:, None], logits, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  return np.einsum("bhln,bnhk->blhk", weights / weights.sum(-1, keepdims=True), v)


def inputs(queries, keys, seed=0):
  rng = np.random.default_rng(seed)
  return tuple(jnp.asarray(rng.normal(size=(2, n, 3, 8)), jnp.float32) for n in (queries, keys, keys))


def test_intervals_and_bias():
  q, k, v = inputs(50, 37)
  start = np.random.default_rng(1).integers(0, 30, (2, 50))
  intervals, bias = np.stack([start, start + 7], -1), np.random.default_rng(2).normal(size=(2, 37))
  assert relative_error(attention(q, k, v), reference(q, k, v)) <= 1e-6
  out = attention(q, k, v, key_intervals=jnp.asarray(intervals), key_bias=jnp.asarray(bias))
  assert relative_error(out, reference(q, k, v, intervals, bias)) <= 1e-6


@pytest.mark.parametrize(
  "blocks, masked",
  [
    (xla.Blocks(1, 64, 48, 0), True),
    (xla.Blocks(1, 64, 0, 0), True),
    (xla.Blocks(0, 128, 0, 0), True),
    (xla.Blocks(1, 64, 48, 0), False),
    pytest.param(xla.Blocks(1, 64, 0, 0), False, marks=pytest.mark.long),
    pytest.param(xla.Blocks(0, 128, 0, 0), False, marks=pytest.mark.long),
  ],
  ids=str,
)
def test_blockwise_equals_unblocked(monkeypatch, blocks, masked):
  """Outputs and gradients, for lengths that no block divides, empty and full intervals, and biased keys."""
  q, k, v = inputs(300, 200)
  start = np.sort(np.random.default_rng(1).integers(0, 150, (2, 300)), axis=1)
  intervals = np.stack([start, start + 50], -1)
  intervals[:, 250:], intervals[:, :10] = 0, [0, 200]
  real = (intervals[..., 1] > 0)[..., None, None]
  options = dict(key_intervals=jnp.asarray(intervals), key_bias=jnp.asarray(start[:, :200] / 100)) if masked else {}

  def out_and_gradients():
    loss = lambda *qkv: jnp.sum((attention(*qkv, **options) * real) ** 2)  # noqa: E731
    return jax.jit(lambda *qkv: (attention(*qkv, **options) * real, *jax.grad(loss, (0, 1, 2))(*qkv)))(q, k, v)

  whole = out_and_gradients()
  monkeypatch.setattr(xla, "choose_blocks", lambda *_: blocks)
  if masked:
    monkeypatch.setattr(xla, "LARGEST", 1)  # heads one by one, if their number is not given
  for a, b in zip(out_and_gradients(), whole):
    assert relative_error(a, b) <= 1e-6


def test_sentences_of_a_short_row_skip_each_other():
  """By NaN, as in the next test: three sentences of 256 tokens, with the blocks for a row of 768 on a CPU."""
  q, k, v = inputs(768, 768)
  v = v.at[:, 512:].set(jnp.nan)
  intervals = np.repeat(np.array([[0, 256], [256, 512], [512, 768]], np.int32), 256, axis=0)
  out = attention(q, k, v, key_intervals=jnp.asarray(np.stack([intervals] * 2)))
  assert bool(jnp.isfinite(out[:, :512]).all()) and bool(jnp.isnan(out[:, 512:]).all())


def test_blocks_outside_all_intervals_are_skipped(monkeypatch):
  """Keys of a skipped block may be NaN; if they were masked only, 0 * NaN would spread."""
  monkeypatch.setattr(xla, "choose_blocks", lambda *_: xla.Blocks(1, 64, 32, 0))
  q, k, v = inputs(128, 128)
  v = v.at[:, 64:96].set(jnp.nan)
  intervals = np.zeros((2, 128, 2), np.int32)
  intervals[:, :64], intervals[:, 64:100] = [0, 60], [96, 128]
  out, gradients = jax.vjp(lambda *qkv: attention(*qkv, key_intervals=jnp.asarray(intervals)), q, k, v)
  assert np.all(np.isfinite(out)) and all(np.all(np.isfinite(g)) for g in gradients(jnp.ones_like(out)))


def test_count_bias_equals_repeated_keys():
  q, k, v = inputs(5, 4)
  counts = np.array([[1, 1, 1, 9], [1, 1, 0, 2]], np.float32)
  out = attention(q, k, v, key_bias=count_bias(jnp.asarray(counts)))
  for row in range(2):
    repeats = counts[row].astype(int)
    expected = reference(
      q[row : row + 1], np.repeat(k[row : row + 1], repeats, 1), np.repeat(v[row : row + 1], repeats, 1)
    )
    assert relative_error(out[row : row + 1], expected) <= 1e-6


def test_empty_intervals_give_finite_outputs_and_gradients():
  q, k, v = inputs(6, 6)
  empty = jnp.zeros((2, 6, 2), jnp.int32)
  gradients = jax.jit(jax.grad(lambda *qkv: jnp.sum(attention(*qkv, key_intervals=empty)), (0, 1, 2)))(q, k, v)
  assert all(np.all(np.isfinite(g)) for g in gradients)


def packed_intervals():
  """Returns two rows of 300 tokens: two sentences and padding; one context-causal sentence and padding."""
  rows = np.zeros((2, 300, 2), np.int32)
  rows[0, :90], rows[0, 90:270] = [0, 90], [90, 270]
  rows[1, :140], rows[1, 140:260] = [0, 140], [0, 260]
  return rows


def out_and_gradients(backend, q, k, v, intervals, weight, bias=None):
  """Computes both for tokens; outputs of padding are finite but undefined."""
  run = lambda *qkv: attention(*qkv, key_intervals=jnp.asarray(intervals), key_bias=bias, backend=backend)  # noqa: E731
  real = (intervals[..., 1] > 0)[..., None, None]
  gradients = jax.grad(lambda *qkv: jnp.sum(run(*qkv) * weight * real), (0, 1, 2))
  return jax.jit(lambda *qkv: (run(*qkv) * real, *gradients(*qkv)))(q, k, v)


@pytest.mark.parametrize("block_kv", [128, pytest.param(256, marks=pytest.mark.long)])
def test_splash_equals_xla_forward_and_backward(monkeypatch, block_kv):
  """In Pallas' interpreter, with packed sentences, context-causal attention and lengths that no block divides."""
  monkeypatch.setattr(splash, "BLOCK_Q", 128)
  monkeypatch.setattr(splash, "BLOCK_KV", block_kv)
  monkeypatch.setattr(splash, "BLOCK_KV_COMPUTE", 128)
  args = *inputs(300, 300), packed_intervals(), np.random.default_rng(7).normal(size=(2, 300, 3, 8))
  for a, b in zip(out_and_gradients(AttentionBackend.SPLASH, *args), out_and_gradients(AttentionBackend.XLA, *args)):
    assert relative_error(a, b) <= 2e-6
  q, k, v = inputs(100, 333)
  assert relative_error(attention(q, k, v, backend=AttentionBackend.SPLASH), reference(q, k, v)) <= 1e-6


@pytest.mark.parametrize(
  "dtype, tolerance", [("float32", 2e-6), pytest.param("bfloat16", 1e-2, marks=pytest.mark.long)]
)
def test_splash_supports_biased_keys(dtype, tolerance):
  """As in cross-attention, where one key that counts 500 times represents the padding of a prompt.

  The tolerance of bfloat16 is that of its matrix products, not of the bias.
  """
  rng = np.random.default_rng(3)
  q, k, v = (jnp.asarray(x, dtype) for x in inputs(300, 140))
  intervals = np.stack([np.repeat([0, 70], 150), np.repeat([70, 140], 150)], -1)[None].repeat(2, 0)
  counts = np.ones((2, 140), np.float32)
  counts[:, [69, 139]], counts[1, 100:139] = 500, 0
  weight = rng.normal(size=(2, 300, 3, 8))
  splash_side, xla_side = (
    out_and_gradients(backend, q, k, v, intervals, weight, count_bias(jnp.asarray(counts)))
    for backend in (AttentionBackend.SPLASH, AttentionBackend.XLA)
  )
  for a, b in zip(splash_side, xla_side):
    assert relative_error(a, b) <= tolerance


def test_appended_bias_is_more_precise_than_bfloat16():
  bias, ones = count_bias(jnp.array([[509.0, 1.0, 3.0]])), jnp.ones((1, 3, 1, 4), jnp.bfloat16)
  q, k = jax.jit(splash.append_bias)(0 * ones, ones, bias)
  logits = jnp.einsum("blhk,bnhk->bhln", q, k, preferred_element_type=jnp.float32)
  np.testing.assert_allclose(logits[0, 0, 0], bias[0], rtol=1e-5)


def test_splash_skips_blocks_outside_all_intervals():
  visible = splash.visible_blocks(jnp.asarray(packed_intervals()[0][:256]), 64, 128, 3)
  assert visible.tolist() == [[True, False, False], [True, True, True], [True, True, True], [True, True, True]]
  prefetched = splash._next_visible(jnp.array([[False, True, False], [True, False, False]]), 1)
  assert prefetched.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_private_parts_of_the_splash_kernel_are_unchanged():
  """`models.attention.splash` builds the kernel from a `MaskInfo` of traced arrays; JAX documents neither class.

  If this fails after an upgrade of JAX: compare `splash._build_kernel` with `_make_splash_attention` in JAX's
  splash_attention_kernel.py, and run this file's splash tests, which check outputs and gradients in interpret mode.
  """
  fields = ("data_next", "mask_next", "block_mask", "partial_mask_blocks", "q_sequence", "is_dynamic_mask")
  assert splash.MaskInfo._fields == fields
  parameters = inspect.signature(splash.splash.SplashAttentionKernel).parameters
  assert list(parameters) == ["fwd_mask_info", "dq_mask_info", "dkv_mask_info", "kwargs"]


@pytest.mark.parametrize(
  "sizes",
  [
    {"data": 2, "context": 4},
    {"tensor": 2, "context": 4},
    pytest.param({"context": 2, "fsdp": 4}, marks=pytest.mark.long),
  ],
  ids=str,
)
def test_sharded_attention_equals_one_device(sizes):
  """Covers Ulysses, rings, and rows that do not divide over the mesh."""
  rng = np.random.default_rng(0)
  qkv_and_weight = rng.normal(size=(4, 2, 300, 4, 8)).astype(np.float32)
  args = *qkv_and_weight[:3], packed_intervals(), qkv_and_weight[3]
  with jax.set_mesh(make_mesh(sizes)):
    sharded = jax.jit(functools.partial(out_and_gradients, AttentionBackend.XLA))(*args)
  for a, b in zip(sharded, out_and_gradients(AttentionBackend.XLA, *args)):
    assert relative_error(a, b) <= 1e-6


def test_auto_backend_by_platform_dtype_and_bias():
  assert best_backend(Platform.TPU, jnp.float32, 32) == AttentionBackend.SPLASH
  assert best_backend(Platform.TPU, jnp.float32, 32, has_bias=True) == AttentionBackend.SPLASH
  assert best_backend(Platform.GPU, jnp.bfloat16, 128) == AttentionBackend.CUDNN
  assert best_backend(Platform.GPU, jnp.bfloat16, 128, has_bias=True) == AttentionBackend.XLA
  assert best_backend(Platform.GPU, jnp.bfloat16, 128, mask_size=37_504**2) == AttentionBackend.CUDNN
  assert best_backend(Platform.GPU, jnp.bfloat16, 128, mask_size=131_040**2) == AttentionBackend.XLA
  assert best_backend(Platform.GPU, jnp.float32, 128) == AttentionBackend.XLA
  assert best_backend(Platform.CPU, jnp.bfloat16, 128) == AttentionBackend.XLA


def test_unsupported_calls():
  q, k, v = inputs(4, 4)
  with pytest.raises(ValueError, match="cuDNN attention takes bfloat16 or float16"):
    attention(q, k, v, backend=AttentionBackend.CUDNN)


def test_unknown_backend():
  # TypeError where annotations are checked.
  with pytest.raises((ValueError, TypeError), match="magic"):
    attention(*inputs(2, 2), backend="magic")
