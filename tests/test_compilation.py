"""Starts: what an earlier process traced is not traced again, and nothing else is taken for it."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from univid_jax.compilation import kept_step, uncollected
from univid_jax.parallel.mesh import make_mesh


def sharded(shape, spec=("data",)):
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(make_mesh({"data": 8}), PartitionSpec(*spec)))


def counting_step():
  """A step, and a list that grows when it is traced."""
  traces = []

  @jax.jit
  def step(state, row):
    traces.append(state)
    return {name: value + row for name, value in state.items()}, {"sum": row.sum()}

  return step, traces


def test_a_kept_step_is_not_traced_again(tmp_path):
  state, row = {"b": sharded((8, 2)), "a": sharded((8, 2))}, sharded((8, 2))
  results = []
  for count in (1, 0):
    step, traces = counting_step()
    kept = kept_step(step, state, row, folder=tmp_path, about="x").lower(state, row).compile()
    assert len(traces) == count and len(list(tmp_path.iterdir())) == 1
    given = {name: jax.device_put(np.full((8, 2), number, np.float32), row.sharding) for number, name in enumerate("ab")}
    results.append(kept(given, jax.device_put(np.arange(16, dtype=np.float32).reshape(8, 2), row.sharding)))
    assert given["a"].is_deleted()
  for new, metrics in results:
    assert new.keys() == state.keys() and new["b"].sharding.is_equivalent_to(row.sharding, 2) and float(metrics["sum"]) == 120
    np.testing.assert_array_equal(new["b"] - new["a"], 1)


@pytest.mark.parametrize("other", [("y", (8, 2), ("data",)), ("x", (8, 3), ("data",)), ("x", (8, 2), ())], ids=str)
def test_another_step_is_traced(tmp_path, other):
  for about, shape, spec in (("x", (8, 2), ("data",)), other):
    step, traces = counting_step()
    kept_step(step, {"a": sharded(shape, spec)}, sharded(shape, spec), folder=tmp_path, about=about)
    assert len(traces) == 1
  assert len(list(tmp_path.iterdir())) == 2


def test_another_source_is_traced(tmp_path, monkeypatch):
  state = {"a": sharded((8, 2))}
  for source in ("1", "2"):
    monkeypatch.setattr("univid_jax.compilation._source", lambda: source)  # noqa: B023
    step, traces = counting_step()
    kept_step(step, state, state["a"], folder=tmp_path, about="x")
    assert len(traces) == 1


def test_a_step_that_cannot_be_kept(tmp_path):
  """As with cuDNN's attention: a call of which JAX promises nothing."""
  step = jax.jit(lambda x: (jax.ffi.ffi_call("a call", jax.ShapeDtypeStruct(x.shape, x.dtype))(x),))
  assert kept_step(step, sharded((8, 2)), folder=tmp_path, about="x") is step and not any(tmp_path.iterdir())


def test_collection_is_put_off():
  @uncollected()
  def inside():
    return gc.isenabled()

  assert not inside() and gc.isenabled()
