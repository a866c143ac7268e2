"""Attention against its definition in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import relative_error
from univid_jax.attention import xla
from univid_jax.attention.api import attention, count_bias


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
  return tuple(rng.normal(size=(2, n, 3, 8)).astype(np.float32) for n in (queries, keys, keys))


def test_intervals_and_bias():
  q, k, v = inputs(50, 37)
  start = np.random.default_rng(1).integers(0, 30, (2, 50))
  intervals, bias = np.stack([start, start + 7], -1), np.random.default_rng(2).normal(size=(2, 37))
  assert relative_error(attention(q, k, v), reference(q, k, v)) <= 1e-6
  out = attention(q, k, v, key_intervals=jnp.asarray(intervals), key_bias=jnp.asarray(bias))
  assert relative_error(out, reference(q, k, v, intervals, bias)) <= 1e-6


def test_chunks_equal_the_whole(monkeypatch):
  q, k, v = inputs(300, 200)
  intervals = jnp.asarray(np.broadcast_to([20, 180], (2, 300, 2)))

  def out_and_gradients():
    loss = lambda *qkv: jnp.sum(attention(*qkv, key_intervals=intervals) ** 2)  # noqa: E731
    return attention(q, k, v, key_intervals=intervals), *jax.grad(loss, (0, 1, 2))(q, k, v)

  whole = out_and_gradients()
  monkeypatch.setattr(xla, "MAX_LOGITS_UNCHUNKED", 0)
  monkeypatch.setattr(xla, "QUERIES_PER_CHUNK", 64)
  for a, b in zip(out_and_gradients(), whole):
    assert relative_error(a, b) <= 1e-6


def test_a_key_that_counts_for_many():
  q, k, v = inputs(5, 4)
  counts = np.array([[1, 1, 1, 9], [1, 1, 0, 2]], np.float32)
  out = attention(q, k, v, key_bias=count_bias(jnp.asarray(counts)))
  for row in range(2):
    repeats = counts[row].astype(int)
    expected = reference(q[row:row + 1], np.repeat(k[row:row + 1], repeats, 1), np.repeat(v[row:row + 1], repeats, 1))
    assert relative_error(out[row:row + 1], expected) <= 1e-6


def test_an_empty_interval_gives_finite_values_and_gradients():
  q, k, v = inputs(6, 6)
  empty = jnp.zeros((2, 6, 2), jnp.int32)
  gradients = jax.grad(lambda *qkv: jnp.sum(attention(*qkv, key_intervals=empty)), (0, 1, 2))(q, k, v)
  assert all(np.all(np.isfinite(g)) for g in gradients)


def test_unknown_backend():
  with pytest.raises(ValueError, match="unknown attention backend 'magic'"):
    attention(*inputs(2, 2), backend="magic")
